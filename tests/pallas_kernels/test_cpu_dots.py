"""XLA's code on CPU multiplies float32 only, so no library can run it on AMX.

With AMX a row's bits depend on the other rows, which processors without it cannot show. The
programs' texts can: no dot in them reads bfloat16, whatever processor compiles them.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.gated_activation import Activation, gated_activation
from jserve.pallas_kernels.grouped_matmul.dispatch import grouped_matmul
from jserve.pallas_kernels.matmul.dispatch import matmul
from jserve.pallas_kernels.quantized_matmul import channels
from jserve.pallas_kernels.quantized_matmul import matrix as groups
from jserve.pallas_kernels.quantized_matmul.channels import CODES, ChannelMatrix, ChannelStack
from jserve.pallas_kernels.quantized_matmul.dispatch import quantized_matmul
from jserve.pallas_kernels.quantized_matmul.matrix import QuantizedMatrix, quantized_shapes
from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch
from jserve.pallas_kernels.ragged_paged_attention.dispatch import (
    kv_pages_shape,
    ragged_paged_attention,
)
from jserve.pallas_kernels.rms_norm import rms_norm
from jserve.pallas_kernels.rotary import rotary
from tests.compiled_hlo import narrow_dots

pytestmark = pytest.mark.optimized

BF16 = jnp.bfloat16
array = jax.ShapeDtypeStruct


def _lowered(op: Callable[..., object], *args: object, **static: object) -> jax.stages.Lowered:
    return jax.jit(functools.partial(op, **static)).lower(*args)


def _codes(*shape: int, dtype: jnp.dtype) -> tuple[array, array]:
    return array(shape, dtype), array(shape[:-1], jnp.float32)


@pytest.mark.parametrize("rows", [1, 67])
@pytest.mark.parametrize("in_dim", [90, 1536])
def test_matmul(rows: int, in_dim: int) -> None:
    weights = [array((out, in_dim), BF16) for out in (211, 66)]
    lowered = _lowered(matmul, array((rows, in_dim), BF16), weights, backend=Backend.CPU)
    assert not narrow_dots(lowered)


@pytest.mark.parametrize("backend", [Backend.CPU, Backend.NATIVE])
@pytest.mark.parametrize("codes", CODES, ids=str)
def test_channel_matmul(codes: jnp.dtype, backend: Backend) -> None:
    weight = ChannelMatrix(*_codes(128, 256, dtype=codes))
    lowered = _lowered(quantized_matmul, array((70, 256), BF16), [weight], backend=backend)
    assert not narrow_dots(lowered)


@pytest.mark.parametrize("bits", [4, 8])
def test_group_matmul(bits: int) -> None:
    codes, scales = quantized_shapes((64, 96), bits)
    weight = QuantizedMatrix(array(codes, jnp.uint8), array(scales, jnp.float16))
    lowered = _lowered(quantized_matmul, array((5, 96), BF16), [weight], backend=Backend.CPU)
    assert not narrow_dots(lowered)


def test_grouped_matmul() -> None:
    x, sizes = array((100, 96), BF16), array((4,), jnp.int32)
    weights = [array((4, out, 96), BF16) for out in (64, 33)]
    assert not narrow_dots(_lowered(grouped_matmul, x, weights, sizes, backend=Backend.CPU))


@pytest.mark.parametrize("backend", [Backend.CPU, Backend.NATIVE])
@pytest.mark.parametrize("codes", CODES, ids=str)
def test_grouped_matmul_of_codes(codes: jnp.dtype, backend: Backend) -> None:
    x, sizes = array((9, 96), BF16), array((4,), jnp.int32)
    stack = ChannelStack(*_codes(4, 64, 96, dtype=codes))
    assert not narrow_dots(_lowered(grouped_matmul, x, [stack], sizes, backend=backend))


@pytest.mark.parametrize(
    ("backend", "pages", "window"),
    [
        (Backend.CPU, jnp.bfloat16, 40),
        (Backend.CPU, jnp.float8_e4m3fn, 0),
        (Backend.NATIVE, jnp.float8_e4m3fn, 40),
    ],
)
def test_attention(backend: Backend, pages: jnp.dtype, window: int) -> None:
    rows, tokens = array((3,), jnp.int32), array((40,), jnp.int32)
    table, count = array((3, 20), jnp.int32), array((), jnp.int32)
    batch = RaggedBatch(table, rows, rows, rows, count, count, tokens, tokens)
    scales = array((2, 2), jnp.float32) if pages == jnp.float8_e4m3fn else None

    def attend(*args: jax.Array, kv_scales: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        static = {"window": window, "prompts": True, "backend": backend}
        return ragged_paged_attention(*args, **static, kv_scales=kv_scales)

    lowered = jax.jit(attend).lower(
        array((40, 4, 64), BF16),
        *[array((40, 2, 64), BF16)] * 2,
        array(kv_pages_shape(64, 16, 2, 64), pages),
        batch,
        kv_scales=scales,
    )
    assert not narrow_dots(lowered)


def test_ops_without_weights() -> None:
    x, heads, angles = (
        array((70, 128), BF16),
        array((70, 2, 64), BF16),
        array((70, 32), jnp.float32),
    )
    cpu = Backend.CPU
    norm = _lowered(rms_norm, x, array((128,), BF16), eps=1e-5, offset=0.0, backend=cpu)
    gate = _lowered(gated_activation, x, x, activation=Activation.SILU, backend=cpu)
    turn = _lowered(rotary, heads, heads, angles, angles, q_scale=0.125, backend=cpu)
    assert not [dot for lowered in (norm, gate, turn) for dot in narrow_dots(lowered)]


def test_lookups() -> None:
    ids = array((7,), jnp.int32)
    codes, scales = quantized_shapes((64, 96), 4)
    matrix = QuantizedMatrix(array(codes, jnp.uint8), array(scales, jnp.float16))
    assert not narrow_dots(_lowered(groups.take_rows, matrix, ids))
    for dtype in CODES:
        matrix = ChannelMatrix(*_codes(64, 96, dtype=dtype))
        assert not narrow_dots(_lowered(channels.take_rows, matrix, ids))


@pytest.mark.parametrize("dtype", [BF16, jnp.float8_e4m3fn, jnp.int8])
def test_narrow_dots_are_found(dtype: jnp.dtype) -> None:
    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    assert narrow_dots(_lowered(dot, *[array((16, 64), dtype)] * 2))
