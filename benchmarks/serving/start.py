"""Seconds from the start of the launcher to the first token, with nothing cached and again.

    python benchmarks/serving/start.py --config configs/smollm2_135m.py

The first start fetches, converts and compiles into a fresh cache folder; `--files` names a folder
whose fetched files are taken over, so that the network is not measured.
"""

import argparse
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx


def measure(config: str, cache: str) -> dict[str, float]:
    """Starts a server, waits for one token, stops the server."""
    http_port, grpc_port = _free_port(), _free_port()
    start_s = time.perf_counter()
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "jserve", f"--config={config}"),
            *(f"--http_port={http_port}", f"--grpc_port={grpc_port}"),
            *("--set", f"model.cache_dir={cache}", "--set", "log.level=warning"),
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{http_port}", timeout=600) as client:
            while not _is_ready(client):
                if server.poll() is not None:
                    raise RuntimeError("the server ended")
                time.sleep(0.02)
            ready_s = time.perf_counter() - start_s
            body = {"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
            client.post("/v1/completions", json=body).raise_for_status()
            return {"ready_s": ready_s, "first_token_s": time.perf_counter() - start_s}
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/smollm2_135m.py")
    parser.add_argument("--files", help="a cache folder whose fetched files are taken over")
    parser.add_argument("--repeats", type=int, default=3, help="of the second start")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        if arguments.files:
            shutil.copytree(Path(arguments.files).expanduser() / "files", Path(cache) / "files")
        first = measure(arguments.config, cache)
        again = [measure(arguments.config, cache) for _ in range(arguments.repeats)]
    best = min(again, key=lambda times: times["first_token_s"])
    for name, times in (("first start", first), ("second start, best", best)):
        print(f"{name:<20} ready {times['ready_s']:6.2f} s, token {times['first_token_s']:6.2f} s")
    print(json.dumps({"config": arguments.config, "first": first, "again": again}))


if __name__ == "__main__":
    main()
