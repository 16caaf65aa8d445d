"""The hyper-parameters of a decoder, independent of where its weights came from. No JAX."""

import enum
from dataclasses import dataclass


class RopeScalingKind(enum.Enum):
    """How rotary frequencies are stretched beyond the trained context."""

    LINEAR = "linear"
    DYNAMIC = "dynamic"  # NTK-aware; per token, so that the result never depends on chunking
    LLAMA3 = "llama3"


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Parameters as in a Hugging Face config's `rope_scaling`."""

    kind: RopeScalingKind
    factor: float
    low_freq_factor: float = 1.0  # llama3 only
    high_freq_factor: float = 4.0  # llama3 only
    original_max_position: int = 0  # llama3 and dynamic


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One decoder architecture with its sizes; hashable, so it can be a static argument."""

    family: str  # a key of model.registry: llama, mistral, qwen2, qwen3, gemma3
    vocab: int
    layers: int
    model_dim: int
    ffn_dim: int
    q_heads: int
    kv_heads: int
    head_dim: int
    max_position: int  # the context the model was trained for
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    qkv_bias: bool = False  # qwen2; llama's attention_bias
    sliding_window: int = 0  # tokens a local layer sees, itself included; 0: no local layers
    local_layers: tuple[bool, ...] = ()  # which layers are local; empty: all of them if windowed
    local_rope_theta: float = 0.0  # gemma3's local layers; 0: rope_theta
    query_scale: float = 0.0  # multiplies q·k; 0: head_dim ** -0.5
    eos_token_ids: tuple[int, ...] = ()

    def window_of(self, layer: int) -> int:
        """The sliding window of a layer in tokens, 0 for full attention."""
        local = self.local_layers[layer] if self.local_layers else True
        return self.sliding_window if local else 0
