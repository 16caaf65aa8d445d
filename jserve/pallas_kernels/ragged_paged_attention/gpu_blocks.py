"""Block sizes of the GPU kernel, by kind of GPU; `gpu_blocks.json` holds the table.

They are chosen from the sizes of shared memory and register files, not measured yet.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import jax

OTHER = "other"  # the interpreter runs it: few thread blocks, short splits
_KINDS = {"NVIDIA H100": "hopper", "NVIDIA H200": "hopper", "NVIDIA GH200": "hopper"}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes for one head_dim."""

    block: int  # tokens of K and V in one stage
    stages: int
    columns: int  # of an output that are written at a time
    wide_columns: int  # of a part of an output, in float32


@dataclass(frozen=True, slots=True)
class Blocks:
    """One row of the table."""

    thread_blocks: int  # one for each multiprocessor
    split: int  # tokens of a decode row that one warpgroup walks over, at least
    max_splits: int  # of a decode row; above it splits grow
    write_kib: int  # of shared memory, for K and V on their way to their pages
    head_dims: dict[str, dict[str, int]]

    def sizes(self, head_dim: int) -> Sizes:
        """The sizes for a head_dim of 64, 128 or 256."""
        return Sizes(**self.head_dims[str(head_dim)])


@functools.cache
def _table() -> dict[str, Blocks]:
    text = Path(__file__).with_name("gpu_blocks.json").read_text(encoding="utf-8")
    return {name: Blocks(**sizes) for name, sizes in json.loads(text).items()}


def blocks_for(kind: str) -> Blocks:
    """The sizes of a kind. Raises ValueError where the table has none."""
    table = _table()
    if kind not in table:
        raise ValueError(f"no GPU kind {kind!r}; the table has {', '.join(table)}")
    return table[kind]


def kind_in_use() -> str:
    """The kind that the current mesh is made of, or else the one JAX runs on.

    A mesh counts first: a program may be compiled for a GPU where there is none.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.device_kind if device is not None else jax.devices()[0].device_kind
    return next((kind for prefix, kind in _KINDS.items() if name.startswith(prefix)), OTHER)
