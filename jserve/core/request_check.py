"""The check of a request at an engine's border: whatever passes can be packed and run.

A gateway checks more, with messages for its clients. This is for what did not come through one.
"""

import math
from collections.abc import Collection
from dataclasses import fields

from jserve.core.errors import PromptTooLong, RequestError
from jserve.core.request import (
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
    Bounds,
    ConstraintSpec,
    EngineInfo,
    Request,
    SamplingParams,
)

MAX_LOGIT_BIAS_VALUE = 100.0
_MAX_ID_CHARS = 256
_MAX_TENANT_CHARS = 256
_MAX_INT32 = 2**31 - 1
MAX_GRAMMAR_CHARS = 1 << 20
_MAX_MARKER_TOKENS = 64
_MAX_BAD_SEQUENCES = 1024
_BOUNDED: tuple[tuple[str, Bounds, bool], ...] = tuple(
    (field.name, field.metadata["bounds"], field.default is None)
    for field in fields(SamplingParams)
    if "bounds" in field.metadata
)


def check_request(request: Request, info: EngineInfo) -> None:
    """Raises RequestError, with `param`, if the engine of `info` could not run `request`."""
    if not 0 < len(request.id) <= _MAX_ID_CHARS:
        _refuse("id", f"has {len(request.id)} characters, not 1 to {_MAX_ID_CHARS}")
    for name, value in (("choice", request.choice), ("priority", request.priority)):
        if not -_MAX_INT32 <= value <= _MAX_INT32 or (name == "choice" and value < 0):
            _refuse(name, f"is {value}")
    if len(request.tenant) > _MAX_TENANT_CHARS:
        _refuse("tenant", f"has {len(request.tenant)} characters; at most {_MAX_TENANT_CHARS}")
    if not 0 <= request.tenant_slots <= _MAX_INT32:
        _refuse("tenant_slots", f"is {request.tenant_slots}, not from 0 to {_MAX_INT32}")
    _check_lengths(request, info)
    _check_ids("prompt", request.prompt, info.vocab)
    _check_ids("output", request.output, info.vocab)
    deadline_s = request.deadline_s
    if deadline_s is not None and not (math.isfinite(deadline_s) and deadline_s >= 0):
        _refuse("deadline_s", f"is {deadline_s}")
    if request.constraint is not None:
        _check_constraint(request.constraint, info)
    _check_sampling(request.sampling, info, room=info.max_model_len - len(request.prompt))


def leaves_no_token(sampling: SamplingParams, info: EngineInfo) -> bool:
    """Whether masks together forbid every token, at least until `min_tokens`.

    End-of-sequence ids are masked until then even if they are ignored, as in vLLM.
    """
    masked: Collection[int] = set(sampling.bad_token_ids)
    if sampling.min_tokens:
        masked |= {*sampling.stop_token_ids, *info.eos_token_ids}
    if sampling.allowed_token_ids:
        return masked.issuperset(sampling.allowed_token_ids)
    return len(masked) >= info.vocab


def _check_lengths(request: Request, info: EngineInfo) -> None:
    prompt, output = len(request.prompt), len(request.output)
    if prompt == 0:
        _refuse("prompt", "is empty; send at least one token")
    if prompt + output >= info.max_model_len:
        raise PromptTooLong(
            f"the prompt has {prompt} tokens and the output so far {output}; the context of "
            f"{info.max_model_len} must hold one more",
            param="prompt",
        )
    most = request.sampling.max_tokens
    if not 1 <= most <= _MAX_INT32:
        _refuse("max_tokens", f"is {most}; it must be at least 1")
    if output >= most:
        _refuse("output", f"has {output} tokens, and max_tokens is {most}: nothing is left to do")


def _check_constraint(constraint: ConstraintSpec, info: EngineInfo) -> None:
    if len(constraint.grammar) > MAX_GRAMMAR_CHARS:
        _refuse("grammar", f"has {len(constraint.grammar)} characters; at most {MAX_GRAMMAR_CHARS}")
    for name in ("reasoning_start", "reasoning_end"):
        ids: tuple[int, ...] = getattr(constraint, name)
        if len(ids) > _MAX_MARKER_TOKENS:
            _refuse(name, f"has {len(ids)} ids; at most {_MAX_MARKER_TOKENS}")
        _check_ids(name, ids, info.vocab)
    if len(constraint.bad_sequences) > _MAX_BAD_SEQUENCES:
        _refuse("bad_words", f"has {len(constraint.bad_sequences)}; at most {_MAX_BAD_SEQUENCES}")
    for ids in constraint.bad_sequences:
        if not 0 < len(ids) <= _MAX_MARKER_TOKENS:
            _refuse(
                "bad_words", f"has a word of {len(ids)} tokens; 1 to {_MAX_MARKER_TOKENS} may be"
            )
        _check_ids("bad_words", ids, info.vocab)
    most = constraint.max_reasoning_tokens
    if most is not None and not 0 <= most <= _MAX_INT32:
        _refuse("max_reasoning_tokens", f"is {most}, not from 0 to {_MAX_INT32}")
    if most is not None and not constraint.reasoning_end:
        _refuse("max_reasoning_tokens", "is there, but nothing that ends the reasoning")


def _check_sampling(sampling: SamplingParams, info: EngineInfo, room: int) -> None:
    for name, bounds, may_be_none in _BOUNDED:
        value: float | None = getattr(sampling, name)
        if value is None and may_be_none:
            continue
        # NaN is in no range.
        if value is None or not bounds.low <= value <= bounds.high:
            _refuse(name, f"is {value}, not from {bounds.low:g} to {bounds.high:g}")
        if bounds.above_low and value == bounds.low:
            _refuse(name, f"is {value}; it must be above")
    most = min(sampling.max_tokens, room)
    if not 0 <= sampling.min_tokens <= most:
        _refuse("min_tokens", f"is {sampling.min_tokens}, not from 0 to {most}")
    for name in ("allowed_token_ids", "bad_token_ids", "stop_token_ids"):
        ids: tuple[int, ...] = getattr(sampling, name)
        if len(ids) > info.vocab:
            _refuse(name, f"has {len(ids)} ids; the vocabulary has {info.vocab}")
        _check_ids(name, ids, info.vocab)
    num_stops = len({*sampling.stop_token_ids, *info.eos_token_ids})
    if num_stops > MAX_STOP_TOKEN_IDS:
        _refuse(
            "stop_token_ids",
            f"and the model's end-of-sequence ids are {num_stops}; at most {MAX_STOP_TOKEN_IDS}",
        )
    _check_biases(sampling.logit_bias, info.vocab)
    if leaves_no_token(sampling, info):
        name = "allowed_token_ids" if sampling.allowed_token_ids else "bad_token_ids"
        _refuse(name, "and the other masks together leave no token to generate")


def _check_biases(biases: tuple[tuple[int, float], ...], vocab: int) -> None:
    if len(biases) > MAX_LOGIT_BIAS:
        _refuse("logit_bias", f"has {len(biases)} entries; at most {MAX_LOGIT_BIAS}")
    ids = tuple(token for token, _ in biases)
    _check_ids("logit_bias", ids, vocab)
    if len(set(ids)) < len(ids):
        _refuse("logit_bias", "names a token twice")
    for token, bias in biases:
        if not -MAX_LOGIT_BIAS_VALUE <= bias <= MAX_LOGIT_BIAS_VALUE:
            _refuse("logit_bias", f"of token {token} is {bias}, not from -100 to 100")


def _check_ids(name: str, ids: tuple[int, ...], vocab: int) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < vocab):
        wrong = next(token for token in ids if not 0 <= token < vocab)
        _refuse(name, f"holds {wrong}; token ids of this model are from 0 to {vocab - 1}")


def _refuse(name: str, fault: str) -> None:
    raise RequestError(f"{name} {fault}", param=name)
