"""The vocabulary that every package shares. No JAX, no I/O; imports nothing of jserve."""
