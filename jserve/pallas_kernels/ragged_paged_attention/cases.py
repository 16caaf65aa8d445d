"""Ragged batches that tests, benchmarks and compilation checks share."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """A ragged batch: (tokens already computed, new tokens) of each row; decode rows first."""

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    decode: tuple[int, ...]  # tokens before the one new token of each row
    prompts: tuple[tuple[int, int], ...] = ()  # (tokens computed before, tokens of the chunk)
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
    Case(
        "short_prompts", 4, 2, 16, 16, (3,), ((0, 1), (0, 2), (5, 3), (0, 17), (16, 1)), padding=1
    ),
    Case("group_of_12", 12, 1, 32, 16, (7, 90), ((10, 20),)),
    Case("dim_64", 8, 2, 64, 128, (5, 127, 300), ((0, 40), (120, 20)), padding=2),
    Case("dim_64_window", 2, 2, 64, 128, (5, 300), ((100, 60),), window=64),
    Case("dim_128", 8, 2, 128, 64, (63, 300), ((0, 70), (30, 50)), idle_rows=1),
    Case("dim_256", 2, 1, 256, 64, (63, 100), ((30, 50),)),
)
