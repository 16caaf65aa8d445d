"""The one entry to grouped matmuls: contract, validation, choice of backend."""

import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from jserve.pallas_kernels.backend import Backend, implementations
from jserve.pallas_kernels.grouped_matmul import cpu, reference, tpu
from jserve.pallas_kernels.matmul.dispatch import wants_panels
from jserve.pallas_kernels.matmul.panels import PanelMatrix
from jserve.pallas_kernels.native import calls
from jserve.pallas_kernels.quantized_matmul.channels import ChannelStack

_log = logging.getLogger(__name__)


def _on_gpu(
    x: jax.Array, weights: Sequence[jax.Array], group_sizes: jax.Array
) -> tuple[jax.Array, ...]:
    from jserve.pallas_kernels.grouped_matmul import gpu  # Mosaic takes half a second to import

    fit = all(gpu.fits(weight.shape[1], weight.shape[2], weight.dtype) for weight in weights)
    if not fit or x.dtype != jnp.bfloat16:
        _log.warning(
            "experts of %s have no kernel: it takes rows of bfloat16, and multiples of 128; XLA's "
            "loop runs",
            [f"{weight.dtype}{list(weight.shape[1:])}" for weight in weights],
        )
        return cpu.grouped_matmul(x, weights, group_sizes)
    return gpu.grouped_matmul(x, weights, group_sizes)


_IMPLEMENTATIONS = implementations(
    reference.grouped_matmul,
    cpu=cpu.grouped_matmul,
    native=calls.grouped_matmul,
    tpu=tpu.grouped_matmul,
    gpu=_on_gpu,
)


def wants_inputs_first(backend: Backend) -> bool:
    """Whether stacks [experts, out, in] should be views of arrays [experts, in, out].

    Such a backend takes any layout, but copies stacks of another one in every call.
    """
    return backend is Backend.TPU


def grouped_matmul(
    x: Float[jax.Array, "rows in_dim"],
    weights: Sequence[Float[jax.Array, "experts _ in_dim"]]
    | Sequence[PanelMatrix]
    | Sequence[ChannelStack],
    group_sizes: Int[jax.Array, " experts"],
    *,
    backend: Backend,
) -> tuple[Float32[jax.Array, "rows _"], ...]:
    """Multiplies the rows of each expert with its weightᵀ, for each stack [experts, out, in].

    The rows of expert 0 come first, then those of expert 1, and so on; `group_sizes` (int32)
    counts them and may be zero for some. The rows after the last group mean nothing: a backend
    may skip them and leave anything there, NaN included. Results are accumulated and returned in
    float32. Weights are float32 or bfloat16 (or `x.dtype`, unless the backend is native) in the
    layout that `matmul` takes, or all of them are codes with a scale per output.

    On CPU a row is bitwise independent of the other rows, of their number and of how many share its
    expert, unless the backend is the reference.
    """
    for weight in weights:
        is_panels, is_codes = (isinstance(weight, kind) for kind in (PanelMatrix, ChannelStack))
        if not is_codes and is_panels != wants_panels(backend):
            raise TypeError(f"{backend} takes panels: {wants_panels(backend)}")
        if len(weight.shape) != 3 or weight.shape[2] != x.shape[1]:
            raise ValueError(f"weights {weight.shape} do not fit rows of {x.shape[1]}")
        if group_sizes.shape != weight.shape[:1]:
            raise ValueError(f"weights {weight.shape} do not fit {group_sizes.shape} group sizes")
    stacks = [weight for weight in weights if isinstance(weight, ChannelStack)]
    with jax.named_scope("grouped_matmul"):
        if not stacks:
            return _IMPLEMENTATIONS[backend](x, weights, group_sizes)
        # The C++ kernels read no codes; XLA converts the codes of experts that have rows.
        multiply = _IMPLEMENTATIONS[Backend.CPU if backend is Backend.NATIVE else backend]
        ys = multiply(x, [stack.codes for stack in stacks], group_sizes)
        expert = _row_experts(group_sizes, x.shape[0])
        return tuple(y * stack.scales[expert] for y, stack in zip(ys, stacks, strict=True))


def _row_experts(group_sizes: jax.Array, rows: int) -> jax.Array:
    """Expert of each row; rows of no expert get the last one."""
    row, ends = jnp.arange(rows, dtype=jnp.int32), jnp.cumsum(group_sizes)
    return jnp.sum(ends[None, :-1] <= row[:, None], axis=1, dtype=jnp.int32)
