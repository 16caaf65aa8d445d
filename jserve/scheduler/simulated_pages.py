"""KV memory of the simulated device: pages by content, on the device and on the host."""

from collections.abc import Iterable, Sequence

from jserve.core.errors import EngineError
from jserve.core.step import Move, MoveKind


class PlanError(EngineError):
    """A plan breaks the contract of `core.step`."""


def require(condition: bool, message: str) -> None:
    """Raises PlanError with `message` unless `condition` holds."""
    if not condition:
        raise PlanError(message)


class SimulatedPages:
    """Each position of a page holds the digest of all tokens up to it, so content is checkable.

    A page has a writer: an object that changes when the page is given away or moved onto. So
    whoever remembers the writer of a page sees that its content is no longer what it was.
    """

    def __init__(self, num_pages: int, page_size: int, num_host_pages: int) -> None:
        self.page_size = page_size
        self._kv = [[0] * page_size for _ in range(num_pages + 1)]  # page 0 is the null page
        self._writers: list[object] = [None] * (num_pages + 1)
        self._host: list[list[int]] = [[] for _ in range(num_host_pages)]
        self._leaving: set[int] = set()  # host pages whose copy was started and not reported
        self._landed: set[int] = set()

    def has(self, page: int) -> bool:
        """Whether there is a page with this id that may be used."""
        return 1 <= page < len(self._kv)

    def writer(self, page: int) -> object:
        """The writer of `page`; None if nobody ever wrote it."""
        return self._writers[page]

    def give(self, page: int, writer: object) -> None:
        """Makes `writer` the writer of `page`."""
        self._writers[page] = writer

    def read(self, pages: Sequence[int], position: int) -> int:
        """The digest at `position` of a page table."""
        return self._kv[pages[position // self.page_size]][position % self.page_size]

    def write(self, pages: Sequence[int], position: int, digest: int) -> None:
        """Stores the digest at `position` of a page table."""
        self._kv[pages[position // self.page_size]][position % self.page_size] = digest

    def move(self, moves: Iterable[Move]) -> tuple[int, ...]:
        """Runs moves in order; returns the host pages that land with the step's result."""
        leaving: list[int] = []
        for kind, group, source, target in moves:
            name = f"{kind.name} {source} to {target}"
            require(group == 0, f"{name}: no page group {group}")
            match kind:
                case MoveKind.OUT:
                    require(self.has(source), f"{name}: no page {source}")
                    require(0 <= target < len(self._host), f"{name}: no host page {target}")
                    require(target not in self._leaving, f"{name}: {target} has not landed")
                    self._host[target] = list(self._kv[source])
                    self._leaving.add(target)
                    self._landed.discard(target)
                    leaving.append(target)
                case MoveKind.IN:
                    require(0 <= source < len(self._host), f"{name}: no host page {source}")
                    require(source in self._landed, f"{name}: {source} has not landed")
                    self._overwrite(name, target, self._host[source])
                case MoveKind.COPY:
                    require(self.has(source), f"{name}: no page {source}")
                    self._overwrite(name, target, self._kv[source])
        return tuple(leaving)

    def land(self, host_pages: Iterable[int]) -> None:
        """Notes that the scheduler was told of these host pages."""
        self._leaving.difference_update(host_pages)
        self._landed.update(host_pages)

    def _overwrite(self, name: str, page: int, content: list[int]) -> None:
        require(self.has(page), f"{name}: no page {page}")
        self._kv[page] = list(content)
        self._writers[page] = object()
