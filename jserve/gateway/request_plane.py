"""The request plane without a wire: prompts in, validated generations, deltas of text out.

Every front end (HTTP, gRPC) parses into `Prompt` and `SamplingFields`, calls `prepare`, iterates
`run`, and writes the deltas in its own format.
"""

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypedDict, Unpack

from jserve.core.clock import Clock
from jserve.core.errors import JserveError, PromptTooLong, RequestError, Unavailable, UnknownModel
from jserve.core.request import EngineInfo, FinishReason, Request
from jserve.gateway.chat import ChatTemplate, check_messages
from jserve.gateway.config import GatewayConfig
from jserve.gateway.defaults import SamplingDefaults
from jserve.gateway.engine_client import EngineClient, UpdateStream
from jserve.gateway.metrics import GatewayMetrics, RequestMetrics
from jserve.gateway.output import GenerationRequest, OutputDelta, OutputProcessor, Prompt
from jserve.gateway.tokenizer import TextTokenizer
from jserve.gateway.validation import (
    SamplingFields,
    boolean,
    check_prompt,
    check_request_id,
    check_stop,
    integer,
    resolve_sampling,
)

__all__ = ["GenerationRequest", "OutputDelta", "OutputStream", "Prompt", "RequestPlane"]

_LONG_TEXT_CHARS = 64 << 10  # longer texts are first checked by a lower bound of their tokens
_PRIORITY_LIMIT = 2**31 - 1


class RequestOptions(TypedDict, total=False):
    """Options of a request beside its sampling; None is the same as not given."""

    stop: str | Sequence[str] | None
    n: int | None
    priority: int | None
    echo: bool | None  # the text of each choice starts with the prompt's text
    skip_special_tokens: bool | None
    include_stop_str_in_output: bool | None


class OutputStream:
    """An asynchronous iterator of `OutputDelta`; choices interleave.

    `__anext__` may be cancelled (a timeout for keep-alive frames) and called again without loss.
    Errors of the engine (Overloaded, Unavailable, EngineError, RequestError) are raised by it, the
    first two by the first call if at all. `close` aborts every choice; idempotent, never blocks.
    """

    def __init__(
        self,
        owner: "RequestPlane",
        generation: GenerationRequest,
        stream: UpdateStream,
        ids: Sequence[str],
        metrics: RequestMetrics | None,
    ) -> None:
        self._owner = owner
        self._stream = stream
        self._metrics = metrics
        self._started_s = owner.clock.now_s()
        self._choices = {
            request_id: OutputProcessor(generation, index, owner.tokenizer)
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
            delta = replace(delta, ttft_s=self._owner.clock.now_s() - self._started_s)
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
        self._owner.forget(self)

    def fail(self, error: JserveError) -> None:
        """Aborts the choices that still run; the reader gets `error`."""
        self._stream.fail(error)


class RequestPlane:
    """Owns the tokenizer, the defaults and the connection to the engine; on one event loop."""

    def __init__(
        self,
        *,
        tokenizer: TextTokenizer,
        chat_template: ChatTemplate | None,
        defaults: SamplingDefaults,
        engine: EngineClient,
        config: GatewayConfig,
        clock: Clock,
        bounds_choices: bool = True,
    ) -> None:
        """Without `bounds_choices`, `n` is as large as the caller likes: `engine` refuses none."""
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.defaults = defaults
        self.engine = engine
        self.config = config
        self.clock = clock
        self._bounds_choices = bounds_choices
        self.draining = False
        self._live: set[OutputStream] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        # Ids are unique in the engine, whatever ids the clients of several gateways choose.
        self._id_prefix = secrets.token_hex(6)
        self._serial = itertools.count()

    @property
    def model_name(self) -> str:
        if self.config.served_model_name:
            return self.config.served_model_name
        return self.engine.info.model if self.engine.info is not None else ""

    @property
    def ready(self) -> bool:
        """Whether a request would be answered now."""
        return self.engine.ready and not self.draining

    @property
    def num_live(self) -> int:
        """Number of generations that run."""
        return len(self._live)

    @property
    def info(self) -> EngineInfo:
        """The engine's description; Unavailable before it was ever reached."""
        if self.engine.info is None:
            raise Unavailable("the model is still loading; try again", retry_after_s=1.0)
        return self.engine.info

    def check_model(self, name: str | None) -> None:
        """Raises UnknownModel unless `name` is None, empty or the served one.

        Raises Unavailable while the served name is not known yet.
        """
        served = self.config.served_model_name or self.info.model
        if name and name != served:
            raise UnknownModel(
                f"model {name[:200]!r} is not served here; {served!r} is", param="model"
            )

    async def text_prompt(self, text: str, *, add_special_tokens: bool | None = None) -> Prompt:
        """Tokenizes; None keeps the tokenizer's own habit of adding a BOS."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text holds a lone surrogate at character {error.start}; send valid Unicode",
                param="prompt",
            ) from error
        if len(text) > _LONG_TEXT_CHARS:
            least = await asyncio.to_thread(self.tokenizer.least_tokens, text)
            if least > self.info.max_model_len:
                raise PromptTooLong(
                    f"the prompt has at least {least} tokens, but this model's context is "
                    f"{self.info.max_model_len} tokens; shorten the prompt",
                    param="prompt",
                )
        ids = await self.tokenizer.encode_async(text, add_special_tokens=add_special_tokens)
        return Prompt(tuple(ids), text)

    def token_prompt(self, ids: Sequence[int]) -> Prompt:
        """Makes a prompt of token ids, which are checked."""
        return Prompt(check_prompt(ids, self.info))

    async def chat_prompt(self, messages: Any, *, add_generation_prompt: bool = True) -> Prompt:
        """Checks the messages, renders the model's chat template and tokenizes.

        The template writes the BOS itself, if the model wants one. RequestError if the model has
        no template.
        """
        checked = check_messages(messages, max_messages=self.config.max_chat_messages)
        if self.chat_template is None:
            raise RequestError(
                f"model {self.model_name!r} has no chat template; "
                "use completions with a prompt instead of chat messages",
                param="messages",
            )
        text = await asyncio.to_thread(
            self.chat_template.render, checked, add_generation_prompt=add_generation_prompt
        )
        return await self.text_prompt(text, add_special_tokens=False)

    def prepare(
        self,
        *,
        id: str,  # noqa: A002
        prompt: Prompt,
        sampling: SamplingFields,
        **options: Unpack[RequestOptions],
    ) -> GenerationRequest:
        """Checks every field and resolves the defaults; None means not given.

        max_tokens 0 is allowed with `echo` or prompt_logprobs: only the prompt is looked at.
        Raises RequestError (with `param`), PromptTooLong, Unavailable before the engine was
        ever seen (its context length is not known yet).
        """
        info, config = self.info, self.config
        most_choices = min(config.max_choices, info.num_slots + info.max_queue)
        ids = check_prompt(prompt.ids, info)
        echoes = boolean("echo", options.get("echo"), default=False)
        prompt_only = (
            type(sampling.max_tokens) is int
            and sampling.max_tokens == 0
            and (echoes or sampling.prompt_logprobs is not None)
        )
        if prompt_only:
            sampling = replace(sampling, max_tokens=1)
        return GenerationRequest(
            id=check_request_id(id, config.max_request_id_chars),
            prompt=Prompt(ids, prompt.text),
            sampling=resolve_sampling(
                sampling, defaults=self.defaults, info=info, prompt_tokens=len(ids)
            ),
            stop=check_stop(
                options.get("stop"),
                max_count=config.max_stop_strings,
                max_chars=config.max_stop_string_chars,
            ),
            n=integer(
                "n",
                options.get("n"),
                1,
                1,
                most_choices if self._bounds_choices else None,
            ),
            priority=integer(
                "priority", options.get("priority"), 0, -_PRIORITY_LIMIT, _PRIORITY_LIMIT
            ),
            echo=echoes,
            skip_special_tokens=boolean(
                "skip_special_tokens", options.get("skip_special_tokens"), default=True
            ),
            include_stop_str_in_output=boolean(
                "include_stop_str_in_output",
                options.get("include_stop_str_in_output"),
                default=False,
            ),
            prompt_only=prompt_only,
        )

    def run(
        self,
        generation: GenerationRequest,
        metrics: GatewayMetrics | None = None,
        *,
        deadline_s: float | None = None,
    ) -> OutputStream:
        """Starts every choice. Raises Unavailable at once when no engine is there.

        `metrics` count the output that is read. The engine drops what is not done in `deadline_s`
        seconds, also when this gateway cannot tell it to.
        """
        if self.draining:
            raise shutting_down()
        serial = next(self._serial)
        requests = [
            Request(
                id=f"{self._id_prefix}-{serial}-{choice}",
                prompt=generation.prompt.ids,
                sampling=generation.sampling,
                choice=choice,
                priority=generation.priority,
                deadline_s=deadline_s,
            )
            for choice in range(generation.n)
        ]
        stream = self.engine.submit(requests)
        deltas = OutputStream(
            self,
            generation,
            stream,
            [request.id for request in requests],
            None if metrics is None else metrics.start(generation),
        )
        self._live.add(deltas)
        self._idle.clear()
        return deltas

    def forget(self, deltas: OutputStream) -> None:
        """Removes a stream that has ended; called by it."""
        self._live.discard(deltas)
        if not self._live:
            self._idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new generations and waits for the others; False if some had to be aborted."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return not self.cut_off()

    def cut_off(self) -> int:
        """Refuses new generations and fails those that run (Unavailable); returns their number."""
        self.draining = True
        running = tuple(self._live)
        for deltas in running:
            deltas.fail(shutting_down())
        return len(running)


def shutting_down() -> Unavailable:
    """The answer to who asks, or still waits, when the server ends."""
    return Unavailable("the server is shutting down; send the request again", retry_after_s=5.0)
