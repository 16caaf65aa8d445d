"""A client that is in the middle of an answer when a server meets its fate."""

import threading
import time

import httpx
import psutil

from tests.e2e.server import Server, events

FOREVER = 1900  # tokens: not finished before a fault comes


class Reader(threading.Thread):
    """Reads one long stream in the background and keeps what it saw."""

    def __init__(self, server: Server, max_tokens: int) -> None:
        super().__init__(daemon=True)
        ask = {"prompt": "Once", "ignore_eos": True, "stream": True}
        self._body = ask | {"max_tokens": max_tokens}
        self._url = f"{server.url}/v1/completions"
        self.started = threading.Event()
        self.finish_reason: str | None = None
        self.error: object = None
        self.ended_at_s = 0.0

    def run(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=60) as reply:
                for event in events(reply.iter_lines()):
                    self.started.set()
                    if "error" in event:
                        self.error = event["error"]
                    elif event["choices"]:
                        self.finish_reason = event["choices"][0]["finish_reason"]
        except httpx.TransportError as error:
            self.error = error
        self.ended_at_s = time.monotonic()


def start_reader(server: Server, max_tokens: int = 400) -> Reader:
    """A stream of which the first token has come."""
    reader = Reader(server, max_tokens)
    reader.start()
    assert reader.started.wait(30)
    return reader


def engine_sockets(pid: int) -> set[str]:
    """The Unix sockets of an engine that have a name."""
    connections = psutil.Process(pid).net_connections("unix")
    return {str(found.laddr) for found in connections if str(found.laddr).endswith(".sock")}
