"""One tile of x · weightᵀ on a Hopper GPU, by a thread block of three warpgroups.

Quantized and grouped matmuls share this code. One warpgroup loads, the other two compute half of
the outputs each:

    loader     │ load 0 │ load 1 │ load 2 │ load 3 │ load 4 …      TMA, up to eight stages ahead
    compute 0           │ codes 0 → bf16 │ wgmma 0 │ codes 1 → bf16 │ wgmma 1 …
    compute 1           │    codes 0 → bf16 │ wgmma 0 │    codes 1 → bf16 │ wgmma 1 …

A stage holds some inputs of the weight and of the rows. The weight is wgmma's left operand, the
rows are its right operand, which may be as narrow as 8. Codes of 8 bits become
bfloat16 in registers and are multiplied from there; while one warpgroup converts, the other
multiplies. Weights of bfloat16 are multiplied from shared memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jserve.pallas_kernels.gpu_launch import Buffer, Memory, Ref, barriers, shared

COMPUTE = 2  # warpgroups; the next one loads
THREADS = COMPUTE + 1  # warpgroups of a thread block


def num_stages(outputs: int, rows: int, inputs: int, dtype: jnp.dtype, num_bytes: int) -> int:
    """Number of stages that fit into `num_bytes` of shared memory, at most eight."""
    stage_bytes = inputs * (outputs * dtype.itemsize + rows * 2)
    return min(num_bytes // stage_bytes, 8)


def tile_memory(
    stages: int, outputs: int, rows: int, inputs: int, dtype: jnp.dtype
) -> dict[str, Buffer]:
    """Memory that `multiply_tile` needs for weights of `dtype`."""
    line = min(128 // dtype.itemsize, inputs)
    weight = (plgpu.TilingTransform((8, line)), plgpu.SwizzleTransform(line * dtype.itemsize))
    x = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return {
        "weight_stages": shared((stages, outputs, inputs), dtype, weight),
        "x_stages": shared((stages, rows, inputs), jnp.bfloat16, x),
        "loaded": barriers(stages, arrivals=2),
        "released": barriers(stages, arrivals=COMPUTE),
    }


def multiply_tile(
    x: Ref,  # [rows, in_dim] in global memory, from a multiple of 8 rows on; see `grouped_matmul`
    weight: Ref,  # [outputs, in_dim]
    memory: Memory,  # with what `tile_memory` declares
    role: jax.Array,
    store: Callable[[Any, jax.Array], None],
    *,
    splits: int = 1,
) -> None:
    """Calls `store` in each compute warpgroup with its slice of outputs and their sums.

    Sums are [outputs of the slice, rows] in wgmma's layout. The inputs are cut into `splits`
    shares: each share is summed in the order of its inputs, then the shares are added in order.
    """
    weight_stages, x_stages = memory.weight_stages, memory.x_stages
    loaded, released = memory.loaded, memory.released
    stages, outputs, inputs = weight_stages.shape
    steps = x.shape[1] // inputs

    @pl.when(role == COMPUTE)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def load(step: jax.Array, stage: jax.Array) -> None:
            part = pl.ds(step * inputs, inputs)
            plgpu.copy_gmem_to_smem(weight.at[:, part], weight_stages.at[stage], loaded.at[stage])
            plgpu.copy_gmem_to_smem(x.at[:, part], x_stages.at[stage], loaded.at[stage])

        def wait(step: jax.Array, stage: jax.Array) -> None:
            del step
            plgpu.barrier_wait(released.at[stage])

        def reload(step: jax.Array, stage: jax.Array) -> None:
            wait(step, stage)
            load(step, stage)

        ahead = min(stages, steps)
        _each_step(0, ahead, stages, load)
        _each_step(ahead, steps, stages, reload)
        _each_step(steps - ahead, steps, stages, wait)  # barriers are left as they were found

    @pl.when(role < COMPUTE)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        half = outputs // COMPUTE
        part = pl.ds(role * half, half)

        def multiply(step: jax.Array, stage: jax.Array, sums: Ref) -> None:
            del step
            plgpu.barrier_wait(loaded.at[stage])
            left = weight_stages.at[stage, part]
            if weight_stages.dtype != jnp.bfloat16:
                left = _floats(left)
            plgpu.wgmma(sums, left, plgpu.transpose_ref(x_stages.at[stage], (1, 0)))
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(released.at[stage])

        def split(i: jax.Array | int) -> jax.Array:
            def run(sums: Ref) -> jax.Array:
                act = functools.partial(multiply, sums=sums)
                start = i * (steps // splits)
                _each_step(start, start + steps // splits, stages, act)
                return sums[...]

            accumulator = plgpu.WGMMAAccumulatorRef((half, x.shape[0]), jnp.float32)
            return pl.run_scoped(run, accumulator)

        store(part, lax.fori_loop(1, splits, lambda i, total: total + split(i), split(0)))


def store_transposed(target: Ref, sums: jax.Array) -> None:
    """Stores sums [outputs, rows] to a reference [rows, outputs] without tiles."""
    transposed = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)
    into = plgpu.transpose_ref(target, (1, 0))
    # JAX after 0.10 refuses stores with bank conflicts unless `optimized=False` allows them; JAX
    # 0.10 allows them always and has no such argument.
    if store := getattr(plgpu, "store", None):
        store(into, transposed, optimized=False)
    else:
        into[...] = transposed


def _each_step(
    start: jax.Array | int,
    stop: jax.Array | int,
    stages: int,
    act: Callable[[jax.Array, jax.Array], None],
) -> None:
    """Calls `act` with each step and its stage."""

    def step(i: jax.Array, _: None) -> None:
        act(i, lax.rem(i, jnp.int32(stages)))

    lax.fori_loop(start, stop, step, None)


def _floats(codes: Ref) -> jax.Array:
    """Converts codes in shared memory to bfloat16 registers, as wgmma's left operand lies."""
    packed = plgpu.layout_cast(codes[...], plgpu.Layout.WGMMA_UPCAST_2X)
    if packed.dtype != jnp.int8:  # the chip converts 8-bit floats to float16 only
        packed = packed.astype(jnp.float16).astype(jnp.float32)
    return plgpu.layout_cast(packed.astype(jnp.bfloat16), plgpu.Layout.WGMMA)
