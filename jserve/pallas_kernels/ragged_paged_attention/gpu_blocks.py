"""Block sizes of the GPU kernel, by kind of GPU; `gpu_blocks.json` holds the table.

Sizes are chosen from the sizes of shared memory and register files, not measured yet.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax

from jserve.pallas_kernels.backend import hopper_multiprocessors
from jserve.pallas_kernels.block_tables import read_row

HOPPER = "hopper"
OTHER = "other"  # for the interpreter: few thread blocks, short splits

_TABLE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes for one head_dim."""

    block: int  # tokens of K and V in one stage
    stages: int
    columns: int  # columns of an output that are written at a time
    wide_columns: int  # columns of a float32 partial output that are written at a time


@dataclass(frozen=True, slots=True)
class Blocks:
    """One row of the table."""

    thread_blocks: int  # one for each multiprocessor
    split: int  # fewest tokens of a decode row that one warpgroup walks over
    max_splits: int  # most splits of a decode row; longer rows have longer splits
    write_kib: int  # shared memory for K and V on their way to pages
    head_dims: dict[str, dict[str, int]]

    def sizes(self, head_dim: int) -> Sizes:
        """Sizes for a head_dim of 64, 128 or 256."""
        return Sizes(**self.head_dims[str(head_dim)])


def blocks_for(kind: str) -> Blocks:
    """Block sizes of a kind. Raises ValueError if the table has none."""
    return read_row(_TABLE, kind, Blocks, "GPU kind")


def blocks_in_use() -> Blocks:
    """Block sizes for the current mesh, or else for the devices JAX runs on (see `blocks_on`).

    A mesh counts first: a program may be compiled for a GPU where there is none.
    """
    target = jax.sharding.get_abstract_mesh().abstract_device
    if target is not None:
        return blocks_on(target.platform, target.device_kind, target.num_cores)
    here = jax.devices()[0]
    return blocks_on(here.platform, here.device_kind, getattr(here, "core_count", None))


def blocks_on(platform: str, device_kind: str, multiprocessors: int | None = None) -> Blocks:
    """Block sizes for a device, with a thread block for each multiprocessor.

    `multiprocessors` is by default the number of the device's kind. Raises ValueError for a GPU
    that is no Hopper; on other devices the interpreter runs the kernel.
    """
    known = hopper_multiprocessors(device_kind)
    if known is not None:
        return dataclasses.replace(blocks_for(HOPPER), thread_blocks=multiprocessors or known)
    if platform in ("gpu", "cuda", "rocm"):
        raise ValueError(f"the attention kernel needs a Hopper GPU, not {device_kind!r}")
    return blocks_for(OTHER)
