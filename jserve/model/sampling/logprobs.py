"""Raw log-probabilities of a token and of the best alternatives, with its rank."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from jserve.core.request import MAX_LOGPROBS
from jserve.model.sampling import mass as masses
from jserve.model.sampling.sharded_vocab import Axes, sums, take_tokens, top_k, width


class Logprobs(NamedTuple):
    """Log-softmax of unprocessed logits at some positions (vLLM's `raw_logprobs`)."""

    token: Float32[Array, " rows"]  # the chosen token's
    rank: Int32[Array, " rows"]  # tokens at least as likely as it, itself included
    top_ids: Int32[Array, "rows most"]  # MAX_LOGPROBS of them, best first, ties by lower id
    top: Float32[Array, "rows most"]


def no_logprobs(rows: int) -> Logprobs:
    return Logprobs(
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows,), jnp.int32),
        jnp.zeros((rows, MAX_LOGPROBS), jnp.int32),
        jnp.zeros((rows, MAX_LOGPROBS), jnp.float32),
    )


def raw_logprobs(
    logits: Float32[Array, "rows vocab"], tokens: Int32[Array, " rows"], axes: Axes = ()
) -> Logprobs:
    """The log-probabilities of `tokens` under `logits`.

    The normalizer is an integer sum (`mass`), so the result depends neither on other rows nor on
    how the vocabulary is split over the devices of `axes` (see `sharded_vocab`). Callers give
    at least 8 rows: XLA's CPU code rounds the logarithm of fewer than 8 numbers differently.
    A vocabulary smaller than MAX_LOGPROBS fills the rest of `top` with -inf.
    """
    num_top = min(MAX_LOGPROBS, width(logits, axes))
    top, top_ids = top_k(logits, num_top, axes)
    largest = top[:, :1]
    weight = jnp.exp(masses.scaled(logits, largest, jnp.ones_like(largest)))
    shift = masses.shift_from_weights(weight, axes)
    whole = masses.total(masses.digits(weight, shift), weight > 0, axes)
    log_total = masses.log(whole, shift)[:, None]
    token = take_tokens(logits, tokens, axes)
    (rank,) = sums((logits >= token).astype(jnp.int32), axes=axes)
    spare = ((0, 0), (0, MAX_LOGPROBS - num_top))
    return Logprobs(
        ((token - largest) - log_total)[:, 0],
        rank,
        jnp.pad(top_ids, spare),
        jnp.pad((top - largest) - log_total, spare, constant_values=-jnp.inf),
    )


def prompt_logprobs(
    logits: Float32[Array, "rows vocab"], targets: Int32[Array, " rows"], axes: Axes = ()
) -> Logprobs:
    """`raw_logprobs` of the next prompt tokens `targets` of a tile of prompt positions."""
    return raw_logprobs(logits, targets, axes)
