"""Desired state to actions: processes and their supervision. No JAX."""
