"""Mosaic GPU kernels whose memory is declared once: operands, outputs and scratch, by name."""

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Memory = SimpleNamespace  # a kernel's references, by the names of its declaration
Ref = Any  # a Pallas reference
_ALIGNMENT = 1024  # bytes


class Kind(enum.Enum):
    """The owner of a buffer."""

    OPERAND = enum.auto()  # the caller
    OUTPUT = enum.auto()  # the caller, once the kernel has run
    SCRATCH = enum.auto()  # a thread block: shared memory and barriers


@dataclass(frozen=True, slots=True)
class Buffer:
    """One reference of a kernel, with its shape."""

    kind: Kind
    type: Any  # a `jax.ShapeDtypeStruct`, or the scratch type of Mosaic GPU
    shared_bytes: int = 0


def operand(shape: tuple[int, ...], dtype: Any) -> Buffer:
    """An array in global memory that the caller passes, or a `jax.Ref` to update in place."""
    return Buffer(Kind.OPERAND, jax.ShapeDtypeStruct(shape, dtype))


def output(shape: tuple[int, ...], dtype: Any) -> Buffer:
    """An array in global memory that the kernel returns."""
    return Buffer(Kind.OUTPUT, jax.ShapeDtypeStruct(shape, dtype))


def shared(shape: tuple[int, ...], dtype: Any, transforms: tuple[Any, ...] = ()) -> Buffer:
    """Shared memory of a thread block."""
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    aligned = -(-size // _ALIGNMENT) * _ALIGNMENT
    return Buffer(Kind.SCRATCH, plgpu.SMEM(shape, dtype, transforms=transforms), aligned)


def barriers(number: int = 1, *, arrivals: int = 1) -> Buffer:
    """Barriers in shared memory, each completed by `arrivals` arrivals."""
    return Buffer(Kind.SCRATCH, plgpu.Barrier(num_arrivals=arrivals, num_barriers=number))


def shared_bytes(memory: Mapping[str, Buffer]) -> int:
    """Bytes of shared memory that these buffers take; barriers are not counted."""
    return sum(buffer.shared_bytes for buffer in memory.values())


def gpu_kernel(
    body: Callable[[Memory], None],
    memory: Mapping[str, Buffer | list[Buffer]],
    *,
    name: str,
    blocks: int,
    warpgroups: int = 1,
) -> Callable[..., dict[str, Any]]:
    """A kernel of `blocks` thread blocks (axis "block") of `warpgroups` (axis "role").

    It is called with the operands by name and returns the outputs by name; `body` gets a namespace
    of references. A name of several buffers, all of one kind, stands for a list. Raises TypeError
    for operands that are not as declared.

    Unlike `plgpu.kernel`, it takes `jax.Ref`s and updates them in place: the batching rule that
    `plgpu.kernel` adds does not know them.
    """
    declared = {
        key: [entry] if isinstance(entry, Buffer) else entry for key, entry in memory.items()
    }
    places = [
        (key, kind, [buffer.type for buffer in entry])
        for kind in Kind
        for key, entry in declared.items()
        if entry[0].kind is kind
    ]
    mesh = plgpu.Mesh(
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="role",
    )

    def by_name(values: Any, *kinds: Kind) -> dict[str, Any]:
        rest, found = list(values), {}
        for key, kind, types in places:
            if kind in kinds:
                several, rest = rest[: len(types)], rest[len(types) :]
                found[key] = several[0] if isinstance(memory[key], Buffer) else several
        assert not rest
        return found

    def declared_types(kind: Kind) -> list[Any]:
        return [each for _, of, types in places if of is kind for each in types]

    def scoped(*refs: Any) -> None:
        def run(*scratch: Any) -> None:
            body(Memory(**by_name((*refs, *scratch), *Kind)))

        pl.run_scoped(run, *declared_types(Kind.SCRATCH), collective_axes="role")

    launch = pl.kernel(
        scoped,
        out_type=tuple(declared_types(Kind.OUTPUT)),
        mesh=mesh,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # The kernels name the layouts of their arrays; JAX 0.11 would infer them by default.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        name=name,
    )

    def call(**arrays: Any) -> dict[str, Any]:
        operands: list[Any] = []
        for key, kind, types in places:
            if kind is Kind.OPERAND:
                given = arrays.pop(key)
                _check(key, given if isinstance(given, list) else [given], types)
                operands += given if isinstance(given, list) else [given]
        if arrays:
            raise TypeError(f"{name} has no operands {', '.join(arrays)}")
        return by_name(launch(*operands), Kind.OUTPUT)

    return call


def _check(key: str, arrays: list[Any], types: list[Any]) -> None:
    found = [(array.shape, jnp.dtype(array.dtype)) for array in arrays]
    wanted = [(each.shape, jnp.dtype(each.dtype)) for each in types]
    if found != wanted:
        raise TypeError(f"{key} is {found}, declared as {wanted}")
