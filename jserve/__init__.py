"""jserve: language-model serving with JAX on TPU, GPU and CPU."""
