"""The activations of gated feed-forward blocks."""

import enum


class Activation(enum.Enum):
    """What is applied to the gate (Shazeer, 2020)."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"  # the approximation by tanh
