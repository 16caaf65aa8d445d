"""Makes the reference fixtures, or (--check) makes them anew elsewhere and compares."""

import argparse
import importlib.metadata
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import tiny
from compare import differences

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
# Folder of fixtures → what writes it, and the packages whose behaviour it records.
PARTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "models": (tiny.make, ("transformers", "torch", "safetensors", "numpy")),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare, exit 1")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    if not arguments.check:
        for part in arguments.only:
            _make(part, FIXTURES / part)
        return 0
    found: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        for part in arguments.only:
            _make(part, Path(temporary) / part)
            versions = [folder / part / "versions.json" for folder in (FIXTURES, Path(temporary))]
            if versions[0].exists() and versions[0].read_text() != versions[1].read_text():
                print(f"{part}: made with other versions: {versions[1].read_text()}")
            for path in versions:
                path.unlink(missing_ok=True) if path.is_relative_to(temporary) else None
            found += [
                f"{part}/{line}"
                for line in differences(FIXTURES / part, Path(temporary) / part)
                if not line.startswith("versions.json")
            ]
    print("\n".join(found) or "the committed fixtures are reproduced")
    return 1 if found else 0


def _make(part: str, folder: Path) -> None:
    make, packages = PARTS[part]
    print(f"making {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    make(folder)
    versions = {"python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in packages
    }
    (folder / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
