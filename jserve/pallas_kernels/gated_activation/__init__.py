"""activation(gate) · up of gated feed-forward blocks."""
