"""Gateway and engine as two processes that were started apart."""

import secrets
from pathlib import Path

import pytest

from tests.e2e.server import Server, free_port

CONFIG = "configs/tiny_random.py"


def test_gateway_and_engine_apart(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(f"{secrets.token_hex(32)}\n")
    flags = (f"--engine_address=127.0.0.1:{free_port()}", f"--engine_token_file={token}")
    wait = "--set=gateway.resume_wait_s=1"  # for an engine that does not come back
    gateway = Server(CONFIG, tmp_path / "gateway", "--role=gateway", wait, *flags)
    engine = Server(CONFIG, tmp_path / "engine", "--role=engine", *flags)
    try:
        gateway.until(lambda: "waiting for the engine" in gateway.output)
        gateway.until(gateway.is_listening)
        assert gateway.get("/health").status_code == 200
        assert gateway.get("/ready").status_code in (200, 503)  # the engine is still compiling
        gateway.until(gateway.is_ready)
        body = {"prompt": "x", "max_tokens": 4, "temperature": 0}
        assert gateway.post("/v1/completions", body).status_code == 200
        engine.close()
        assert engine.wait() == 0
        gateway.until(lambda: not gateway.is_ready())
        assert gateway.post("/v1/completions", body).status_code == 503
    finally:
        engine.close()
        gateway.close()
    assert gateway.wait() == 0


@pytest.mark.parametrize("role", ["--role=gateway", "--role=engine"])
def test_tcp_without_a_token_is_refused(tmp_path: Path, role: str) -> None:
    address = f"--engine_address=127.0.0.1:{free_port()}"
    apart = Server(CONFIG, tmp_path / "log", role, address)
    assert apart.wait(60) == 2
    assert "need a token" in apart.output
    assert "Traceback" not in apart.output
