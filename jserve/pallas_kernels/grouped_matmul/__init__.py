"""Matmuls of rows, grouped by expert, with the weight of their expert."""
