"""Host bookkeeping of KV memory: page pools. No JAX."""
