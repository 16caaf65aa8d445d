"""Shapes of grouped matmuls that tests, benchmarks and compilation checks share."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """Numbers of rows of each expert and sizes of the experts' weights."""

    name: str
    in_dim: int
    out_dims: tuple[int, ...]  # outputs of each stack of weights
    group_sizes: tuple[int, ...]  # rows of each expert
    padding: int = 0  # rows after the last group

    @property
    def rows(self) -> int:
        """Rows of the input, padding included."""
        return sum(self.group_sizes) + self.padding


# Small shapes, which any backend can run.
CASES = (
    Case("one_row", 64, (96, 96), (0, 0, 1, 0)),
    Case("decode", 64, (96, 96), (2, 0, 1, 0, 0, 3, 1, 1)),
    Case("prompt", 96, (64,), (17, 40, 0, 71), padding=5),
    Case("one_expert", 48, (40, 24), (0, 130, 0)),
    Case("no_rows", 32, (32,), (0, 0), padding=3),
    Case("odd", 90, (211, 22), (3, 0, 29, 1, 13), padding=2),
    Case("long", 1536, (33,), (1, 5, 0, 26)),  # longer than a run of any backend
)

# Shapes that the kernel for Hopper takes: fewer rows than a tile has, several stacks, and items
# that end anywhere in a tile.
TILED_CASES = (
    Case("few_rows", 128, (128,), (0, 3, 0)),
    Case("decode", 128, (128, 256), (2, 0, 1, 0, 0, 3, 1, 1), padding=2),
    Case("prompt", 256, (128,), (17, 40, 0, 71), padding=5),
)


def _spread(rows: int, experts: int) -> tuple[int, ...]:
    """Spreads rows over experts as evenly as possible."""
    return tuple(rows * (e + 1) // experts - rows * e // experts for e in range(experts))


# Shapes of models on one device: eight of 128 experts a token, and two of eight.
MODEL_CASES = tuple(
    Case(f"{name}, {tokens} tokens", in_dim, out_dims, _spread(chosen * tokens, experts))
    for name, experts, chosen, in_dim, out_dims in (
        ("qwen3_30b gate_up", 128, 8, 2048, (768, 768)),
        ("qwen3_30b down", 128, 8, 768, (2048,)),
        ("mixtral gate_up", 8, 2, 4096, (14336, 14336)),
        ("mixtral down", 8, 2, 14336, (4096,)),
    )
    for tokens in (1, 64, 2048)
)
