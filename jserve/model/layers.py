"""The parts that decoders are wired from, as Flax NNX modules whose paths are Hugging Face's names.

A module declares its parameters when it is built and computes while a program is traced.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jserve.model.numerics import Numerics
from jserve.model.params import param
from jserve.model.rope import RopeTables, rotate
from jserve.model.spec import ModelSpec

KV = TypeVar("KV")  # one layer's pages: whatever the attention op makes of them
# attend(q, k, v, pages, window) → (out [tokens, q_heads, head_dim], pages)
#   q [tokens, q_heads, head_dim] is rotated and scaled; k, v [tokens, kv_heads, head_dim],
#   k rotated; `window` is static, in tokens, 0 for full attention.
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any, int], tuple[jax.Array, Any]]
Activation = Callable[[jax.Array], jax.Array]


def dot(
    x: Float[Array, "tokens in_dim"], weight: Float[Array, "out_dim in_dim"]
) -> Float[Array, "tokens out_dim"]:
    """X · weightᵀ, accumulated and returned in float32.

    On CPU a row of the result is bitwise independent of the number of rows and of the others:
    every matrix kernel sums one output in the order of the contracted axis. A single row would
    take a matrix-vector kernel with another order, so it is computed as two.
    """
    rows = x.shape[0]
    if rows == 1:
        x = jnp.concatenate((x, jnp.zeros_like(x)))
    y = lax.dot_general(
        x,
        weight,
        (((1,), (1,)), ((), ())),
        # Float32 means float32, on the matrix units of accelerators too.
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return y[:rows]


def mean_square(x: Float[Array, "*rows dim"]) -> Float[Array, "*rows 1"]:
    """The mean of squares over the last axis of a float32 array, bitwise the same for any rows.

    XLA's CPU backend hands a reduction to YNNPACK only above some 4,000 elements, and below it
    sums in another order, so `jnp.mean` of a row depends on how many rows there are. A dot with
    ones does not (see `dot`); two columns, because one would make it a matrix-vector product.
    """
    total = lax.platform_dependent(x * x, cpu=_sum_by_dot, default=_sum_by_reduction)
    return total / x.shape[-1]


def _sum_by_dot(x: Float[Array, "*rows dim"]) -> Float[Array, "*rows 1"]:
    dim = x.shape[-1]
    totals = dot(x.reshape(-1, dim), jnp.ones((2, dim), x.dtype))
    return totals[:, :1].reshape(*x.shape[:-1], 1)


def _sum_by_reduction(x: Float[Array, "*rows dim"]) -> Float[Array, "*rows 1"]:
    return jnp.sum(x, axis=-1, keepdims=True)


class Linear(nnx.Module):
    """y = x · weightᵀ (+ bias), the weight [out, in]."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        axes: tuple[str | None, str | None],  # of the weight
        numerics: Numerics,
        *,
        bias: bool = False,
    ) -> None:
        self.dtype = numerics.dtype
        self.weight = param((out_dim, in_dim), axes, self.dtype, std=in_dim**-0.5)
        self.bias = param((out_dim,), axes[:1], self.dtype, std=0.02) if bias else None

    def __call__(self, x: Float[Array, "tokens in_dim"]) -> Float[Array, "tokens out_dim"]:
        """The product in the compute dtype; a bias is added before rounding to it."""
        y = dot(x, self.weight[...])
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)[None, :]
        return y.astype(self.dtype)


class Embedding(nnx.Module):
    """A row per token id; transposed it is the head of a model with tied embeddings."""

    def __init__(self, vocab: int, dim: int, numerics: Numerics) -> None:
        self.weight = param((vocab, dim), ("vocab", None), numerics.dtype, std=dim**-0.5)

    def __call__(self, tokens: Int[Array, " tokens"]) -> Float[Array, "tokens model_dim"]:
        """The rows of `tokens`, in the compute dtype."""
        return self.weight[...][tokens]


class RMSNorm(nnx.Module):
    """x / rms(x) · (offset + weight) over the last axis, in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float, numerics: Numerics, *, offset: float = 0.0) -> None:
        self.eps = eps
        self.offset = offset
        self.weight = param((dim,), (None,), numerics.dtype, mean=1.0 - offset, std=0.1)

    def __call__(self, x: Float[Array, "*rows dim"]) -> Float[Array, "*rows dim"]:
        """The normalized rows, in the dtype of `x`."""
        wide = x.astype(jnp.float32)
        scale = lax.rsqrt(mean_square(wide) + self.eps)
        weight = self.weight[...].astype(jnp.float32) + self.offset
        return (wide * scale * weight.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class GatedFfn(nnx.Module):
    """down(activation(gate(x)) · up(x)): SwiGLU, GeGLU (Shazeer, 2020)."""

    def __init__(self, spec: ModelSpec, numerics: Numerics, activation: Activation) -> None:
        self.activation = activation
        self.gate_proj = _ffn_linear(spec, numerics, into=True)
        self.up_proj = _ffn_linear(spec, numerics, into=True)
        self.down_proj = _ffn_linear(spec, numerics, into=False)

    def __call__(self, x: Float[Array, "tokens model_dim"]) -> Float[Array, "tokens model_dim"]:
        """The block's output, to be added to the residual stream."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


def _ffn_linear(spec: ModelSpec, numerics: Numerics, *, into: bool) -> Linear:
    if into:
        return Linear(spec.model_dim, spec.ffn_dim, ("ffn", None), numerics, bias=spec.ffn_bias)
    return Linear(spec.ffn_dim, spec.model_dim, (None, "ffn"), numerics, bias=spec.ffn_bias)


class Attention(nnx.Module):
    """Projections, optional per-head norms of q and k, rotation; attention itself is `attend`."""

    def __init__(
        self, spec: ModelSpec, numerics: Numerics, *, qk_norm_offset: float | None = None
    ) -> None:
        dim, q_dim, kv_dim = (
            spec.model_dim,
            spec.q_heads * spec.head_dim,
            spec.kv_heads * spec.head_dim,
        )
        self.spec = spec
        self.q_proj = Linear(dim, q_dim, ("q_heads", None), numerics, bias=spec.qkv_bias)
        self.k_proj = Linear(dim, kv_dim, ("kv_heads", None), numerics, bias=spec.qkv_bias)
        self.v_proj = Linear(dim, kv_dim, ("kv_heads", None), numerics, bias=spec.qkv_bias)
        self.o_proj = Linear(q_dim, dim, (None, "q_heads"), numerics, bias=spec.output_bias)
        self.q_norm = self._head_norm(qk_norm_offset, numerics)
        self.k_norm = self._head_norm(qk_norm_offset, numerics)

    def _head_norm(self, offset: float | None, numerics: Numerics) -> RMSNorm | None:
        if offset is None:
            return None
        return RMSNorm(self.spec.head_dim, self.spec.norm_eps, numerics, offset=offset)

    def __call__(
        self,
        x: Float[Array, "tokens model_dim"],
        rope: RopeTables,
        kv: KV,
        attend: Attend,
        window: int,
    ) -> tuple[Float[Array, "tokens model_dim"], KV]:
        """The block's output, and the layer's pages with the new tokens."""
        q = self._heads(self.q_proj(x))
        k = self._heads(self.k_proj(x))
        v = self._heads(self.v_proj(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q.astype(jnp.float32), rope) * self.spec.attention_scale
        k = rotate(k.astype(jnp.float32), rope)
        out, kv = attend(q.astype(x.dtype), k.astype(x.dtype), v, kv, window)
        return self.o_proj(out.reshape(x.shape[0], -1)), kv

    def _heads(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens heads head_dim"]:
        return x.reshape(x.shape[0], -1, self.spec.head_dim)
