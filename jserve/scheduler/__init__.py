"""The scheduler decides who runs in the next step: plan and commit. No JAX."""
