"""Requests of clients and the updates they get back, as plain frozen data."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# Static widths of the per-slot sampling state on the device. A request beyond one of them is
# refused with the limit in the message.
MAX_STOP_TOKEN_IDS = 32  # stop_token_ids and the model's end-of-sequence ids together
MAX_LOGIT_BIAS = 300  # the OpenAI API's limit
MAX_LOGPROBS = 20


class FinishReason(enum.Enum):
    """Cause of a sequence's end; the values are the wire names."""

    STOP = "stop"  # an end-of-sequence id, a stop id, or (in the gateway) a stop string
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Bounds:
    """Values that a client may give, from `low` to `high`."""

    low: float
    high: float
    above_low: bool = False  # `low` itself is refused


def _bounded(default: float | None, low: float, high: float, *, above_low: bool = False) -> Any:
    return field(default=default, metadata={"bounds": Bounds(low, high, above_low)})


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Rules for choosing the next token. Defaults are neutral: plain sampling at temperature 1.

    This is the one declaration of sampling fields: the wire, the gateway's checks and the records
    of the device derive from it. Fields without `Bounds` have rules of their own in the gateway.

    Semantics, order of processors and ties follow vLLM. `seed` is always set once a request has
    left the gateway; an unseeded request gets a random one there.
    """

    temperature: float = _bounded(1.0, 0, 100)  # 0 is greedy
    top_k: int = _bounded(0, -1, 2**31 - 1)  # 0 keeps the whole vocabulary
    top_p: float = _bounded(1.0, 0, 1, above_low=True)
    min_p: float = _bounded(0.0, 0, 1)
    repetition_penalty: float = _bounded(1.0, 0, 100, above_low=True)  # over prompt and output
    presence_penalty: float = _bounded(0.0, -2, 2)  # over output
    frequency_penalty: float = _bounded(0.0, -2, 2)  # over output
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, bias), ids distinct
    allowed_token_ids: tuple[int, ...] = ()  # empty allows all
    bad_token_ids: tuple[int, ...] = ()
    seed: int = _bounded(0, -(2**63), 2**63 - 1)
    max_tokens: int = 16  # output tokens, at least 1
    min_tokens: int = 0  # stop ids are masked until then
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    # Top alternatives per output token, by raw (unprocessed) log-probability; None for no output.
    logprobs: int | None = _bounded(None, 0, MAX_LOGPROBS)
    prompt_logprobs: int | None = _bounded(None, 0, MAX_LOGPROBS)  # the same for prompt tokens

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on how often tokens occurred before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def has_token_rules(self) -> bool:
        """Whether single tokens are biased, allowed or forbidden: one row of the vocabulary."""
        return bool(self.logit_bias or self.allowed_token_ids or self.bad_token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstraintSpec:
    """Bounds on the text of an answer beyond its sampling parameters.

    With `reasoning_end` the answer begins with reasoning, which a grammar leaves alone: what
    follows these tokens is bound. Reasoning begins with `reasoning_start`, or with the answer
    where that is empty; an answer that does not begin with it has none.
    """

    grammar: str = ""  # in llguidance's form, JSON or Lark; empty: none
    fit: bool = False  # the text ends within max_tokens, by a short way if need be
    reasoning_start: tuple[int, ...] = ()
    reasoning_end: tuple[int, ...] = ()
    bad_sequences: tuple[tuple[int, ...], ...] = ()  # tokens that never come in a row
    max_reasoning_tokens: int | None = None  # at which `reasoning_end` is forced; None: no bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to generate in the engine; `n` choices are `n` requests.

    `choice` is folded into the sampling key, so the choices of one seed differ. Smaller
    `priority` is served first; among equals the tenants take turns, and of one tenant the earlier
    arrival is first.

    `output` are tokens that an engine which is gone has generated; the sequence goes on after
    them, exactly as it would have there. They count as output for limits, penalties and the
    sampling key, and are not sent again, nor are log-probabilities of the prompt.
    """

    id: str  # unique among live requests
    prompt: tuple[int, ...]  # token ids, not empty
    sampling: SamplingParams = field(default_factory=SamplingParams)
    choice: int = 0
    priority: int = 0
    output: tuple[int, ...] = ()  # fewer than sampling.max_tokens
    resumed: bool = False  # an engine had accepted it before: it is never refused for a full queue
    deadline_s: float | None = None  # seconds from now; dropped when they have passed
    tenant: str = ""  # who sent it: the name of a key, or an address
    tenant_slots: int = 0  # the most slots that the tenant may hold at a time; 0: no bound
    # Computed tokens are shared among requests of the same salt only. Whoever knows a salt can
    # learn by timing what was asked under it, so no log shows it.
    cache_salt: str = field(default="", repr=False)
    constraint: ConstraintSpec | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Raw log-probabilities at one position: of the token itself and of the best alternatives."""

    token_id: int
    logprob: float
    rank: int  # 1 is the most likely token
    top: tuple[tuple[int, float], ...]  # (token id, logprob), best first


class SequenceUpdate(NamedTuple):
    """New tokens of one sequence after one step. `finish` is set on its last update.

    A tuple: each step makes one per sequence.

    `logprobs` is parallel to `tokens` when requested. `prompt_logprobs` comes once, with the
    first token, and has one entry per prompt token; the first is None.
    """

    request_id: str
    tokens: tuple[int, ...]  # a stop token is included
    finish: FinishReason | None = None
    logprobs: Sequence[TokenLogprobs] | None = None
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    queue_s: float | None = (
        None  # seconds from arrival to first scheduling; set on the first update
    )
    error: str | None = None  # set when finish is ERROR
    cached_tokens: int = 0  # prompt tokens that were not computed; set on the first update

    def then(self, later: "SequenceUpdate") -> "SequenceUpdate":
        """Merges this update with the next one of the same sequence."""
        if self.logprobs is None or later.logprobs is None:
            logprobs = later.logprobs if self.logprobs is None else self.logprobs
        else:
            logprobs = (*self.logprobs, *later.logprobs)
        prompt = self.prompt_logprobs
        return later._replace(
            tokens=self.tokens + later.tokens,
            logprobs=logprobs,
            prompt_logprobs=later.prompt_logprobs if prompt is None else prompt,
            queue_s=later.queue_s if self.queue_s is None else self.queue_s,
            cached_tokens=self.cached_tokens + later.cached_tokens,
        )


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Description that an engine gives to a gateway when they connect."""

    model: str
    vocab: int
    max_model_len: int  # prompt and output tokens of one sequence
    num_slots: int
    num_pages: int  # without the null page
    page_size: int
    max_queue: int
    eos_token_ids: tuple[int, ...]
    numerics: str = ""  # digest of all that tokens depend on: engines of the same give the same
    # With `page_size` all that the digests of pages depend on, beside salt and tokens; see `pages`.
    weights: str = ""  # digest
    kv_dtype: str = ""
