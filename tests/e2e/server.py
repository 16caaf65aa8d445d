"""A real server on free loopback ports, started as a user starts it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil

from jserve.engine.job import COMMAND

REPOSITORY = Path(__file__).parents[2]
START_TIMEOUT_S = 180.0  # compilation on a loaded machine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def user_environment() -> dict[str, str]:
    """The environment without what the tests set for JAX in their own process.

    With `--unoptimized` servers do not optimize either.
    """
    environment = {name: text for name, text in os.environ.items() if not name.startswith("JAX_")}
    flags = environment.get("XLA_FLAGS", "").split()
    environment["XLA_FLAGS"] = " ".join(flag for flag in flags if "device_count" not in flag)
    return environment


# Becomes `python ARGUMENTS` that ends with the tests: a run that is killed leaves no server behind.
# Not by a function between fork and exec: this process has threads.
_DIE_WITH_THE_TESTS = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Server:
    """A launcher process. Its output is kept in a file for messages."""

    def __init__(self, config: str, log: Path, *flags: str) -> None:
        self.http_port, self.grpc_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.grpc_address = f"127.0.0.1:{self.grpc_port}"
        self._log = log
        ports = (f"--http_port={self.http_port}", f"--grpc_port={self.grpc_port}")
        self._client = httpx.Client(base_url=self.url, timeout=60)
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-c", _DIE_WITH_THE_TESTS),
                    *("-m", "jserve", f"--config={config}"),
                    *(() if {"--role=engine", "--role=follower"} & set(flags) else ports),
                    *flags,
                ],
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=user_environment(),
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    @property
    def engine_pid(self) -> int:
        """The engine's process id; the launcher has other children, for templates and bodies."""
        children = psutil.Process(self.process.pid).children()
        (engine,) = [child.pid for child in children if COMMAND[-1] in child.cmdline()]
        return engine

    def get(self, path: str) -> httpx.Response:
        return self._client.get(path)

    def post(self, path: str, body: object) -> httpx.Response:
        return self._client.post(path, json=body)

    def is_listening(self) -> bool:
        try:
            return self.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def is_ready(self) -> bool:
        try:
            return self.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def gauge(self, name: str) -> float:
        """The value of a metric without regard to its labels."""
        for line in self.get("/metrics").text.splitlines():
            if line.split("{")[0].split(" ")[0] == name:
                return float(line.rsplit(" ", 1)[1])
        raise KeyError(name)

    def until(self, condition: Callable[[], bool], timeout_s: float = START_TIMEOUT_S) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None and condition is not self.has_ended:
                raise AssertionError(f"the server ended:\n{self.output}")
            if time.monotonic() > deadline_s:
                raise AssertionError(f"not within {timeout_s} s:\n{self.output}")
            time.sleep(0.1)

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self, timeout_s: float = 60.0) -> int:
        return self.process.wait(timeout_s)

    def close(self) -> None:
        self._client.close()
        if not self.has_ended():
            self.process.send_signal(signal.SIGTERM)
            try:
                self.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.wait()


@contextlib.contextmanager
def serving(config: str, log: Path, *flags: str) -> Iterator[Server]:
    """A server that is ready; ended when the block is left."""
    server = Server(config, log, *flags)
    try:
        server.until(server.is_ready)
        yield server
    finally:
        server.close()


def events(lines: Iterator[str]) -> Iterator[dict]:
    """The JSON events of a stream, up to [DONE]."""
    for line in lines:
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line[6:])
