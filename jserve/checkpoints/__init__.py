"""Weight and tokenizer files: locating, fetching and reading them. No JAX."""
