"""Decoders as pure functions over parameters: layers, families, sampling, weight formats."""
