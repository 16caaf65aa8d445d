"""A gateway's HTTP side on loopback, over a scripted engine, in a thread of its own."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jserve.core.clock import WallClock
from jserve.core.request import EngineInfo
from jserve.gateway.chat import ChatTemplate
from jserve.gateway.config import GatewayConfig
from jserve.gateway.connection_limits import ConnectionLimits
from jserve.gateway.defaults import sampling_defaults
from jserve.gateway.fake_engine import Cached, FakeEngine, Reply, echo, nothing_cached
from jserve.gateway.http.app import make_app
from jserve.gateway.http.request_bodies import RequestBodies
from jserve.gateway.http.server import HttpServer
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.request_plane import RequestPlane
from jserve.gateway.tokenizer import TextTokenizer
from tests.model_files import gpt2_alphabet

T = TypeVar("T")

END = 256  # the id of <|end|>, the one end-of-sequence token; ids below are bytes
MODEL = "test/model"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'boom' %}{{ raise_exception('no boom please') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def byte_tokenizer() -> TextTokenizer:
    """One token per byte, whose id is the byte, and then <|end|>."""
    vocab = {symbol: byte for byte, symbol in enumerate(gpt2_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return TextTokenizer(tokenizer.to_str())


class Served:
    """A running server. Its event loop runs in another thread; `call` reaches into it."""

    def __init__(
        self,
        *,
        reply: Reply,
        cached: Cached,
        step_s: float,
        num_slots: int,
        max_queue: int,
        config: GatewayConfig,
        chat_template: str | None,
    ) -> None:
        info = EngineInfo(
            model=MODEL,
            vocab=END + 1,
            max_model_len=4096,
            num_slots=num_slots,
            num_pages=1000,
            page_size=16,
            max_queue=max_queue,
            eos_token_ids=(END,),
        )
        self.engine = FakeEngine(info, reply=reply, cached=cached, step_s=step_s)
        template = None if chat_template is None else ChatTemplate(chat_template, special_tokens={})
        self.clock = WallClock()
        self.metrics = GatewayMetrics(clock=self.clock)
        self._parts = {"tokenizer": byte_tokenizer(), "chat_template": template, "config": config}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def start(self) -> None:
        """Serves on a free port."""
        self._thread.start()
        self.call(self._start)

    async def _start(self) -> None:
        self.plane = RequestPlane(
            defaults=sampling_defaults({}, self._parts["config"]),
            engine=self.engine,
            clock=self.clock,
            **self._parts,
        )
        self.bodies = RequestBodies(self.plane)
        app = make_app(self.plane, self.metrics, version="1.2.3", bodies=self.bodies)
        self.server = HttpServer(
            app,
            host="127.0.0.1",
            port=0,
            drain_s=1.0,
            limits=ConnectionLimits.from_config(self.plane.config),
            counts=self.metrics.connections,
        )
        await self.server.start()
        self.port = self.server.port
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """Ends the server, the loop and the thread."""
        self.call(self.server.stop)
        self.call(self.engine.close)
        self.bodies.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Runs a coroutine function in the server's loop."""

        async def run() -> T:
            return await function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(timeout=30)

    def do(self, function: Callable[[], Any]) -> Any:
        """Runs a plain function in the server's loop."""

        async def run() -> Any:
            return function()

        return self.call(run)

    def assert_idle(self, timeout_s: float = 5.0) -> None:
        """Waits until nothing runs: no slot, no queue, no generation is left."""

        async def idle() -> bool:
            for _ in range(int(timeout_s / 0.01)):
                stats = self.engine.stats
                busy = stats.num_running + stats.num_waiting + self.plane.num_live
                if not busy and not self.metrics.in_flight:
                    return True
                await asyncio.sleep(0.01)
            return False

        assert self.call(idle), f"{self.engine.stats}, {self.plane.num_live} generations live"


@contextmanager
def serving(
    *,
    reply: Reply = echo,
    cached: Cached = nothing_cached,
    step_s: float = 0.0,
    num_slots: int = 8,
    max_queue: int = 64,
    chat_template: str | None = CHAT_TEMPLATE,
    **config: Any,
) -> Iterator[Served]:
    """A server for one test; nothing may be left running in it at the end."""
    served = Served(
        reply=reply,
        cached=cached,
        step_s=step_s,
        num_slots=num_slots,
        max_queue=max_queue,
        config=GatewayConfig(**config),
        chat_template=chat_template,
    )
    served.start()
    try:
        yield served
        served.assert_idle()
    finally:
        served.stop()


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """Checks that an answer is an error in OpenAI's shape, and returns it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]
