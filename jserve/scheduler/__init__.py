"""Who runs in the next step: plan and commit. No JAX."""
