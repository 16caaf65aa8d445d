"""Building blocks of decoders: Flax NNX modules whose paths are Hugging Face's names.

A module declares its parameters when it is built and computes while a program is traced.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jserve.checkpoints.config import WeightKind
from jserve.core.model_spec import ModelSpec
from jserve.model.context import KV, LayerContext, StepContext
from jserve.model.numerics import Numerics
from jserve.model.params import param
from jserve.model.weights import lookup, matmul_weights, matrix
from jserve.pallas_kernels.gated_activation import Activation, gated_activation
from jserve.pallas_kernels.rms_norm import rms_norm
from jserve.pallas_kernels.rotary import rotary


class Linear(nnx.Module):
    """y = x · weightᵀ (+ bias), the weight [out, in]."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        axes: tuple[str | None, str | None],  # logical axes of the weight
        numerics: Numerics,
        *,
        bias: bool = False,
        kind: WeightKind | None = None,  # the weight's; None: numerics.layers
    ) -> None:
        self.numerics = numerics
        self.weight = matrix((out_dim, in_dim), axes, numerics, kind or numerics.layers)
        self.bias = param((out_dim,), axes[:1], numerics.dtype, std=0.02) if bias else None

    def __call__(
        self, x: Float[Array, "tokens in_dim"], context: StepContext
    ) -> Float[Array, "tokens out_dim"]:
        """The output in the compute dtype; a bias is added before rounding to it."""
        return project(x, context, self)[0]

    def biased(self, y: Float[Array, "tokens out_dim"]) -> Float[Array, "tokens out_dim"]:
        """Adds the bias to a float32 matmul result; returns the compute dtype."""
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)[None, :]
        return y.astype(self.numerics.dtype)


def project(
    x: Float[Array, "tokens in_dim"], context: StepContext, *linears: Linear
) -> tuple[Float[Array, "tokens _"], ...]:
    """The outputs of several linear layers for the same input, as one op."""
    weights = [linear.weight for linear in linears]
    ys = matmul_weights(x, weights, linears[0].numerics, context.num_tokens)
    return tuple(linear.biased(y) for linear, y in zip(linears, ys, strict=True))


class Embedding(nnx.Module):
    """A row per token id; also the head's weight in a model with tied embeddings."""

    def __init__(self, vocab: int, dim: int, numerics: Numerics) -> None:
        self.dtype = numerics.dtype
        self.weight = matrix((vocab, dim), ("vocab", None), numerics, numerics.head)

    def __call__(self, tokens: Int[Array, " tokens"]) -> Float[Array, "tokens model_dim"]:
        """The rows of `tokens`, in the compute dtype."""
        return lookup(self.weight, tokens).astype(self.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) · (offset + weight) over the last axis, in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float, numerics: Numerics, *, offset: float = 0.0) -> None:
        self.eps = eps
        self.offset = offset
        self.backend = numerics.backend
        self.weight = param((dim,), (None,), numerics.dtype, mean=1.0 - offset, std=0.1)

    def __call__(self, x: Float[Array, "*rows dim"]) -> Float[Array, "*rows dim"]:
        """The normalized rows, in the dtype of `x`."""
        return rms_norm(x, self.weight[...], eps=self.eps, offset=self.offset, backend=self.backend)


class GatedFfn(nnx.Module):
    """down(activation(gate(x)) · up(x)): SwiGLU, GeGLU (Shazeer, 2020)."""

    def __init__(self, spec: ModelSpec, numerics: Numerics, activation: Activation) -> None:
        self.activation = activation
        self.backend = numerics.backend
        self.gate_proj = _ffn_linear(spec, numerics, into=True)
        self.up_proj = _ffn_linear(spec, numerics, into=True)
        self.down_proj = _ffn_linear(spec, numerics, into=False)

    def __call__(
        self, x: Float[Array, "tokens model_dim"], context: StepContext
    ) -> Float[Array, "tokens model_dim"]:
        """The block's output, to be added to the residual stream."""
        gate, up = project(x, context, self.gate_proj, self.up_proj)
        gated = gated_activation(
            gate, up, self.activation, num_tokens=context.num_tokens, backend=self.backend
        )
        return self.down_proj(gated, context)


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
        self.backend = numerics.backend
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
        self, x: Float[Array, "tokens model_dim"], kv: KV, context: LayerContext
    ) -> tuple[Float[Array, "tokens model_dim"], KV]:
        """The block's output, and the layer's pages with the new tokens."""
        q, k, v = map(self._heads, project(x, context, self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotary(
            q,
            k,
            *context.rope,
            q_scale=self.spec.attention_scale,
            num_tokens=context.num_tokens,
            backend=self.backend,
        )
        out, kv = context.attend(q, k, v, kv, context.window)
        return self.o_proj(out.reshape(x.shape[0], -1), context), kv

    def _heads(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens heads head_dim"]:
        return x.reshape(x.shape[0], -1, self.spec.head_dim)
