"""Gateway and engine as two processes that were started apart."""

from pathlib import Path

from tests.e2e.server import Server, free_port

CONFIG = "configs/tiny_random.py"


def test_gateway_and_engine_apart(tmp_path: Path) -> None:
    address = f"--engine_address=127.0.0.1:{free_port()}"
    gateway = Server(CONFIG, tmp_path / "gateway", "--role=gateway", address)
    engine = Server(CONFIG, tmp_path / "engine", "--role=engine", address)
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
