"""Chooses the compiled program of a step."""

from jserve.core.errors import ConfigError
from jserve.core.step import Program, ProgramKind


class ProgramTable:
    """The programs of one engine, smallest first.

    Raises:
        ConfigError: no mixed program holds a row and a token for every slot; then a prompt could
            stall decodes, or never start.
    """

    def __init__(self, programs: tuple[Program, ...], num_slots: int) -> None:
        self._mixed = sorted(
            (p for p in programs if p.kind is ProgramKind.MIXED), key=lambda p: (p.tokens, p.rows)
        )
        self._decodes = sorted(
            (p for p in programs if p.kind is ProgramKind.DECODE), key=lambda p: (p.rows, p.steps)
        )
        if not self._mixed or min(self._mixed[-1].tokens, self._mixed[-1].rows) < num_slots:
            names = ", ".join(p.name for p in programs)
            raise ConfigError(
                f"no mixed program holds {num_slots} slots (programs: {names}); "
                f"add one of at least {num_slots} tokens and rows, or use fewer slots"
            )

        self._num_slots = num_slots

    def step_tokens(self, wanted: int | None) -> int:
        """The token budget of a mixed step: `wanted`, limited to what the largest program holds.

        Raises:
            ConfigError: it leaves no token for a prompt while other slots decode.
        """
        most = self._mixed[-1].tokens
        if wanted is not None and wanted < self._num_slots:
            raise ConfigError(
                f"scheduler.step_tokens is {wanted}, less than the {self._num_slots} slots; "
                f"raise it, or use fewer slots"
            )
        return most if wanted is None else min(wanted, most)

    def max_decode_steps(self, rows: int) -> int:
        """Most decode steps of one run over `rows` rows."""
        fitting = [p for p in self._decodes if p.rows >= rows]
        return max((p.steps for p in fitting if p.rows == fitting[0].rows), default=1)

    def mixed(self, tokens: int, rows: int) -> Program:
        """The smallest mixed program for `tokens` tokens of `rows` rows."""
        return next(p for p in self._mixed if p.tokens >= tokens and p.rows >= rows)

    def decode(self, rows: int, steps: int) -> Program:
        """The smallest decode program that fits, or a mixed one if none is wide enough."""
        for program in self._decodes:
            if program.rows >= rows and program.steps >= steps:
                return program
        return self.mixed(rows, rows)
