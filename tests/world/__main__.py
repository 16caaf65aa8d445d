"""Official clients, unchanged, against one server with SmolLM2.

python -m tests.world [ARGUMENTS OF PYTEST]    (make test-world)

`scripts/world.sh` makes the environments of the clients, which have no jserve.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.e2e.server import REPOSITORY, serving

CONFIG = "configs/smollm2_135m_fast.py"
MODEL = "smollm2-135m"
WORLD = Path(__file__).parent
LOG = REPOSITORY / ".cache/world.log"


def environments() -> dict[str, Path]:
    """The Python of every group of clients, by the name of its folder of tests."""
    locks = sorted((REPOSITORY / "requirements").glob("clients-*.txt"))
    return {
        lock.stem.removeprefix("clients-"): REPOSITORY / f".venv-{lock.stem}/bin/python"
        for lock in locks
    }


def run(group: str, python: Path, url: str, arguments: list[str]) -> int:
    """Runs the tests of one group in its environment; returns the exit status of pytest."""
    print(f"==> {group}", flush=True)
    begin_s = time.monotonic()
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    status = subprocess.run(
        [python, "-m", "pytest", "-c", WORLD / "pytest.ini", WORLD / group, *arguments],
        cwd=WORLD,
        env={**environment, "WORLD_URL": url, "WORLD_MODEL": MODEL},
        check=False,
    ).returncode
    print(f"==> {group}: status {status} after {time.monotonic() - begin_s:.0f} s", flush=True)
    return status


def main(arguments: list[str]) -> int:
    """Returns 0 if the tests of every group pass."""
    LOG.parent.mkdir(exist_ok=True)
    with serving(CONFIG, LOG) as server:
        groups = environments().items()
        statuses = [run(group, python, server.url, arguments) for group, python in groups]
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
