"""From model files to parameters on devices, by way of the native Orbax checkpoint."""
