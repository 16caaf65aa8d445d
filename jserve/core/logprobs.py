"""Log-probabilities of many positions in a few arrays: 8 bytes for each token and alternative."""

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self, TypeVar, overload

from jserve.core.request import TokenLogprobs

P_co = TypeVar("P_co", bound=TokenLogprobs | None, covariant=True)


class LogprobBytes(NamedTuple):
    """The arrays of `PackedLogprobs` as little-endian bytes, in which they travel."""

    ids: bytes  # int32
    values: bytes  # float32, parallel to `ids`
    ranks: bytes  # int32, one of each position
    ends: bytes  # int64, one of each position: where it ends in `ids`


class PackedLogprobs(Sequence[P_co]):
    """Positions as `TokenLogprobs`, None for one without; made when they are looked at.

    As objects they take twenty times the memory. Values are float32, as the device has them.
    """

    __slots__ = ("_ends", "_ids", "_ranks", "_values")

    def __init__(self, positions: Iterable[P_co] = ()) -> None:
        # Of each position the token and then its alternatives, up to `_ends[position]`.
        self._ids = array("i")
        self._values = array("f")
        self._ends = array("q")
        self._ranks = array("i")  # of each position
        self.extend(positions)

    @classmethod
    def from_bytes(cls, packed: LogprobBytes) -> Self:
        """The inverse of `to_bytes`. Raises ValueError for arrays that do not fit each other."""
        made = cls()
        for name, data in zip(LogprobBytes._fields, packed, strict=True):
            numbers: array[Any] = getattr(made, f"_{name}")
            numbers.frombytes(data)
            if sys.byteorder == "big":
                numbers.byteswap()
        num_entries = made._ends[-1] if made._ends else 0
        if not (num_entries == len(made._ids) == len(made._values)) or (
            len(made._ends) != len(made._ranks)
        ):
            raise ValueError("the arrays of log-probabilities do not fit each other")
        return made

    def to_bytes(self) -> LogprobBytes:
        """Copies the arrays, in microseconds for thousands of positions."""
        arrays: list[array[Any]] = [getattr(self, f"_{name}") for name in LogprobBytes._fields]
        if sys.byteorder == "big":
            arrays = [array(each.typecode, each) for each in arrays]
            for each in arrays:
                each.byteswap()
        return LogprobBytes(*(each.tobytes() for each in arrays))

    def extend(self, positions: Iterable[TokenLogprobs | None]) -> None:
        """Adds positions at the end; only its one owner may."""
        if isinstance(positions, PackedLogprobs):
            offset = len(self._ids)
            self._ids += positions._ids
            self._values += positions._values
            self._ends.extend(offset + end for end in positions._ends)
            self._ranks += positions._ranks
            return
        for position in positions:
            if position is not None:
                self._ids.append(position.token_id)
                self._values.append(position.logprob)
                for token_id, logprob in position.top:
                    self._ids.append(token_id)
                    self._values.append(logprob)
            self._ends.append(len(self._ids))
            self._ranks.append(0 if position is None else position.rank)

    @property
    def num_entries(self) -> int:
        """Number of log-probabilities: of tokens and of their alternatives."""
        return len(self._ids)

    @property
    def nbytes(self) -> int:
        """Memory that the positions take."""
        return 8 * len(self._ids) + 12 * len(self._ends)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[P_co]:
        start = 0
        for index, end in enumerate(self._ends):
            yield self._position(index, start, end)
            start = end

    @overload
    def __getitem__(self, index: int) -> P_co: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[P_co, ...]: ...

    def __getitem__(self, index: int | slice) -> P_co | tuple[P_co, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if index < 0:
            index += len(self)
        end = self._ends[index]  # raises IndexError
        return self._position(index, self._ends[index - 1] if index else 0, end)

    def __eq__(self, other: object) -> bool:
        """Whether `other` is a sequence of the same positions, packed or not."""
        if not isinstance(other, Sequence):
            return NotImplemented
        others: list[object] = list(other)  # pyright: ignore[reportUnknownArgumentType]
        return len(self) == len(others) and list(self) == others

    __hash__ = None  # pyright: ignore[reportAssignmentType]  it may grow

    def __repr__(self) -> str:
        return f"PackedLogprobs({list(self)!r})"

    def _position(self, index: int, start: int, end: int) -> Any:
        if start == end:
            return None
        ids, values = self._ids[start:end], self._values[start:end]
        top = tuple(zip(ids[1:], values[1:], strict=True))
        return TokenLogprobs(ids[0], values[0], self._ranks[index], top)
