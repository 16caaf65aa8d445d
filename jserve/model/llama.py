"""The plain pre-norm block of Llama 2 and 3, SmolLM2, Mistral and Qwen 2.

Windows, biases and rotary scaling are in the spec, so these families share all the wiring.
"""

from flax import nnx
from jaxtyping import Array, Float

from jserve.core.model_spec import ModelSpec
from jserve.model.context import KV, LayerContext
from jserve.model.decoder import Family
from jserve.model.layers import Attention, GatedFfn, RMSNorm
from jserve.model.numerics import Numerics
from jserve.model.sparse_ffn import SparseFfn
from jserve.pallas_kernels.gated_activation import Activation


class PreNormLayer(nnx.Module):
    """x += attention(norm(x)); x += ffn(norm(x))."""

    def __init__(
        self, spec: ModelSpec, numerics: Numerics, *, qk_norm: bool = False, sparse: bool = False
    ) -> None:
        self.input_layernorm = RMSNorm(spec.model_dim, spec.norm_eps, numerics)
        self.self_attn = Attention(spec, numerics, qk_norm_offset=0.0 if qk_norm else None)
        self.post_attention_layernorm = RMSNorm(spec.model_dim, spec.norm_eps, numerics)
        ffn = SparseFfn if sparse else GatedFfn
        self.mlp = ffn(spec, numerics, Activation.SILU)

    def __call__(
        self, x: Float[Array, "tokens model_dim"], kv: KV, context: LayerContext
    ) -> tuple[Float[Array, "tokens model_dim"], KV]:
        out, kv = self.self_attn(self.input_layernorm(x), kv, context)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x), context), kv


LLAMA = Family(layer=PreNormLayer)
