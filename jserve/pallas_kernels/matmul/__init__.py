"""Matmuls of activations with weights stored [out, in]."""
