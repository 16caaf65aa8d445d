"""Certificates for 127.0.0.1 and localhost, signed by their own key, by the openssl command."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Pair:
    certificate: Path
    key: Path

    def replace(self, other: "Pair") -> None:
        """Puts another pair in the place of this one, a file at a time, as a renewal does."""
        for old, new in ((self.certificate, other.certificate), (self.key, other.key)):
            copy = old.with_suffix(".new")
            shutil.copy(new, copy)
            os.replace(copy, old)


def make_pair(folder: Path, name: str) -> Pair:
    """A new key and its certificate, whose subject is `name`."""
    command = shutil.which("openssl")
    if command is None:
        pytest.skip("the openssl command makes the certificates")
    pair = Pair(folder / f"{name}.crt", folder / f"{name}.key")
    options = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30".split()
    names = ["-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(pair.key), "-out", str(pair.certificate)]
    subprocess.run([command, *options, *names, *files], check=True, capture_output=True)
    return pair
