"""Kernels of JAX and tokamax, for the tables beside ours: what each takes, and how it is called.

None does all that ours do: they write no K and V (cuDNN, tokamax and the causal kernel know no
pages either), return bfloat16, or take rows in whole tiles. They are timed on what they can do,
with arrays laid out as they want them, and must agree with ours. Those that leave their tiles to
the caller come with several.
"""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jserve.pallas_kernels.quantized_matmul.channels import ChannelMatrix
from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch

# Errors a library may raise without ending the benchmark; JAX's own errors are among them.
FAILURES = (
    *(ImportError, AttributeError, AssertionError),
    *(TypeError, ValueError, NotImplementedError, RuntimeError),
)


class AttentionLibrary(NamedTuple):
    """A library's attention over K and V that are there already."""

    name: str
    # From pages [pages, K|V, kv_heads, page_size, head_dim]; `most` is the longest row's tokens.
    lay_out: Callable[[jax.Array, RaggedBatch, int], Any]
    attend: Callable[[jax.Array, Any, RaggedBatch], jax.Array]  # attends with scaled queries


class MatmulLibrary(NamedTuple):
    """A library's matmul of rows with one weight or a stack of weights."""

    name: str
    lay_out: Callable[[Any], Any]  # lays out the weights of our op
    multiply: Callable[[jax.Array, Any], jax.Array]


def attention_libraries(
    platform: str, head_dim: int, window: int, lengths: Sequence[tuple[int, int]]
) -> tuple[AttentionLibrary, ...]:
    """Libraries that can attend so in bfloat16; `lengths` are (before, new) tokens by row."""
    if platform == "tpu":
        return (_tpu_ragged(window),) if head_dim % 128 == 0 else ()
    if platform != "gpu" or window:
        return ()
    if all(new == 1 for _, new in lengths):
        return *map(_triton, (2, 4)), _CUDNN_DECODE, _TOKAMAX_DECODE
    (before, new), *others = lengths
    if others or before or new % 128:
        return ()
    blocks = (64, 128) if head_dim <= 128 else (64,)  # blocks that fit
    return _CUDNN_PROMPT, _TOKAMAX_PROMPT, *map(_mosaic_prompt, blocks)


def matmul_libraries(
    platform: str, codes: jnp.dtype, rows: int, in_dim: int, out_dims: Sequence[int]
) -> tuple[MatmulLibrary, ...]:
    """Libraries that can multiply rows of bfloat16 by such weights."""
    if platform != "gpu" or codes != jnp.int8:
        return (_PLAIN,)
    tiles = [
        (tile_out, tile_rows, tile_in)
        for tile_out, tile_rows, tile_in in ((128, 64, 128), (128, 128, 64), (256, 64, 64))
        if not (rows % tile_rows or in_dim % tile_in or any(out % tile_out for out in out_dims))
    ]
    return _PLAIN, *(_mixed(*tile) for tile in tiles)


def expert_libraries(platform: str, sizes: jax.Array) -> tuple[MatmulLibrary, ...]:
    """Libraries that can multiply by stacks [experts, out, in] of bfloat16."""
    if platform == "gpu":
        tiles = ((64, 64), (64, 128), (128, 128))
        return _ragged(sizes), _tokamax_ragged(sizes), *(_mosaic_ragged(sizes, *t) for t in tiles)
    if platform == "tpu":
        tilings = ((128, 128, 128), (128, 512, 512), (128, 1024, 1024))
        return _tokamax_ragged(sizes), *(_megablox(sizes, tiling) for tiling in tilings)
    return (_ragged(sizes),)


def _of_jax(name: str) -> ModuleType:
    """Imports an experimental module of Pallas only when it is measured: some need a platform."""
    return importlib.import_module(f"jax.experimental.pallas.ops.{name}")


def _tokamax() -> ModuleType:
    """Imports tokamax, which is no dependency and needs Python 3.12."""
    return importlib.import_module("tokamax")


def _contiguous(pages: jax.Array, batch: RaggedBatch, most: int) -> tuple[jax.Array, jax.Array]:
    """K and V [rows, tokens, kv_heads, head_dim]."""
    size = pages.shape[3]
    table = batch.page_table[:, : -(-most // size)]
    found = pages[table]  # [rows, pages, K|V, kv_heads, page_size, head_dim]

    def tokens(x: jax.Array) -> jax.Array:
        rows, count, kv_heads, _, dim = x.shape
        return x.swapaxes(2, 3).reshape(rows, count * size, kv_heads, dim)

    return tokens(found[:, :, 0]), tokens(found[:, :, 1])


def _triton(block: int) -> AttentionLibrary:
    """JAX's Triton kernel, with `block` pages at once."""

    def lay_out(pages: jax.Array, batch: RaggedBatch, most: int) -> Any:
        """Makes pages [kv_heads, pages, page_size, head_dim]; the table has 16 even parts."""
        part = -(-most // (pages.shape[3] * 16))
        width = 16 * -(-part // block) * block
        table = batch.page_table[:, :width]
        table = jnp.pad(table, ((0, 0), (0, width - table.shape[1])))
        return pages[:, 0].swapaxes(0, 1), pages[:, 1].swapaxes(0, 1), table

    def attend(q: jax.Array, kv: Any, batch: RaggedBatch) -> jax.Array:
        k, v, table = kv
        paged_attention = _of_jax("gpu.paged_attention").paged_attention
        return paged_attention(q, k, v, table, batch.kv_lens, pages_per_compute_block=block)

    return AttentionLibrary(f"pallas.ops paged_attention (Triton), {block} pages", lay_out, attend)


def _decode(q: jax.Array, kv: Any, batch: RaggedBatch) -> jax.Array:
    out = jax.nn.dot_product_attention(
        q[:, None], *kv, scale=1.0, key_value_seq_lengths=batch.kv_lens, implementation="cudnn"
    )
    return out[:, 0]


def _prompt(q: jax.Array, kv: Any, batch: RaggedBatch) -> jax.Array:
    k, v = (x[:, : len(q)] for x in kv)
    out = jax.nn.dot_product_attention(
        q[None], k, v, scale=1.0, is_causal=True, implementation="cudnn"
    )
    return out[0]


def _tokamax_decode(q: jax.Array, kv: Any, batch: RaggedBatch) -> jax.Array:
    out = _tokamax().dot_product_attention(
        q[:, None], *kv, scale=1.0, key_value_seq_lengths=batch.kv_lens, implementation="mosaic"
    )
    return out[:, 0]


def _tokamax_prompt(q: jax.Array, kv: Any, batch: RaggedBatch) -> jax.Array:
    k, v = (x[:, : len(q)] for x in kv)
    out = _tokamax().dot_product_attention(
        q[None], k, v, scale=1.0, is_causal=True, implementation="mosaic"
    )
    return out[0]


_CUDNN_DECODE = AttentionLibrary("cuDNN, no pages", _contiguous, _decode)
_CUDNN_PROMPT = AttentionLibrary("cuDNN, no pages", _contiguous, _prompt)
_TOKAMAX_DECODE = AttentionLibrary("tokamax, no pages", _contiguous, _tokamax_decode)
_TOKAMAX_PROMPT = AttentionLibrary("tokamax, no pages", _contiguous, _tokamax_prompt)


def _halves(pages: jax.Array, batch: RaggedBatch, most: int) -> tuple[jax.Array, ...]:
    return tuple(x.astype(jnp.float16) for x in _contiguous(pages, batch, most))


def _mosaic_prompt(block: int) -> AttentionLibrary:
    """Pallas' attention of a prompt, with `block` keys at once.

    The kernel takes bfloat16, too, but JAX 0.11.2 does not compile that.
    """

    def attend(q: jax.Array, kv: Any, batch: RaggedBatch) -> jax.Array:
        kernels = _of_jax("gpu.attention_mgpu")
        k, v = (x[:, : len(q)] for x in kv)
        config = kernels.TuningConfig(
            block_q=64, block_kv=block, max_concurrent_steps=2, causal=True
        )
        return kernels.attention(q[None].astype(jnp.float16), k, v, config)[0].astype(q.dtype)

    return AttentionLibrary(f"pallas.ops attention_mgpu, no pages, {block} keys", _halves, attend)


def _tpu_ragged(window: int) -> AttentionLibrary:
    def lay_out(pages: jax.Array, batch: RaggedBatch, most: int) -> tuple[jax.Array, jax.Array]:
        """Makes pages [pages, page_size, 2 kv_heads, head_dim]: K and V of a head are neighbours.

        The table is no wider than it must be, since the kernel's blocks grow with it.
        """
        count, _, kv_heads, size, dim = pages.shape
        both = jnp.transpose(pages, (0, 3, 2, 1, 4)).reshape(count, size, 2 * kv_heads, dim)
        return both, batch.page_table[:, : -(-most // size)]

    def attend(q: jax.Array, kv: tuple[jax.Array, jax.Array], batch: RaggedBatch) -> jax.Array:
        pages, table = kv
        ends = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(batch.q_lens)])
        return _of_jax("tpu.ragged_paged_attention").ragged_paged_attention(
            *(q, pages, batch.kv_lens, table, ends.astype(jnp.int32), batch.num_rows[None]),
            sliding_window=window or None,
            vmem_limit_bytes=100 << 20,
        )

    return AttentionLibrary("pallas.ops ragged_paged_attention", lay_out, attend)


def _floats(weight: ChannelMatrix) -> jax.Array:
    return (weight.codes.astype(jnp.float32) * weight.scales[:, None]).astype(jnp.bfloat16)


def _plain(x: jax.Array, weight: jax.Array) -> jax.Array:
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


# 8 bits must beat this matmul without quantization.
_PLAIN = MatmulLibrary("XLA, bfloat16 weights", _floats, _plain)


def _mixed(outputs: int, rows: int, inputs: int) -> MatmulLibrary:
    """Pallas' mixed matmul, with tiles of these sizes."""

    def multiply(x: jax.Array, weight: ChannelMatrix) -> jax.Array:
        kernels = _of_jax("gpu.hopper_mixed_type_matmul_mgpu")
        config = kernels.TuningConfig(
            tile_m=outputs // 2,
            tile_n=rows,
            tile_k=inputs,
            max_concurrent_steps=4,
            wg_dimension=kernels.MatmulDimension.M,
        )
        y = kernels.mixed_matmul_kernel(weight.codes, x.T, out_dtype=jnp.float32, config=config)
        return (y * weight.scales[:, None]).T

    name = f"pallas.ops mixed_matmul, {outputs}, {rows}, {inputs}"
    return MatmulLibrary(name, lambda weight: weight, multiply)


def _ragged(sizes: jax.Array) -> MatmulLibrary:
    def multiply(x: jax.Array, stack: jax.Array) -> jax.Array:
        return lax.ragged_dot(x, stack, sizes, preferred_element_type=jnp.float32)

    return MatmulLibrary("XLA, ragged_dot", _inputs_first, multiply)


def _inputs_first(stack: jax.Array) -> jax.Array:
    return stack.swapaxes(1, 2)


def _tokamax_ragged(sizes: jax.Array) -> MatmulLibrary:
    def multiply(x: jax.Array, stack: jax.Array) -> jax.Array:
        return _tokamax().ragged_dot(
            x, stack, sizes, preferred_element_type=jnp.float32, implementation="mosaic"
        )

    return MatmulLibrary("tokamax ragged_dot", _inputs_first, multiply)


def _mosaic_ragged(sizes: jax.Array, rows: int, outputs: int) -> MatmulLibrary:
    """Pallas' ragged dot for GPUs, with tiles of `rows` and `outputs`."""

    def multiply(x: jax.Array, stack: jax.Array) -> jax.Array:
        return _of_jax("gpu.ragged_dot_mgpu").ragged_dot(
            x,
            stack,
            group_sizes=sizes,
            block_m=rows,
            block_n=outputs,
            block_k=64,
            max_concurrent_steps=4,
            grid_block_n=1,
            transpose_rhs=True,
        )

    name = f"pallas.ops ragged_dot_mgpu, {rows}, {outputs}"
    return MatmulLibrary(name, lambda stack: stack, multiply)


def _megablox(sizes: jax.Array, tiling: tuple[int, int, int]) -> MatmulLibrary:
    def multiply(x: jax.Array, stack: jax.Array) -> jax.Array:
        whole = jnp.pad(x, ((0, -len(x) % tiling[0]), (0, 0)))
        return _of_jax("tpu.megablox.gmm").gmm(whole, stack, sizes, tiling=tiling)[: len(x)]

    return MatmulLibrary(f"pallas.ops megablox, {tiling}", _inputs_first, multiply)


def agree(
    found: jax.Array | Sequence[jax.Array], expected: jax.Array | Sequence[jax.Array]
) -> bool:
    """Whether two results differ by no more than bfloat16 does; NaN does not."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)

    def differ(a: jax.Array, b: jax.Array) -> float:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))

    return all(differ(a, b) < 2e-2 for a, b in pairs)
