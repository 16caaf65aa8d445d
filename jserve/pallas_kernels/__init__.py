"""Kernels, one folder an op: dispatch, reference, one file per backend, cases. JAX only."""
