"""Official clients, unchanged, against a server with SmolLM2 and one whose model is a script.

python -m tests.world [ARGUMENTS OF PYTEST]    (make test-world)

`scripts/world.sh` makes the environments of the clients, which have no jserve.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.e2e.server import REPOSITORY, serving
from tests.gateway.http.agent_serving import call_text, serving_agent
from tests.gateway.http.http_serving import MODEL as SCRIPTED_MODEL

CONFIG = "configs/smollm2_135m_fast.py"
MODEL = "smollm2-135m"
WORLD = Path(__file__).parent
NO_TESTS = 5  # pytest's exit status
LOG = REPOSITORY / ".cache/world.log"
# What SmolLM2 cannot do: every answer of the scripted model reasons, speaks and calls a tool.
SCRIPT = "<think>I don't know.</think>Let me see. " + call_text(
    "weather", '{"city": "Paris", "days": 2}'
)
SCRIPTED_KEY = "secret"


def environments() -> dict[str, Path]:
    """The Python of every group of clients, by the name of its folder of tests."""
    locks = sorted((REPOSITORY / "requirements").glob("clients-*.txt"))
    return {
        lock.stem.removeprefix("clients-"): REPOSITORY / f".venv-{lock.stem}/bin/python"
        for lock in locks
    }


def run(group: str, python: Path, variables: dict[str, str], arguments: list[str]) -> int:
    """Runs the tests of one group in its environment; returns the exit status of pytest."""
    print(f"==> {group}", flush=True)
    begin_s = time.monotonic()
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    status = subprocess.run(
        [python, "-m", "pytest", "-c", WORLD / "pytest.ini", WORLD / group, *arguments],
        cwd=WORLD,
        env=environment | variables,
        check=False,
    ).returncode
    print(f"==> {group}: status {status} after {time.monotonic() - begin_s:.0f} s", flush=True)
    return status


def main(arguments: list[str]) -> int:
    """Returns 0 if the tests of every group pass; a group may have none of those asked for."""
    LOG.parent.mkdir(exist_ok=True)
    with serving(CONFIG, LOG) as server, serving_agent(api_keys=(SCRIPTED_KEY,)) as scripted:
        scripted.says = SCRIPT
        variables = {
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else its import asks the Internet for prices
            "WORLD_URL": server.url,
            "WORLD_MODEL": MODEL,
            "WORLD_SCRIPTED_URL": scripted.url,
            "WORLD_SCRIPTED_MODEL": SCRIPTED_MODEL,
            "WORLD_SCRIPTED_KEY": SCRIPTED_KEY,
        }
        groups = environments().items()
        statuses = [run(group, python, variables, arguments) for group, python in groups]
    return max((it for it in statuses if it != NO_TESTS), default=NO_TESTS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
