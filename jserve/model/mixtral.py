"""Mixtral (Jiang et al., 2024): the Llama block with experts, under its own parameter names."""

from flax import nnx
from jaxtyping import Array, Float

from jserve.core.model_spec import ModelSpec
from jserve.model.context import KV, LayerContext
from jserve.model.decoder import Family
from jserve.model.layers import Attention, RMSNorm
from jserve.model.llama import PreNormLayer
from jserve.model.numerics import Numerics
from jserve.model.sparse_ffn import ExpertNames, SparseFfn
from jserve.pallas_kernels.gated_activation import Activation

NAMES = ExpertNames(gate="w1", up="w3", down="w2")


class MixtralLayer(nnx.Module):
    """x += attention(norm(x)); x += experts(norm(x))."""

    def __init__(self, spec: ModelSpec, numerics: Numerics) -> None:
        self.input_layernorm = RMSNorm(spec.model_dim, spec.norm_eps, numerics)
        self.self_attn = Attention(spec, numerics)
        self.post_attention_layernorm = RMSNorm(spec.model_dim, spec.norm_eps, numerics)
        self.block_sparse_moe = SparseFfn(spec, numerics, Activation.SILU, NAMES)

    def __call__(
        self, x: Float[Array, "tokens model_dim"], kv: KV, context: LayerContext
    ) -> tuple[Float[Array, "tokens model_dim"], KV]:
        out, kv = self.self_attn(self.input_layernorm(x), kv, context)
        x = x + out
        return x + self.block_sparse_moe(self.post_attention_layernorm(x), context), kv


MIXTRAL = Family(layer=PreNormLayer, sparse_layer=MixtralLayer)
