"""The shapes that matter, named once: for tests, benchmarks and tuning."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """A ragged batch: (tokens already computed, new tokens) of each row; decode rows first."""

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    decode: tuple[int, ...]  # context before the one new token
    prompts: tuple[tuple[int, int], ...] = ()  # (computed before, chunk)
    window: int = 0
    idle_rows: int = 0
    padding: int = 0  # tokens after the last row


CASES = (
    Case("decode", 4, 2, 16, 16, (0, 1, 15, 16, 127, 128, 200)),
    Case("prompts", 4, 2, 16, 16, (), ((0, 1), (0, 33), (31, 70), (130, 5)), padding=3),
    Case("mixed", 9, 3, 64, 16, (5, 300, 127), ((0, 64), (64, 65)), idle_rows=2, padding=7),
    Case("mha", 2, 2, 32, 8, (9, 64), ((0, 40),)),
    Case("mqa", 8, 1, 16, 32, (63, 64), ((3, 40),)),
    Case("wide_page", 4, 4, 16, 128, (127, 128), ((120, 20),)),
    Case("wider_page", 4, 2, 16, 256, (300,), ((250, 20),)),
    Case("window", 4, 1, 32, 16, (3, 31, 32, 160, 300), ((0, 100), (150, 40)), window=32),
    Case("window_over_blocks", 4, 2, 16, 16, (400,), ((0, 300), (290, 30)), window=200),
)
