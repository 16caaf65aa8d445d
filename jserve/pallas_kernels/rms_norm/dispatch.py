"""The one entry to RMS norms: contract and choice of backend."""

import jax
from jaxtyping import Float

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.rms_norm import cpu, native, reference

_IMPLEMENTATIONS = {
    Backend.REFERENCE: reference.rms_norm,
    Backend.CPU: cpu.rms_norm,
    Backend.NATIVE: native.rms_norm,
    Backend.TPU: reference.rms_norm,
    Backend.GPU: reference.rms_norm,
}


def rms_norm(
    x: Float[jax.Array, "*rows dim"],
    weight: Float[jax.Array, " dim"],
    *,
    eps: float,
    offset: float,
    backend: Backend,
) -> Float[jax.Array, "*rows dim"]:
    """X / rms(x) · (offset + weight) over the last axis, in float32, in the dtype of `x`.

    A row is bitwise independent of the others and of their number. Zhang and Sennrich, 2019.
    """
    with jax.named_scope("rms_norm"):
        return _IMPLEMENTATIONS[backend](x, weight, eps=eps, offset=offset)
