"""Matmuls of activations with weights of 4 or 8 bits."""
