"""Compilation for GPUs that are not here. JAX reads its environment when it is imported."""

import os

# Mosaic reads the last two when a kernel is compiled: what ptxas says, and how it is launched.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_HOST_LLVM": "1",
}
os.environ.pop("XLA_FLAGS", None)
