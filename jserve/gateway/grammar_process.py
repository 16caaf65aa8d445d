"""Checks grammars in processes of their own: what a client sends may take any time and memory.

What was found good is kept, so a schema that every request sends costs nothing.
"""

import asyncio
import hashlib
import signal
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import orjson
from tokenizers import Tokenizer

from jserve.core.errors import ConfigError, RequestError
from jserve.core.request import EngineInfo
from jserve.gateway.job_child import Handler
from jserve.gateway.job_process import JobLimits, JobProcesses, JobStopped
from jserve.grammar.check import check_source
from jserve.grammar.compiler import GrammarCompiler
from jserve.grammar.source import MAX_SOURCE_BYTES, GrammarKind, GrammarSource, Whitespace

_LIMITS = JobLimits(cpu_s=2.0, memory_bytes=1 << 30)
_START_CPU_S = 60.0  # to read a tokenizer of any size
_MOST = 2  # so that a grammar that takes its seconds does not hold up the others
_MAX_KEPT_CHARS = 8 << 20


class GrammarProcess:
    """Makes grammars of sources, each within bounds of time and memory. On one event loop.

    The processes start with the first grammar, and end at `close` or with this object.
    """

    def __init__(
        self,
        tokenizer_json: str,
        info: Callable[[], EngineInfo],
        limits: JobLimits = _LIMITS,
    ) -> None:
        """`info` raises Unavailable until the engine was reached, and so does every grammar."""
        self._tokenizer_json = tokenizer_json
        self._info = info
        self._limits = limits
        self._processes: JobProcesses | None = None
        self._model: tuple[int, tuple[int, ...]] | None = None  # of the processes
        self._kept: OrderedDict[bytes, str] = OrderedDict()
        self._kept_chars = 0
        self._running: dict[bytes, asyncio.Future[str]] = {}
        self._waiters = Counter[bytes]()

    def close(self) -> None:
        """Ends the processes."""
        if self._processes is not None:
            self._processes.close()
            self._processes = None

    async def text(self, source: GrammarSource, tenant: str = "") -> str:
        """Returns the text of a grammar that every engine of this model compiles.

        It is compiled when it is the turn of `tenant`.

        Raises:
            RequestError: it is wrong, not supported, or exceeds its time or memory.
            Unavailable: no engine was reached yet.
        """
        processes = self._started()
        job = _encode(source)
        key = hashlib.sha256(job).digest()
        if (kept := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            return kept
        running = self._running.get(key)
        if running is None:
            # Others may wait for it: it goes on until the last client leaves.
            running = asyncio.ensure_future(self._check(processes, source, job, key, tenant))
            running.add_done_callback(_retrieve)
            self._running[key] = running
        self._waiters[key] += 1
        try:
            return await asyncio.shield(running)
        finally:
            self._waiters[key] -= 1
            if not self._waiters[key]:
                del self._waiters[key]
                running.cancel()  # if it is not done: nobody waits for it any more

    async def _check(
        self, processes: JobProcesses, source: GrammarSource, job: bytes, key: bytes, tenant: str
    ) -> str:
        try:
            text = (await processes.call(job, tenant)).decode()
        except JobStopped as error:
            raise source.refused(f"the grammar is too complex: {error}") from None
        finally:
            self._running.pop(key, None)
        self._keep(key, text)
        return text

    def _keep(self, key: bytes, text: str) -> None:
        self._kept[key] = text
        self._kept_chars += len(text)
        while self._kept_chars > _MAX_KEPT_CHARS:
            _, oldest = self._kept.popitem(last=False)
            self._kept_chars -= len(oldest)

    def _started(self) -> JobProcesses:
        info = self._info()
        model = (info.vocab, info.eos_token_ids)
        if self._processes is None or self._model != model:
            self.close()
            self._kept.clear()
            self._kept_chars = 0
            start = {"tokenizer": self._tokenizer_json, "vocab": model[0], "eos": list(model[1])}
            self._processes = JobProcesses(__name__, orjson.dumps(start), self._limits, most=_MOST)
            self._model = model
        return self._processes


def _retrieve(running: "asyncio.Future[str]") -> None:
    """Takes an error that nobody waits for any more."""
    if not running.cancelled():
        running.exception()


def _encode(source: GrammarSource) -> bytes:
    whitespace = source.whitespace
    fields = {
        "kind": source.kind.value,
        "value": source.value,
        "field": source.field,
        "whitespace": whitespace.value if isinstance(whitespace, Whitespace) else None,
        "pattern": None if isinstance(whitespace, Whitespace) else whitespace,
    }
    try:
        job = orjson.dumps(fields)
    except (orjson.JSONEncodeError, RecursionError) as error:
        raise source.refused(f"is no valid JSON: {error}") from error
    if len(job) > MAX_SOURCE_BYTES:
        raise source.refused(f"has {len(job)} bytes; at most {MAX_SOURCE_BYTES}")
    return job


def _decode(job: bytes) -> GrammarSource:
    fields: dict[str, Any] = orjson.loads(job)
    pattern = fields["pattern"]
    return GrammarSource(
        kind=GrammarKind(fields["kind"]),
        value=fields["value"],
        field=fields["field"],
        whitespace=Whitespace(fields["whitespace"]) if pattern is None else pattern,
    )


def make_handler(start: bytes) -> Handler:
    """Makes what runs in the process: a source in, the text of a grammar out."""
    signal.setitimer(signal.ITIMER_PROF, _START_CPU_S)
    model = orjson.loads(start)
    try:
        compiler = GrammarCompiler(
            model["tokenizer"], vocab=model["vocab"], eos_token_ids=tuple(model["eos"])
        )
    except ConfigError as error:
        fault = f"grammars are not supported with this model: {error}"
        return lambda job: _refuse(_decode(job), fault)
    special = _special_tokens(model["tokenizer"])
    return lambda job: check_source(_decode(job), compiler, special).encode()


def _refuse(source: GrammarSource, fault: str) -> bytes:
    raise RequestError(fault, param=source.field)


def _special_tokens(tokenizer_json: str) -> dict[str, int]:
    added = Tokenizer.from_str(tokenizer_json).get_added_tokens_decoder()
    return {token.content: token_id for token_id, token in added.items() if token.special}
