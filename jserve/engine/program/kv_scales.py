"""Scales for K and V in 8 bits: one of each for every layer and KV head, measured at the start.

A float8_e4m3fn has its full precision from 2**-6 to 448. Which values K and V take is up to the
weights: biases make K of several hundred, and other models have V of thousandths. So once the
weights are there, the model reads some random tokens, and powers of two, which cost no precision,
bring what it had for K and V to where 8 bits are at their best. The same weights on the same
devices have the same scales in every replica; other devices may round one to its neighbour.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from jserve.engine.program.state import SCALES_AXES
from jserve.model.context import StepContext
from jserve.model.functional import Model
from jserve.model.sharding import AnyMesh, named_sharding, stored_kv_heads

_TOKENS = 256
# At most this is the root mean square of a head: there is room for values 56 times as large, and
# values down to 1/500 of it are still normal floats.
_USUAL = 8.0
_LARGEST = 224.0  # and this the largest value seen: others may be twice as large


def measure_kv_scales(
    model: Model, mesh: AnyMesh, params: Mapping[str, jax.Array]
) -> Float32[Array, "layers 2 stored_kv_heads"]:
    """The divisors of K and V for each layer and head; called while tracing."""
    spec = model.spec

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, _: None, window: int
    ) -> tuple[jax.Array, jax.Array]:
        return _causal_attention(q, k, v, window), jnp.stack([_scales(k), _scales(v)])

    tokens = jax.random.randint(jax.random.key(0), (_TOKENS,), 0, spec.vocab, jnp.int32)
    positions = jnp.arange(_TOKENS, dtype=jnp.int32)
    no_pages: tuple[Any, ...] = (None,) * spec.layers
    _, scales = model.hidden(params, tokens, positions, no_pages, StepContext(attend))
    return jnp.repeat(jnp.stack(scales), stored_kv_heads(spec, mesh) // spec.kv_heads, axis=2)


def lower_kv_scales(
    model: Model, mesh: Mesh, params: Mapping[str, jax.ShapeDtypeStruct]
) -> jax.stages.Lowered:
    """The program of `measure_kv_scales`, with heads where `state_shardings` has them."""
    measure = jax.jit(
        functools.partial(measure_kv_scales, model, mesh),
        out_shardings=named_sharding(mesh, SCALES_AXES),
    )
    return measure.lower(params)


def _scales(x: Float[Array, "tokens kv_heads head_dim"]) -> Float32[Array, " kv_heads"]:
    x = jnp.abs(x.astype(jnp.float32))
    usual = jnp.sqrt(jnp.mean(jnp.square(x), axis=(0, 2))) / _USUAL
    wanted = jnp.maximum(usual, jnp.max(x, axis=(0, 2)) / _LARGEST)
    # The next power of two, by the bits: exp2 and log2 are not exact on every device.
    bits = lax.bitcast_convert_type(wanted, jnp.int32)
    found = lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)
    # A head that is all zeros, or has values that are not finite, keeps them.
    return jnp.where((wanted > 0) & jnp.isfinite(found), found, jnp.float32(1))


def _causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, window: int) -> jax.Array:
    """Computes causal attention of one sequence with all scores at once."""
    tokens, q_heads, dim = q.shape
    grouped = q.reshape(tokens, k.shape[1], q_heads // k.shape[1], dim).astype(jnp.float32)
    scores = jnp.einsum("tkgd,skd->kgts", grouped, k.astype(jnp.float32))
    before = jnp.arange(tokens)[:, None] - jnp.arange(tokens)[None, :]
    seen = (before >= 0) & (before < (window or tokens))
    weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("kgts,skd->tkgd", weights, v.astype(jnp.float32))
    return out.reshape(q.shape).astype(q.dtype)
