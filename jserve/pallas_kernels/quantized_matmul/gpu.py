"""Products with weights of 8 bits on Hopper GPUs: codes cross the memory, floats only registers.

One launch for all weights of a call. A thread block has 256 outputs of a weight, a share of its
inputs, and up to 128 rows. Of its three warpgroups one loads, two have half of the outputs each:

    loader     │ load 0 │ load 1 │ load 2 │ load 3 │ load 4 …      TMA, up to eight stages ahead
    compute 0           │ codes 0 → bf16 │ wgmma 0 │ codes 1 → bf16 │ wgmma 1 …
    compute 1           │    codes 0 → bf16 │ wgmma 0 │    codes 1 → bf16 │ wgmma 1 …

A stage holds 64 or 128 inputs of the weight and of the rows. Weights are the left operand, from
registers, and never come back to shared memory as floats; rows are the right one, because its
width may be as small as 8. While one warpgroup converts, the other multiplies.

Where there are fewer tiles of outputs than multiprocessors, the inputs are split, and every split
has a thread block that writes its own sums; they are added up in order and scaled by the XLA fusion
that reads them next. Above 256 rows there are tiles enough: a thread block goes
through the splits one after the other and adds up, in the same order, in registers. Splits depend
on the weights only, and a split is summed in the order of its inputs: a row's bits depend on
nothing but the row. Tile sizes are reasoned from memory sizes and traffic, not measured yet.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jserve.pallas_kernels.quantized_matmul.channels import ChannelMatrix

_OUTPUTS = 128  # that a weight has a multiple of
_COMPUTE = 2  # warpgroups; the next one loads
_INPUTS = 128  # likewise, and of a stage of few rows
_SHARED_BYTES = 200 * 1024  # for the stages
_MAX_STAGES = 8
# Thread blocks that keep the memory busy: Hopper has 132 multiprocessors, an H100 PCIe has 114.
_BUSY = 96
_MIN_SHARE = 512  # inputs of a split

Ref = Any  # a Pallas reference


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a launch is cut into thread blocks."""

    rows: int  # of a tile: what wgmma takes, a multiple of 8 up to 256
    row_tiles: int
    outputs: int  # of a tile: 64 or 128 for each compute warpgroup
    inputs: int  # of a stage
    stages: int
    splits: int  # of the inputs
    in_registers: bool  # splits are added up by one thread block

    @property
    def parts(self) -> int:
        """Sums that are written for an output."""
        return 1 if self.in_registers else self.splits

    def blocks(self, out_dim: int) -> int:
        """Thread blocks of a weight."""
        return out_dim // self.outputs * self.parts * self.row_tiles


def tiling_of(rows: int, in_dim: int, out_dims: Sequence[int]) -> Tiling:
    """How products of so many rows with weights that fit are cut."""
    splits = splits_of(in_dim, out_dims)
    in_registers = splits > 1 and rows > 256
    # Accumulators take 128 registers of a thread at most; two sets of them where splits add up.
    width = min(-(-rows // 8) * 8, 128 if in_registers else 256)
    tall = rows <= 128 and all(out_dim % (2 * _OUTPUTS) == 0 for out_dim in out_dims)
    outputs = (2 if tall else 1) * _OUTPUTS
    inputs = _INPUTS if width <= 64 else _INPUTS // 2
    return Tiling(
        rows=width,
        row_tiles=-(-rows // width),
        outputs=outputs,
        inputs=inputs,
        stages=min(_SHARED_BYTES // (inputs * (outputs + 2 * width)), _MAX_STAGES),
        splits=splits,
        in_registers=in_registers,
    )


def splits_of(in_dim: int, out_dims: Sequence[int]) -> int:
    """Shares of the inputs: as few as keep the memory busy with tall tiles, none too short."""
    splits, tiles = 1, sum(out_dims) // (2 * _OUTPUTS)
    while tiles * splits < _BUSY:
        share = in_dim // (2 * splits)
        if in_dim % (2 * splits) or share % _INPUTS or share < _MIN_SHARE:
            break
        splits *= 2
    return splits


def fits(out_dim: int, in_dim: int, dtype: jnp.dtype) -> bool:
    """Whether the kernel takes a weight of this shape with rows of this type."""
    return out_dim % _OUTPUTS == 0 and in_dim % _INPUTS == 0 and dtype == jnp.bfloat16


def channel_matmul(
    x: jax.Array, weights: Sequence[ChannelMatrix], num_rows: jax.Array | None
) -> tuple[jax.Array, ...]:
    """See `dispatch`; of weights that fit, with codes of one type."""
    rows, in_dim = x.shape
    tiling = tiling_of(rows, in_dim, [weight.shape[0] for weight in weights])
    padded = jnp.pad(x, ((0, tiling.rows * tiling.row_tiles - rows), (0, 0)))
    live = jnp.full(1, rows, jnp.int32) if num_rows is None else num_rows.reshape(1)
    sums = _launch(live, padded, [weight.codes for weight in weights], tiling)
    ys: list[jax.Array] = []
    for weight, parts in zip(weights, sums, strict=True):
        # One after the other: a reduction could take another order for another number of rows.
        total = functools.reduce(jnp.add, [parts[i] for i in range(tiling.parts)])
        ys.append(total[:rows] * weight.scales[None, :])
    return tuple(ys)


def _launch(
    live: jax.Array, x: jax.Array, codes: Sequence[jax.Array], tiling: Tiling
) -> Sequence[jax.Array]:
    """The sums of splits: [parts, rows, out_dim] for each weight."""
    dtype = codes[0].dtype
    assert all(weight.dtype == dtype for weight in codes)
    narrow = (plgpu.TilingTransform((8, tiling.inputs)), plgpu.SwizzleTransform(tiling.inputs))
    wide = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    call = plgpu.kernel(
        functools.partial(_body, tiling=tiling, num_weights=len(codes)),
        out_type=[
            jax.ShapeDtypeStruct((tiling.parts, x.shape[0], weight.shape[0]), jnp.float32)
            for weight in codes
        ],
        grid=(sum(tiling.blocks(weight.shape[0]) for weight in codes),),
        grid_names=("block",),
        num_threads=_COMPUTE + 1,
        thread_name="role",
        scratch_types=[
            plgpu.SMEM((tiling.stages, tiling.outputs, tiling.inputs), dtype, transforms=narrow),
            plgpu.SMEM((tiling.stages, tiling.rows, tiling.inputs), jnp.bfloat16, transforms=wide),
            plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages),
            plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=tiling.stages),
        ],
    )
    return call(live, x, *codes)


def _body(live: Ref, x: Ref, *refs: Ref, tiling: Tiling, num_weights: int) -> None:
    """One thread block: finds its weight, then its place in it."""
    weights, outs = refs[:num_weights], refs[num_weights : 2 * num_weights]
    scratch = refs[2 * num_weights :]
    block, role, first = lax.axis_index("block"), lax.axis_index("role"), 0
    # Neighbours share a tile of the weight, so it comes from memory once for all rows.
    row = lax.rem(block, jnp.int32(tiling.row_tiles)) * tiling.rows
    is_live = row < live[0] if tiling.row_tiles > 1 else True
    for weight, out in zip(weights, outs, strict=True):
        end = first + tiling.blocks(weight.shape[0])

        @pl.when((block >= first) & (block < end) & is_live)
        def _(weight: Ref = weight, out: Ref = out, first: int = first) -> None:
            tile = lax.div(block - first, jnp.int32(tiling.row_tiles))
            tiles = jnp.int32(weight.shape[0] // tiling.outputs)
            output, part = lax.rem(tile, tiles) * tiling.outputs, lax.div(tile, tiles)
            share = weight.shape[1] // tiling.parts
            rows, inputs = pl.ds(row, tiling.rows), pl.ds(part * share, share)
            outputs = pl.ds(output, tiling.outputs)
            _tile(
                x.at[rows, inputs],
                weight.at[outputs, inputs],
                out.at[part, rows, outputs],
                scratch,
                role,
                splits=tiling.splits // tiling.parts,
            )

        first = end


def _tile(
    x: Ref, weight: Ref, out: Ref, scratch: Sequence[Ref], role: jax.Array, *, splits: int
) -> None:
    """Out = x · weightᵀ, by the three roles."""
    codes_here, x_here, loaded, done = scratch
    stages, outputs, inputs = codes_here.shape
    steps = x.shape[1] // inputs

    @pl.when(role == _COMPUTE)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def load(step: jax.Array, slot: jax.Array) -> None:
            part = pl.ds(step * inputs, inputs)
            plgpu.copy_gmem_to_smem(weight.at[:, part], codes_here.at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(x.at[:, part], x_here.at[slot], loaded.at[slot])

        def wait(step: jax.Array, slot: jax.Array) -> None:
            del step
            plgpu.barrier_wait(done.at[slot])

        def reload(step: jax.Array, slot: jax.Array) -> None:
            wait(step, slot)
            load(step, slot)

        ahead = min(stages, steps)
        _each_step(0, ahead, stages, load)
        _each_step(ahead, steps, stages, reload)
        _each_step(steps - ahead, steps, stages, wait)  # barriers are left as they were found

    @pl.when(role < _COMPUTE)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        half = outputs // _COMPUTE
        own = pl.ds(role * half, half)

        def multiply(step: jax.Array, slot: jax.Array, sums: Ref) -> None:
            del step
            plgpu.barrier_wait(loaded.at[slot])
            floats = _floats(codes_here.at[slot, own])
            plgpu.wgmma(sums, floats, plgpu.transpose_ref(x_here.at[slot], (1, 0)))
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(done.at[slot])

        def split(i: jax.Array | int) -> jax.Array:
            def run(sums: Ref) -> jax.Array:
                act = functools.partial(multiply, sums=sums)
                start = i * (steps // splits)
                _each_step(start, start + steps // splits, stages, act)
                return sums[...]

            return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((half, x.shape[0]), jnp.float32))

        total = lax.fori_loop(1, splits, lambda i, total: total + split(i), split(0))
        turned = plgpu.layout_cast(total, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.transpose_ref(out.at[:, own], (1, 0))[...] = turned


def _each_step(
    start: jax.Array | int,
    stop: jax.Array | int,
    stages: int,
    act: Callable[[jax.Array, jax.Array], None],
) -> None:
    """Acts on a step and the stage that it takes."""

    def step(i: jax.Array, _: None) -> None:
        act(i, lax.rem(i, jnp.int32(stages)))

    lax.fori_loop(start, stop, step, None)


def _floats(codes: Ref) -> jax.Array:
    """Codes from shared memory to bfloat16, as a left operand of wgmma lies in registers."""
    packed = plgpu.layout_cast(codes[...], plgpu.Layout.WGMMA_UPCAST_2X)
    if packed.dtype != jnp.int8:  # the chip converts 8-bit floats to float16 only
        packed = packed.astype(jnp.float16).astype(jnp.float32)
    return plgpu.layout_cast(packed.astype(jnp.bfloat16), plgpu.Layout.WGMMA)
