"""Quantized and grouped matmuls beside what memory and matrix units can do.

    python -m benchmarks.kernels.matmuls
    python -m benchmarks.kernels.matmuls --only "qwen3_30b" --backends gpu cpu
    python -m benchmarks.kernels.matmuls --only "llama_8b o, 8 rows" --weights_mib 64 --turns 3

The shapes are `MODEL_CASES` of the two ops; backend `cpu` is XLA's code, which makes floats of
weights first. Beside them: XLA with weights in bfloat16, and kernels of libraries (see
`libraries.py`), their shares counted as if they moved our bytes. A program multiplies by several
weights one after the other, so that none is still in a cache; times are of one call, medians of
the turns. Bytes are those of the weights that are needed, rows and results. Prints one
table, one JSON line.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.engine import ceilings
from benchmarks.kernels.chained_attention import Turns
from benchmarks.kernels.libraries import (
    FAILURES,
    MatmulLibrary,
    agree,
    expert_libraries,
    matmul_libraries,
)
from benchmarks.serving import report
from jserve.pallas_kernels.backend import Backend, backend_for
from jserve.pallas_kernels.grouped_matmul.cases import MODEL_CASES as GROUPED_CASES
from jserve.pallas_kernels.grouped_matmul.cases import Case as GroupedCase
from jserve.pallas_kernels.grouped_matmul.dispatch import grouped_matmul
from jserve.pallas_kernels.matmul.dispatch import wants_panels
from jserve.pallas_kernels.quantized_matmul.cases import MODEL_CASES, Case
from jserve.pallas_kernels.quantized_matmul.channels import CODES, ChannelMatrix, ChannelStack
from jserve.pallas_kernels.quantized_matmul.dispatch import quantized_matmul

_GIGA, _TERA = 1e9, 1e12
_RUNS = 4  # runs of a program between two looks at the clock
_DTYPE = jnp.dtype(jnp.bfloat16)  # dtype of the rows
_EXPERTS = (_DTYPE, jnp.dtype(jnp.int8))  # dtypes of experts that are served


@dataclass(frozen=True)
class Cell:
    """One shape on one backend."""

    name: str
    backend: str
    us: float
    bytes_share: float  # share of the faster stream's rate
    operations_share: float  # share of the matmul's rate


@dataclass(frozen=True)
class _Problem:
    name: str
    weight_bytes: int  # bytes that are held
    num_bytes: int  # bytes that must be moved
    operations: int
    make: Callable[[jax.Array], Any]  # weights of one call, from a key
    call: Callable[[Backend, Any], tuple[jax.Array, ...]]
    x: jax.Array
    libraries: Sequence[MatmulLibrary]  # libraries that take these shapes
    takes: Callable[[Backend], bool]  # weights as `make` makes them


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", help="default: the best, and XLA's code")
    parser.add_argument("--only", default="", help="shapes with this in their names")
    parser.add_argument("--weights_mib", type=int, default=1024, help="of one program, about")
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--stream_mib", type=int, default=1024, help="of each streamed array")
    parser.add_argument("--product_dim", type=int, default=0, help="0: by device")
    return parser.parse_args()


def _quantized(case: Case, codes: jnp.dtype) -> _Problem:
    x = jax.random.normal(jax.random.key(0), (case.rows, case.in_dim), _DTYPE)
    outputs = sum(case.out_dims)

    def make(key: jax.Array) -> list[ChannelMatrix]:
        shapes = [(out, case.in_dim) for out in case.out_dims]
        bits = [jax.random.randint(key, shape, -127, 128, jnp.int8) for shape in shapes]
        scales = [jnp.full(shape[:1], 1e-3, jnp.float32) for shape in shapes]
        return [ChannelMatrix(b.astype(codes), s) for b, s in zip(bits, scales, strict=True)]

    def call(backend: Backend, weights: Any) -> tuple[jax.Array, ...]:
        return quantized_matmul(x, weights, backend=backend)

    return _Problem(
        f"{codes.name} {case.name}",
        outputs * case.in_dim,
        outputs * case.in_dim + case.rows * (2 * case.in_dim + 4 * outputs),
        2 * case.rows * case.in_dim * outputs,
        make,
        call,
        x,
        matmul_libraries(jax.default_backend(), codes, case.rows, case.in_dim, case.out_dims),
        lambda backend: True,
    )


def _grouped(case: GroupedCase, dtype: jnp.dtype) -> _Problem:
    x = jax.random.normal(jax.random.key(0), (case.rows, case.in_dim), _DTYPE)
    sizes, outputs = jnp.asarray(case.group_sizes, jnp.int32), sum(case.out_dims)
    expert_bytes = dtype.itemsize * outputs * case.in_dim
    used = sum(size > 0 for size in case.group_sizes)

    def make(key: jax.Array) -> list[jax.Array] | list[ChannelStack]:
        shapes = [(len(case.group_sizes), out, case.in_dim) for out in case.out_dims]
        if dtype != jnp.int8:
            return [jax.random.normal(key, shape, dtype) for shape in shapes]
        bits = [jax.random.randint(key, shape, -127, 128, jnp.int8) for shape in shapes]
        scales = [jnp.full(shape[:2], 1e-3, jnp.float32) for shape in shapes]
        return [ChannelStack(b, s) for b, s in zip(bits, scales, strict=True)]

    def call(backend: Backend, weights: Any) -> tuple[jax.Array, ...]:
        return grouped_matmul(x, weights, sizes, backend=backend)

    return _Problem(
        f"experts of {dtype.name} {case.name}",
        len(case.group_sizes) * expert_bytes,
        used * expert_bytes + case.rows * (2 * case.in_dim + 4 * outputs),
        2 * case.rows * case.in_dim * outputs,
        make,
        call,
        x,
        expert_libraries(jax.default_backend(), sizes) if dtype == _DTYPE else (),
        lambda backend: dtype != _DTYPE or not wants_panels(backend),
    )


def problems(only: str) -> Iterator[_Problem]:
    """Cases with `only` in their names."""
    found = [
        _quantized(case, codes) for case in MODEL_CASES for codes in CODES if only in case.name
    ]
    found += [
        _grouped(case, dtype) for case in GROUPED_CASES for dtype in _EXPERTS if only in case.name
    ]
    yield from found


def measure(arguments: argparse.Namespace, best: ceilings.Ceilings) -> list[Cell]:
    """Every shape on every backend."""
    names = arguments.backends or dict.fromkeys(
        (_best_backend().value, Backend.CPU.value)  # the second is XLA's own code
    )
    found: list[Cell] = []
    turns = arguments.turns
    for problem in problems(arguments.only):
        calls = max(arguments.weights_mib * 2**20 // problem.weight_bytes, 1)
        backends = [backend for backend in map(Backend, names) if problem.takes(backend)]
        if not backends:
            print(f"left out, no backend takes such weights: {problem.name}")
            continue
        weights = [jax.jit(problem.make)(jax.random.key(i)) for i in range(calls)]
        taken = {
            backend.value: _seconds(functools.partial(problem.call, backend), weights, turns)
            for backend in backends
        }
        expected = problem.call(backends[0], weights[0])
        for library in problem.libraries:
            try:
                taken[library.name] = _library_seconds(problem, weights, library, expected, turns)
            except FAILURES as error:
                print(f"{library.name}, {problem.name}: {error}")
        found += [
            Cell(
                problem.name,
                name,
                seconds * 1e6,
                problem.num_bytes / seconds / best.bytes_per_s,
                problem.operations / seconds / best.operations_per_s,
            )
            for name, seconds in taken.items()
        ]
    return found


def _best_backend() -> Backend:
    device = jax.devices()[0]
    return backend_for(device.platform, _DTYPE, device_kind=device.device_kind)


def _seconds(call: Callable[[Any], Any], weights: list[Any], turns: int) -> float:
    """Seconds of one call among several in a program."""
    run = jax.jit(lambda weights: [call(one) for one in weights])
    return Turns(turns, _RUNS).median_ms(functools.partial(run, weights)) / 1e3 / len(weights)


def _library_seconds(
    problem: _Problem,
    weights: list[Any],
    library: MatmulLibrary,
    expected: tuple[jax.Array, ...],
    turns: int,
) -> float:
    """Seconds of a library's call. Raises ValueError if its results are not ours."""
    lay_out = jax.jit(library.lay_out)
    laid_out = [[lay_out(one) for one in call] for call in weights]

    def call(weights: list[Any]) -> list[jax.Array]:
        return [library.multiply(problem.x, weight) for weight in weights]

    if not agree(call(laid_out[0]), expected):
        raise ValueError("does not agree with ours")
    return _seconds(call, laid_out, turns)


def show(found: list[Cell], best: ceilings.Ceilings) -> None:
    """Prints one table, with shares of the ceilings."""
    print(
        f"ceilings: {best.bytes_per_s / _GIGA:,.0f} GB/s, "
        f"{best.operations_per_s / _TERA:,.1f} TFLOP/s\n"
    )
    rows = [
        [
            f"{cell.name} ({cell.backend})",
            f"{cell.us:,.1f}",
            f"{cell.bytes_share:.1%}",
            f"{cell.operations_share:.1%}",
        ]
        for cell in found
    ]
    print(report.grid(["", "us", "bandwidth", "matrix rate"], rows))


def main() -> None:
    arguments = parse()
    dim = arguments.product_dim or ceilings.default_product_dim()
    best = ceilings.measure(_DTYPE, stream_mib=arguments.stream_mib, product_dim=dim)
    found = measure(arguments, best)
    show(found, best)
    cells = [asdict(cell) for cell in found]
    print(report.json_line("matmuls", vars(arguments), ceilings=asdict(best), cells=cells))


if __name__ == "__main__":
    main()
