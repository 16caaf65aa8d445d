"""Block sizes of the TPU kernel, by generation; `tpu_blocks.json` holds the table.

They are chosen from bandwidths, memory sizes and matrix units, not measured yet: a block takes
one to two microseconds to load, and so many rows make a product that takes longer than loading
its weights.
"""

from dataclasses import dataclass
from pathlib import Path

from jserve.pallas_kernels.block_tables import read_row

LANES = 128

_TABLE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True, slots=True)
class Blocks:
    """Sizes in KiB, rows and MiB; there are two buffers of everything that is streamed."""

    weight_block_kib: int  # of codes that one round computes with, if 128 outputs are not more
    rows: int  # of activations that meet the weights at a time
    vmem_limit_mib: int

    def outputs(self, out_dim: int, in_dim: int) -> int:
        """Outputs of a block: the largest multiple of 128 that fits, if it may be one that divides.

        Of outputs that 128 does not divide the last block has fewer.
        """
        tiles = -(-out_dim // LANES)
        fitting = min(max(self.weight_block_kib * 1024 // (LANES * in_dim), 1), tiles)
        if out_dim % LANES:
            return LANES * fitting
        return LANES * max(n for n in range(1, fitting + 1) if tiles % n == 0)


def blocks_for(generation: str) -> Blocks:
    """The sizes of a generation. Raises ValueError where the table has none."""
    return read_row(_TABLE, generation, Blocks, "TPU generation")
