"""`LLM` for scripts and notebooks: the request plane over an engine in this process."""

import asyncio
import itertools
import threading
import weakref
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral
from typing import Any, TypeVar, Unpack

import jax
from tqdm import tqdm

from jserve.checkpoints.locate import text_assets_from_config
from jserve.checkpoints.tensor_source import Progress
from jserve.config import ServeConfig
from jserve.core.clock import WallClock
from jserve.core.errors import ConfigError, EngineError, JserveError, RequestError
from jserve.core.request import EngineInfo, FinishReason, Request, TokenLogprobs
from jserve.core.stats import EngineStats
from jserve.engine.build.assembly import Engine
from jserve.engine.build.start import start_engine
from jserve.engine.config import PlatformConfig
from jserve.engine.inbox import Abort, Inbox, Outbox, Submit
from jserve.engine.loop import EngineLoop
from jserve.engine.step_log import StepLog, open_step_log
from jserve.gateway.chat_reader import WholeAnswer
from jserve.gateway.conversation import PreparedChat, prepare
from jserve.gateway.engine_client import LiveStreams, UpdateStream
from jserve.gateway.http.openai_conversation import conversation_of
from jserve.gateway.http.openai_request import ChatRequest, parse_chat
from jserve.gateway.output import join
from jserve.gateway.request_plane import (
    GenerationRequest,
    OutputDelta,
    OutputStream,
    RequestOptions,
    RequestPlane,
)
from jserve.gateway.structured import read_structured
from jserve.gateway.tenants import LOCAL
from jserve.gateway.text_model import TextModel
from jserve.gateway.validation import SamplingFields
from jserve.grammar.maker import ConstraintMaker

_STRUCTURED = ("response_format", "structured_outputs")
PromptLike = str | Sequence[int]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that the model wants answered; `arguments` is JSON text."""

    id: str = field(compare=False)
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Completion:
    """One completed choice of one prompt. The text of a chat is without reasoning and calls."""

    prompt: PromptLike
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None  # the stop string or stop token id that matched
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    # Prompt tokens that were not computed again. Equal answers may differ in it.
    num_cached_tokens: int = field(default=0, compare=False)
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class GenerateOptions(RequestOptions, total=False):
    """Options of a request here: those of the request plane, and forms of the HTTP API."""

    response_format: Mapping[str, Any] | None
    structured_outputs: Mapping[str, Any] | None


class InProcessEngine:
    """An `EngineClient` whose engine steps on the client's own event loop, only inside `drive`.

    It takes any number of sequences and lets them into the engine's queue as that has room, so
    nothing is refused as Overloaded. A step that fails ends it: what is known of pages and slots
    may be wrong then, so later sequences are refused.
    """

    def __init__(
        self, engine: Engine, constraints: ConstraintMaker, step_log: StepLog | None
    ) -> None:
        self.info: EngineInfo | None = engine.info
        self.ready = True
        self.stats = EngineStats()
        self._constraints = constraints
        self._scheduler = engine.scheduler
        self._max_queue = engine.info.max_queue
        self._inbox, self._outbox = Inbox(), Outbox()
        self._outbox.attach(self._inbox.wake)  # a refusal does not wait out an idle turn
        self._loop = EngineLoop(
            engine.scheduler,
            engine.executor,
            self._inbox,
            self._outbox,
            WallClock(),
            engine.num_compiles,
            step_log,
        )
        self._streams = LiveStreams()
        self._backlog: dict[str, Request] = {}  # by name; they wait for room in the engine
        self._failure: Exception | None = None  # of the step that ended the engine

    def submit(self, requests: Sequence[Request]) -> UpdateStream:
        if self._failure is not None:
            raise _engine_failed(self._failure) from self._failure
        stream, named = self._streams.open(self, requests)
        self._backlog.update((request.id, request) for request in named)
        return stream

    def abort(self, request_id: str) -> None:
        name = self._streams.close(request_id)
        if name is not None and self._backlog.pop(name, None) is None:
            self._inbox.put(Abort(name))

    async def drive(self, work: Coroutine[Any, Any, T]) -> T:
        """Steps the engine until `work`, which waits for its answers, is done.

        Raises what `work` raises; if a step fails, that is EngineError from each of its streams.
        """
        task = asyncio.create_task(work)
        try:
            while not task.done():
                if self._streams:
                    try:
                        self._step()
                    except Exception as error:
                        self._fail(error)
                await asyncio.sleep(0)  # readers take the updates
            return task.result()
        finally:
            task.cancel()
            await asyncio.wait([task])

    def _fail(self, error: Exception) -> None:
        self.ready = False
        self._failure = error
        self._backlog.clear()
        failed = _engine_failed(error)
        failed.__cause__ = error
        self._streams.fail_all(failed)

    def _step(self) -> None:
        if self._backlog:
            room = self._max_queue - self._scheduler.stats().num_waiting
            for name in list(itertools.islice(self._backlog, max(room, 0))):
                self._enter(name)
        self._loop.run_once()
        events = self._outbox.take()
        self.stats = events.stats
        for update in events.updates:
            self._streams.post(update)
        for name, error in events.rejections:
            self._streams.reject(name, error)

    def _enter(self, name: str) -> None:
        request, constraint = self._backlog.pop(name), None
        if request.constraint is not None:
            try:
                constraint = self._constraints.make(request)
            except JserveError as error:
                self._outbox.reject(name, error)
                return
        self._inbox.put(Submit(request, constraint))


class _LoopThread:
    """An event loop in a thread of its own, since a notebook's thread already runs one."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="jserve-offline", daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs `work` on the loop and returns its result; an interrupt (Ctrl-C) cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Runs `callback` on the loop, without waiting; nothing happens after `stop`."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()


class LLM:
    """A model, ready to generate. Owns the engine; use it from one thread, one call at a time."""

    def __init__(
        self,
        config: ServeConfig,
        *,
        on_files: Progress = lambda done_bytes, total_bytes: None,
        on_phase: Callable[[str, str], None] = lambda phase, detail: None,
    ) -> None:
        """Fetches, loads and compiles; the callbacks are told how far it is.

        Raises ConfigError when the config or a file is wrong, or when this process already runs
        JAX on another backend.
        """
        _pin(config.platform)
        engine = start_engine(
            config.model,
            config.engine,
            config.scheduler,
            config.cache,
            on_files=on_files,
            on_phase=on_phase,
        )
        assets = text_assets_from_config(config.model, on_files)
        self.text = TextModel.from_assets(assets, config.gateway)
        self.info = engine.info
        constraints = ConstraintMaker(
            lambda: assets.tokenizer_json,
            vocab=self.info.vocab,
            eos_token_ids=self.info.eos_token_ids,
        )
        self._engine = InProcessEngine(engine, constraints, open_step_log(config.engine))
        self._plane = RequestPlane(
            tokenizer=self.text.tokenizer,
            chat_template=self.text.chat_template,
            defaults=self.text.defaults,
            engine=self._engine,
            config=config.gateway,
            clock=WallClock(),
            bounded=False,
        )
        self._serial = itertools.count()
        self._loop = _LoopThread()
        weakref.finalize(self, self._loop.stop)

    def generate(
        self,
        prompts: PromptLike | Iterable[PromptLike],
        sampling: SamplingFields | Sequence[SamplingFields] | None = None,
        *,
        use_tqdm: bool = True,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]:
        """Completes every prompt, `n` times each, in the order of the prompts.

        `sampling` is one for all prompts, or one for each; its fields that are None take the
        model's defaults. Options (`n`, `stop`, `cache_salt`, …) are those of a served request;
        `structured_outputs` ({"json": schema}, {"regex": …}, …) and `response_format` bind answers.
        Raises RequestError, before anything runs, when a prompt, a field or an option is wrong, and
        TypeError when there is no such option.
        """
        wanted = _prompts(prompts)
        fields = _one_each(sampling, len(wanted))
        generations = self._loop.call(self._prepare(wanted, fields, options))
        return [
            _completion(prompt, deltas)
            for prompt, choices in zip(wanted, self._complete(generations, use_tqdm), strict=True)
            for deltas in choices
        ]

    def chat(
        self,
        conversations: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling: SamplingFields | Sequence[SamplingFields] | None = None,
        *,
        use_tqdm: bool = True,
        **options: Any,
    ) -> list[Completion]:
        """Answers every conversation, `n` times each; one is a list of messages.

        `sampling` is as of `generate`. Options are fields of `POST /v1/chat/completions`, with
        values as JSON has them: `tools`, `tool_choice`, `response_format`, `chat_template_kwargs`,
        `continue_final_message`, `n`, … The prompt of a completion is the rendered text. Raises
        RequestError, before anything runs, when a message or an option is wrong or unknown.
        """
        given: list[Any] = list(conversations)
        if given and isinstance(given[0], Mapping):
            given = [given]
        fields = _one_each(sampling, len(given))
        asked = [parse_chat({**options, "messages": messages}) for messages in given]
        for request in asked:
            for name in ("stream", "echo"):
                if getattr(request, name):
                    raise RequestError(f"{name} is not an option of LLM.chat", param=name)
        chats = self._loop.call(self._prepare_chats(asked, fields))
        answers = self._complete([chat.generation for chat in chats], use_tqdm)
        return [
            _chat_completion(request, chat, deltas)
            for request, chat, choices in zip(asked, chats, answers, strict=True)
            for deltas in choices
        ]

    def _complete(
        self, generations: Sequence[GenerationRequest], use_tqdm: bool
    ) -> list[list[list[OutputDelta]]]:
        """Runs the requests; returns the deltas of their choices."""
        answers: list[list[list[OutputDelta]]] = [[[] for _ in range(it.n)] for it in generations]
        tokens = 0
        total = sum(it.n for it in generations)
        with tqdm(total=total, disable=not use_tqdm, unit="seq") as bar:

            def on_delta(index: int, delta: OutputDelta) -> None:
                nonlocal tokens
                answers[index][delta.index].append(delta)
                tokens += len(delta.token_ids)
                if delta.finish is not None:
                    bar.update()
                    rate = tokens / max(bar.format_dict["elapsed"], 1e-9)
                    bar.set_postfix_str(f"{rate:.1f} tokens/s")

            self._loop.call(self._engine.drive(self._run(generations, on_delta)))
        return answers

    def stream(
        self,
        prompt: PromptLike,
        sampling: SamplingFields | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[str]:
        """Yields the text of one completion as it grows. Options are those of `generate`."""
        fields = [sampling or SamplingFields()]
        (generation,) = self._loop.call(self._prepare([prompt], fields, options))
        started: list[OutputStream] = []  # filled on the loop, which owns the request plane

        async def start() -> None:
            started.append(self._plane.run(generation))

        def close() -> None:
            for deltas in started:  # none, if an interrupt came before the start
                deltas.close()

        try:
            self._loop.call(start())
            while (delta := self._loop.call(self._engine.drive(_next(started[0])))) is not None:
                if delta.text:
                    yield delta.text
        finally:
            self._loop.call_soon(close)

    @property
    def stats(self) -> EngineStats:
        """The engine's load after its last step."""
        return self._engine.stats

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The token ids of a conversation in the model's chat template, for `generate`."""
        return list(self._loop.call(self._plane.prompts.of_chat(list(messages))).ids)

    async def _prepare(
        self,
        prompts: Sequence[PromptLike],
        sampling: Sequence[SamplingFields],
        options: GenerateOptions,
    ) -> list[GenerationRequest]:
        if unknown := options.keys() - GenerateOptions.__annotations__.keys():
            raise TypeError(
                f"{', '.join(sorted(unknown))}: no such option; options are "
                f"{', '.join(GenerateOptions.__annotations__)}, and SamplingFields holds the rest"
            )
        structured = read_structured({key: options.get(key) for key in _STRUCTURED})
        constraint = await self._plane.constraint(structured)
        rest: Any = {key: value for key, value in options.items() if key not in _STRUCTURED}
        generations: list[GenerationRequest] = []
        for index, (prompt, fields) in enumerate(zip(prompts, sampling, strict=True)):
            if isinstance(prompt, str):
                ids = await self._plane.prompts.of_text(prompt)
            else:
                ids = self._plane.prompts.of_ids(_token_ids(prompt, index))
            name = f"offline-{next(self._serial)}"
            generations.append(
                self._plane.prepare(
                    id=name, prompt=ids, sampling=fields, constraint=constraint, **rest
                )
            )
        return generations

    async def _prepare_chats(
        self, asked: Sequence[ChatRequest], sampling: Sequence[SamplingFields]
    ) -> list[PreparedChat]:
        chats: list[PreparedChat] = []
        for request, fields in zip(asked, sampling, strict=True):
            given = {name: value for name, value in asdict(fields).items() if value is not None}
            request = replace(request, sampling=replace(request.sampling, **given))
            conversation = conversation_of(self._plane, request)
            name = f"offline-{next(self._serial)}"
            chats.append(await prepare(self._plane, conversation, id=name, caller=LOCAL))
        return chats

    async def _run(
        self, generations: Sequence[GenerationRequest], on_delta: Callable[[int, OutputDelta], None]
    ) -> None:
        """Runs the requests in order, as many at a time as the engine's slots and queue hold."""
        queue = enumerate(generations)

        async def work() -> None:
            for index, generation in queue:
                async with aclosing(self._plane.run(generation)) as deltas:
                    async for delta in deltas:
                        on_delta(index, delta)

        most = self.info.num_slots + self.info.max_queue
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(len(generations), most)):
                    workers.create_task(work())
        except ExceptionGroup as errors:
            error = errors.exceptions[0]
            raise error from error.__cause__  # without the group


def _one_each(
    sampling: SamplingFields | Sequence[SamplingFields] | None, num_prompts: int
) -> Sequence[SamplingFields]:
    """Returns sampling fields for each prompt."""
    if sampling is None or isinstance(sampling, SamplingFields):
        return [sampling or SamplingFields()] * num_prompts
    if len(sampling) != num_prompts:
        raise RequestError(f"sampling has {len(sampling)} entries for {num_prompts} prompts")
    return sampling


async def _next(deltas: AsyncIterator[OutputDelta]) -> OutputDelta | None:
    return await anext(deltas, None)


def _engine_failed(error: Exception) -> EngineError:
    return EngineError(f"the engine failed: {error}; make a new LLM")


def _pin(config: PlatformConfig) -> None:
    jax.config.update("jax_platforms", config.jax_platforms)
    if jax.default_backend() != config.backend.value:
        raise ConfigError(
            f"platform.backend is {config.backend.value!r}, but this process already runs JAX on "
            f"{jax.default_backend()!r}; make the LLM first, or change the config"
        )


def _prompts(prompts: PromptLike | Iterable[PromptLike]) -> list[PromptLike]:
    """Returns one prompt or several as a list."""
    if isinstance(prompts, str):
        return [prompts]
    try:
        items: list[Any] = list(prompts)  # once: it may be a generator
    except TypeError:
        raise RequestError(
            f"prompts is {prompts!r}; give a text, token ids, or several of these", param="prompt"
        ) from None
    are_ids = [isinstance(item, Integral) for item in items]
    if len(set(are_ids)) > 1:
        index = are_ids.index(not are_ids[0])
        kinds = "a prompt", "a token id"
        raise RequestError(
            f"prompts[{index}] is {kinds[are_ids[index]]}, but prompts[0] is {kinds[are_ids[0]]}; "
            "put the token ids of a prompt into a list of their own",
            param="prompt",
        )
    return [_token_ids(items, 0)] if any(are_ids) else items


def _token_ids(prompt: Iterable[Any], index: int) -> list[Any]:
    """The ids of prompt number `index` with NumPy's integers as Python's; they are not checked."""
    try:
        return [
            int(item) if isinstance(item, Integral) and not isinstance(item, bool) else item
            for item in prompt
        ]
    except TypeError:
        raise RequestError(
            f"prompts[{index}] is {prompt!r}; a prompt is a text or a list of token ids",
            param="prompt",
        ) from None


def _completion(prompt: PromptLike, deltas: Sequence[OutputDelta]) -> Completion:
    whole = join(deltas)
    assert whole.finish is not None
    return Completion(
        prompt=prompt,
        text=whole.text,
        token_ids=whole.token_ids,
        finish_reason=whole.finish,
        stop_reason=whole.stop_reason,
        logprobs=None if whole.logprobs is None else tuple(whole.logprobs),
        prompt_logprobs=None if whole.prompt_logprobs is None else tuple(whole.prompt_logprobs),
        num_cached_tokens=whole.cached_tokens,
    )


def _chat_completion(
    asked: ChatRequest, chat: PreparedChat, deltas: Sequence[OutputDelta]
) -> Completion:
    prompt = chat.generation.prompt
    completion = _completion(prompt.text or prompt.ids, deltas)
    answer = WholeAnswer.of(chat.reader().feed(join(deltas)).parts)
    return replace(
        completion,
        text=answer.text,
        reasoning=answer.reasoning if asked.include_reasoning else "",
        tool_calls=tuple(
            ToolCall(chat.call_id(), name, arguments) for name, arguments in answer.calls
        ),
    )
