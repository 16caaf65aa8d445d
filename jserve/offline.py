"""`LLM.generate` for scripts and notebooks: scheduler and executor in this process, no server."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
from tqdm import tqdm

from jserve.checkpoints.locate import text_assets_of
from jserve.checkpoints.tensor_source import Progress
from jserve.config import ServeConfig
from jserve.core.clock import WallClock
from jserve.core.errors import ConfigError, EngineError, RequestError
from jserve.core.request import FinishReason, Request, SequenceUpdate, TokenLogprobs
from jserve.core.stats import EngineStats
from jserve.engine.build.start import start_engine
from jserve.engine.config import PlatformConfig
from jserve.engine.inbox import Abort, Inbox, Outbox, Submit
from jserve.engine.loop import EngineLoop
from jserve.engine.step_log import open_step_log
from jserve.gateway.pieces import Choice, Generation, Piece, Prompt, join
from jserve.gateway.text_model import TextModel
from jserve.gateway.validation import (
    SamplingFields,
    check_prompt,
    check_stop,
    resolve_sampling,
)

PromptLike = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Completion:
    """One choice for one prompt."""

    prompt: PromptLike
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None  # the stop string or stop token id that matched
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


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
            config.model, config.engine, config.scheduler, on_files=on_files, on_phase=on_phase
        )
        self.text = TextModel.of(text_assets_of(config.model, on_files), config.gateway)
        self.info = engine.info
        self._config = config
        self._inbox, self._outbox = Inbox(), Outbox()
        self._outbox.attach(lambda: None)  # `generate` looks for news itself
        self._loop = EngineLoop(
            engine.scheduler,
            engine.executor,
            self._inbox,
            self._outbox,
            WallClock(),
            engine.num_compiles,
            open_step_log(config.engine),
        )
        self._serial = itertools.count()
        self._stats = EngineStats()

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling: SamplingFields | Sequence[SamplingFields] | None = None,
        *,
        stop: str | Sequence[str] | None = None,
        n: int = 1,
        use_tqdm: bool = True,
    ) -> list[Completion]:
        """Completes every prompt, `n` times each, in the order of the prompts.

        `sampling` is one for all prompts, or one for each; its fields that are None take the
        model's defaults. Raises RequestError, before anything runs, when a prompt or a field is
        wrong.
        """
        wanted = _prompts(prompts)
        if sampling is None or isinstance(sampling, SamplingFields):
            sampling = [sampling or SamplingFields()] * len(wanted)
        if len(sampling) != len(wanted):
            raise RequestError(f"sampling has {len(sampling)} entries for {len(wanted)} prompts")
        generations = [
            self._prepare(prompt, each, stop, n)
            for prompt, each in zip(wanted, sampling, strict=True)
        ]
        answers: dict[tuple[int, int], list[Piece]] = {}
        tokens = 0
        with tqdm(total=len(generations) * n, disable=not use_tqdm, unit="seq") as bar:
            for index, piece in self._run(generations):
                answers.setdefault((index, piece.index), []).append(piece)
                tokens += len(piece.token_ids)
                if piece.finish is not None:
                    bar.update()
                    rate = tokens / max(bar.format_dict["elapsed"], 1e-9)
                    bar.set_postfix_str(f"{rate:.1f} tokens/s")
        return [
            _completion(prompt, answers[index, choice])
            for index, prompt in enumerate(wanted)
            for choice in range(n)
        ]

    def stream(
        self,
        prompt: PromptLike,
        sampling: SamplingFields | None = None,
        *,
        stop: str | Sequence[str] | None = None,
    ) -> Iterator[str]:
        """The text of one completion as it grows."""
        for _, piece in self._run([self._prepare(prompt, sampling, stop, 1)]):
            if piece.text:
                yield piece.text

    @property
    def stats(self) -> EngineStats:
        """The engine's load after its last step."""
        return self._stats

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The token ids of a conversation in the model's chat template, for `generate`."""
        if self.text.chat_template is None:
            raise RequestError("this model has no chat template; give a plain prompt")
        rendered = self.text.chat_template.render(messages)
        return self.text.tokenizer.encode(rendered, add_special_tokens=False)

    def _prepare(
        self,
        prompt: PromptLike,
        sampling: SamplingFields | None,
        stop: str | Sequence[str] | None,
        n: int,
    ) -> Generation:
        is_text = isinstance(prompt, str)
        ids = check_prompt(self.text.tokenizer.encode(prompt) if is_text else prompt, self.info)
        limits = self._config.gateway
        return Generation(
            id=f"offline-{next(self._serial)}",
            prompt=Prompt(ids, prompt if is_text else None),
            sampling=resolve_sampling(
                sampling or SamplingFields(),
                defaults=self.text.defaults,
                info=self.info,
                prompt_tokens=len(ids),
            ),
            stop=check_stop(
                stop, max_count=limits.max_stop_strings, max_chars=limits.max_stop_string_chars
            ),
            n=n,
        )

    def _run(self, generations: Sequence[Generation]) -> Iterator[tuple[int, Piece]]:
        """Pieces as they come, with the index of their generation. Aborts the rest when closed."""
        waiting = (
            (index, choice)
            for index, generation in enumerate(generations)
            for choice in range(generation.n)
        )
        running: dict[str, tuple[int, Choice]] = {}
        try:
            while True:
                for index, choice in itertools.islice(waiting, self._room(len(running))):
                    generation = generations[index]
                    request = _request(generation, choice)
                    running[request.id] = index, Choice(generation, choice, self.text.tokenizer)
                    self._inbox.put(Submit(request))
                if not running:
                    return
                self._loop.run_once()
                for update in self._take_updates():
                    if update.request_id not in running:
                        continue  # ended by a stop string; the engine did not know yet
                    index, choice_text = running[update.request_id]
                    piece = choice_text.feed(update)
                    if piece.finish is not None:
                        del running[update.request_id]
                        if update.finish is None:
                            self._inbox.put(Abort(update.request_id))
                    yield index, piece
        finally:
            self._inbox.put(*(Abort(request_id) for request_id in running))

    def _room(self, num_submitted: int) -> int:
        """How many sequences the queue surely takes now; the stats may be a step old."""
        not_running = num_submitted - self._stats.num_running
        return max(self.info.max_queue - max(self._stats.num_waiting, not_running), 0)

    def _take_updates(self) -> list[SequenceUpdate]:
        news = self._outbox.take()
        self._stats = news.stats
        for _, error in news.rejections:
            raise error
        for update in news.updates:
            if update.finish is FinishReason.ERROR:
                raise EngineError(update.error or "the engine failed")
        return news.updates


def _pin(config: PlatformConfig) -> None:
    jax.config.update("jax_platforms", config.jax_platforms)
    if jax.default_backend() != config.backend.value:
        raise ConfigError(
            f"platform.backend is {config.backend.value!r}, but this process already runs JAX on "
            f"{jax.default_backend()!r}; make the LLM first, or change the config"
        )


def _prompts(prompts: PromptLike | Sequence[PromptLike]) -> list[PromptLike]:
    """One prompt or several, as several."""
    if isinstance(prompts, str):
        return [prompts]
    ids = [item for item in prompts if isinstance(item, int)]
    return [ids] if ids else [item for item in prompts if not isinstance(item, int)]


def _request(generation: Generation, choice: int) -> Request:
    return Request(
        id=f"{generation.id}-{choice}",
        prompt=generation.prompt.ids,
        sampling=generation.sampling,
        choice=choice,
    )


def _completion(prompt: PromptLike, pieces: Sequence[Piece]) -> Completion:
    whole = join(pieces)
    assert whole.finish is not None
    return Completion(
        prompt=prompt,
        text=whole.text,
        token_ids=whole.token_ids,
        finish_reason=whole.finish,
        stop_reason=whole.stop_reason,
        logprobs=whole.logprobs,
        prompt_logprobs=whole.prompt_logprobs,
    )
