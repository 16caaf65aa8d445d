"""One generation that runs: updates of the engine in, deltas of text out."""

import asyncio
from collections.abc import Callable, Sequence

from jserve.core.clock import Clock
from jserve.core.errors import JserveError
from jserve.core.request import FinishReason
from jserve.gateway.buffers import BufferAccount
from jserve.gateway.engine_client import UpdateStream
from jserve.gateway.metrics import RequestMetrics
from jserve.gateway.output import GenerationRequest, OutputDelta, OutputProcessor, echoed
from jserve.gateway.tokenizer import TextTokenizer


class OutputStream:
    """An asynchronous iterator of `OutputDelta`; choices interleave.

    `__anext__` may be cancelled (a timeout for keep-alive frames) and called again without loss.
    Errors of the engine (Overloaded, Unavailable, EngineError, RequestError) are raised by any
    call: Overloaded also when too much is unread, Unavailable when an engine is lost and none
    follows. `close` aborts every choice; idempotent, never blocks.
    """

    def __init__(
        self,
        generation: GenerationRequest,
        stream: UpdateStream,
        ids: Sequence[str],
        metrics: RequestMetrics | None,
        account: BufferAccount | None,
        *,
        tokenizer: TextTokenizer,
        clock: Clock,
        on_end: Callable[["OutputStream"], None],
    ) -> None:
        """`account` is closed with the stream; `on_end` may be called again and again then."""
        self.generation = generation
        self._clock = clock
        self._on_end = on_end
        self._stream = stream
        self._account = account
        self._metrics = metrics
        self._started_s = clock.now_s()
        head = echoed(generation, tokenizer)
        self._choices = {
            request_id: OutputProcessor(generation, index, tokenizer, head)
            for index, request_id in enumerate(ids)
        }
        self._unseen = set(ids)  # choices without a delta yet
        self._unfinished = generation.n

    @property
    def finished(self) -> bool:
        """Whether every choice came to its end; False for one that was cut off."""
        return self._unfinished == 0

    def __aiter__(self) -> "OutputStream":
        return self

    async def __anext__(self) -> OutputDelta:
        try:
            while True:
                update = await self._stream.__anext__()
                choice = self._choices.get(update.request_id)
                if choice is not None:
                    break
        except asyncio.CancelledError:
            raise
        except (JserveError, StopAsyncIteration):
            self._close("error")
            raise
        except BaseException:
            self.close()
            raise
        delta = choice.feed(update)
        if update.request_id in self._unseen:
            self._unseen.discard(update.request_id)
            delta = delta._replace(ttft_s=self._clock.now_s() - self._started_s)
        if self._metrics is not None:
            self._metrics.count(delta)
        if delta.finish is not None:
            self._unfinished -= delta.finish is not FinishReason.ABORT
            del self._choices[update.request_id]
            if update.finish is None:
                self._stream.drop(update.request_id)
            if not self._choices:
                self.close()
        return delta

    def close(self) -> None:
        """Aborts the choices that still run; a pending `__anext__` ends."""
        self._close("abort")

    async def aclose(self) -> None:
        """Calls `close`; for contextlib.aclosing."""
        self.close()

    def _close(self, reason: str) -> None:
        if self._metrics is not None:
            self._metrics.end(reason)
        self._choices.clear()
        self._stream.close()
        if self._account is not None:
            self._account.close()
        self._on_end(self)

    def fail(self, error: JserveError) -> None:
        """Aborts the choices that still run; the reader gets `error`."""
        self._stream.fail(error)
