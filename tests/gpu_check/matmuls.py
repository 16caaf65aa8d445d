"""Matmuls on the GPU itself: against float64, and that a row's bits depend on nothing but it.

python3 -m tests.gpu_check.matmuls
"""

import functools
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.grouped_matmul.cases import TILED_CASES
from jserve.pallas_kernels.grouped_matmul.cases import Case as GroupedCase
from jserve.pallas_kernels.grouped_matmul.dispatch import grouped_matmul
from jserve.pallas_kernels.quantized_matmul.cases import CASES, Case
from jserve.pallas_kernels.quantized_matmul.channels import (
    CODES,
    ChannelMatrix,
    ChannelStack,
    channel_codes,
    channel_scales,
)
from jserve.pallas_kernels.quantized_matmul.dispatch import quantized_matmul

_LARGE = (
    Case("large", 300, 4096, (4096, 1024, 1024)),
    Case("large_without_splits", 300, 1024, (14336, 14336)),
    Case("large_odd", 130, 1024, (16032,)),
)
# One to several items of an expert.
_LARGE_EXPERTS = GroupedCase("large", 2048, (768,), (1, 0, 70, 5, 0, 200, 17, 7))
_SOME = (1, 2, 9, 64, 128, 129, 256)  # rows


def _coded(weight: np.ndarray, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    made = channel_codes(weight, dtype), channel_scales(weight, dtype)
    return jnp.asarray(made[0]), jnp.asarray(made[1])


def _floats(codes: jax.Array, scales: jax.Array) -> np.ndarray:
    return np.asarray(codes, np.float64) * np.asarray(scales, np.float64)[..., None]


def _error(y: jax.Array, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected))


def quantized(case: Case, codes: jnp.dtype) -> tuple[float, str]:
    """Relative error, and the number of rows that changes bits, if any does."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(case.rows, case.in_dim)), jnp.bfloat16)
    floats = [rng.normal(size=(out, case.in_dim)).astype(np.float32) for out in case.out_dims]
    weights = [ChannelMatrix(*_coded(weight, codes)) for weight in floats]
    run = jax.jit(functools.partial(quantized_matmul, backend=Backend.GPU))
    ys = run(x, weights)
    a = np.asarray(x, np.float64)
    error = max(_error(y, a @ _floats(*w).T) for y, w in zip(ys, weights, strict=True))
    for rows in (rows for rows in _SOME if rows < case.rows):
        for part, whole in zip(run(x[-rows:], weights), ys, strict=True):
            if not np.array_equal(part, whole[-rows:]):
                return error, f"{rows} rows have other bits than {case.rows}"
    return error, ""


def grouped(case: GroupedCase, kind: str) -> tuple[float, str]:
    """Checks experts of bfloat16 or int8 in the same way."""
    rng = np.random.default_rng(2)
    experts = len(case.group_sizes)
    x = jnp.asarray(rng.normal(size=(case.rows, case.in_dim)), jnp.bfloat16)
    floats = [rng.normal(size=(experts, n, case.in_dim)).astype(np.float32) for n in case.out_dims]
    if kind == "int8":
        stacks = [ChannelStack(*_coded(weight, CODES[0])) for weight in floats]
        exact = [_floats(*stack) for stack in stacks]
    else:
        stacks = [jnp.asarray(weight, jnp.bfloat16) for weight in floats]
        exact = [np.asarray(stack, np.float64) for stack in stacks]
    run = jax.jit(functools.partial(grouped_matmul, backend=Backend.GPU))
    ys = run(x, stacks, jnp.asarray(case.group_sizes, jnp.int32))
    expert = np.repeat(np.arange(experts), case.group_sizes)
    a = np.asarray(x, np.float64)[: len(expert)]
    error = 0.0
    for y, weight in zip(ys, exact, strict=True):
        expected = np.concatenate([a[expert == e] @ weight[e].T for e in range(experts)])
        error = max(error, _error(y[: len(expert)], expected) if len(expert) else 0.0)
    for row in {0, len(expert) // 3, len(expert) - 1} if len(expert) else ():
        own = jnp.asarray(np.arange(experts) == expert[row], jnp.int32)
        for alone, y in zip(run(x[row : row + 1], stacks, own), ys, strict=True):
            if not np.array_equal(alone[0], y[row]):
                return error, f"row {row} alone has other bits"
    return error, ""


def checks() -> Iterator[tuple[str, tuple[float, str]]]:
    """Names and findings."""
    for case in (*CASES, *_LARGE):
        for codes in CODES:
            yield f"{codes.name} {case.name}", quantized(case, codes)
    for case in (*TILED_CASES, _LARGE_EXPERTS):
        for kind in ("bfloat16", "int8"):
            yield f"experts {kind} {case.name}", grouped(case, kind)


def main() -> int:
    """1 if anything failed."""
    failed = 0
    for name, (error, fault) in checks():
        ok = error < 1e-5 and not fault  # NaN is not below
        failed += not ok
        print(f"{'ok  ' if ok else 'FAIL'} {name:45} {error:.2e} {fault}", flush=True)
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
