"""Block sizes of the TPU kernel, by generation; `tpu_blocks.json` holds the table.

They are chosen from the sizes of memories and matrix units, not measured yet.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

_LANES = 128


@dataclass(frozen=True, slots=True)
class Blocks:
    """Sizes in tokens, rows and MiB; the two buffers of K and V together stay below theirs."""

    kv_block: int  # tokens of K and V that one round computes with
    kv_buffers_mib: int
    query_rows: int  # queries times grouped heads in one product of a prompt
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


@functools.cache
def _table() -> dict[str, Blocks]:
    text = Path(__file__).with_name("tpu_blocks.json").read_text(encoding="utf-8")
    return {name: Blocks(**sizes) for name, sizes in json.loads(text).items()}


def blocks_for(generation: str) -> Blocks:
    """The sizes of a generation. Raises ValueError where the table has none."""
    table = _table()
    if generation not in table:
        raise ValueError(f"no TPU generation {generation!r}; the table has {', '.join(table)}")
    return table[generation]
