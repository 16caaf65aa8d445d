"""The request plane without a wire: prompts in, validated generations, deltas of text out.

Every front end (HTTP, gRPC) parses into `Prompt` and `SamplingFields`, calls `prepare`, iterates
`run`, and writes the deltas in its own format.
"""

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import TypedDict, Unpack

from jserve.core.clock import Clock
from jserve.core.errors import Unavailable, UnknownModel
from jserve.core.request import ConstraintSpec, EngineInfo, Request
from jserve.gateway.bad_words import bad_sequences
from jserve.gateway.buffers import BufferAccount, BufferBudget
from jserve.gateway.cache_salts import given_salt
from jserve.gateway.chat import ChatTemplate
from jserve.gateway.chat_formats import ChatFormats
from jserve.gateway.config import GatewayConfig
from jserve.gateway.defaults import SamplingDefaults
from jserve.gateway.engine_client import EngineClient
from jserve.gateway.fingerprint import fingerprint
from jserve.gateway.grammar_process import GrammarProcess
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.output import GenerationRequest, OutputDelta, Prompt
from jserve.gateway.output_stream import OutputStream
from jserve.gateway.prompts import PromptMaker
from jserve.gateway.structured import check_sampling
from jserve.gateway.tenants import LOCAL, Caller, TenantCounts, most_sequences
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
from jserve.grammar.source import GrammarSource

__all__ = ["GenerationRequest", "OutputDelta", "OutputStream", "Prompt", "RequestPlane"]

_PRIORITY_LIMIT = 2**31 - 1


class RequestOptions(TypedDict, total=False):
    """Options of a request beside its sampling; None is the same as not given."""

    stop: str | Sequence[str] | None
    n: int | None
    priority: int | None
    echo: bool | None  # the text of each choice starts with the prompt's text
    skip_special_tokens: bool | None
    include_stop_str_in_output: bool | None
    default_max_tokens: int | None  # instead of the model's default; the context bounds it
    shown_tokens: frozenset[int] | None  # special tokens that are text all the same
    cache_salt: str | None  # computed prompts are shared with requests of the same salt only


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
        bounded: bool = True,
    ) -> None:
        """Without `bounded` the caller is trusted, as in its own process.

        Then `n` is as large as it likes, since `engine` refuses none, and it may be slow to read.
        """
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.prompts = PromptMaker(tokenizer, chat_template, config, lambda: self.info)
        self.grammars = GrammarProcess(tokenizer.tokenizer_json, lambda: self.info)
        source = None if chat_template is None else chat_template.source
        self.formats = ChatFormats.of_template(source, config)
        self.defaults = defaults
        self.engine = engine
        self.config = config
        self.clock = clock
        self._bounded = bounded
        self.tenants = TenantCounts()
        self.buffers = BufferBudget(config.max_buffer_bytes, config.max_request_buffer_bytes)
        # Held while a long list of log-probabilities is encoded. Several at a time would finish no
        # sooner, but the event loop would wait for a piece of each.
        self.large_answers = asyncio.Lock()
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

    @property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint; changes with all that an answer depends on."""
        return fingerprint(self.info, self.defaults)

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names that requests may use; the first is that of answers.

        Raises Unavailable while the first is not known yet.
        """
        served = self.config.served_model_name or self.info.model
        return tuple(dict.fromkeys((served, *filter(None, self.config.served_model_aliases))))

    def check_model(self, name: str | None) -> None:
        """Raises UnknownModel unless `name` is None, empty or a served one.

        Raises Unavailable while the served name is not known yet.
        """
        names = self.model_names
        if name and name not in names:
            served = " or ".join(map(repr, names))
            raise UnknownModel(
                f"model {name[:200]!r} is not served here; {served} is", param="model"
            )

    @cached_property
    def special_ids(self) -> Mapping[str, int]:
        """Ids of the vocabulary's special tokens by their text."""
        return {
            token["content"]: int(token_id)
            for token_id, token in self.tokenizer.added_tokens().items()
            if token["special"]
        }

    @cached_property
    def marker_ids(self) -> frozenset[int]:
        """Special tokens that the parsers of calls and reasoning must see."""
        ids = (self.special_ids.get(text) for text in self.formats.markers)
        return frozenset(token_id for token_id in ids if token_id is not None)

    def text_ids(self, text: str) -> tuple[int, ...]:
        """The tokens of a short text inside of an answer."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def with_bad_words(
        self, constraint: ConstraintSpec | None, words: Sequence[str]
    ) -> ConstraintSpec | None:
        """Returns `constraint`, with the words that must not be generated.

        Raises RequestError for an empty word, and for too many or too long ones.
        """
        if not words:
            return constraint
        found = bad_sequences(words, self.text_ids)
        return replace(constraint or ConstraintSpec(), bad_sequences=found)

    async def constraint(
        self, source: GrammarSource | None, caller: Caller = LOCAL
    ) -> ConstraintSpec | None:
        """Returns what binds an answer to `source`, for `prepare`; None for none.

        The grammar is compiled beside the event loop, unless it was before. Raises RequestError if
        it is wrong, not supported or too complex, and Unavailable before an engine was seen.
        """
        if source is None:
            return None
        return ConstraintSpec(grammar=await self.grammars.text(source, caller.name), fit=source.fit)

    def prepare(
        self,
        *,
        id: str,  # noqa: A002
        prompt: Prompt,
        sampling: SamplingFields,
        caller: Caller = LOCAL,
        constraint: ConstraintSpec | None = None,
        **options: Unpack[RequestOptions],
    ) -> GenerationRequest:
        """Checks every field and resolves the defaults; None means not given.

        The priority of a caller who may not set one is 0. max_tokens 0 is allowed with `echo` or
        prompt_logprobs: only the prompt is looked at, and nothing is bound by `constraint`, which
        else is that of every choice.
        Raises RequestError (with `param`), PromptTooLong, Unavailable before the engine was
        ever seen (its context length is not known yet).
        """
        info, config = self.info, self.config
        ids = check_prompt(prompt.ids, info)
        echoes = boolean("echo", options.get("echo"), default=False)
        priority = integer(
            "priority", options.get("priority"), 0, -_PRIORITY_LIMIT, _PRIORITY_LIMIT
        )
        prompt_only = (
            type(sampling.max_tokens) is int
            and sampling.max_tokens == 0
            and (echoes or sampling.prompt_logprobs is not None)
        )
        if prompt_only:
            sampling = replace(sampling, max_tokens=1)
        defaults = self.defaults
        if (default := options.get("default_max_tokens")) is not None:
            defaults = replace(defaults, max_tokens=default)
        resolved = resolve_sampling(sampling, defaults=defaults, info=info, prompt_tokens=len(ids))
        if constraint is not None:
            check_sampling(resolved, constraint, info)
        return GenerationRequest(
            id=check_request_id(id, config.max_request_id_chars),
            prompt=Prompt(ids, prompt.text),
            sampling=resolved,
            stop=check_stop(
                options.get("stop"),
                max_count=config.max_stop_strings,
                max_chars=config.max_stop_string_chars,
            ),
            n=self._choices(options.get("n")),
            priority=priority if caller.may_set_priority else 0,
            caller=caller,
            echo=echoes,
            skip_special_tokens=boolean(
                "skip_special_tokens", options.get("skip_special_tokens"), default=True
            ),
            shown_tokens=options.get("shown_tokens") or frozenset(),
            include_stop_str_in_output=boolean(
                "include_stop_str_in_output",
                options.get("include_stop_str_in_output"),
                default=False,
            ),
            prompt_only=prompt_only,
            cache_salt=given_salt(options.get("cache_salt")) or caller.cache_salt,
            constraint=None if prompt_only else constraint,
        )

    def run(
        self,
        generation: GenerationRequest,
        metrics: GatewayMetrics | None = None,
        account: BufferAccount | None = None,
        *,
        deadline_s: float | None = None,
    ) -> OutputStream:
        """Starts every choice. Raises what `EngineClient.submit` does.

        `metrics` count the output that is read. What is not read is counted to `account`, which
        several generations may share, else to one of its own. The engine drops what is not done in
        `deadline_s` seconds, also when this gateway cannot tell it to.
        """
        if self.draining:
            raise shutting_down()
        if self._bounded:
            self.tenants.start(generation.caller, generation.n, self._most_sequences)
        try:
            return self._start(generation, metrics, account, deadline_s)
        except BaseException:
            self._end(generation)
            raise

    def _start(
        self,
        generation: GenerationRequest,
        metrics: GatewayMetrics | None,
        account: BufferAccount | None,
        deadline_s: float | None,
    ) -> OutputStream:
        caller = generation.caller
        max_slots = caller.max_slots or self.config.max_tenant_slots or 0
        serial = next(self._serial)
        requests = [
            Request(
                id=f"{self._id_prefix}-{serial}-{choice}",
                prompt=generation.prompt.ids,
                sampling=generation.sampling,
                choice=choice,
                priority=generation.priority,
                deadline_s=deadline_s,
                tenant=caller.name,
                tenant_slots=max_slots,
                cache_salt=generation.cache_salt,
                constraint=generation.constraint,
            )
            for choice in range(generation.n)
        ]
        stream = self.engine.submit(requests)
        own = self.buffers.open(caller.name) if account is None and self._bounded else None
        if (charged := account or own) is not None:
            stream.charge(charged)
        deltas = OutputStream(
            generation,
            stream,
            [request.id for request in requests],
            None if metrics is None else metrics.start(generation),
            own,
            tokenizer=self.tokenizer,
            clock=self.clock,
            on_end=self.forget,
        )
        self._live.add(deltas)
        self._idle.clear()
        return deltas

    def preparing(
        self, caller: Caller, num_prompts: int, n: int | None
    ) -> AbstractContextManager[None]:
        """Counts the sequences of a request, prompts × n, before there is any work on them.

        A text that is only tokenized, or detokenized, counts as one.
        Raises RequestError if `n` is out of range. Raises Overloaded, when it is entered, if they
        are too many for one tenant.
        """
        choices = self._choices(n)
        return self.tenants.preparing(caller, num_prompts * choices, self._most_sequences)

    def _choices(self, n: int | None) -> int:
        most = min(self.config.max_choices, self.info.num_slots + self.info.max_queue)
        return integer("n", n, 1, 1, most if self._bounded else None)

    @property
    def _most_sequences(self) -> int:
        info = self.info
        return most_sequences(info.num_slots, info.max_queue, self.config.max_tenant_sequences)

    def _end(self, generation: GenerationRequest) -> None:
        if self._bounded:
            self.tenants.end(generation.caller, generation.n)

    def forget(self, deltas: OutputStream) -> None:
        """Removes a stream that has ended; called by it."""
        if deltas in self._live:
            self._live.remove(deltas)
            self._end(deltas.generation)
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
