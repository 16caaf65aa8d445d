"""Block sizes of the TPU kernel, by generation; `tpu_blocks.json` holds the table.

Sizes are chosen from the sizes of memories and matrix units, not measured yet.
"""

from dataclasses import dataclass
from pathlib import Path

from jserve.pallas_kernels.block_tables import read_row

_LANES = 128

_TABLE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True, slots=True)
class Blocks:
    """Sizes in tokens, rows and MiB."""

    kv_block: int  # tokens of K and V of one round
    kv_buffers_mib: int  # most that the two buffers of K and V together may take
    query_rows: int  # queries times grouped heads of one matmul of a prompt
    vmem_limit_mib: int

    def kv_tokens(self, page_size: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
        """Tokens of a block: whole pages, as many as the table and the buffers allow."""
        lanes = -(-head_dim // _LANES) * _LANES
        token_bytes = 2 * 2 * kv_heads * lanes * itemsize  # two buffers of K and V
        fitting = min(self.kv_block, self.kv_buffers_mib * 2**20 // token_bytes)
        return max(fitting // page_size, 1) * page_size

    def query_tokens(self, group: int, least: int) -> int:
        """Tokens of a prompt's tile: a power of two times `least`."""
        tokens = least
        while 2 * tokens * group <= self.query_rows:
            tokens *= 2
        return tokens


def blocks_for(generation: str) -> Blocks:
    """Block sizes of a generation. Raises ValueError if the table has none."""
    return read_row(_TABLE, generation, Blocks, "TPU generation")
