"""The pages of one sequence, what a newcomer finds of them, and what the device must know."""

from dataclasses import dataclass

from jserve.cache.prefix import Node, PageChain
from jserve.core.step import NewPages

NEVER = 1 << 62  # a number of tokens that no sequence has

# Pages that were added to a sequence's page tables; the scheduler carries it into a chunk.
PageDelta = tuple[NewPages, ...]


class Pages:
    """The pages of one sequence in every group. Only `KVCache` looks inside.

    Attributes:
        capacity: tokens that they hold. All that the scheduler reads, and it does for every row.
    """

    __slots__ = ("capacity", "chain", "expected", "most_kept", "num_context", "num_kept", "tables")

    def __init__(self, num_groups: int, chain: PageChain, num_context: int = 0) -> None:
        self.capacity = 0
        self.tables: list[list[int]] = [[] for _ in range(num_groups)]  # page ids in order
        self.chain = chain
        self.num_context = num_context  # tokens that prompt chunks compute; decodes add others
        self.num_kept = 0  # pages that were offered to others
        self.most_kept = 0  # tokens at most whose pages others may share
        # Released pages whose tokens are in flight, with their places in the chain.
        self.expected: list[tuple[int, Node]] = []

    @property
    def num_pages(self) -> int:
        """Pages in all groups."""
        return sum(map(len, self.tables))


NO_PAGES = Pages(0, PageChain(b"", (), [], 1))  # for sequences that never had a slot


@dataclass(frozen=True, slots=True)
class Hit:
    """Computed tokens at the start of a sequence whose K and V are in pages already.

    Attributes:
        num_tokens: less than the sequence has: the last one must still be computed.
        tables: page ids by group, known to `KVCache` alone.
        num_pages: pages in all groups.
        num_evictable: pages among them that nobody uses; they count as free until they are adopted.
        pending: a running sequence is about to compute the page after them.
    """

    num_tokens: int = 0
    tables: tuple[tuple[int, ...], ...] = ()
    num_pages: int = 0
    num_evictable: int = 0
    pending: bool = False

    @property
    def num_entries(self) -> int:
        """Entries of the device's page table that the hit fills, in the group with most of them."""
        return max(map(len, self.tables), default=0)


NO_HIT = Hit()
PENDING = Hit(pending=True)


def joined(first: PageDelta, then: PageDelta) -> PageDelta:
    """One delta for two that follow each other."""
    if not first or not then:
        return first or then
    ids = {new.group: new for new in first}
    for new in then:
        before = ids.get(new.group)
        ids[new.group] = new if before is None else before._replace(ids=before.ids + new.ids)
    return tuple(ids.values())
