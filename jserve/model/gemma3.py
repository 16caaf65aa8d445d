"""Gemma 3 text (Gemma Team, 2025): norms before and after each block, local and global layers.

Norm weights are stored minus one; the embedding is scaled by sqrt(model_dim).
"""

from functools import partial

from flax import nnx
from jaxtyping import Array, Float

from jserve.core.model_spec import ModelSpec
from jserve.model.context import KV, LayerContext
from jserve.model.decoder import Family
from jserve.model.layers import Attention, GatedFfn, RMSNorm
from jserve.model.numerics import Numerics
from jserve.pallas_kernels.gated_activation import Activation

NORM_OFFSET = 1.0


class Gemma3Layer(nnx.Module):
    """x += norm(attention(norm(x))); x += norm(ffn(norm(x)))."""

    def __init__(self, spec: ModelSpec, numerics: Numerics) -> None:
        norm = partial(RMSNorm, spec.model_dim, spec.norm_eps, numerics, offset=NORM_OFFSET)
        self.input_layernorm = norm()
        self.self_attn = Attention(spec, numerics, qk_norm_offset=NORM_OFFSET)
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.mlp = GatedFfn(spec, numerics, Activation.GELU_TANH)
        self.post_feedforward_layernorm = norm()

    def __call__(
        self, x: Float[Array, "tokens model_dim"], kv: KV, context: LayerContext
    ) -> tuple[Float[Array, "tokens model_dim"], KV]:
        out, kv = self.self_attn(self.input_layernorm(x), kv, context)
        x = x + self.post_attention_layernorm(out)
        out = self.mlp(self.pre_feedforward_layernorm(x), context)
        return x + self.post_feedforward_layernorm(out), kv


GEMMA3 = Family(layer=Gemma3Layer, norm_offset=NORM_OFFSET, scaled_embeddings=True)
