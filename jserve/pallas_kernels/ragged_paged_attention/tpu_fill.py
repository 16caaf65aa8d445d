"""The TPU kernel's memory, and its copies of K and V of prompts into their pages."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jserve.pallas_kernels.ragged_paged_attention.tpu_items import Ref, Rows, Shape, next_live


class Memory(NamedTuple):
    """References that all parts share."""

    pages: Ref  # [pages, K|V, kv_heads, plane of page_size], in HBM
    kv: Ref  # [2, K|V, kv_heads, plane of block]
    kv_ready: Ref  # semaphores, one for each buffer
    q_ready: Ref
    out_done: Ref
    written: Ref
    pending: Ref  # [2] in SMEM: 1 while a buffer's last copy out of it may be in flight


def page_copy(
    memory: Memory, shape: Shape, page: jax.Array, buffer: jax.Array, place: jax.Array
) -> Any:
    """Copy of a whole page into one of the buffers, as the buffer's page number `place`."""
    start = pl.multiple_of(place * shape.page_size, shape.page_size)
    into = memory.kv.at[buffer, :, :, *shape.span(start, shape.page_size)]
    return pltpu.make_async_copy(memory.pages.at[page], into, memory.kv_ready.at[buffer])


def settle(memory: Memory, buffer: jax.Array, copy: Any) -> None:
    """Waits for the last copy out of a buffer, if there was one; `copy` is of the same size."""

    @pl.when(memory.pending[buffer] == 1)
    def _() -> None:
        copy.wait()
        memory.pending[buffer] = 0


def each_head(heads: int, act: Callable[[jax.Array], None], at_once: int = 8) -> None:
    """Calls `act` for every head, up to `at_once` side by side so that the units overlap."""
    unrolled = max(n for n in range(1, at_once + 1) if heads % n == 0)
    if unrolled == heads:
        for head in range(heads):
            act(jnp.int32(head))
        return

    def some(i: jax.Array, _: None) -> None:
        for j in range(unrolled):
            act(i * unrolled + j)

    lax.fori_loop(0, heads // unrolled, some, None)


class _Fill(NamedTuple):
    """A page that takes new K and V of a prompt row, as scalars."""

    row: jax.Array
    page: jax.Array  # index of the page in the row
    end_page: jax.Array
    start: jax.Array  # position of the row's first new token
    end: jax.Array
    source: jax.Array  # place of position 0 among the new K and V


def fill_pages(
    memory: Memory,
    rows: Rows,
    shape: Shape,
    new: Ref,  # [K|V, kv_heads · columns, plane of all tokens] float32
    new_buffers: Ref,  # [2, K|V, kv_heads · columns, plane of a page and a strip]
    begin: jax.Array,
    end: jax.Array,
) -> None:
    """Writes K and V of the prompt rows [begin, end), page after page."""
    size, unit = shape.page_size, shape.fresh_strip

    def opening(row: jax.Array) -> _Fill:
        row = next_live(rows, row, end)
        row_in = jnp.minimum(row, shape.rows - 1)
        q_len, kv_len = rows.q_lens[row_in], rows.kv_lens[row_in]
        start = kv_len - q_len
        source = shape.lead + rows.q_starts[row_in] - start
        return _Fill(row, start // size, pl.cdiv(kv_len, size), start, kv_len, source)

    def advance(fill: _Fill) -> _Fill:
        return lax.cond(
            fill.page + 1 < fill.end_page,
            lambda: fill._replace(page=fill.page + 1),
            lambda: opening(fill.row + 1),
        )

    def page_at(fill: _Fill) -> jax.Array:
        return rows.table[fill.row * shape.pages_per_row + fill.page]

    def is_partial(fill: _Fill) -> jax.Array:
        return fill.page * size < fill.start

    def fetch(fill: _Fill, buffer: jax.Array, act: Callable[[Any], None]) -> None:
        source = (fill.source + fill.page * size) // unit * unit
        source = shape.span(pl.multiple_of(source, unit), size + unit)
        ready = memory.q_ready.at[buffer]
        act(pltpu.make_async_copy(new.at[:, :, *source], new_buffers.at[buffer], ready))

        @pl.when(is_partial(fill))
        def _() -> None:
            act(page_copy(memory, shape, page_at(fill), buffer, jnp.int32(0)))

    def write_copy(page: jax.Array, buffer: jax.Array) -> Any:
        source = memory.kv.at[buffer, :, :, *shape.span(0, size)]
        return pltpu.make_async_copy(source, memory.pages.at[page], memory.out_done.at[buffer])

    def merge(fill: _Fill, buffer: jax.Array) -> None:
        shift = (fill.source + fill.page * size) % unit
        axis = shape.token_axis
        plane = (shape.lanes, size) if shape.transposed else (size, shape.lanes)
        is_new = fill.page * size + lax.broadcasted_iota(jnp.int32, plane, axis) >= fill.start

        def head_merge(head: jax.Array) -> None:
            for half, column in itertools.product((0, 1), range(shape.columns)):
                at = (buffer, half, head * shape.columns + column)
                if shape.transposed:
                    fresh = pltpu.roll(new_buffers[at], size + unit - shift, 1)[:, :size]
                    place = (buffer, half, head, *shape.span(0, size))
                else:
                    fresh = new_buffers[*at, pl.ds(shift, size), :]
                    lanes = pl.ds(column * shape.lanes, shape.lanes)
                    place = (buffer, half, head, pl.ds(0, size), lanes)
                old = memory.kv[place]
                both = jnp.where(is_new, fresh, old.astype(jnp.float32))
                memory.kv[place] = both.astype(old.dtype)

        each_head(shape.kv_heads, head_merge)

    first = opening(begin)

    @pl.when(first.row < end)
    def _() -> None:
        fetch(first, jnp.int32(0), lambda copy: copy.start())

    def step(carry: tuple[_Fill, jax.Array]) -> tuple[_Fill, jax.Array]:
        fill, buffer = carry
        following = advance(fill)

        @pl.when(following.row < end)
        def _() -> None:
            settle(memory, 1 - buffer, write_copy(jnp.int32(0), 1 - buffer))
            fetch(following, 1 - buffer, lambda copy: copy.start())

        fetch(fill, buffer, lambda copy: copy.wait())
        merge(fill, buffer)
        write_copy(page_at(fill), buffer).start()
        memory.pending[buffer] = 1
        return following, 1 - buffer

    lax.while_loop(lambda carry: carry[0].row < end, step, (first, jnp.int32(0)))
    for buffer in (0, 1):
        settle(memory, jnp.int32(buffer), write_copy(jnp.int32(0), jnp.int32(buffer)))
