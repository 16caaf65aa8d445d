"""The programs that copy pages: small ones beside the step's, compiled where an engine moves pages.

A program copies page by page inside a loop, in the memory it is given: its largest temporary is
one page, in a copy on the device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jserve.core.step import MoveKind
from jserve.engine.program.executable_cache import ExecutableCache, load_or_compile
from jserve.engine.program.programs import signature

MOVE_SIZES = (8, 32)  # moves that one run of a program makes at most
MAX_PAYLOADS = 2  # payloads of OUT and IN runs that lie on the device at once

# Of each layer of a group, one array [pages, K|V, kv_heads, page, dim].
LayerPages = tuple[jax.Array, ...]


class MoveProgram(NamedTuple):
    """The static part of a compiled copy."""

    kind: MoveKind
    group: int
    size: int  # moves that fit


def copy_out(pages: LayerPages, table: jax.Array) -> LayerPages:
    """The payload of an OUT: pages `table[:, 0]` in rows `table[:, 1]`. Ids below 0 are unused."""
    size = table.shape[0]
    payload = tuple(jnp.zeros((size, *layer.shape[1:]), layer.dtype) for layer in pages)
    return _copy(table, payload, lambda _: pages)


def copy_in(
    pages: LayerPages, payload: LayerPages, table: jax.Array
) -> tuple[LayerPages, jax.Array]:
    """`pages` with rows `table[:, 0]` of a payload in pages `table[:, 1]`; their number.

    The pages are donated to the next program at once. The number is not: it is ready when the
    payload has been read.
    """
    return _copy(table, pages, lambda _: payload), _num_used(table)


def copy_within(pages: LayerPages, table: jax.Array) -> LayerPages:
    """`pages` with page `table[i, 0]` copied to `table[i, 1]`, in the order of i."""
    return _copy(table, pages, lambda copied: copied)


def _copy(
    table: jax.Array, targets: LayerPages, sources: Callable[[LayerPages], LayerPages]
) -> LayerPages:
    def one(i: jax.Array, copied: LayerPages) -> LayerPages:
        source, target = table[i, 0], table[i, 1]
        return tuple(
            lax.dynamic_update_slice_in_dim(
                to, lax.dynamic_slice_in_dim(layer, source, 1, axis=0), target, axis=0
            )
            for to, layer in zip(copied, sources(copied), strict=True)
        )

    return lax.fori_loop(0, _num_used(table), one, targets)


def _num_used(table: jax.Array) -> jax.Array:
    return jnp.sum(table[:, 0] >= 0, dtype=jnp.int32)


def lower_move(program: MoveProgram, pages: LayerPages) -> jax.stages.Lowered:
    """A copy as it is compiled; IN and COPY are given the pages and give them back."""
    shardings = tuple(layer.sharding for layer in pages)
    payload = tuple(
        jax.ShapeDtypeStruct((program.size, *layer.shape[1:]), layer.dtype, sharding=where)
        for layer, where in zip(pages, shardings, strict=True)
    )
    table = jax.ShapeDtypeStruct((program.size, 2), jnp.int32)
    if program.kind is MoveKind.OUT:
        return jax.jit(copy_out, out_shardings=shardings).lower(pages, table)
    jit = functools.partial(jax.jit, donate_argnums=0)
    if program.kind is MoveKind.IN:
        return jit(copy_in, out_shardings=(shardings, None)).lower(pages, payload, table)
    return jit(copy_within, out_shardings=shardings).lower(pages, table)


def compile_moves(
    kv: Sequence[LayerPages], cache: ExecutableCache | None
) -> dict[MoveProgram, jax.stages.Compiled]:
    """Compiles or loads every copy."""
    made: dict[MoveProgram, jax.stages.Compiled] = {}
    for group, pages in enumerate(kv):
        for kind in MoveKind:
            for size in MOVE_SIZES:
                program = MoveProgram(kind, group, size)
                key = repr((program, [signature(layer) for layer in pages]))
                lower = functools.partial(lower_move, program, pages)
                made[program] = load_or_compile(cache, key, lower).call
    return made
