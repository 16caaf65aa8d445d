"""Matmuls with weights of 8 bits on TPU: codes cross the memory, floats only the matrix unit.

Each weight is one launch. Rows stay in VMEM while blocks of codes, 128 outputs or a few times as
many with all their inputs, stream by in two buffers; a block is converted 128 outputs at a time:

    codes from HBM     │ load 0 │ load 1 │ load 2 │ load 3
    codes → bfloat16            │ 0a  0b │ 1a  1b │ 2a  2b     vector unit
    rows · codesᵀ               │   0a  0b   1a  1b   2a  2b   matrix unit, sums in float32
    sums · scales               │    0a  0b   1a  1b   2a  2b  vector unit
    results to HBM                       │ store 0│ store 1

Up to 256 or 512 rows (by generation) the codes are read once, and reading them bounds the time;
more rows take further rounds over the weight, each of which computes longer than it loads. An
output is one dot over all inputs, whatever the number of rows: a row's bits depend on nothing but
the row.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jserve.pallas_kernels.matmul.reference import dot
from jserve.pallas_kernels.quantized_matmul.channels import ChannelMatrix
from jserve.pallas_kernels.quantized_matmul.tpu_blocks import LANES, blocks_for
from jserve.pallas_kernels.tpu_generation import generation_in_use

Ref = Any  # a Pallas reference

_SUBLANES = 16  # rows of a tile of bfloat16
_SUBLANES_8 = 32  # rows of a tile of 8 bits


def fits(out_dim: int, in_dim: int, dtype: jnp.dtype) -> bool:
    """Whether the kernel takes a weight of this shape with rows of this type."""
    whole = out_dim % _SUBLANES_8 == 0 and in_dim % LANES == 0
    return whole and dtype in (jnp.bfloat16, jnp.float32)


def channel_matmul(
    x: jax.Array, weights: Sequence[ChannelMatrix], num_rows: jax.Array | None
) -> tuple[jax.Array, ...]:
    """Implements `dispatch.quantized_matmul` for weights that fit."""
    return tuple(_matmul(x, weight, num_rows) for weight in weights)


def _matmul(x: jax.Array, weight: ChannelMatrix, num_rows: jax.Array | None) -> jax.Array:
    (rows, in_dim), out_dim = x.shape, weight.shape[0]
    blocks = blocks_for(generation_in_use())
    outputs = blocks.outputs(out_dim, in_dim)
    tile = min(blocks.rows, -(-rows // _SUBLANES) * _SUBLANES)
    num_blocks, num_tiles = -(-out_dim // outputs), -(-rows // tile)

    def block(at: jax.Array, i: jax.Array, live: Ref) -> jax.Array:
        """Index of the weight's block: idle rounds repeat the last one, so nothing is fetched."""
        return jnp.where(at * tile < live[0], i, num_blocks - 1)

    call = pl.pallas_call(
        functools.partial(_kernel, tile=tile),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_tiles, num_blocks),
            in_specs=[
                pl.BlockSpec((tile, in_dim), lambda at, i, live: (at, 0)),
                pl.BlockSpec((outputs, in_dim), lambda at, i, live: (block(at, i, live), 0)),
                pl.BlockSpec((1, outputs), lambda at, i, live: (0, block(at, i, live))),
            ],
            out_specs=pl.BlockSpec((tile, outputs), lambda at, i, live: (at, i)),
        ),
        out_shape=jax.ShapeDtypeStruct((rows, out_dim), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=blocks.vmem_limit_mib * 2**20,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * out_dim * in_dim,
            transcendentals=0,
            bytes_accessed=num_tiles * out_dim * in_dim + rows * (2 * in_dim + 4 * out_dim),
        ),
        name="quantized_matmul",
    )
    live = jnp.full(1, rows, jnp.int32) if num_rows is None else num_rows.reshape(1)
    return call(live, x, weight.codes, weight.scales[None, :])


def _kernel(
    live: Ref,  # [1] in SMEM: rows that mean something
    x: Ref,  # [tile, in_dim]
    codes: Ref,  # [outputs, in_dim]
    scales: Ref,  # [1, outputs]
    out: Ref,  # [tile, outputs]
    *,
    tile: int,
) -> None:
    @pl.when(pl.program_id(0) * tile < live[0])
    def _() -> None:
        for start in range(0, codes.shape[0], LANES):
            part = pl.ds(start, LANES)
            out[:, part] = dot(x[...], codes[part, :].astype(x.dtype)) * scales[:, part]
