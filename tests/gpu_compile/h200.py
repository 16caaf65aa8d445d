"""Compiles programs for an H200 that is not here, and finds out what became of them."""

import dataclasses
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.compiled_hlo import Op, written

_COPYING = {"copy", "copy-start", "transpose"}

# XLA's GpuTargetConfigProto: what it would ask an H200's driver. Without versions of the driver
# and of CUDA it takes them to be too old to capture custom calls in command buffers.
_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 4814000000000 device_memory_size: 150000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  cuda_compute_capability { major: 9 minor: 0 }
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


@dataclasses.dataclass(frozen=True)
class Program:
    """Something to compile. `lower` is called within the mesh; sizes are of one device."""

    name: str
    lower: Callable[[Mesh], jax.stages.Lowered]
    launches: int  # Mosaic kernels, neither more nor fewer
    in_place_bytes: int = 0  # donated memory that must be updated in place
    # A copy of so much is one of pages, or of a weight, in whatever shape.
    watched_bytes: frozenset[int] = frozenset()
    # Weights that nothing writes, as a copy, in another layout or as floats; their sizes sorted.
    weights: frozenset[tuple[int, ...]] = frozenset()
    most_temp_bytes: int | None = None
    captured: bool = True  # all launches must be inside command buffers
    devices: int = 1


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Mosaic kernel as ptxas made it."""

    registers: int  # at its start; warpgroups then give and take
    spill_bytes: int  # stored and loaded
    smem_bytes: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's report on a program."""

    kernels: tuple[Kernel, ...]  # but those that this process had compiled before
    launches: int  # launches of Mosaic kernels
    calls: int  # launches, and other calls of libraries
    captured: int  # calls inside a command buffer (CUDA graph)
    alias_bytes: int
    temp_bytes: int
    written: tuple[Op, ...]  # every operation of the scheduled program that writes memory
    seconds: float


def h200(devices: int = 1) -> Mesh:
    """Makes a mesh of `devices` devices of one machine."""
    topology = topologies.get_topology_desc(
        topology_name="h200", platform="cuda", topology=f"1x1x{devices}", target_config=_TARGET
    )
    return Mesh(np.array(topology.devices).reshape(devices, 1), ("model", "expert"))


def argument(mesh: Mesh, dtype: str, *shape: int, split: int | None = None) -> jax.ShapeDtypeStruct:
    """An array on all devices, one of its axes split over them or none."""
    spec = PartitionSpec(*("model" if axis == split else None for axis in range(len(shape))))
    return jax.ShapeDtypeStruct(
        shape, np.dtype(jax.numpy.dtype(dtype)), sharding=NamedSharding(mesh, spec)
    )


@contextmanager
def _everything_printed(path: Path) -> Iterator[None]:
    """Puts into a file what this process prints, C++ included."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            os.close(kept[0])
            os.close(kept[1])


_REGISTERS = re.compile(r"ptxas info\s+: Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
# Shared memory is an argument of the call that loads a kernel; from JAX 0.11 on of the call that
# launches it, after the grid, the cluster and the block.
_SMEM = re.compile(
    r"call (?:ptr @mosaic_gpu_get_function\(ptr \S+, ptr \S+|"
    r"i32 @mosaic_gpu_launch_kernel\(ptr \S+(?:, i32 \d+){9}), i32 (\d+), i32 \d+"
)
_THUNK = re.compile(r"^( *)\d+: (k\w+)")


def _kernels(printed: str) -> tuple[Kernel, ...]:
    registers = [int(found) for found in _REGISTERS.findall(printed)]
    # "Function properties" come once for each kernel; a warning repeats the numbers before them.
    properties = [line for line in printed.splitlines() if "stack frame" in line]
    spills = [sum(map(int, _SPILLS.findall(line)[0])) for line in properties]
    smem = [int(found) for found in _SMEM.findall(printed)]
    return tuple(Kernel(*each) for each in zip(registers, spills, smem, strict=True))


def _calls(thunks: str) -> tuple[int, int]:
    """Custom calls of a dump, and how many of them are inside a command buffer.

    A thunk's own are indented deeper than it; loops and branches have some, too.
    """
    found = captured = 0
    around: list[tuple[int, str]] = []  # indentation and kind of the thunks that enclose a line
    for line in thunks.splitlines():
        if not (thunk := _THUNK.match(line)):
            continue
        indentation, kind = len(thunk[1]), thunk[2]
        while around and around[-1][0] >= indentation:
            around.pop()
        if kind == "kCustomCall":
            found += 1
            captured += any(other == "kCommandBuffer" for _, other in around)
        around.append((indentation, kind))
    return found, captured


def compile_program(program: Program) -> Compiled:
    """Compiles it and reads what the compilers have left."""
    started = time.perf_counter()
    mesh = h200(program.devices)
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder) / "printed.txt"
        with _everything_printed(printed), jax.set_mesh(mesh):
            compiled = program.lower(mesh).compile(compiler_options={"xla_dump_to": folder})
        # Nothing is written after the passes where they change nothing: then nothing is captured.
        thunks = sorted(Path(folder).glob("*.thunk_sequence_after_thunk_passes.txt"))
        thunks = thunks or sorted(Path(folder).glob("*.thunk_sequence.txt"))
        calls, captured = _calls("\n".join(path.read_text() for path in thunks))
        kernels = _kernels(printed.read_text(errors="replace"))
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Compiled(
        kernels=kernels,
        launches=text.count('custom_call_target="mosaic_gpu'),
        calls=calls,
        captured=captured,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        written=tuple(written(text)),
        seconds=round(time.perf_counter() - started, 1),
    )


def complaints(program: Program, compiled: Compiled) -> list[str]:
    """Faults of a compiled program, in words."""
    found = []
    if compiled.alias_bytes < program.in_place_bytes:
        found.append(f"only {compiled.alias_bytes} bytes are updated in place")
    for op in compiled.written:
        if op.kind in _COPYING and op.size_bytes in program.watched_bytes:
            found.append(f"{op.name} copies {op.size_bytes} bytes")
        if tuple(sorted(op.shape)) in program.weights:
            found.append(f"{op.name} writes {op.dtype}{list(op.shape)}, a weight")
    most = program.most_temp_bytes
    if most is not None and compiled.temp_bytes > most:
        found.append(f"temporaries take {compiled.temp_bytes} bytes, not {most} at most")
    if compiled.launches != program.launches:
        found.append(f"{compiled.launches} kernels are launched, not {program.launches}")
    if program.captured and compiled.captured < compiled.calls:
        found.append(f"only {compiled.captured} calls are inside command buffers")
    return found
