"""Ragged paged attention on TPU: one Pallas launch that writes K and V, then attends.

Everything large stays in HBM; addresses are scalars in SMEM. The kernel walks items, an item
being one block of KV for one tile of queries, row after row, and always fetches one ahead:

    K and V of block   │ load 0 │ load 1 │ load 2 │ load 3 │          two buffers in VMEM
    queries of tile    │ load A │        │ load B │        │          fetched with its first block
    q·k, softmax, p·v           │ A on 0 │ A on 1 │ B on 2 │ B on 3   running sums in VMEM
    outputs of tile                               │ store A│ store B  two buffers in VMEM

Items run on across tiles and rows, so the memory never waits for a row to end. Three parts:

1. Prompt rows, pages: merges new K and V into whole pages in VMEM and writes these back, with
   the next page on its way. Attention reads them again: later tiles need most of them anyway.
2. Decode rows: the one new token is merged into the block that was loaded for attention, and
   one strip of the page (the smallest aligned slice of its tiled layout) is written back
   while the block is computed with.
3. Prompt rows, attention: tiles of queries at places that the tiled layout allows. A tile may
   hold tokens of a neighbour row: these are kept as they are.

Blocks lie at fixed positions of a row, and positions that a query does not see change no bit, so a
row's result depends neither on its neighbours nor on how its prompt was cut.
"""

import functools
import itertools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch
from jserve.pallas_kernels.ragged_paged_attention.tpu_blocks import blocks_for
from jserve.pallas_kernels.ragged_paged_attention.tpu_fill import (
    Memory,
    each_head,
    fill_pages,
    page_copy,
    settle,
)
from jserve.pallas_kernels.ragged_paged_attention.tpu_items import (
    LANES,
    Item,
    Ref,
    Rows,
    Shape,
    advance,
    first_item,
    make_shape,
    next_live,
)
from jserve.pallas_kernels.tpu_generation import OTHER, generation_in_use

_log = logging.getLogger(__name__)

_MASKED = -1e30  # finite, so that a fully masked block leaves the running softmax unchanged


class _Part(NamedTuple):
    """Queries and outputs of one kind of row: in HBM, and two buffers each in VMEM."""

    q: Ref
    out: Ref
    q_buffers: Ref
    out_buffers: Ref
    peak: Ref  # [kv_heads, queries, lanes], all lanes alike
    total: Ref
    sums: Ref  # [kv_heads, queries, head_dim]


def _each_page(
    memory: Memory,
    rows: Rows,
    shape: Shape,
    item: Item,
    buffer: jax.Array,
    act: Callable[[Any], None],
) -> None:
    """Calls `act` with the copy of each page of an item's block that the tile sees."""
    per_block = shape.block // shape.page_size
    start = item.block * per_block

    def copy(page: jax.Array, _: None) -> None:
        index = rows.table[item.row * shape.pages_per_row + page]
        act(page_copy(memory, shape, index, buffer, page - start))

    lax.fori_loop(
        jnp.maximum(start, item.page), jnp.minimum(start + per_block, item.end_page), copy, None
    )


def _silence(memory: Memory, shape: Shape, item: Item, buffer: jax.Array) -> None:
    """Zeroes V that was never written or never loaded: a weight of zero does not silence NaN."""
    start = item.block * shape.block
    seen_from = item.page * shape.page_size

    @pl.when((start + shape.block - 1 > item.last) | (start < seen_from))
    def _() -> None:
        plane = shape.plane(shape.block)
        position = start + lax.broadcasted_iota(jnp.int32, plane, shape.token_axis)
        seen = (position <= item.last) & (position >= seen_from)

        def clean(head: jax.Array) -> None:
            values = memory.kv[buffer, 1, head].astype(jnp.float32)
            memory.kv[buffer, 1, head] = jnp.where(seen, values, 0.0).astype(memory.kv.dtype)

        each_head(shape.kv_heads, clean)


def _attend(
    memory: Memory,
    part: _Part,
    shape: Shape,
    item: Item,
    buffer: jax.Array,
    q_buffer: jax.Array,
    position: jax.Array,  # [queries, block]: each query's position; below zero it sees nothing
) -> None:
    """Adds one block to the running softmax of a tile (Milakov and Gimelshein, 2018)."""
    queries = part.sums.shape[1]
    place = item.block * shape.block + lax.broadcasted_iota(jnp.int32, (queries, shape.block), 1)
    age = position - place
    seen = age >= 0
    if shape.window:
        seen &= age < shape.window

    def head_step(head: jax.Array) -> None:
        q = part.q_buffers[q_buffer, head].reshape(queries, shape.head_dim)
        keys = memory.kv[buffer, 0, head].astype(q.dtype)
        values = memory.kv[buffer, 1, head].astype(q.dtype)
        scores = lax.dot_general(
            q,
            keys,
            (((1,), (1 - shape.token_axis,)), ((), ())),
            precision=shape.precision,
            preferred_element_type=jnp.float32,
        )
        scores = jnp.where(seen, scores, _MASKED)
        old_peak = part.peak[head][:, :1]
        peak = jnp.maximum(old_peak, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - peak), 0.0)
        fade = jnp.exp(old_peak - peak)
        total = part.total[head][:, :1] * fade + jnp.sum(weights, axis=1, keepdims=True)
        added = lax.dot_general(
            weights.astype(values.dtype),
            values,
            (((1,), (shape.token_axis,)), ((), ())),
            precision=shape.precision,
            preferred_element_type=jnp.float32,
        )
        part.peak[head] = jnp.broadcast_to(peak, (queries, LANES))
        part.total[head] = jnp.broadcast_to(total, (queries, LANES))
        part.sums[head] = part.sums[head] * fade + added

    # A prompt's tile keeps all units busy by itself, and less code compiles faster.
    each_head(shape.kv_heads, head_step, at_once=8 if queries <= 64 else 2)


def _reset(part: _Part) -> None:
    part.peak[...] = jnp.full(part.peak.shape, _MASKED, jnp.float32)
    part.total[...] = jnp.zeros(part.total.shape, jnp.float32)
    part.sums[...] = jnp.zeros(part.sums.shape, jnp.float32)


class _Routine(NamedTuple):
    """The steps of the walk over items that differ between decode and prompt rows."""

    part: _Part
    decode: bool
    fetch: Callable[
        [Item, jax.Array, Callable[[Any], None]], None
    ]  # acts on the copies into q_buffer
    attend: Callable[[Item, jax.Array, jax.Array], None]
    store: Callable[[Item, jax.Array], None]  # puts a tile's outputs into q_buffer
    out_copy: Callable[[Item, jax.Array], Any]


def _walk(
    memory: Memory,
    rows: Rows,
    shape: Shape,
    routine: _Routine,
    begin: jax.Array,
    end: jax.Array,
) -> None:
    """Walks the items of rows [begin, end) while the memory of the next item is on its way."""
    decode = routine.decode
    zero = jnp.int32(0)
    opening = first_item(rows, shape, next_live(rows, begin, end), zero, decode=decode)

    @pl.when(opening.row < end)
    def _() -> None:
        _each_page(memory, rows, shape, opening, zero, lambda copy: copy.start())
        routine.fetch(opening, zero, lambda copy: copy.start())

    def step(carry: tuple[Item, jax.Array, jax.Array]) -> tuple[Item, jax.Array, jax.Array]:
        item, buffer, q_buffer = carry
        following = advance(rows, shape, item, end, decode=decode)
        closes = item.block == item.last_block

        @pl.when(following.row < end)
        def _() -> None:
            _each_page(memory, rows, shape, following, 1 - buffer, lambda copy: copy.start())

            @pl.when(closes)
            def _() -> None:
                routine.fetch(following, 1 - q_buffer, lambda copy: copy.start())

        @pl.when(item.block == item.first_block)
        def _() -> None:
            routine.fetch(item, q_buffer, lambda copy: copy.wait())
            _reset(routine.part)

        _each_page(memory, rows, shape, item, buffer, lambda copy: copy.wait())
        _silence(memory, shape, item, buffer)
        routine.attend(item, buffer, q_buffer)

        @pl.when(closes)
        def _() -> None:
            settle(memory, q_buffer, routine.out_copy(item, q_buffer))
            routine.store(item, q_buffer)
            routine.out_copy(item, q_buffer).start()
            memory.pending[q_buffer] = 1

        return following, 1 - buffer, jnp.where(closes, 1 - q_buffer, q_buffer)

    last = lax.while_loop(lambda carry: carry[0].row < end, step, (opening, zero, zero))[0]
    for buffer in (0, 1):
        harmless = last._replace(token=jnp.int32(0))
        settle(memory, jnp.int32(buffer), routine.out_copy(harmless, jnp.int32(buffer)))


def _column(row: jax.Array) -> jax.Array:
    """Transposes [1, dim] to [dim, 1], exactly."""
    square = (row.shape[1], row.shape[1])
    diagonal = lax.broadcasted_iota(jnp.int32, square, 0) == lax.broadcasted_iota(
        jnp.int32, square, 1
    )
    return jnp.sum(jnp.where(diagonal, row, 0.0), axis=1, keepdims=True)


def _decode_routine(
    memory: Memory, rows: Rows, shape: Shape, part: _Part, new: Ref, new_buffers: Ref
) -> _Routine:
    """Steps for rows of one token: q and out are [tokens, kv_heads, group, head_dim]."""

    def fetch(item: Item, buffer: jax.Array, act: Callable[[Any], None]) -> None:
        ready = memory.q_ready.at[buffer]
        act(pltpu.make_async_copy(part.q.at[item.token], part.q_buffers.at[buffer], ready))
        act(pltpu.make_async_copy(new.at[item.token], new_buffers.at[buffer], ready))

    def strip_copy(item: Item, buffer: jax.Array) -> Any:
        page = rows.table[item.row * shape.pages_per_row + item.last // shape.page_size]
        source = pl.multiple_of(item.last % shape.block // shape.strip * shape.strip, shape.strip)
        target = item.last % shape.page_size // shape.strip * shape.strip
        target = pl.multiple_of(target, shape.strip)
        return pltpu.make_async_copy(
            memory.kv.at[buffer, :, :, *shape.span(source, shape.strip)],
            memory.pages.at[page, :, :, *shape.span(target, shape.strip)],
            memory.written.at[0],
        )

    def merge(item: Item, buffer: jax.Array, q_buffer: jax.Array) -> None:
        place = item.last % shape.block
        start = pl.multiple_of(place // shape.strip * shape.strip, shape.strip)
        index = lax.broadcasted_iota(jnp.int32, shape.plane(shape.strip), shape.token_axis)
        for half, head in itertools.product((0, 1), range(shape.kv_heads)):
            strip = (buffer, half, head, *shape.span(start, shape.strip))
            token = new_buffers[q_buffer, pl.ds(half * shape.kv_heads + head, 1), :]
            if shape.transposed:
                token = _column(token)
            old = memory.kv[strip]
            merged = jnp.where(index == place - start, token, old.astype(jnp.float32))
            memory.kv[strip] = merged.astype(old.dtype)

    def attend(item: Item, buffer: jax.Array, q_buffer: jax.Array) -> None:
        closes = item.block == item.last_block

        @pl.when(closes)
        def _() -> None:
            merge(item, buffer, q_buffer)
            strip_copy(item, buffer).start()

        position = jnp.full((part.sums.shape[1], shape.block), item.origin, jnp.int32)
        _attend(memory, part, shape, item, buffer, q_buffer, position)

        @pl.when(closes)
        def _() -> None:
            strip_copy(item, buffer).wait()  # before the buffer takes another block

    def store(item: Item, q_buffer: jax.Array) -> None:
        del item

        def head_store(head: jax.Array) -> None:
            out = part.sums[head] / jnp.maximum(part.total[head][:, :1], 1e-30)
            part.out_buffers[q_buffer, head] = out.astype(part.out_buffers.dtype)

        each_head(shape.kv_heads, head_store)

    def out_copy(item: Item, q_buffer: jax.Array) -> Any:
        return pltpu.make_async_copy(
            part.out_buffers.at[q_buffer], part.out.at[item.token], memory.out_done.at[q_buffer]
        )

    return _Routine(part, True, fetch, attend, store, out_copy)


def _prompt_routine(
    memory: Memory, shape: Shape, part: _Part, kept: Ref, kept_ready: Ref
) -> _Routine:
    """Steps for chunks of prompts: q and out are [kv_heads, group, tokens, head_dim]."""

    def tokens(item: Item, size: int) -> Any:
        return pl.ds(pl.multiple_of(item.token, shape.query_strip), size)

    def fetch(item: Item, buffer: jax.Array, act: Callable[[Any], None]) -> None:
        source = part.q.at[:, :, tokens(item, shape.tile), :]
        act(pltpu.make_async_copy(source, part.q_buffers.at[buffer], memory.q_ready.at[buffer]))

    def attend(item: Item, buffer: jax.Array, q_buffer: jax.Array) -> None:
        lane = lax.broadcasted_iota(jnp.int32, (shape.group, shape.tile, shape.block), 1)
        own = (lane >= item.first) & (lane < item.end)
        position = jnp.where(own, item.origin + lane, -1)
        position = position.reshape(shape.group * shape.tile, shape.block)
        _attend(memory, part, shape, item, buffer, q_buffer, position)

    def out_copy(item: Item, q_buffer: jax.Array) -> Any:
        target = part.out.at[:, :, tokens(item, shape.tile), :]
        return pltpu.make_async_copy(
            part.out_buffers.at[q_buffer], target, memory.out_done.at[q_buffer]
        )

    def store(item: Item, q_buffer: jax.Array) -> None:
        # The tile before may hang over into this row, and this row's first strip may hold
        # tokens of the rows before it.
        @pl.when(item.tile == 0)
        def _() -> None:
            settle(memory, 1 - q_buffer, out_copy(item, 1 - q_buffer))

        def head_store(head: jax.Array) -> None:
            out = part.sums[head] / jnp.maximum(part.total[head][:, :1], 1e-30)
            out = out.reshape(shape.group, shape.tile, shape.head_dim)
            part.out_buffers[q_buffer, head] = out.astype(part.out_buffers.dtype)

        each_head(shape.kv_heads, head_store)

        @pl.when(item.first > 0)
        def _() -> None:
            source = part.out.at[:, :, tokens(item, shape.query_strip), :]
            copy = pltpu.make_async_copy(source, kept, kept_ready.at[0])
            copy.start()
            copy.wait()
            strip = (shape.group, shape.query_strip, shape.head_dim)
            neighbour = lax.broadcasted_iota(jnp.int32, strip, 1) < item.first

            def head_keep(head: jax.Array) -> None:
                at = (q_buffer, head, slice(None), pl.ds(0, shape.query_strip), slice(None))
                mine = part.out_buffers[at].astype(jnp.float32)
                both = jnp.where(neighbour, kept[head].astype(jnp.float32), mine)
                part.out_buffers[at] = both.astype(part.out_buffers.dtype)

            each_head(shape.kv_heads, head_keep)

    return _Routine(part, False, fetch, attend, store, out_copy)


def _kernel(*refs: Ref, shape: Shape, prompts: bool) -> None:
    """Fills pages, then walks decode rows and prompt rows; operands as the launch lists them."""
    rows = Rows(*refs[:5])
    rest = iter(refs[5:])
    kinds = 2 if prompts else 1
    inputs = [(next(rest), next(rest)) for _ in range(kinds)]  # q, new K and V
    next(rest)  # the pages as an input are the pages as an output
    pages = next(rest)
    outs = [next(rest) for _ in range(kinds)]
    memory = Memory(pages, *(next(rest) for _ in range(6)))
    memory.pending[0] = 0
    memory.pending[1] = 0
    buffers = [[next(rest) for _ in range(6)] for _ in range(kinds)]
    num_decode, num_rows = rows.counts[0], rows.counts[1]

    if prompts:
        fill_pages(memory, rows, shape, inputs[1][1], buffers[1][5], num_decode, num_rows)
    part = _Part(inputs[0][0], outs[0], *buffers[0][:5])
    routine = _decode_routine(memory, rows, shape, part, inputs[0][1], buffers[0][5])
    _walk(memory, rows, shape, routine, jnp.int32(0), num_decode)
    if prompts:
        part = _Part(inputs[1][0], outs[1], *buffers[1][:5])
        routine = _prompt_routine(memory, shape, part, next(rest), next(rest))
        _walk(memory, rows, shape, routine, num_decode, num_rows)


def _scratch(
    shape: Shape, q_dtype: jnp.dtype, tile: tuple[int, ...], new: tuple[int, ...]
) -> list[Any]:
    """Scratch of one kind of row: q, out, the running softmax, new K and V."""
    queries = 1
    for size in tile[:-1]:
        queries *= size
    heads = shape.kv_heads
    return [
        pltpu.VMEM((2, heads, *tile), q_dtype),
        pltpu.VMEM((2, heads, *tile), q_dtype),
        pltpu.VMEM((heads, queries, LANES), jnp.float32),
        pltpu.VMEM((heads, queries, LANES), jnp.float32),
        pltpu.VMEM((heads, queries, shape.head_dim), jnp.float32),
        pltpu.VMEM((2, *new), jnp.float32),
    ]


def _decode_operands(
    q: jax.Array, k: jax.Array, v: jax.Array, shape: Shape
) -> tuple[jax.Array, jax.Array]:
    """Lays out q [tokens, kv_heads, group, head_dim], K and V [tokens, K|V · kv_heads, head_dim].

    Decode rows come first and have one token at most, so their tokens are among the first.
    """
    tokens = min(shape.rows, q.shape[0])
    grouped = q[:tokens].reshape(tokens, shape.kv_heads, shape.group, shape.head_dim)
    padding = shape.decode_group - shape.group
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, padding), (0, 0)))
    new = jnp.concatenate([k[:tokens], v[:tokens]], axis=1).astype(jnp.float32)
    return grouped, new


def _prompt_operands(
    q: jax.Array, k: jax.Array, v: jax.Array, shape: Shape
) -> tuple[jax.Array, jax.Array]:
    """Lays out q [kv_heads, group, tokens, head_dim], K and V [K|V, kv_heads, tokens, head_dim].

    Both have room for a tile or a page that begins before or ends behind the tokens. A head of
    several columns of lanes counts as several heads of K and V: only rows of one column can be
    read from any place on.
    """
    tokens = q.shape[0]
    grouped = q.reshape(tokens, shape.kv_heads, shape.group, shape.head_dim)
    over = -tokens % shape.query_strip + shape.tile
    grouped = jnp.pad(grouped.transpose(1, 2, 0, 3), ((0, 0), (0, 0), (0, over), (0, 0)))
    new = jnp.stack([k, v]).astype(jnp.float32).reshape(2, tokens, -1, shape.lanes)
    over = -tokens % shape.fresh_strip + shape.page_size + shape.fresh_strip
    new = jnp.pad(new, ((0, 0), (shape.lead, over), (0, 0), (0, 0)))
    return grouped, new.transpose((0, 2, 3, 1) if shape.transposed else (0, 2, 1, 3))


def _gathered(outs: list[jax.Array], batch: RaggedBatch, q: jax.Array, shape: Shape) -> jax.Array:
    """Gathers outputs in the order of the tokens, with zeros for tokens of no row."""
    tokens = q.shape[0]
    decoded = outs[0][:, :, : shape.group].reshape(-1, *q.shape[1:])
    decoded = jnp.pad(decoded, ((0, tokens - decoded.shape[0]), (0, 0), (0, 0)))
    token = jnp.arange(tokens)[:, None]
    row = jnp.arange(shape.rows)[None, :]
    start = batch.q_starts[None, :]
    own = (token >= start) & (token < start + batch.q_lens[None, :])
    by_decode = jnp.any(own & (row < batch.num_decode), axis=1)[:, None, None]
    out = jnp.where(by_decode, decoded, 0)
    if len(outs) > 1:
        prompted = outs[1][:, :, :tokens].transpose(2, 0, 1, 3).reshape(q.shape)
        by_prompt = own & (row >= batch.num_decode) & (row < batch.num_rows)
        out = jnp.where(jnp.any(by_prompt, axis=1)[:, None, None], prompted, out)
    return out.astype(q.dtype)


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    batch: RaggedBatch,
    *,
    window: int,
    prompts: bool,
    generation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Implements `dispatch.ragged_paged_attention`; `generation` names a row of `tpu_blocks.json`.

    Addresses of K and V come from the page table; padding is not written at all.
    """
    generation = generation or generation_in_use()
    blocks = blocks_for(generation)
    shape = make_shape(q, pages, batch, window, blocks)
    if shape.transposed:
        pages = pages.swapaxes(3, 4)
    elif shape.head_dim < LANES and generation != OTHER:
        _log.warning(
            "XLA copies all pages around attention: with head_dim %d, take a page_size that is "
            "a multiple of %d, not %d",
            shape.head_dim,
            LANES,
            shape.page_size,
        )
    operands = [*_decode_operands(q, k, v, shape)]
    tiles: list[tuple[int, ...]] = [(shape.decode_group, shape.head_dim)]
    new_shapes: list[tuple[int, ...]] = [(2 * shape.kv_heads, shape.head_dim)]
    scratch_end: list[Any] = []
    if prompts:
        operands += _prompt_operands(q, k, v, shape)
        tiles.append((shape.group, shape.tile, shape.head_dim))
        new_tokens = shape.page_size + shape.fresh_strip
        plane = (shape.lanes, new_tokens) if shape.transposed else (new_tokens, shape.lanes)
        new_shapes.append((2, shape.kv_heads * shape.columns, *plane))
        strip = (shape.kv_heads, shape.group, shape.query_strip, shape.head_dim)
        scratch_end = [pltpu.VMEM(strip, q.dtype), pltpu.SemaphoreType.DMA((1,))]
    scalars = (
        batch.page_table.reshape(-1),
        batch.kv_lens,
        batch.q_starts,
        batch.q_lens,
        jnp.stack([batch.num_decode, batch.num_rows]),
    )
    block = (2, 2, shape.kv_heads, *shape.plane(shape.block))
    pair = pltpu.SemaphoreType.DMA((2,))
    scratch = [pltpu.VMEM(block, pages.dtype), pair, pair, pair, pltpu.SemaphoreType.DMA((1,))]
    scratch.append(pltpu.SMEM((2,), jnp.int32))
    for tile, new in zip(tiles, new_shapes, strict=True):
        scratch += _scratch(shape, q.dtype, tile, new)
    out_shapes = [jax.ShapeDtypeStruct(part.shape, q.dtype) for part in operands[::2]]
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    pages, *outs = pl.pallas_call(
        functools.partial(_kernel, shape=shape, prompts=prompts),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[hbm] * (len(operands) + 1),
            out_specs=[hbm] * (len(out_shapes) + 1),
            scratch_shapes=scratch + scratch_end,
        ),
        out_shape=[jax.ShapeDtypeStruct(pages.shape, pages.dtype), *out_shapes],
        input_output_aliases={len(scalars) + len(operands): 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=blocks.vmem_limit_mib * 2**20,
        ),
        name="ragged_paged_attention",
    )(*scalars, *operands, pages)
    if shape.transposed:
        pages = pages.swapaxes(3, 4)
    return _gathered(outs, batch, q, shape), pages
