"""Progress in the terminal while a server starts: plain lines on standard output."""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, TextIO

from jserve.core.addresses import host_and_port
from jserve.proto.engine_status import Ready

if TYPE_CHECKING:  # the launcher starts the engine before it spends time on this import
    from jserve.gateway.request_plane import RequestPlane


class Console:
    """Prints progress with the seconds since it was made. Owned by the launcher."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._start_s = time.monotonic()

    def say(self, text: str) -> None:
        """One line of progress."""
        elapsed_s = time.monotonic() - self._start_s
        print(f"[{elapsed_s:6.1f} s] {text}", file=self._stream, flush=True)

    def table(self, title: str, rows: Mapping[str, str]) -> None:
        """A block of names and values."""
        width = max(map(len, rows), default=0)
        lines = [f"  {name:<{width}}  {value}" for name, value in rows.items()]
        print("\n".join(["", title, *lines]), file=self._stream, flush=True)

    def text(self, text: str) -> None:
        """Anything else, as it is."""
        print(text, file=self._stream, flush=True)


def show_summary(console: Console, plane: "RequestPlane", ready: Ready) -> None:
    """Shows the running configuration, the addresses, and a command that works."""
    config, defaults = plane.config, plane.defaults
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in ready.phases.items())
    sampling = ", ".join(f"{name} {value}" for name, value in asdict(defaults).items() if value)
    # An address that means "every interface" is no address to send to.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)  # noqa: S104
    scheme = "http" if config.tls_cert is None else "https"
    url = f"{scheme}://{host_and_port(host, config.http_port)}"
    rows = {
        "model": plane.model_name,
        **ready.summary,
        "defaults": sampling,
        "start": phases,
        "HTTP": url,
        "gRPC": host_and_port(host, config.grpc_port),
    }
    console.table("jserve is ready", {name: value for name, value in rows.items() if value})
    # Questions whose greedy answer is no near tie, so that 4-bit weights answer them as well.
    if plane.chat_template is not None:
        path, body = (
            "chat/completions",
            {"messages": [{"role": "user", "content": "What is 2+2?"}]},
        )
    else:
        path, body = "completions", {"prompt": "1, 2, 3, 4,"}
    key = " -H 'Authorization: Bearer YOUR_KEY'" if config.has_keys else ""
    data = json.dumps({"model": plane.model_name, **body, "max_tokens": 32, "temperature": 0})
    console.text(
        f"\nTry:\n  curl {url}/v1/{path}{key} \\\n"
        f"    -H 'Content-Type: application/json' \\\n    -d '{data}'\n"
    )
