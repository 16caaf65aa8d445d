"""Weight formats: readers of GGUF and safetensors, and the native Orbax checkpoint."""
