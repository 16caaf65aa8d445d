"""The shapes that matter, named once: for tests, benchmarks and tuning."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """Rows of each expert, and the sizes of the experts' weights."""

    name: str
    in_dim: int
    out_dims: tuple[int, ...]  # of the stacks of weights that are multiplied at once
    group_sizes: tuple[int, ...]  # rows of each expert
    padding: int = 0  # rows after the last group

    @property
    def rows(self) -> int:
        """Of the input, padding included."""
        return sum(self.group_sizes) + self.padding


CASES = (
    Case("one_row", 64, (96, 96), (0, 0, 1, 0)),
    Case("decode", 64, (96, 96), (2, 0, 1, 0, 0, 3, 1, 1)),
    Case("prompt", 96, (64,), (17, 40, 0, 71), padding=5),
    Case("one_expert", 48, (40, 24), (0, 130, 0)),
    Case("no_rows", 32, (32,), (0, 0), padding=3),
    Case("odd", 90, (211, 22), (3, 0, 29, 1, 13), padding=2),
    Case("long", 1536, (33,), (1, 5, 0, 26)),  # longer than a run of any backend
)
