"""A request plane over a fake engine, and real sockets around both."""

import asyncio
import atexit
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

from jserve.core.clock import WallClock
from jserve.core.errors import JserveError
from jserve.core.request import EngineInfo
from jserve.engine.inbox import Inbox, Outbox, Submit
from jserve.gateway.chat import ChatTemplate
from jserve.gateway.config import GatewayConfig
from jserve.gateway.defaults import SamplingDefaults
from jserve.gateway.engine_client import EngineClient
from jserve.gateway.fake_engine import Reply, ScriptedSequences, echo
from jserve.gateway.request_plane import RequestPlane
from jserve.gateway.tokenizer import TextTokenizer
from tests.gateway.tiny_tokenizers import byte_level_json

INFO = EngineInfo(
    model="tiny",
    vocab=410,
    max_model_len=512,
    num_slots=4,
    num_pages=100,
    page_size=16,
    max_queue=8,
    eos_token_ids=(1, 2),
)
CONFIG = GatewayConfig(http_port=0, grpc_port=0)
CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "


def make_plane(engine: EngineClient, **config: object) -> RequestPlane:
    """The tiny byte-level tokenizer, a chat template, neutral defaults."""
    return RequestPlane(
        tokenizer=TextTokenizer(byte_level_json(), bos_token_id=0),
        chat_template=ChatTemplate(CHAT, special_tokens={"bos_token": "<s>"}),
        defaults=SamplingDefaults(),
        engine=engine,
        config=replace(CONFIG, **config),
        clock=WallClock(),
    )


class LoopThread:
    """An engine loop without a device: steps scripted sequences from an inbox to an outbox."""

    def __init__(
        self, info: EngineInfo = INFO, reply: Reply = echo, tokens_per_step: int = 1
    ) -> None:
        self.inbox, self.outbox = Inbox(), Outbox()
        self.sequences = ScriptedSequences(info, reply)
        self.paused = threading.Event()
        self.num_added = 0
        self.step_s = 0.0  # time that a step takes
        self._tokens_per_step = tokens_per_step
        self._stopping = False
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stopping:
            for command in self.inbox.drain():
                if isinstance(command, Submit):
                    try:
                        self.sequences.add(command.request)
                        self.num_added += 1
                    except JserveError as error:
                        self.outbox.reject(command.request.id, error)
                else:
                    self.sequences.abort(command.request_id)
            if self.paused.is_set() or not (self.sequences.running or self.sequences.waiting):
                self.inbox.wait(0.005)
                continue
            time.sleep(self.step_s)
            updates = self.sequences.step(self._tokens_per_step)
            self.outbox.post(updates, self.sequences.stats())

    @property
    def num_live(self) -> int:
        """Sequences that the engine still knows."""
        return len(self.sequences.running) + len(self.sequences.waiting)

    @contextmanager
    def running(self) -> Iterator["LoopThread"]:
        """Steps while the context is open."""
        self._thread.start()
        try:
            yield self
        finally:
            self._stopping = True
            self.inbox.wake()
            self._thread.join(5)


def unix_address() -> str:
    """The address of a socket, not there yet, in a private folder with a short path."""
    folder = tempfile.mkdtemp(prefix="jserve-test-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return f"unix:{folder}/engine.sock"


async def eventually(condition, timeout_s: float = 5.0) -> None:
    """Waits until a condition of the other side holds."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "condition never held"
        await asyncio.sleep(0.002)


@asynccontextmanager
async def closing(thing) -> AsyncIterator:
    """Calls an async `close` at the end."""
    try:
        yield thing
    finally:
        await thing.close()
