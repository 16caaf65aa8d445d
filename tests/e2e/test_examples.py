"""The commands and examples of the documentation run."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.e2e.server import REPOSITORY, Server, user_environment


def _run(*command: str) -> str:
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_openai_example(server: Server) -> None:
    assert _run(sys.executable, "examples/openai_client.py", f"{server.url}/v1").strip()


def test_grpc_example(server: Server) -> None:
    assert _run(sys.executable, "examples/grpc_client.py", server.grpc_address).strip()


def test_offline_example() -> None:
    lines = _run(sys.executable, "examples/offline_generate.py", "configs/tiny_random.py")
    assert len(lines.splitlines()) >= 3
    assert "'2, 4, 6, 8,' -> " in lines


def test_readme_gives_the_examples_as_they_are_run(server: Server) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    parts = [
        block.replace("127.0.0.1:8000", server.url.removeprefix("http://"))
        .replace("127.0.0.1:8500", server.grpc_address)
        .replace("smollm2-135m", "tiny-random")
        .replace("smollm2_135m", "tiny_random")
        for block in blocks
    ]
    answers = _run(sys.executable, "-c", "\nprint('next example')\n".join(parts))
    assert all(answer.strip() for answer in answers.split("next example\n"))


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_line_that_is_shown_works(server: Server) -> None:
    command = server.output.split("Try:\n")[1].split("\n\n")[0]
    assert '"choices"' in _run("bash", "-c", command)
