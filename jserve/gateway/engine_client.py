"""Interface between gateway and engine: submit, abort, and merged updates of each sequence."""

import asyncio
import itertools
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from jserve.core.errors import EngineError, JserveError, Overloaded, RequestError
from jserve.core.logprobs import PackedLogprobs
from jserve.core.request import (
    EngineInfo,
    FinishReason,
    Request,
    SequenceUpdate,
)
from jserve.core.stats import EngineStats
from jserve.gateway.buffers import BufferAccount, logprobs_bytes


class EngineClient(Protocol):
    """A connection to one engine. Lives on one event loop; no method blocks it."""

    @property
    def info(self) -> EngineInfo | None:
        """The engine's description; kept over a reconnect, None before the first connection."""
        ...

    @property
    def ready(self) -> bool:
        """Whether the engine can take a request now."""
        ...

    @property
    def stats(self) -> EngineStats:
        """The engine's load as of its latest message."""
        ...

    def submit(self, requests: Sequence[Request]) -> "UpdateStream":
        """Starts sequences that share one stream of updates, usually the choices of one prompt.

        Raises at once Unavailable when no engine is there and none is waited for, RequestError when
        an id is that of a live sequence or is given twice, Overloaded when too many are in flight.
        A refusal by the engine (Overloaded, RequestError) is raised by the stream. When the engine
        dies, sequences go on in the next one, and new ones wait for it; the stream raises
        Unavailable if there is none in time.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Stops a sequence; an unknown or finished one is ignored."""
        ...


class _Unread:
    """Updates of one sequence that were not read yet, merged without copying them each time."""

    __slots__ = (
        *("_cached_tokens", "_latest", "_logprobs", "_prompt_logprobs", "_queue_s", "_tokens"),
        "num_bytes",
    )

    def __init__(self, first: SequenceUpdate, second: SequenceUpdate) -> None:
        self._tokens = array("i", first.tokens)
        self._logprobs = None if first.logprobs is None else PackedLogprobs(first.logprobs)
        self._prompt_logprobs = first.prompt_logprobs
        self._queue_s = first.queue_s
        self._cached_tokens = first.cached_tokens
        self.num_bytes = _num_bytes(first)
        self.add(second)

    def add(self, update: SequenceUpdate) -> None:
        """Merges the next update."""
        self._tokens.extend(update.tokens)
        if update.logprobs is not None:
            if self._logprobs is None:
                self._logprobs = PackedLogprobs()
            self._logprobs.extend(update.logprobs)
        if self._prompt_logprobs is None:
            self._prompt_logprobs = update.prompt_logprobs
        if self._queue_s is None:
            self._queue_s = update.queue_s
        self._cached_tokens += update.cached_tokens
        self._latest = update
        self.num_bytes += _num_bytes(update)

    def take(self) -> SequenceUpdate:
        """Returns all as one update."""
        return self._latest._replace(
            tokens=tuple(self._tokens),
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
            queue_s=self._queue_s,
            cached_tokens=self._cached_tokens,
        )


def _num_bytes(update: SequenceUpdate) -> int:
    num_bytes = 4 * len(update.tokens)
    if update.logprobs is not None or update.prompt_logprobs is not None:
        num_bytes += logprobs_bytes(update.logprobs) + logprobs_bytes(update.prompt_logprobs)
    return num_bytes


class UpdateStream:
    """Updates of a group of sequences, merged until read: memory is bounded by their tokens.

    Written by the engine client, read by one consumer, all on one event loop. `__anext__` may be
    cancelled (a timeout) and called again without losing anything. Ends after the last finish.
    """

    def __init__(self, client: EngineClient, request_ids: Sequence[str]) -> None:
        self._client = client
        self._live = set(request_ids)  # sequences whose finish the engine has not reported
        # In order of the first unread update; one alone is kept as it is.
        self._unread: dict[str, SequenceUpdate | _Unread] = {}
        self._error: JserveError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._account: BufferAccount | None = None

    def charge(self, account: BufferAccount) -> None:
        """Counts what is unread to `account`; without one there is no bound."""
        self._account = account
        account.on_full.append(self._overflow)

    def post(self, update: SequenceUpdate) -> None:
        """Adds an update; unread ones of the same sequence are merged with it."""
        if update.request_id not in self._live:
            return
        if update.finish is not None:
            self._live.discard(update.request_id)
        unread = self._unread.get(update.request_id)
        if unread is None:
            self._unread[update.request_id] = update
        elif isinstance(unread, _Unread):
            unread.add(update)
        else:
            self._unread[update.request_id] = _Unread(unread, update)
        self._wake()
        if self._account is not None:
            self._account.add(_num_bytes(update))

    def fail(self, error: JserveError) -> None:
        """Ends the stream with `error`, after the updates already there; the rest is aborted."""
        if self._error is None and self._live:
            self._error = error
            self.close()

    def close(self) -> None:
        """Aborts what still runs; a reader that waits sees the end. Idempotent."""
        live, self._live = self._live, set()
        for request_id in live:
            self._client.abort(request_id)
        self._wake()

    def drop(self, request_id: str) -> None:
        """Aborts one sequence and forgets its unread updates."""
        self._forget(self._unread.pop(request_id, None))
        if request_id in self._live:
            self._live.discard(request_id)
            self._client.abort(request_id)

    def __aiter__(self) -> "UpdateStream":
        return self

    async def __anext__(self) -> SequenceUpdate:
        while not self._unread:
            if self._error is not None:
                raise self._error
            if not self._live:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        unread = self._unread.pop(next(iter(self._unread)))
        self._forget(unread)
        update = unread.take() if isinstance(unread, _Unread) else unread
        if update.finish is FinishReason.ERROR:
            self.close()
            raise EngineError(update.error or "the engine failed on this request")
        return update

    def _forget(self, unread: SequenceUpdate | _Unread | None) -> None:
        if unread is not None and self._account is not None:
            num_bytes = unread.num_bytes if isinstance(unread, _Unread) else _num_bytes(unread)
            self._account.add(-num_bytes)

    def _overflow(self, error: Overloaded) -> None:
        """Drops what nobody reads; the reader gets `error` next."""
        self._unread.clear()
        self._error = error
        self.close()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


_MAX_DEATHS = 3  # with this many engines lost since its last token, a sequence fails


@dataclass(slots=True, eq=False)
class _Live:
    """A sequence whose end the engine has not reported."""

    request: Request  # with the client's id
    stream: UpdateStream
    opened_s: float = 0.0
    output: list[int] = field(default_factory=list[int])  # tokens that were received
    lost_s: float | None = None  # since when no engine has it; None while one has it
    num_deaths: int = 0  # engines that were lost since it last got a token
    begun: bool = False  # an update was received

    @property
    def had_engine(self) -> bool:
        """Whether an engine that is gone had accepted it."""
        return self.num_deaths > 0 or bool(self.output)

    def deadline_s(self, now_s: float) -> float | None:
        """Seconds that are left until the request's deadline."""
        total_s = self.request.deadline_s
        return None if total_s is None else max(0.0, total_s - (now_s - self.opened_s))


class LiveStreams:
    """Owns which stream takes the updates of which live sequence of one engine client.

    Each sequence has a name of its own in the engine, so updates of an aborted one that are still
    on their way find no stream, though a newer sequence may have the same request id.

    It remembers what each sequence has received, so another engine can continue it (`resume`).
    """

    def __init__(self) -> None:
        self._names: dict[str, str] = {}  # request id -> name in the engine
        self._live: dict[str, _Live] = {}  # by name
        self._serial = itertools.count()

    def __len__(self) -> int:
        """Number of live sequences."""
        return len(self._live)

    def open(
        self,
        client: EngineClient,
        requests: Sequence[Request],
        now_s: float = 0.0,
        *,
        lost: bool = False,
    ) -> tuple[UpdateStream, list[Request]]:
        """Starts the stream that `requests` share; returns it, and them as the engine gets them.

        Their deadlines count from `now_s`. With `lost` no engine is there; `resume` returns them.

        Raises RequestError, and starts nothing, when an id is that of a live sequence or is given
        twice.
        """
        ids: set[str] = set()
        for request in requests:
            if request.id in self._names or request.id in ids:
                raise RequestError(f"request id {request.id!r} is in use", param="request_id")
            ids.add(request.id)
        stream = UpdateStream(client, [request.id for request in requests])
        lost_s = now_s if lost else None
        lives = [_Live(request, stream, now_s, lost_s=lost_s) for request in requests]
        return stream, [self._enter(live) for live in lives]

    def _enter(self, live: _Live) -> Request:
        """Gives a sequence a new name; returns the request under it."""
        request = live.request
        name = f"{request.id}.{next(self._serial)}"
        self._names[request.id] = name
        self._live[name] = live
        return replace(request, id=name)

    def close(self, request_id: str) -> str | None:
        """Forgets an aborted sequence; returns its name in the engine, None if it is not live."""
        name = self._names.pop(request_id, None)
        if name is not None:
            del self._live[name]
        return name

    def post(self, update: SequenceUpdate) -> None:
        """Gives an update to its stream; nobody reads that of a sequence aborted meanwhile."""
        live = self._live.get(update.request_id)
        if live is None:
            return
        request_id = live.request.id
        if update.tokens:
            live.output += update.tokens
            live.num_deaths = 0
        if update.finish is not None:
            self.close(request_id)
        # What the next engine finds of the prompt is not what its client waited for.
        cached_tokens = 0 if live.begun else update.cached_tokens
        live.begun = True
        # Without names, since each step does this for each sequence.
        live.stream.post(SequenceUpdate(request_id, *update[1:-1], cached_tokens))

    def reject(self, name: str, error: JserveError) -> None:
        """Fails the stream of a sequence that the engine refuses."""
        live = self._live.get(name)
        if live is not None:
            self.close(live.request.id)
            live.stream.fail(error)

    # An engine is gone, and another one comes.

    def lose(self, now_s: float, name: str | None = None) -> None:
        """Notes that nobody works on the sequence `name`, or on any, until `resume`."""
        if name is None:
            lost = list(self._live.values())
        else:
            lost = [self._live[name]] if name in self._live else []
        for live in lost:
            # One death may be told twice: by the engine itself, and by the end of its session.
            if live.lost_s is None:
                live.lost_s = now_s
                live.num_deaths += 1

    def expire(self, since_s: float, error: JserveError) -> None:
        """Fails the streams of sequences that have had no engine since `since_s` or earlier.

        A sequence that has lost three engines since its last token fails at once, so a request that
        kills every engine ends itself.
        """

        def is_over(live: _Live) -> bool:
            if live.lost_s is None:
                return False
            return live.lost_s <= since_s or live.num_deaths >= _MAX_DEATHS

        self._fail_streams(is_over, error)

    def fail_begun(self, error: JserveError) -> None:
        """Fails the streams of sequences that only an equal engine could continue."""
        self._fail_streams(lambda live: bool(live.output), error)

    def resume(self, now_s: float = 0.0) -> list[Request]:
        """Returns every sequence, in order, under a new name, as the next engine gets it.

        It goes on after the tokens that were received: none is lost, and none comes twice.
        """
        old = list(self._live.values())
        self._live.clear()
        for live in old:
            live.lost_s = None  # time in the new engine's queue is no time without an engine
        return [
            replace(
                self._enter(live),
                output=tuple(live.output),
                resumed=live.had_engine,
                deadline_s=live.deadline_s(now_s),
            )
            for live in old
        ]

    def abort_all(self, error: JserveError) -> None:
        """Fails every stream; an engine that still works on a sequence is told to drop it."""
        self._fail_streams(lambda live: True, error)

    def fail_all(self, error: JserveError) -> None:
        """Fails every stream, once the engine is gone: nothing is left to abort."""
        streams = {live.stream for live in self._live.values()}
        self._live.clear()
        self._names.clear()
        for stream in streams:
            stream.fail(error)

    def _fail_streams(self, which: Callable[[_Live], bool], error: JserveError) -> None:
        for stream in {live.stream for live in self._live.values() if which(live)}:
            stream.fail(error)
