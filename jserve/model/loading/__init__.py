"""Loading: model files become parameters on devices, by way of the native Orbax checkpoint."""
