"""The two roles of the GPU kernel that only copy: the loader and the writer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jserve.pallas_kernels.gpu_launch import Memory, Ref
from jserve.pallas_kernels.ragged_paged_attention.batch import NULL_PAGE
from jserve.pallas_kernels.ragged_paged_attention.gpu_items import BLANK, TILE, Shape
from jserve.pallas_kernels.ragged_paged_attention.gpu_memory import (
    KEYS,
    VALUES,
    Tile,
    each_item,
    prompt_item,
    split_item,
)


def _load(memory: Memory, shape: Shape, used: jax.Array, source: Callable[[int, int], Any]):
    """Fills a stage; `source` gives K or V of one piece."""
    stage = lax.rem(used, jnp.int32(shape.stages))
    size = shape.block // shape.pieces
    halves = (
        (KEYS, memory.keys, memory.keys_loaded, memory.keys_released),
        (VALUES, memory.values, memory.values_loaded, memory.values_released),
    )
    for part, target, here, done in halves:

        @pl.when(used >= shape.stages)
        def _(done: Ref = done) -> None:
            plgpu.barrier_wait(done.at[stage])

        for piece in range(shape.pieces):
            into = target.at[stage]
            if shape.pieces > 1:
                into = target.at[stage, pl.ds(piece * size, size)]
            plgpu.copy_gmem_to_smem(source(part, piece), into, here.at[stage])


def _load_pages(
    memory: Memory, shape: Shape, tile: Tile, block: jax.Array, used: jax.Array
) -> None:
    size = shape.block // shape.pieces
    place = block * shape.block
    inside = pl.multiple_of(lax.rem(place, jnp.int32(shape.page_size)), TILE)
    first = lax.div(place, jnp.int32(shape.page_size))
    ids = []
    for piece in range(shape.pieces):
        index = jnp.minimum(first + piece, shape.pages_per_row - 1)
        ids.append(memory.table[tile.row * shape.pages_per_row + index])

    def source(part: int, piece: int) -> Any:
        plane = (ids[piece] * 2 + part) * shape.kv_heads + tile.head
        return memory.pages.at[plane, pl.ds(inside, size)]

    _load(memory, shape, used, source)


def _load_new(memory: Memory, shape: Shape, tile: Tile, block: jax.Array, used: jax.Array) -> None:
    size = shape.block // shape.pieces
    first = pl.multiple_of(tile.new + block * shape.block, TILE)

    def source(part: int, piece: int) -> Any:
        array = memory.new_v if part else memory.new_k
        return array.at[pl.ds(pl.multiple_of(first + piece * size, TILE), size), tile.head]

    _load(memory, shape, used, source)


def load_items(memory: Memory, shape: Shape, prompts: bool) -> None:
    """Fills stages in the order in which the compute warpgroups release them."""

    def prompt(item: jax.Array, used: jax.Array) -> jax.Array:
        tile = prompt_item(memory, shape, item)
        edge, straddles = tile.patch_block(shape), tile.straddles(shape)
        old_end = jnp.clip(edge + straddles, tile.first, tile.end)
        new_first = jnp.clip(edge, tile.first, tile.end)

        def load_old(block: jax.Array, used: jax.Array) -> jax.Array:
            _load_pages(memory, shape, tile, block, used)
            return used + 1

        def load_new(block: jax.Array, used: jax.Array) -> jax.Array:
            _load_new(memory, shape, tile, block, used)
            return used + 1

        used = lax.fori_loop(tile.first, old_end, load_old, used)
        return lax.fori_loop(new_first, tile.end, load_new, used)

    def decode(item: jax.Array, used: jax.Array) -> jax.Array:
        tiles = [split_item(memory, shape, item, group)[0] for group in range(2)]

        def step(i: jax.Array, used: jax.Array) -> jax.Array:
            for tile in tiles:

                @pl.when(i < tile.blocks)
                def _(tile: Tile = tile, used: jax.Array = used) -> None:
                    _load_pages(memory, shape, tile, tile.first + i, used)

                used += (i < tile.blocks).astype(jnp.int32)
            return used

        return lax.fori_loop(0, jnp.maximum(tiles[0].blocks, tiles[1].blocks), step, used)

    used = each_item(memory, shape, prompt if prompts else None, decode)

    def settle(used: jax.Array, _: None) -> None:
        stage = lax.rem(used, jnp.int32(shape.stages))
        plgpu.barrier_wait(memory.keys_released.at[stage])
        plgpu.barrier_wait(memory.values_released.at[stage])

    lax.fori_loop(jnp.maximum(used - shape.stages, 0), used, settle, None)


def write_new(memory: Memory, shape: Shape) -> None:
    """Copies new K and V to their pages; blanks the outputs of tokens that belong to no row."""
    heads = shape.kv_heads * shape.group
    memory.blank[...] = jnp.zeros(memory.blank.shape, memory.blank.dtype)
    plgpu.commit_smem()
    here, stride = lax.axis_index("block"), shape.blocks
    tokens = lax.div(jnp.int32(shape.tokens) - here + stride - 1, jnp.int32(stride))
    jobs = 2 * tokens  # K of a token, then V of it

    def address(job: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        job_in = jnp.minimum(job, jnp.maximum(jobs - 1, 0))
        token = here + lax.div(job_in, jnp.int32(2)) * stride
        part = lax.rem(job_in, jnp.int32(2))
        page = jnp.where(job < jobs, memory.write_pages[token], -1)
        return token, part, page

    def several(turn: jax.Array, _: None) -> None:
        for stage in range(shape.writes):
            token, part, page = address(turn * shape.writes + stage)
            for half, array in ((KEYS, memory.k), (VALUES, memory.v)):

                @pl.when((page > NULL_PAGE) & (part == half))
                def _(array: Ref = array, token: jax.Array = token, stage: int = stage) -> None:
                    plgpu.copy_gmem_to_smem(
                        array.at[token],
                        memory.writes.at[stage],
                        memory.writes_loaded.at[stage],
                    )

        for stage in range(shape.writes):
            token, part, page = address(turn * shape.writes + stage)

            @pl.when(page > NULL_PAGE)
            def _(
                token: jax.Array = token,
                part: jax.Array = part,
                page: jax.Array = page,
                stage: int = stage,
            ) -> None:
                plgpu.barrier_wait(memory.writes_loaded.at[stage])
                plane = (page * 2 + part) * shape.kv_heads
                target = memory.pages.at[pl.ds(plane, shape.kv_heads), memory.write_offsets[token]]
                plgpu.copy_smem_to_gmem(memory.writes.at[stage], target)

            @pl.when((page == NULL_PAGE) & (part == 0))
            def _(token: jax.Array = token) -> None:
                for column in range(0, shape.head_dim, BLANK):
                    target = memory.out.at[token, :, pl.ds(column, BLANK)]
                    plgpu.copy_smem_to_gmem(memory.blank.at[pl.ds(0, heads)], target)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    lax.fori_loop(0, lax.div(jobs + shape.writes - 1, jnp.int32(shape.writes)), several, None)
