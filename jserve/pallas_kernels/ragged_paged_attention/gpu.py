"""Ragged paged attention on Hopper GPUs: one Pallas launch that writes K and V and attends.

Every multiprocessor runs one thread block of four warpgroups for the whole launch. It walks a
list of items; a stage of shared memory holds one block of K and one of V:

    loader      │ K0 V0 │ K1 V1 │ K2 V2 │ K3 V3 │ K4 V4 …       by TMA, two to four stages ahead
    compute 0   │ q·k 0 │ softmax 0 │ p·v 0 │ q·k 1 │ softmax 1 │ p·v 1       tensor cores and
    compute 1           │ q·k 0     │ softmax 0     │ p·v 0     │ q·k 1       exponents take turns
    writer      │ new K, V → pages │ new K, V → pages │ …               never read in this launch

Prompts: an item is two tiles of queries, one for each compute warpgroup, which share K and V.
What came before the chunk is read from pages, its own K and V from the arrays, so that no thread
block waits for the pages that another writes; the block in which the chunk starts is put
together in shared memory. Decode rows: an item is two splits of the contexts (of one row or of
two), one for each warpgroup; the blocks of the two alternate in the stages, and the new token is
put into the last block. Rows of more than one split are combined by a second, small launch.

A warpgroup's tile has 64 rows: the query heads of a KV head for as many tokens as fit. Decode
rows leave most of them unused: the memory, not the tensor cores, sets their pace.

Blocks and splits lie at fixed positions of a row and what a query does not see changes no bit,
so a row's result depends neither on its neighbours nor on how its prompt was cut.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch
from jserve.pallas_kernels.ragged_paged_attention.gpu_blocks import blocks_for, kind_in_use
from jserve.pallas_kernels.ragged_paged_attention.gpu_combine import combine
from jserve.pallas_kernels.ragged_paged_attention.gpu_copies import load_items, write_new
from jserve.pallas_kernels.ragged_paged_attention.gpu_items import (
    ROWS,
    Shape,
    Work,
    shape_of,
    work_of,
)
from jserve.pallas_kernels.ragged_paged_attention.gpu_launch import gpu_kernel
from jserve.pallas_kernels.ragged_paged_attention.gpu_memory import (
    COMPUTE,
    KEYS,
    VALUES,
    Memory,
    Ref,
    Tile,
    each_item,
    prompt_item,
    scratch,
    split_item,
)

_MASKED = -1e30  # finite, so that a fully masked block leaves the running softmax unchanged
_LOG2E = math.log2(math.e)
_LOADER, _WRITER = COMPUTE, COMPUTE + 1  # warpgroups after the computing ones

Sums = tuple[jax.Array, jax.Array, jax.Array]  # out [64, head_dim], peak [64], total [64]


def _iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def _rows(values: jax.Array, columns: int) -> jax.Array:
    return lax.broadcast_in_dim(values, (ROWS, columns), [0])


def _empty(shape: Shape) -> Sums:
    layout = plgpu.Layout.WGMMA
    return (
        plgpu.layout_cast(jnp.zeros((ROWS, shape.head_dim), jnp.float32), layout),
        plgpu.layout_cast(jnp.full((ROWS,), _MASKED, jnp.float32), layout.reduce(1)),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), layout.reduce(1)),
    )


def _take_turn(memory: Memory) -> None:
    plgpu.barrier_arrive(memory.turn)
    plgpu.barrier_wait(memory.turn)


class _Block(NamedTuple):
    """One block for a compute warpgroup."""

    slot: jax.Array
    values_waited: jax.Array | None  # whether V was waited for already; None: it never was
    seen: jax.Array | None  # [64, block], where None all


def _attend(
    memory: Memory, shape: Shape, group: jax.Array, block: _Block, sums: Sums, *, turns: bool
) -> Sums:
    """Adds one block to the running softmax (Milakov and Gimelshein, 2018), in powers of 2."""
    out, peak, total = sums
    slot = block.slot

    def scores_of(scores: Ref) -> jax.Array:
        keys = plgpu.transpose_ref(memory.keys.at[slot], (1, 0))
        plgpu.wgmma(scores, memory.queries.at[group], keys)
        if turns:
            _take_turn(memory)
        return scores[...]

    scores = pl.run_scoped(scores_of, plgpu.WGMMAAccumulatorRef((ROWS, shape.block), jnp.float32))
    plgpu.barrier_arrive(memory.keys_done.at[slot])
    if block.seen is not None:
        scores = jnp.where(block.seen, scores, _MASKED)
    new_peak = jnp.maximum(peak, jnp.max(scores, axis=1) * _LOG2E)
    fade = jnp.exp2(peak - new_peak)
    weights = jnp.exp2(scores * _LOG2E - _rows(new_peak, shape.block))
    total = total * fade + jnp.sum(weights, axis=1)
    out = out * _rows(fade, shape.head_dim)
    narrow = weights.astype(jnp.bfloat16)
    if turns:
        out, total, new_peak, narrow = lax.optimization_barrier((out, total, new_peak, narrow))
        plgpu.barrier_arrive(memory.turn)

    def wait_for_values() -> None:
        plgpu.barrier_wait(memory.values_here.at[slot])

    if block.values_waited is None:
        wait_for_values()
    else:
        pl.when(jnp.logical_not(block.values_waited))(wait_for_values)
    if turns:
        plgpu.barrier_wait(memory.turn)

    def add_values(acc: Ref) -> None:
        if shape.head_dim <= 128:
            plgpu.wgmma(acc, narrow, memory.values.at[slot])
            return
        # One instruction may not need more registers than a thread has when the kernel starts.
        for column in range(0, shape.head_dim, 128):
            here = (slice(None), pl.ds(column, 128))
            plgpu.wgmma(acc.at[here], narrow, memory.values.at[slot, *here])

    accumulator: Any = plgpu.WGMMAAccumulatorRef.init(out)
    out = pl.run_state(add_values)(accumulator)
    plgpu.barrier_arrive(memory.values_done.at[slot])
    return out, new_peak, total


def _store_outputs(
    memory: Memory,
    shape: Shape,
    group: jax.Array,
    tile: Tile,
    tokens: tuple[jax.Array, jax.Array],
    out: jax.Array,
) -> None:
    """Writes the rows of `tokens` (first, number), some columns at a time."""
    first, number = tokens
    heads = pl.ds(tile.head * shape.group, shape.group)
    for column in range(0, shape.head_dim, shape.columns):
        part = lax.slice(out, (0, column), (ROWS, column + shape.columns))
        memory.narrow[group] = part.astype(jnp.bfloat16)
        plgpu.commit_smem()

        def store(i: jax.Array, _: None, column: int = column) -> None:
            plgpu.copy_smem_to_gmem(
                memory.narrow.at[group, pl.ds(i * shape.group, shape.group)],
                memory.out.at[first + i, heads, pl.ds(column, shape.columns)],
            )

        lax.fori_loop(0, number, store, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _patch_prompt(
    memory: Memory, shape: Shape, tile: Tile, block: jax.Array, slots: tuple[jax.Array, jax.Array]
) -> None:
    """Puts a block together: pages, then the chunk's own K and V, then zeros in V."""
    slot, new_slot = slots
    own = tile.start - block * shape.block
    held = tile.kv_len - block * shape.block

    @pl.when((own > 0) & (own < shape.block))
    def _() -> None:
        for part in (memory.keys, memory.values):
            for column in range(0, shape.head_dim, 64):
                here = (slice(None), pl.ds(column, 64))
                old = plgpu.layout_cast(part[slot, *here], plgpu.Layout.WGMMA)
                new = plgpu.layout_cast(part[new_slot, *here], plgpu.Layout.WGMMA)
                mine = _iota((shape.block, 64), 0) >= own
                part[slot, *here] = jnp.where(mine, new, old)

    # A weight of zero does not silence a NaN in memory that was never written.
    @pl.when(held < shape.block)
    def _() -> None:
        for column in range(0, shape.head_dim, 64):
            here = (slice(None), pl.ds(column, 64))
            old = plgpu.layout_cast(memory.values[slot, *here], plgpu.Layout.WGMMA)
            kept = jnp.where(_iota((shape.block, 64), 0) < held, old, jnp.zeros_like(old))
            memory.values[slot, *here] = kept

    plgpu.commit_smem()


def _prompt_queries(memory: Memory, shape: Shape, group: jax.Array, tile: Tile) -> None:
    row = (tile.token + group * shape.tile) * shape.group
    plgpu.copy_gmem_to_smem(
        memory.q.at[tile.head, pl.ds(row, ROWS)],
        memory.queries.at[group],
        memory.queries_here.at[group],
    )
    plgpu.barrier_wait(memory.queries_here.at[group])


def _compute_prompt(
    memory: Memory, shape: Shape, group: jax.Array, item: jax.Array, stage: jax.Array
) -> jax.Array:
    """Both warpgroups see all blocks of the item; returns the number of stages used so far."""
    tile = prompt_item(memory, shape, item)
    _prompt_queries(memory, shape, group, tile)
    edge, straddles = tile.patch_block(shape), tile.straddles(shape)
    mine = tile.position + group * shape.tile
    # Taking turns, the second warpgroup holds a stage while the first one puts together two.
    turns = shape.stages > 2
    stages = jnp.int32(shape.stages)

    def step(block: jax.Array, carry: tuple[jax.Array, Sums], *, masked: bool):
        stage, sums = carry
        slot, new_slot = lax.rem(stage, stages), lax.rem(stage + 1, stages)
        merges = (block == edge) & (straddles > 0)
        ends = tile.kv_len < (block + 1) * shape.block
        patches = merges | ends if masked else merges
        plgpu.barrier_wait(memory.keys_here.at[slot])

        @pl.when(patches)
        def _() -> None:
            plgpu.barrier_wait(memory.values_here.at[slot])

            @pl.when(merges)
            def _() -> None:
                plgpu.barrier_wait(memory.keys_here.at[new_slot])
                plgpu.barrier_wait(memory.values_here.at[new_slot])

            # The first warpgroup is ahead of the second, and never waits for it here.
            @pl.when(group == 0)
            def _() -> None:
                _patch_prompt(memory, shape, tile, block, (slot, new_slot))
                plgpu.barrier_arrive(memory.patched)

            @pl.when(group == 1)
            def _() -> None:
                plgpu.barrier_wait(memory.patched)

            @pl.when(merges)
            def _() -> None:
                plgpu.barrier_arrive(memory.keys_done.at[new_slot])
                plgpu.barrier_arrive(memory.values_done.at[new_slot])

        seen = None
        if masked:
            # Row r is query r // group: for whole numbers, x ≤ r // group is x · group ≤ r.
            ahead = _iota((ROWS, shape.block), 1) * shape.group - _iota((ROWS, shape.block), 0)
            offset = (mine - block * shape.block) * shape.group
            seen = ahead <= offset
            if shape.window:
                seen &= ahead > offset - shape.window * shape.group
        sums = _attend(memory, shape, group, _Block(slot, patches, seen), sums, turns=turns)
        return stage + 1 + merges.astype(jnp.int32), sums

    whole = lax.div(tile.position, jnp.int32(shape.block))
    left = tile.first
    carry = (stage, _empty(shape))
    if turns:
        pl.when(group == 1)(lambda: _take_turn(memory))

    masked, plain = functools.partial(step, masked=True), functools.partial(step, masked=False)
    if shape.window:
        hidden = tile.position + tile.number - shape.window + shape.block - 1
        left = jnp.clip(lax.div(jnp.maximum(hidden, 0), jnp.int32(shape.block)), left, tile.end)
        carry = lax.fori_loop(tile.first, left, masked, carry)
    right = jnp.clip(whole, left, tile.end)
    carry = lax.fori_loop(left, right, plain, carry)
    stage, (out, _, total) = lax.fori_loop(right, tile.end, masked, carry)

    if turns:
        pl.when(group == 0)(lambda: _take_turn(memory))
    else:  # so that the first warpgroup is not ahead by more than a patch
        _take_turn(memory)
    out = out / _rows(total, shape.head_dim)
    number = jnp.clip(tile.number - group * shape.tile, 0, shape.tile)
    first = tile.token + group * shape.tile
    _store_outputs(memory, shape, group, tile, (first, number), out)
    return stage


def _skip(memory: Memory, shape: Shape, stage: jax.Array) -> None:
    """Lets go of a stage that the other warpgroup uses."""
    slot = lax.rem(stage, jnp.int32(shape.stages))
    plgpu.barrier_wait(memory.keys_here.at[slot])
    plgpu.barrier_arrive(memory.keys_done.at[slot])
    plgpu.barrier_wait(memory.values_here.at[slot])
    plgpu.barrier_arrive(memory.values_done.at[slot])


def _patch_decode(
    memory: Memory, shape: Shape, group: jax.Array, slot: jax.Array, place: jax.Array
) -> None:
    """Puts the new token into its block, and zeros after it into V."""
    plgpu.barrier_wait(memory.values_here.at[slot])
    for half, part in ((KEYS, memory.keys), (VALUES, memory.values)):
        for column in range(0, shape.head_dim, 64):
            here = (slice(None), pl.ds(column, 64))
            old = plgpu.layout_cast(part[slot, *here], plgpu.Layout.WGMMA)
            fresh = memory.fresh[group, half, pl.ds(column, 64)]
            fresh = plgpu.layout_cast(fresh, plgpu.Layout.WGMMA.reduce(0))
            fresh = lax.broadcast_in_dim(fresh, old.shape, [1])
            token = _iota(old.shape, 0)
            if half == VALUES:
                old = jnp.where(token < place, old, jnp.zeros_like(old))
            part[slot, *here] = jnp.where(token == place, fresh, old)
    plgpu.commit_smem()


def _store_split(
    memory: Memory,
    shape: Shape,
    group: jax.Array,
    tile: Tile,
    index: jax.Array,
    sums: Sums,
) -> None:
    """A row of one split is done; the others are combined later."""
    out, peak, total = sums
    out = out / _rows(total, shape.head_dim)

    @pl.when(tile.number == 1)
    def _() -> None:
        _store_outputs(memory, shape, group, tile, (tile.token, jnp.int32(1)), out)

    @pl.when(tile.number > 1)
    def _() -> None:
        heads = pl.ds(tile.head * shape.group, shape.group)
        rows = pl.ds(0, shape.group)
        weight = peak + jnp.log(total) * _LOG2E
        memory.weight[group] = _rows(weight, 8)
        for column in range(0, shape.head_dim, shape.wide_columns):
            part = lax.slice(out, (0, column), (ROWS, column + shape.wide_columns))
            memory.wide[group] = part
            plgpu.commit_smem()
            if column == 0:
                plgpu.copy_smem_to_gmem(
                    memory.weight.at[group, rows], memory.part_weight.at[index, heads]
                )
            plgpu.copy_smem_to_gmem(
                memory.wide.at[group, rows],
                memory.part_out.at[index, heads, pl.ds(column, shape.wide_columns)],
            )
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _decode_queries(memory: Memory, shape: Shape, group: jax.Array, tile: Tile) -> None:
    """Queries of one token, and its K and V."""
    plgpu.copy_gmem_to_smem(
        memory.q.at[tile.head, pl.ds(tile.token * shape.group, shape.query_rows)],
        memory.queries.at[group, pl.ds(0, shape.query_rows)],
        memory.queries_here.at[group],
    )
    for half, array in ((KEYS, memory.k), (VALUES, memory.v)):
        plgpu.copy_gmem_to_smem(
            array.at[shape.block + tile.token, tile.head],
            memory.fresh.at[group, half],
            memory.fresh_here.at[group],
        )
    plgpu.barrier_wait(memory.queries_here.at[group])
    plgpu.barrier_wait(memory.fresh_here.at[group])


def _compute_decode(
    memory: Memory, shape: Shape, group: jax.Array, item: jax.Array, stage: jax.Array
) -> jax.Array:
    """This warpgroup's split; the other one's stages are let go in their turn."""
    tile, index = split_item(memory, shape, 2 * item + group)
    other = split_item(memory, shape, 2 * item + 1 - group)[0]
    size = jnp.int32(shape.block)
    last = lax.div(tile.position, size)
    # The stages hold block 0 of both, block 1 of both, … and then the rest of the longer one.
    lead = group  # the first warpgroup's block comes before the second one's

    @pl.when(tile.blocks > 0)
    def _() -> None:
        _decode_queries(memory, shape, group, tile)

    def step(i: jax.Array, sums: Sums, *, masked: bool) -> Sums:
        here = stage + i + jnp.minimum(i + lead, other.blocks)
        follows = (i + lead - 1 >= 0) & (i + lead - 1 < other.blocks)

        @pl.when(follows)
        def _() -> None:
            _skip(memory, shape, here - 1)

        slot = lax.rem(here, jnp.int32(shape.stages))
        block = tile.first + i
        plgpu.barrier_wait(memory.keys_here.at[slot])
        seen: jax.Array | None = None
        patches: jax.Array | None = None
        if masked:
            patches = block == last
            place = tile.position - block * shape.block

            @pl.when(patches)
            def _() -> None:
                _patch_decode(memory, shape, group, slot, place)

            token = _iota((ROWS, shape.block), 1)
            seen = token <= place
            if shape.window:
                seen &= token > place - shape.window
        return _attend(memory, shape, group, _Block(slot, patches, seen), sums, turns=False)

    left = jnp.int32(0)
    sums = _empty(shape)
    masked, plain = functools.partial(step, masked=True), functools.partial(step, masked=False)
    if shape.window:
        hidden = tile.position - shape.window + shape.block
        left = lax.div(jnp.maximum(hidden, 0), size) - tile.first
        left = jnp.clip(left, 0, tile.blocks)
        sums = lax.fori_loop(0, left, masked, sums)
    right = jnp.clip(last - tile.first, left, tile.blocks)
    sums = lax.fori_loop(left, right, plain, sums)
    sums = lax.fori_loop(right, tile.blocks, masked, sums)
    # What the other warpgroup still uses.
    used = tile.blocks + jnp.minimum(jnp.maximum(tile.blocks + lead - 1, 0), other.blocks)

    def skip(i: jax.Array, _: None) -> None:
        _skip(memory, shape, stage + i)

    lax.fori_loop(used, tile.blocks + other.blocks, skip, None)

    @pl.when(tile.blocks > 0)
    def _() -> None:
        _store_split(memory, shape, group, tile, index, sums)

    return stage + tile.blocks + other.blocks


def _kernel(*refs: Ref, shape: Shape, prompts: bool) -> None:
    memory = Memory(*refs)
    role = lax.axis_index("role")

    @pl.when(role < COMPUTE)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        prompt = functools.partial(_compute_prompt, memory, shape, role)
        decode = functools.partial(_compute_decode, memory, shape, role)
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
    q: jax.Array, k: jax.Array, v: jax.Array, shape: Shape
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries head by head with spare rows after them; K and V with a block before and after."""
    grouped = q.reshape(shape.tokens, shape.kv_heads, shape.group, shape.head_dim)
    grouped = grouped.swapaxes(0, 1).reshape(shape.kv_heads, -1, shape.head_dim)
    grouped = jnp.pad(grouped, ((0, 0), (0, 2 * ROWS), (0, 0)))
    around = ((shape.block, shape.block), (0, 0), (0, 0))
    k, v = (jnp.pad(part.astype(shape.kv_dtype), around) for part in (k, v))
    return grouped, k, v


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
    """See `dispatch`. `kind` names a row of `gpu_blocks.json`; by default the one in use.

    Queries are bfloat16, pages bfloat16 or float8_e4m3fn, of 64 or 128 tokens; head_dim is 64,
    128 or 256. Padding is not written at all.
    """
    shape = shape_of(q, pages, batch, window, blocks_for(kind or kind_in_use()))
    work: Work = work_of(batch, shape, prompts=prompts)
    part_heads = -(-q.shape[1] // 8) * 8
    flat = jax.new_ref(pages.reshape(-1, shape.page_size, shape.head_dim), memory_space=plgpu.GMEM)
    parts = shape.rows * shape.max_splits
    launch = gpu_kernel(
        functools.partial(_kernel, shape=shape, prompts=prompts),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, jnp.bfloat16),
            jax.ShapeDtypeStruct((parts, part_heads, shape.head_dim), jnp.float32),
            jax.ShapeDtypeStruct((parts, part_heads, 8), jnp.float32),
        ),
        scratch_types=scratch(shape),
        name="ragged_paged_attention",
        blocks=shape.blocks,
        warpgroups=4,
    )
    out, part_out, part_weight = launch(
        work.counts,
        work.prompts,
        work.splits,
        batch.page_table.reshape(-1),
        batch.write_pages,
        batch.write_offsets,
        *_operands(q, k, v, shape),
        flat,
    )
    if shape.max_splits > 1:
        out = combine(out, part_out, part_weight, work.row_splits, blocks=shape.blocks)
    return out, jax.freeze(flat).reshape(pages.shape)
