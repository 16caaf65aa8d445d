"""Matmuls with weights of 8 bits on Hopper GPUs: codes cross the memory, floats only registers.

One launch serves all weights of a call. A thread block has 256 outputs of a weight, a share of its
inputs and up to 128 rows. `gpu_tile` draws what overlaps what inside; blocks side by side:

    weight 0   │ split 0: outputs 0… │ 256… │ … │ split 1: outputs 0… │ 256… │ …
    weight 1       │ split 0: outputs 0… │ 256… │ …
    XLA                                               │ splits added up, scaled; what comes next

Where there are fewer tiles of outputs than multiprocessors, the inputs are split. Each split
writes its own sums, which the XLA fusion that reads them adds up in order. Above 256 rows there
are tiles enough: a thread block goes through the splits one after the other and adds up, in the
same order, in registers. Splits depend on the weights only, and a split is summed in the order of
its inputs: a row's bits depend on nothing but the row. Sizes of tiles are reasoned from memory
sizes and traffic, not measured yet.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jserve.pallas_kernels.gpu_launch import Buffer, Memory, Ref, gpu_kernel, operand, output
from jserve.pallas_kernels.gpu_tile import (
    THREADS,
    multiply_tile,
    num_stages,
    store_transposed,
    tile_memory,
)
from jserve.pallas_kernels.quantized_matmul.channels import ChannelMatrix

_OUTPUTS = 128  # fewest outputs of a weight
_LINE = 8  # outputs of a weight are a multiple of this
_INPUTS = 128  # inputs of a weight are a multiple of this; inputs of a stage of few rows
_SHARED_BYTES = 200 * 1024  # shared memory for stages
# Thread blocks that keep the memory busy: Hopper has 132 multiprocessors, an H100 PCIe has 114.
_BUSY = 96
_MIN_SHARE = 512  # inputs of a split


@dataclass(frozen=True, slots=True)
class Tiling:
    """The cut of a launch into thread blocks."""

    rows: int  # rows of a tile: a multiple of 8 up to 256, as wgmma takes them
    row_tiles: int
    outputs: int  # outputs of a tile: 64 or 128 for each compute warpgroup
    inputs: int  # inputs of a stage
    stages: int
    splits: int  # shares of the inputs
    in_registers: bool  # splits are added up by one thread block

    @property
    def parts(self) -> int:
        """Number of sums that are written for an output."""
        return 1 if self.in_registers else self.splits

    def blocks(self, out_dim: int) -> int:
        """Number of thread blocks of a weight."""
        return self.tiles(out_dim) * self.parts * self.row_tiles

    def tiles(self, out_dim: int) -> int:
        """Number of output tiles; the last one ends at `out_dim` and overlaps its neighbour."""
        return -(-out_dim // self.outputs)


def make_tiling(rows: int, in_dim: int, out_dims: Sequence[int]) -> Tiling:
    """Cuts the matmuls of `rows` rows with weights that fit."""
    splits = num_splits(in_dim, out_dims)
    in_registers = splits > 1 and rows > 256
    # Accumulators take 128 registers of a thread at most; two sets of them where splits add up.
    width = min(-(-rows // 8) * 8, 128 if in_registers else 256)
    tall = rows <= 128 and all(out_dim >= 2 * _OUTPUTS for out_dim in out_dims)
    outputs = (2 if tall else 1) * _OUTPUTS
    inputs = _INPUTS if width <= 64 else _INPUTS // 2
    return Tiling(
        rows=width,
        row_tiles=-(-rows // width),
        outputs=outputs,
        inputs=inputs,
        stages=num_stages(outputs, width, inputs, jnp.dtype(jnp.int8), _SHARED_BYTES),
        splits=splits,
        in_registers=in_registers,
    )


def num_splits(in_dim: int, out_dims: Sequence[int]) -> int:
    """Number of shares of the inputs: the fewest that keep the memory busy, none too short."""
    splits, tiles = 1, sum(out_dims) // (2 * _OUTPUTS)
    while tiles * splits < _BUSY:
        share = in_dim // (2 * splits)
        if in_dim % (2 * splits) or share % _INPUTS or share < _MIN_SHARE:
            break
        splits *= 2
    return splits


def fits(out_dim: int, in_dim: int, dtype: jnp.dtype) -> bool:
    """Whether the kernel takes a weight of this shape with rows of this type."""
    whole = out_dim >= _OUTPUTS and out_dim % _LINE == 0 and in_dim % _INPUTS == 0
    return whole and dtype == jnp.bfloat16


def channel_matmul(
    x: jax.Array, weights: Sequence[ChannelMatrix], num_rows: jax.Array | None
) -> tuple[jax.Array, ...]:
    """Implements `dispatch.quantized_matmul` for weights that fit and have codes of one type."""
    rows, in_dim = x.shape
    tiling = make_tiling(rows, in_dim, [weight.shape[0] for weight in weights])
    padded = jnp.pad(x, ((0, tiling.rows * tiling.row_tiles - rows), (0, 0)))
    live = jnp.full(1, rows, jnp.int32) if num_rows is None else num_rows.reshape(1)
    sums = _launch(live, padded, [weight.codes for weight in weights], tiling)
    ys: list[jax.Array] = []
    for weight, parts in zip(weights, sums, strict=True):
        # Added one after the other: a reduction might choose its order by the number of rows.
        total = functools.reduce(jnp.add, [parts[i] for i in range(tiling.parts)])
        remainder = weight.shape[0] % tiling.outputs  # new outputs of the last tile, if it overlaps
        if remainder:
            first, last = jnp.split(total, [total.shape[1] - tiling.outputs], axis=1)
            total = jnp.concatenate((first, last[:, -remainder:]), axis=1)
        ys.append(total[:rows] * weight.scales[None, :])
    return tuple(ys)


def _launch(
    live: jax.Array, x: jax.Array, codes: Sequence[jax.Array], tiling: Tiling
) -> Sequence[jax.Array]:
    """Sums of splits: [parts, rows, outputs of all tiles] for each weight."""
    dtype = codes[0].dtype
    assert all(weight.dtype == dtype for weight in codes)
    rows, in_dim = x.shape
    memory: dict[str, Buffer | list[Buffer]] = {
        "live": operand((1,), jnp.int32),
        "x": operand((rows, in_dim), jnp.bfloat16),
        "weights": [operand(weight.shape, dtype) for weight in codes],
        "outs": [
            output((tiling.parts, rows, tiling.tiles(out_dim) * tiling.outputs), jnp.float32)
            for out_dim, _ in (weight.shape for weight in codes)
        ],
        **tile_memory(tiling.stages, tiling.outputs, tiling.rows, tiling.inputs, dtype),
    }
    launch = gpu_kernel(
        functools.partial(_body, tiling=tiling),
        memory,
        name="channel_matmul",
        blocks=sum(tiling.blocks(weight.shape[0]) for weight in codes),
        warpgroups=THREADS,
    )
    return launch(live=live, x=x, weights=list(codes))["outs"]


def _body(memory: Memory, *, tiling: Tiling) -> None:
    """Finds the weight of this thread block, then its tile, and multiplies."""
    block, role, first = lax.axis_index("block"), lax.axis_index("role"), 0
    # Neighbours share a tile of the weight, so it comes from memory once for all rows.
    row = lax.rem(block, jnp.int32(tiling.row_tiles)) * tiling.rows
    is_live = row < memory.live[0] if tiling.row_tiles > 1 else True
    for weight, out in zip(memory.weights, memory.outs, strict=True):
        end = first + tiling.blocks(weight.shape[0])

        @pl.when((block >= first) & (block < end) & is_live)
        def _(weight: Ref = weight, out: Ref = out, first: int = first) -> None:
            tile = lax.div(block - first, jnp.int32(tiling.row_tiles))
            tiles = jnp.int32(tiling.tiles(weight.shape[0]))
            column, part = lax.rem(tile, tiles) * tiling.outputs, lax.div(tile, tiles)
            output = jnp.minimum(column, weight.shape[0] - tiling.outputs)
            share = weight.shape[1] // tiling.parts
            rows, inputs = pl.ds(row, tiling.rows), pl.ds(part * share, share)
            outputs = pl.ds(output, tiling.outputs)
            into = out.at[part, rows, pl.ds(column, tiling.outputs)]
            multiply_tile(
                memory.x.at[rows, inputs],
                weight.at[outputs, inputs],
                memory,
                role,
                lambda part, sums: store_transposed(into.at[:, part], sums),
                splits=tiling.splits // tiling.parts,
            )

        first = end
