"""Ragged paged attention on Hopper GPUs: one Pallas launch that writes K and V and attends.

Every multiprocessor runs one thread block of four warpgroups for the whole launch. It walks a
list of items; a stage of shared memory holds one block of K and one of V:

    loader      │ K0 V0 │ K1 V1 │ K2 V2 │ K3 V3 │ K4 V4 …       by TMA, two to four stages ahead
    compute 0   │ q·k 0 │ softmax 0 │ p·v 0 │ q·k 1 │ softmax 1 │ p·v 1       tensor cores and
    compute 1           │ q·k 0     │ softmax 0     │ p·v 0     │ q·k 1       exponents take turns
    writer      │ new K, V → pages │ new K, V → pages │ …               never read in this launch

Prompts: an item is two tiles of queries, one for each compute warpgroup, which share K and V.
K and V before the chunk are read from pages, those of the chunk from the arrays, so that no thread
block waits for pages that another one writes; the block in which the chunk starts is put together
in shared memory. Decode rows: an item is two splits of the contexts (of one row or of
two), one for each warpgroup; the blocks of the two alternate in the stages, and the new token is
put into the last block. Where there are thread blocks enough, an item is one split. Rows of more
than one split are combined by a second, small launch.

TMA fills tiled shared memory by whole tiles of 8 rows and leaves zeros where a copy begins inside
one. So queries and a chunk's own K and V are gathered first, by XLA, each tile and each block at a
multiple of 8 rows.

A warpgroup's tile has 64 rows: the query heads of a KV head for as many tokens as fit. Decode
rows leave most of them unused: the memory, not the tensor cores, sets their pace.

Each compute warpgroup widens pages of float8_e4m3fn to float16 in shared memory, exactly; queries
and weights are float16 as well then.

Blocks and splits lie at fixed positions of a row, and positions that a query does not see change no
bit, so a row's result depends neither on its neighbours nor on how its prompt was cut.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jserve.pallas_kernels.gpu_launch import Memory, gpu_kernel
from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch
from jserve.pallas_kernels.ragged_paged_attention.gpu_blocks import blocks_for, blocks_in_use
from jserve.pallas_kernels.ragged_paged_attention.gpu_combine import combine
from jserve.pallas_kernels.ragged_paged_attention.gpu_copies import load_items, write_new
from jserve.pallas_kernels.ragged_paged_attention.gpu_decode import compute_decode
from jserve.pallas_kernels.ragged_paged_attention.gpu_items import (
    Shape,
    Work,
    make_work,
)
from jserve.pallas_kernels.ragged_paged_attention.gpu_memory import (
    COMPUTE,
    each_item,
    make_shape,
    off_chip,
    on_chip,
)
from jserve.pallas_kernels.ragged_paged_attention.gpu_prompts import compute_prompt

_LOADER, _WRITER = COMPUTE, COMPUTE + 1  # warpgroups after the computing ones


def _kernel(memory: Memory, *, shape: Shape, prompts: bool) -> None:
    role = lax.axis_index("role")

    @pl.when(role < COMPUTE)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        prompt = functools.partial(compute_prompt, memory, shape, role)
        decode = functools.partial(compute_decode, memory, shape, role)
        each_item(memory, shape, prompt if prompts else None, decode)

    @pl.when(role == _LOADER)
    def _() -> None:
        plgpu.set_max_registers(24, action="decrease")
        load_items(memory, shape, prompts)

    @pl.when(role == _WRITER)
    def _() -> None:
        plgpu.set_max_registers(24, action="decrease")
        write_new(memory, shape)


def _operands(
    q: jax.Array, k: jax.Array, v: jax.Array, work: Work, shape: Shape
) -> dict[str, jax.Array]:
    """Gathers queries, K and V so that tiles begin where copies may begin."""
    # Row `token · group + g` of a KV head is query head `head · group + g` of the token.
    token, head = work.queries // shape.group, work.queries % shape.group
    first = shape.group * jnp.arange(shape.kv_heads, dtype=jnp.int32)
    index = (token * q.shape[1] + head)[None, :] + first[:, None]
    queries = _rows(q.reshape(-1, shape.head_dim), index).astype(shape.dtype)
    # Decode rows come first, with a token each.
    fresh_k, fresh_v = (part[: shape.rows].astype(shape.dtype) for part in (k, v))
    k, v = (part.astype(shape.kv_dtype) for part in (k, v))
    new_k, new_v = (k, v) if work.new is None else (_rows(part, work.new) for part in (k, v))
    return {
        "q": queries,
        "k": k,
        "v": v,
        "new_k": new_k,
        "new_v": new_v,
        "fresh_k": fresh_k,
        "fresh_v": fresh_v,
    }


def _rows(array: jax.Array, index: jax.Array) -> jax.Array:
    return array.at[index].get(mode="promise_in_bounds")


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    batch: RaggedBatch,
    *,
    window: int,
    prompts: bool,
    kind: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Implements `dispatch.ragged_paged_attention`; `kind` names another row of `gpu_blocks.json`.

    Queries are bfloat16, pages bfloat16 or float8_e4m3fn, of 64 or 128 tokens; head_dim is 64,
    128 or 256. Padding is not written at all.
    """
    shape = make_shape(q, pages, batch, window, blocks_for(kind) if kind else blocks_in_use())
    work: Work = make_work(batch, shape, prompts=prompts)
    flat = jax.new_ref(pages.reshape(-1, shape.page_size, shape.head_dim), memory_space=plgpu.GMEM)
    launch = gpu_kernel(
        functools.partial(_kernel, shape=shape, prompts=prompts),
        {**off_chip(shape, work, pages.shape[0]), **on_chip(shape)},
        name="ragged_paged_attention",
        blocks=shape.blocks,
        warpgroups=4,
    )
    made = launch(
        counts=work.counts,
        prompts=work.prompts,
        splits=work.splits,
        table=batch.page_table.reshape(-1),
        write_pages=batch.write_pages,
        write_offsets=batch.write_offsets,
        **_operands(q, k, v, work, shape),
        pages=flat,
    )
    out = made["out"]
    if shape.max_splits > 1:
        parts = made["part_out"], made["part_weight"]
        out = combine(out, *parts, work.row_splits, blocks=shape.blocks)
    return out, jax.freeze(flat).reshape(pages.shape)
