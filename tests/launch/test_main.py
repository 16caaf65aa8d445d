"""The command line before anything starts: help, and errors that say what to do."""

import contextlib
import io
import multiprocessing
import multiprocessing.connection
import sys
from typing import NamedTuple

import pytest


class _Done(NamedTuple):
    """The end of a process."""

    returncode: int
    stdout: str
    stderr: str


# A process of its own for each command line, as users have it; but one that is forked where the
# imports are done, which take a second.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["jserve.launch.main"])


def _jserve(*arguments: str) -> _Done:
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_command, args=(arguments, sender), daemon=True)
    process.start()
    sender.close()
    assert receiver.poll(60), f"{arguments} does not end"
    stdout, stderr = receiver.recv()
    process.join(60)
    assert process.exitcode is not None
    return _Done(process.exitcode, stdout, stderr)


def _command(arguments: tuple[str, ...], sender: multiprocessing.connection.Connection) -> None:
    from jserve.launch.main import run

    sys.argv = ["jserve", *arguments]
    stdout, stderr = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            run()
    finally:
        sender.send((stdout.getvalue(), stderr.getvalue()))


_TINY = ("--config=configs/tiny_random.py",)
_TWO_PROCESSES = (
    "--config=configs/tiny_random.py",
    "--set=engine.tensor_parallel=2",
    "--set=engine.num_processes=2",
)


def test_help_lists_commands_and_flags() -> None:
    text = _jserve("--help").stdout
    for word in ("convert SOURCE FOLDER", "--config", "--set", "--role", "--http_port"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        (["--config=nothing.py"], "there is no file nothing.py"),
        (["--config=configs/tiny_random.py", "--set", "engine.slots=1"], "it has num_slots"),
        (["--config=configs/tiny_random.py", "--set", "engine.num_slots=x"], "not of type int"),
        (["--config=configs/tiny_random.py", "--role=follower"], "--leader_address=HOST:PORT"),
        (
            [
                *("--config=configs/tiny_random.py", "--role=follower", "--process=1"),
                "--leader_address=a:1",
            ],
            "engine.num_processes is 1",
        ),
        (["--config=configs/tiny_random.py", "--set=engine.num_processes=2"], "must divide"),
        (["--config=configs/tiny_random.py", "--host=0.0.0.0"], "gateway.open=true"),
        (["--config=configs/tiny_random.py", "--set=gateway.api_keys="], "a key is empty"),
        ([*_TWO_PROCESSES, "--leader_address=0.0.0.0:8610"], "for example host0:8610"),
        ([*_TWO_PROCESSES, "--leader_address=:8610"], "for example host0:8610"),
        ([*_TINY, "--http_port=99999"], "gateway.http_port is 99999; ports are"),
        ([*_TINY, "--grpc_port=-1"], "gateway.grpc_port is -1; ports are"),
        ([*_TINY, "--http_port=8123", "--grpc_port=8123"], "are both 8123"),
        ([*_TINY, "--host=192.0.2.1", "--set=gateway.open=true"], "choose another with --host"),
        ([*_TINY, "--host="], "gateway.host is empty"),
        ([*_TINY, "--role=gateway", "--engine_address=a:99999"], "or host:port"),
        ([*_TINY, "--role=gateway", "--engine_address=a"], "or host:port"),
        (["convert", ".", "."], "exists already"),
        (["plan", "--config=configs/tiny_random.py"], "platform.chip is not set"),
        (["plan", "--config=configs/llama33_70b.py"], "--architecture=config.json"),
        (["plan", "--config=configs/llama33_70b.py", "--architecture=x"], "there is no file x"),
        (["plan", "--config=configs/llama33_70b.py", "--set=platform.chip=v9"], "v5e, v5p, v6e"),
        (["plan", "--config=configs/llama33_70b.py", "--set=platform.chip=h200"], "is 'tpu'"),
    ],
)
def test_config_errors_exit_with_2(arguments: list[str], message: str) -> None:
    done = _jserve(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["--role=engine", "--host=127.0.0.1"],
        ["--role=engine", "--http_port=8000"],
        ["--role=engine", "--grpc_port=8001"],
        ["--engine_address=127.0.0.1:8600"],
        ["--process=1"],
        ["--role=gateway", "--leader_address=127.0.0.1:8610"],
        ["serve", "--dtype=float32"],
        ["serve", "--max_tokens=3"],
        ["serve", "--seed=0"],
        ["serve", "--nochat"],
        ["convert", "a", "b", "--config=configs/tiny_random.py"],
        ["convert", "a", "b", "--set=engine.num_slots=8"],
        ["generate", "x", "--role=engine"],
        ["generate", "x", "--http_port=8000"],
        ["plan", "--max_tokens=3"],
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(arguments: list[str]) -> None:
    done = _jserve(*arguments)
    assert done.returncode == 1
    name = arguments[-1].removeprefix("--").removeprefix("no").split("=")[0]
    assert f"--{name} has no meaning for" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        *(["fly"], ["FILE.gguf"], ["plan", "x"], ["generate"], ["generate", "a", "b"]),
        *(["convert"], ["serve", "x"], ["--nonsense"], ["--http_port=x"], ["--role=king"]),
    ],
)
def test_wrong_usage_is_explained(arguments: list[str]) -> None:
    done = _jserve(*arguments, "--config=configs/tiny_random.py")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "jserve --help" in line
