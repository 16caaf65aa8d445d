"""Ranges, limits and messages of every request field: one place for HTTP, gRPC and offline."""

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from typing import Any

from jserve.core.errors import PromptTooLong, RequestError
from jserve.core.request import (
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
    EngineInfo,
    SamplingParams,
)
from jserve.core.request_check import MAX_LOGIT_BIAS_VALUE, leaves_no_token
from jserve.gateway.defaults import SamplingDefaults

# Logits / temperature overflow float32 at smaller temperatures; vLLM raises them to it as well.
MIN_TEMPERATURE = 0.01
_INT32_MAX = 2**31 - 1
_FLOAT32_TINY = 2.0**-126  # the smallest normal number
# Larger floats are whole, and outside any bounds: what JSON's reader makes of longer integers.
MAX_EXACT = 2.0**53


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFields:
    """Fields of `SamplingParams` as a client gave them; None means not given.

    Values may be of any type: `resolve_sampling` checks them and names the field that is wrong.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | Mapping[str, float] | None = None  # keys may be text
    allowed_token_ids: Sequence[int] | None = None
    bad_token_ids: Sequence[int] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Sequence[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class CheckedIds(tuple[int, ...]):
    """Distinct token ids of the vocabulary, checked by `check_id_lists`."""

    __slots__ = ()


def check_id_lists(given: SamplingFields, info: EngineInfo) -> SamplingFields:
    """Checks the fields that may be as long as the vocabulary, once for all prompts of a request.

    Raises RequestError with `param`.
    """
    checked = {
        name: CheckedIds(_id_set(name, value, info.vocab))
        for name in ("allowed_token_ids", "bad_token_ids", "stop_token_ids")
        if (value := getattr(given, name)) is not None
    }
    return replace(given, **checked) if checked else given


def random_seed() -> int:
    return secrets.randbits(63)


def check_prompt(ids: Sequence[int], info: EngineInfo) -> tuple[int, ...]:
    """Returns the prompt; refuses an empty or too long one and ids out of range."""
    if len(ids) == 0:
        raise RequestError("prompt is empty; give at least one token", param="prompt")
    if len(ids) >= info.max_model_len:
        raise prompt_too_long(str(len(ids)), info.max_model_len)
    return token_ids("prompt", ids, info.vocab)


def prompt_too_long(num_tokens: str, most: int) -> PromptTooLong:
    """The error for a prompt of `num_tokens` where `most` is the context.

    Clients know it by its first words, which are OpenAI's, and shorten the prompt themselves.
    """
    return PromptTooLong(
        f"This model's maximum context length is {most} tokens, but the prompt has {num_tokens} "
        "tokens, and at least one output token must fit as well; shorten the prompt",
        param="prompt",
    )


def resolve_sampling(
    given: SamplingFields,
    *,
    defaults: SamplingDefaults,
    info: EngineInfo,
    prompt_tokens: int,
    make_seed: Callable[[], int] = random_seed,
) -> SamplingParams:
    """Checks and resolves every field: the given value, else the model's default.

    Raises RequestError with `param`, or PromptTooLong when prompt + max_tokens exceed the context.
    """
    max_tokens = _max_tokens(given.max_tokens, defaults, info, prompt_tokens)
    values: dict[str, Any] = {
        field.name: _resolve_bounded(field, given, getattr(defaults, field.name, field.default))
        for field in fields(SamplingParams)
        if "bounds" in field.metadata
    }
    values["top_k"] = min(max(values["top_k"], 0), info.vocab)
    if values["temperature"]:
        values["temperature"] = max(values["temperature"], MIN_TEMPERATURE)
    if given.seed is None:
        values["seed"] = make_seed()
    sampling = SamplingParams(
        **values,
        logit_bias=_logit_bias(given.logit_bias, info.vocab),
        allowed_token_ids=_allowed(given.allowed_token_ids, info.vocab),
        bad_token_ids=_id_set("bad_token_ids", given.bad_token_ids, info.vocab),
        max_tokens=max_tokens,
        min_tokens=integer("min_tokens", given.min_tokens, 0, 0, max_tokens, "max_tokens"),
        ignore_eos=boolean("ignore_eos", given.ignore_eos, default=False),
        stop_token_ids=_stop_token_ids(given, info),
    )
    _check_something_is_left(sampling, info)
    return sampling


def check_request_id(value: str, max_chars: int) -> str:
    """Checks a client's request id: printable ASCII, bounded, since headers and logs carry it."""
    if not 0 < len(value) <= max_chars or not (value.isascii() and value.isprintable()):
        raise RequestError(
            f"a request id must be 1 to {max_chars} printable ASCII characters", param="request_id"
        )
    return value


def check_stop(value: Any, *, max_count: int, max_chars: int) -> tuple[str, ...]:
    """Returns stop strings from None, one string or several."""
    if value is None:
        return ()
    stops: Sequence[Any] = [value] if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise RequestError("stop must be a string or a list of strings", param="stop")
    if len(stops) > max_count:
        raise RequestError(f"stop has {len(stops)} strings; at most {max_count}", param="stop")
    for stop in stops:
        if not 0 < len(stop) <= max_chars:
            raise RequestError(
                f"a stop string has {len(stop)} characters; it must have 1 to {max_chars}",
                param="stop",
            )
    return tuple(stops)


def number(
    name: str,
    value: Any,
    default: float | None,
    low: float,
    high: float,
    *,
    above_low: bool = False,
) -> float:
    """A finite number in [low, high], or in (low, high] with `above_low`.

    None stands for the default, if there is one.
    """
    if value is None and default is not None:
        return float(default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name} must be a number, not {_show(value)}", param=name)
    if not (low <= value <= high) or (above_low and value == low):  # NaN fails as well
        bound = f"above {low:g} and at most {high:g}" if above_low else f"from {low:g} to {high:g}"
        raise RequestError(f"{name} must be {bound}, not {_show(value)}", param=name)
    return float(value)


def integer(
    name: str, value: Any, default: int, low: int, high: int | None, high_name: str | None = None
) -> int:
    """An integer in [low, high], None: without end; `high_name` names the bound in the message."""
    if value is None:
        return default
    huge = isinstance(value, float) and MAX_EXACT < abs(value) < math.inf
    if isinstance(value, bool) or not (isinstance(value, int) or huge):
        raise RequestError(f"{name} must be an integer, not {_show(value)}", param=name)
    if isinstance(value, int) and low <= value and (high is None or value <= high):
        return value
    if high is None:
        raise RequestError(f"{name} must be at least {low}, not {_show(value)}", param=name)
    bound = f"{high_name} ({high})" if high_name else high
    raise RequestError(f"{name} must be from {low} to {bound}, not {_show(value)}", param=name)


def boolean(name: str, value: Any, *, default: bool) -> bool:
    """True or False; nothing else counts as either."""
    if value is None:
        return default
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, not {_show(value)}", param=name)
    return value


def is_deeper(value: Any, most: int) -> bool:
    """Whether JSON is nested deeper than `most` levels; without recursion."""
    level: list[Any] = [value] if type(value) in (dict, list) else []
    for _ in range(most):
        children: list[Any] = []
        for container in level:
            items = container.values() if type(container) is dict else container
            children += [item for item in items if type(item) in (dict, list)]
        if not children:
            return False
        level = children
    return True


def token_ids(name: str, value: Any, vocab: int) -> tuple[int, ...]:
    """A list of token ids of the vocabulary."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise RequestError(f"{name} must be a list of token ids, not {_show(value)}", param=name)
    ids: tuple[Any, ...] = tuple(value)
    # The checks of the whole sequence run in C; only a wrong one is searched for its culprit.
    if ids and (set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= vocab):
        wrong = next(i for i in ids if type(i) is not int or not 0 <= i < vocab)
        raise RequestError(
            f"{name} holds {_show(wrong)}; token ids of this model are integers from 0 to "
            f"{vocab - 1}",
            param=name,
        )
    return ids


def _resolve_bounded(field: Field[Any], given: SamplingFields, default: Any) -> Any:
    """Resolves a number that has bounds in `SamplingParams`."""
    name, value, bounds = field.name, getattr(given, field.name), field.metadata["bounds"]
    if value is None:
        return default
    if isinstance(field.default, float):
        found = number(name, value, default, bounds.low, bounds.high, above_low=bounds.above_low)
        # The device computes in float32, in which a smaller one would be the bound itself.
        return max(found, _FLOAT32_TINY) if bounds.above_low else found
    return integer(name, value, 0, bounds.low, bounds.high)


def _max_tokens(
    value: Any, defaults: SamplingDefaults, info: EngineInfo, prompt_tokens: int
) -> int:
    room = info.max_model_len - prompt_tokens
    if value is None:
        return room if defaults.max_tokens is None else min(room, defaults.max_tokens)
    max_tokens = integer("max_tokens", value, 0, 1, _INT32_MAX)
    if max_tokens > room:
        raise PromptTooLong(
            f"This model's maximum context length is {info.max_model_len} tokens, which "
            f"{prompt_tokens} prompt tokens + max_tokens {max_tokens} = "
            f"{prompt_tokens + max_tokens} exceed; shorten the prompt or set max_tokens to at most "
            f"{room}",
            param="max_tokens",
        )
    return max_tokens


def _id_set(name: str, value: Any, vocab: int) -> tuple[int, ...]:
    if type(value) is CheckedIds:
        return value
    if isinstance(value, Sequence) and len(value) > vocab:
        raise RequestError(
            f"{name} has {len(value)} ids, but this model has {vocab}; give each at most once",
            param=name,
        )
    return () if value is None else tuple(dict.fromkeys(token_ids(name, value, vocab)))


def _allowed(value: Any, vocab: int) -> tuple[int, ...]:
    allowed = _id_set("allowed_token_ids", value, vocab)
    if value is not None and not allowed:
        raise RequestError(
            "allowed_token_ids is empty, so nothing could be generated; leave it out to allow all",
            param="allowed_token_ids",
        )
    return allowed


def _stop_token_ids(given: SamplingFields, info: EngineInfo) -> tuple[int, ...]:
    stops = _id_set("stop_token_ids", given.stop_token_ids, info.vocab)
    num_eos = len(set(info.eos_token_ids) - set(stops))
    if len(stops) + num_eos > MAX_STOP_TOKEN_IDS:
        raise RequestError(
            f"stop_token_ids has {len(stops)} ids; at most {MAX_STOP_TOKEN_IDS - num_eos} fit "
            f"beside the model's {num_eos} end-of-sequence ids",
            param="stop_token_ids",
        )
    return stops


def _logit_bias(value: Any, vocab: int) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        raise RequestError(
            f"logit_bias must map token ids to numbers, not {_show(value)}", param="logit_bias"
        )
    if len(value) > MAX_LOGIT_BIAS:
        raise RequestError(
            f"logit_bias has {len(value)} entries; at most {MAX_LOGIT_BIAS}", param="logit_bias"
        )
    biases: dict[int, float] = {}
    for key, bias in value.items():
        # JSON keys are text; "+7", "٧" and "1_0" are not ids.
        text = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10
        token_id: Any = int(key) if text else key
        token_ids("logit_bias", (token_id,), vocab)
        if token_id in biases:
            raise RequestError(f"logit_bias names token {token_id} twice", param="logit_bias")
        biases[token_id] = number(
            f"logit_bias.{token_id}", bias, None, -MAX_LOGIT_BIAS_VALUE, MAX_LOGIT_BIAS_VALUE
        )
    return tuple(sorted(biases.items()))


def _check_something_is_left(sampling: SamplingParams, info: EngineInfo) -> None:
    """Refuses masks that together leave no token to sample."""
    most_masked = len(sampling.bad_token_ids) + len(sampling.stop_token_ids) + MAX_STOP_TOKEN_IDS
    if most_masked < (len(sampling.allowed_token_ids) or info.vocab):
        return  # without making sets of lists as long as the vocabulary
    if leaves_no_token(sampling, info):
        raise RequestError(
            "allowed_token_ids, bad_token_ids and min_tokens together leave no token to generate",
            param="allowed_token_ids" if sampling.allowed_token_ids else "bad_token_ids",
        )


def _show(value: Any) -> str:
    """Returns `repr` of a value, bounded, for a message."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
