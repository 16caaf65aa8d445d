"""Block sizes of the TPU kernel, by generation; `tpu_blocks.json` holds the table.

Sizes are chosen from bandwidths, memory sizes and matrix units, not measured yet: a block takes one
to two microseconds to load, and `rows` rows take longer to multiply than their weights to load.
"""

from dataclasses import dataclass
from pathlib import Path

from jserve.pallas_kernels.block_tables import read_row

LANES = 128

_TABLE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True, slots=True)
class Blocks:
    """Sizes in KiB, rows and MiB; everything that is streamed has two buffers."""

    weight_block_kib: int  # codes of one round, unless 128 outputs take more
    rows: int  # rows of activations of one round
    vmem_limit_mib: int

    def outputs(self, out_dim: int, in_dim: int) -> int:
        """Outputs of a block: the largest multiple of 128 that fits and divides `out_dim`.

        If 128 does not divide `out_dim`, the block is as large as fits and the last one has fewer.
        """
        tiles = -(-out_dim // LANES)
        fitting = min(max(self.weight_block_kib * 1024 // (LANES * in_dim), 1), tiles)
        if out_dim % LANES:
            return LANES * fitting
        return LANES * max(n for n in range(1, fitting + 1) if tiles % n == 0)


def blocks_for(generation: str) -> Blocks:
    """Block sizes of a generation. Raises ValueError if the table has none."""
    return read_row(_TABLE, generation, Blocks, "TPU generation")
