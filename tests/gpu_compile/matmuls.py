"""Quantized and grouped matmuls to compile for GPUs, at the sizes of models."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.grouped_matmul.cases import MODEL_CASES as GROUPED_CASES
from jserve.pallas_kernels.grouped_matmul.cases import Case as GroupedCase
from jserve.pallas_kernels.grouped_matmul.dispatch import grouped_matmul
from jserve.pallas_kernels.quantized_matmul.cases import MODEL_CASES, Case
from jserve.pallas_kernels.quantized_matmul.channels import CODES, ChannelMatrix, ChannelStack
from jserve.pallas_kernels.quantized_matmul.dispatch import quantized_matmul
from jserve.pallas_kernels.quantized_matmul.gpu import make_tiling
from tests.gpu_compile.h200 import Program, argument


def _lower_quantized(case: Case, codes: jnp.dtype, mesh: Mesh) -> jax.stages.Lowered:
    weights = [
        ChannelMatrix(argument(mesh, codes.name, out, case.in_dim), argument(mesh, "float32", out))
        for out in case.out_dims
    ]
    multiply = functools.partial(quantized_matmul, backend=Backend.GPU)
    return jax.jit(multiply).lower(argument(mesh, "bfloat16", case.rows, case.in_dim), weights)


def _lower_grouped(case: GroupedCase, dtype: str, mesh: Mesh) -> jax.stages.Lowered:
    experts = len(case.group_sizes)
    stacks: Any = [argument(mesh, dtype, experts, out, case.in_dim) for out in case.out_dims]
    if dtype == "int8":
        scales = (argument(mesh, "float32", experts, out) for out in case.out_dims)
        stacks = list(map(ChannelStack, stacks, scales))
    multiply = functools.partial(grouped_matmul, backend=Backend.GPU)
    x = argument(mesh, "bfloat16", case.rows, case.in_dim)
    return jax.jit(multiply).lower(x, stacks, argument(mesh, "int32", experts))


def _program(
    name: str,
    lower: Callable[[Mesh], jax.stages.Lowered],
    shapes: Sequence[tuple[int, ...]],
    weight_bytes: int,
    sum_bytes: int = 0,
) -> Program:
    """One launch; whole steps show that it is captured, a program of one op is too small for it."""
    return Program(
        name,
        lower,
        1,
        captured=False,
        weights=frozenset(tuple(sorted(shape)) for shape in shapes),
        most_temp_bytes=weight_bytes // 8 + sum_bytes,
    )


def _quantized(case: Case, codes: jnp.dtype) -> Program:
    """XLA adds up and scales the sums of splits."""
    tiling = make_tiling(case.rows, case.in_dim, case.out_dims)
    sums = tiling.parts * tiling.rows * tiling.row_tiles
    sums *= sum(map(tiling.tiles, case.out_dims)) * tiling.outputs
    return _program(
        f"{codes} {case.name}",
        functools.partial(_lower_quantized, case, codes),
        [(out, case.in_dim) for out in case.out_dims],
        sum(case.out_dims) * case.in_dim,
        4 * sums,
    )


def _grouped(case: GroupedCase, dtype: str) -> Program:
    shapes = [(len(case.group_sizes), out, case.in_dim) for out in case.out_dims]
    return _program(
        f"{dtype} experts {case.name}",
        functools.partial(_lower_grouped, case, dtype),
        shapes,
        sum(map(math.prod, shapes)) * jnp.dtype(dtype).itemsize,
    )


PROGRAMS = (
    *(
        _quantized(case, codes)
        for case in MODEL_CASES
        for codes in CODES
        if case.rows != 8  # the kernel of one row
    ),
    *(_grouped(case, dtype) for case in GROUPED_CASES for dtype in ("bfloat16", "int8")),
)
