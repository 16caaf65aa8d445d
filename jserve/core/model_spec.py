"""The hyper-parameters of a decoder, independent of where its weights came from. No JAX."""

import enum
import math
from dataclasses import dataclass

from jserve.core.errors import ConfigError


class RopeScalingKind(enum.Enum):
    """The rule that stretches rotary frequencies beyond the trained context."""

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

    family: str  # a key of model.registry: llama, mistral, qwen2, qwen3, gemma3, …
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
    rope_scaling: RopeScaling | None = None  # never applies to layers with local_rope_theta
    tied_embeddings: bool = False
    qkv_bias: bool = False  # qwen2; llama's attention_bias
    output_bias: bool = False  # attention's output projection has a bias; llama's attention_bias
    ffn_bias: bool = False  # llama's mlp_bias
    sliding_window: int = 0  # tokens a local layer sees, itself included; 0: no local layers
    local_layers: tuple[bool, ...] = ()  # a flag a layer; empty: all, if there is a window
    local_rope_theta: float | None = None  # gemma3's local layers; None: rope_theta
    query_scale: float | None = None  # multiplies q·k; None: head_dim ** -0.5
    experts: int = 0  # experts of a sparse layer; 0: every layer is dense
    experts_per_token: int = 0  # experts that a token is sent to
    expert_ffn_dim: int = 0  # one expert's; ffn_dim is a dense layer's
    weights_sum_to_one: bool = False  # over a token's experts; else over all experts
    sparse_layers: tuple[bool, ...] = ()  # a flag a layer; empty: all, if there are experts
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises ConfigError naming the first field whose value makes no model."""
        for name in ("vocab", "layers", "model_dim", "ffn_dim", "q_heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model spec: {name} must be positive, got {getattr(self, name)}")
        if self.q_heads % self.kv_heads:
            raise ConfigError(
                f"model spec: q_heads ({self.q_heads}) must be a multiple of "
                f"kv_heads ({self.kv_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model spec: head_dim must be even to rotate, got {self.head_dim}")
        if self.local_layers and len(self.local_layers) != self.layers:
            raise ConfigError(
                f"model spec: local_layers has {len(self.local_layers)} entries "
                f"for {self.layers} layers"
            )
        if any(self.local_layers) and self.sliding_window < 1:
            raise ConfigError("model spec: local_layers are given but sliding_window is not")
        self._check_experts()

    def _check_experts(self) -> None:
        if self.experts < 0:
            raise ConfigError(f"model spec: experts must not be negative, got {self.experts}")
        if not self.experts:
            if self.experts_per_token or self.expert_ffn_dim or any(self.sparse_layers):
                raise ConfigError("model spec: there are sizes of experts but experts is 0")
            return
        if not 1 <= self.experts_per_token <= self.experts:
            raise ConfigError(
                f"model spec: experts_per_token must be between 1 and experts ({self.experts}), "
                f"got {self.experts_per_token}"
            )
        if self.expert_ffn_dim < 1:
            raise ConfigError(
                f"model spec: expert_ffn_dim must be positive, got {self.expert_ffn_dim}"
            )
        if self.sparse_layers and len(self.sparse_layers) != self.layers:
            raise ConfigError(
                f"model spec: sparse_layers has {len(self.sparse_layers)} entries "
                f"for {self.layers} layers"
            )

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees only its sliding window."""
        return self.window_of(layer) > 0

    def window_of(self, layer: int) -> int:
        """The sliding window of a layer in tokens, 0 for full attention."""
        local = self.local_layers[layer] if self.local_layers else True
        return self.sliding_window if local else 0

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.experts > 0 and (not self.sparse_layers or self.sparse_layers[layer])

    @property
    def max_context(self) -> int:
        """Longest prompt and output together, in tokens."""
        if self.rope_scaling is None or self.rope_scaling.kind is not RopeScalingKind.DYNAMIC:
            return self.max_position
        return int(self.max_position * self.rope_scaling.factor)

    @property
    def attention_scale(self) -> float:
        """The factor on q·k."""
        if self.query_scale is None:
            return 1.0 / math.sqrt(self.head_dim)
        return self.query_scale
