"""Sampling in float64 NumPy with full sorts, written after vLLM V1; states for tests."""

from collections import Counter
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jserve.core.request import SamplingParams
from jserve.model.sampling.host import host_row
from jserve.model.sampling.sample import sample
from jserve.model.sampling.state import (
    SamplerState,
    admit,
    admit_processors,
    count_chunk,
    init_sampler_state,
)

draw = jax.jit(sample, static_argnames="config")
_admit, _admit_processors, _count_chunk = map(jax.jit, (admit, admit_processors, count_chunk))

EOS = (2,)
PROMPT_LEN = 8

# One request of every kind; the vocabulary has at least 100 ids.
KINDS = (
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {},
    {"temperature": 0.7, "logprobs": 20},
    {"top_k": 5},
    {"top_k": 50},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"min_p": 0.1},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "temperature": 1.5},
    {"logit_bias": ((3, 5.0), (60, -2.0)), "top_p": 0.8},
    {"allowed_token_ids": tuple(range(0, 100, 3)), "bad_token_ids": (3, 33)},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5, "top_k": 20, "logprobs": 0},
    {"min_tokens": 50, "max_tokens": 60, "stop_token_ids": (1, 5), "top_p": 0.9},
)


def requests_of_every_kind(
    vocab: int,
) -> tuple[list[SamplingParams], np.ndarray, list[list[int]], list[list[int]], np.ndarray]:
    """KINDS with logits [kinds, vocab], prompts, outputs and positions."""
    rng = np.random.default_rng(vocab)
    n = len(KINDS)
    return (
        [SamplingParams(**{"seed": 1000 + i, **kind}) for i, kind in enumerate(KINDS)],
        np.float32(rng.normal(size=(n, vocab)) * 2),
        rng.integers(0, vocab, size=(n, 6)).tolist(),
        rng.integers(0, vocab, size=(n, 4)).tolist(),
        np.int32(rng.integers(12, 30, size=n)),
    )


def build(
    params: Sequence[SamplingParams],
    vocab: int,
    *,
    choices: Sequence[int] | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    outputs: Sequence[Sequence[int]] | None = None,
    slots: Sequence[int] | None = None,
    num_slots: int | None = None,
) -> SamplerState:
    """A state whose slot `slots[i]` (by default i) samples with `params[i]`."""
    n = len(params)
    slots = list(range(n)) if slots is None else list(slots)
    state = init_sampler_state(num_slots or n, vocab)
    rows = [
        host_row(
            p,
            choice=choices[i] if choices else 0,
            eos_token_ids=EOS,
            prompt_len=PROMPT_LEN,
            vocab=vocab,
        )
        for i, p in enumerate(params)
    ]
    words = np.stack([r.slot for r in rows]).view(np.int32).reshape(n, -1)
    state = _admit(state, jnp.asarray(slots, jnp.int32), jnp.asarray(words))
    special = [
        (s, r.processors) for s, r in zip(slots, rows, strict=True) if r.processors is not None
    ]
    if special:
        words = np.stack([r for _, r in special]).view(np.int32).reshape(len(special), -1)
        at = jnp.asarray([s for s, _ in special], jnp.int32)
        state = _admit_processors(state, at, jnp.asarray(words))
    for lists, is_prompt in ((prompts, True), (outputs, False)):
        flat = [(s, t) for s, ts in zip(slots, lists or [], strict=False) for t in ts]
        if flat:
            at, ids = np.asarray(flat, np.int32).T
            state = _count_chunk(
                state,
                jnp.asarray(at),
                jnp.asarray(ids),
                jnp.full(len(ids), is_prompt),
                jnp.ones(len(ids), bool),
            )
    return state


def processed(
    logits: np.ndarray,
    params: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
) -> np.ndarray:
    """The processors and penalties of vLLM on one row, in float64."""
    x = logits.astype(np.float64)
    if params.allowed_token_ids:
        forbidden = np.ones(x.size, bool)
        forbidden[list(params.allowed_token_ids)] = False
        x[forbidden] = -np.inf
    x[list(params.bad_token_ids)] = -np.inf
    if len(output) < params.min_tokens:
        x[list(set(params.stop_token_ids) | set(EOS))] = -np.inf
    for token, bias in params.logit_bias:
        x[token] += bias
    seen = sorted(set(prompt) | set(output))
    for token in seen:
        r = params.repetition_penalty
        x[token] = x[token] / r if x[token] > 0 else x[token] * r
    for token, count in Counter(output).items():
        x[token] -= params.frequency_penalty * count
        x[token] -= params.presence_penalty
    return x


def softmax(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        e = np.exp(x - x.max())
    return e / e.sum()


def truncated(
    x: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> np.ndarray:
    """True for the tokens of a processed row that may be drawn: bool [vocab]."""
    p = softmax(x / temperature)
    keep = (p >= min_p * p.max()) & (x > -np.inf)
    if 0 < top_k < x.size:
        kept = np.where(keep, x, -np.inf)
        keep &= kept >= np.sort(kept)[-top_k]
    if top_p < 1:
        p = softmax(np.where(keep, x / temperature, -np.inf))
        order = np.lexsort((np.arange(x.size), -x))  # best first, ties by lower id
        before = np.cumsum(p[order]) - p[order]
        nucleus = np.zeros(x.size, bool)
        nucleus[order] = before < top_p
        nucleus[order[0]] = True
        keep &= nucleus
    return keep


def distribution(
    logits: np.ndarray,
    params: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
) -> np.ndarray:
    """The exact probabilities of the next token, float64 [vocab]."""
    x = processed(logits, params, prompt, output)
    if params.temperature < 1e-5:
        return np.eye(x.size)[np.argmax(x)]
    keep = truncated(x, params.temperature, params.top_k, params.top_p, params.min_p)
    return softmax(np.where(keep, x / params.temperature, -np.inf))
