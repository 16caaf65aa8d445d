"""The budget of a device's memory: how many KV pages fit beside all else.

Measured, where the engine starts: the compiler tells what programs need. Estimated, where
`jserve plan` runs: shapes alone tell it, without device, weights or compiler.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jserve.cache.layout import kv_layout
from jserve.core.errors import ConfigError
from jserve.core.step import Program, ProgramKind
from jserve.engine.build.shape import GRID, EngineShape, abstract_params
from jserve.engine.config import EngineConfig, Platform
from jserve.engine.program.executable_cache import ExecutableCache
from jserve.engine.program.page_moves import MAX_PAYLOADS, MOVE_SIZES
from jserve.engine.program.programs import compile_programs
from jserve.engine.program.state import abstract_state
from jserve.model.functional import Model
from jserve.model.sharding import AnyMesh, vocab_axes

_HEADROOM = 0.9  # share of a host's free memory; the rest is for Python, buffers, the page cache
_FLOAT = 4  # bytes of float32 and int32
# Code of a program on TPU, which lies in the same memory: the part all layers share, and a layer's.
_CODE_BYTES = 40 << 20
_LAYER_CODE_BYTES = 1 << 19
_LAYER_TEMPORARIES = 2 << 20  # kept by the compiler for every layer through a program
# Arrays of [rows, vocab] that sampling holds at once: logits, those with processors applied,
# counts and masks of the rows, noise, and what copies and comparisons make (compiled: up to 9).
_VOCAB_ARRAYS = 10


@dataclass(frozen=True, slots=True)
class KVBudget:
    """Memory of one device by consumer, in bytes. Pages take the rest.

    Attributes:
      params: parameters.
      slots: the state of all slots, without pages.
      page: one page over all layers.
      devices: devices that hold a share of every page.
      local_devices: devices among them that belong to one process.
      host_pages: pages that host memory holds beside those of the devices, for moves.
      temporaries: buffers of the program that needs most of them.
      code: code of all programs.
      largest: the program whose temporaries are counted; None while none are.
    """

    params: int
    slots: int
    page: int
    devices: int = 1
    local_devices: int = 1
    host_pages: int = 0
    temporaries: int = 0
    code: int = 0
    largest: Program | None = None

    @property
    def moves(self) -> int:
        """Payloads of page moves in flight; `PageMover` keeps to it."""
        return MAX_PAYLOADS * MOVE_SIZES[-1] * self.page if self.host_pages else 0

    @property
    def fixed(self) -> int:
        """Bytes used whatever the number of pages."""
        return self.params + self.slots + self.temporaries + self.code + self.moves

    def used(self, num_pages: int) -> int:
        """Bytes used with `num_pages` pages."""
        return self.fixed + num_pages * self.page

    def pages_within(self, limit: int) -> int:
        """Pages that fit in `limit` bytes, a multiple of GRID. Raises ConfigError for none."""
        pages = (limit - self.fixed) // self.page // GRID * GRID
        if pages <= 0:
            raise ConfigError(
                f"no KV page fits: the device has {limit} bytes, parameters and slots take "
                f"{self.params + self.slots}, the programs {self.temporaries + self.code}, page "
                f"moves {self.moves}; use more devices or a smaller model"
            )
        return pages

    def pages_in_kv_bytes(self, kv_bytes: int, available_bytes: int | None = None) -> int:
        """Pages in `kv_bytes` over all devices. Raises ConfigError if not one fits.

        `available_bytes` of host memory limit them where the devices are cores of the host.
        """
        if available_bytes is not None:
            page = self.local_devices * self.page
            taken = self.local_devices * self.fixed + self.host_pages * page
            free = int(available_bytes * _HEADROOM) - taken
            kv_bytes = min(kv_bytes, free * self.devices // self.local_devices)
        page = self.devices * self.page
        pages = kv_bytes // page
        pages = pages // GRID * GRID or pages
        if pages <= 0:
            fewer = ", lower engine.host_pages" if self.host_pages else ""
            raise ConfigError(
                f"no KV page of {page} bytes fits in {kv_bytes} bytes; raise engine.kv_bytes"
                f"{fewer} or free memory"
            )
        return pages


def budget_without_programs(
    model: Model, mesh: AnyMesh, config: EngineConfig, shape: EngineShape
) -> KVBudget:
    """The exact part of a budget: what shapes alone tell of one device of the mesh."""
    heads = shape.kv_heads // mesh.size
    return KVBudget(
        params=_shard_bytes(abstract_params(model, mesh)),
        slots=_shard_bytes(abstract_state(model, mesh, shape.state)._replace(kv={})),
        page=page_bytes(model, shape.batch.page_size, shape.kv_dtype, heads),
        devices=mesh.size,
        local_devices=mesh.size // config.num_processes,
        host_pages=config.host_pages,
    )


def measured_budget(
    model: Model,
    mesh: Mesh,
    config: EngineConfig,
    least: EngineShape,
    cache: ExecutableCache | None,
) -> KVBudget:
    """The budget with programs as the compiler measures them.

    The largest program of each kind is compiled once with few pages; the cache keeps it for the
    next start. Raises ConfigError if the backend does not tell.
    """
    params, state = abstract_params(model, mesh), abstract_state(model, mesh, least.state)
    largest = [
        [program for program in config.programs() if program.kind is kind][-1]
        for kind in ProgramKind
    ]
    compiled = compile_programs(model, mesh, largest, least.batch, params, state, cache=cache)
    temporaries: dict[Program, int] = {}
    code: dict[ProgramKind, int] = {}
    for program, made in compiled.items():
        memory = made.call.memory_analysis()
        if memory is None:
            raise ConfigError("this backend cannot tell what programs need; set engine.kv_bytes")
        temporaries[program] = memory.temp_size_in_bytes
        code[program.kind] = memory.generated_code_size_in_bytes
    return _with_programs(
        budget_without_programs(model, mesh, config, least),
        temporaries,
        sum(code[program.kind] for program in config.programs()),
    )


def estimated_budget(
    model: Model, mesh: AnyMesh, config: EngineConfig, least: EngineShape, *, platform: Platform
) -> KVBudget:
    """The budget with programs as estimated from shapes, from above."""
    programs = config.programs()
    return _with_programs(
        budget_without_programs(model, mesh, config, least),
        {program: estimated_temporary_bytes(model, mesh, program) for program in programs},
        len(programs) * estimated_code_bytes(model) if platform is Platform.TPU else 0,
    )


def _with_programs(budget: KVBudget, temporaries: dict[Program, int], code: int) -> KVBudget:
    largest = max(temporaries, key=temporaries.__getitem__)
    return dataclasses.replace(budget, temporaries=temporaries[largest], code=code, largest=largest)


def page_bytes(model: Model, page_size: int, kv_dtype: jnp.dtype, kv_heads: int) -> int:
    """Bytes of one page of `kv_heads` heads over all layers."""
    layout = kv_layout(
        model.spec, page_size=page_size, kv_heads=kv_heads, value_bytes=kv_dtype.itemsize
    )
    return layout.page_bytes


def host_available_bytes(
    cgroup: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo")
) -> int | None:
    """Bytes this process may still take: the tighter of cgroup and machine; None if unknown.

    The page cache counts as free: the kernel gives it back.
    """
    found: list[int] = []
    limit, usage = cgroup / "memory.max", cgroup / "memory.current"
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        found.append(int(text) - int(usage.read_text()) + int(stat["inactive_file"]))
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    elif hasattr(os, "sysconf"):
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def estimated_temporary_bytes(model: Model, mesh: AnyMesh, program: Program) -> int:
    """An upper estimate of the bytes one device needs to run a program beside its arguments.

    Layers come one after the other and reuse memory, so the widest counts: its input, its
    matmuls in float32 and in the compute dtype, and attention's own copies of q, k and v. The
    head and the sampler come after them.
    """
    spec, chips = model.spec, mesh.size
    tokens, itemsize = program.tokens, model.dtype.itemsize
    both = _FLOAT + itemsize
    heads = spec.q_heads // chips + 2 * max(spec.kv_heads // chips, 1)
    # q, k and v as multiplied, rotated, and laid out for the kernel; its outputs twice.
    attention = heads * spec.head_dim * 3 * both
    ffn = 3 * spec.ffn_dim // chips * both
    if spec.experts:
        columns = spec.expert_ffn_dim // mesh.shape["model"]  # rows are there for all experts
        row = 3 * columns * both + 2 * spec.model_dim * both
        ffn = max(ffn if spec.sparse_layers else 0, spec.experts_per_token * row)
    layers = tokens * (3 * spec.model_dim * both + max(attention, ffn))
    rows = program.rows
    if program.kind is ProgramKind.MIXED:
        layers += tokens * spec.model_dim * both  # the hidden states of all tokens, for their rows
    vocab = spec.vocab // (chips if vocab_axes(spec.vocab, mesh) else 1)
    layers += spec.layers * _LAYER_TEMPORARIES
    return layers + rows * vocab * _FLOAT * _VOCAB_ARRAYS


def estimated_code_bytes(model: Model) -> int:
    """An upper estimate of the bytes of one program's code on TPU."""
    return _CODE_BYTES + model.spec.layers * _LAYER_CODE_BYTES


def _shard_bytes(tree: object) -> int:
    """Bytes of the largest shard of every leaf: what one device holds."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
