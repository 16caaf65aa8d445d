"""Responses that are kept for `previous_response_id` and for fetching, within bounds.

They are in this process's memory only.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field

_OVERHEAD_BYTES = 256  # of an object beside its JSON, roughly
_REFERENCE_BYTES = 8


@dataclass(frozen=True, slots=True, eq=False)
class StoredItem:
    """An item of a conversation. Responses that continue one another share it."""

    id: str
    json: bytes


@dataclass(frozen=True, slots=True, eq=False)
class StoredResponse:
    """A response, and the conversation that it is part of."""

    id: str
    json: bytes
    input: tuple[StoredItem, ...]  # of the whole conversation before the output
    output: tuple[StoredItem, ...]
    background: bool = False

    @property
    def items(self) -> tuple[StoredItem, ...]:
        return self.input + self.output


@dataclass(slots=True)
class ResponseStore:
    """The responses of all tenants, each of which sees its own. Owned by one event loop.

    Over a bound the least recently used response goes, of the tenant who holds the most: nobody
    pushes out what others keep. Items count once.
    """

    max_responses: int
    max_bytes: int
    num_bytes: int = 0
    _responses: dict[str, OrderedDict[str, StoredResponse]] = field(
        default_factory=dict[str, OrderedDict[str, StoredResponse]]
    )
    _bytes: Counter[str] = field(default_factory=Counter[str])  # by tenant
    _uses: Counter[StoredItem] = field(default_factory=Counter[StoredItem])
    _items: dict[tuple[str, str], StoredItem] = field(
        default_factory=dict[tuple[str, str], StoredItem]
    )  # by tenant and id; of equal ids the last one

    def __len__(self) -> int:
        return sum(map(len, self._responses.values()))

    def put(self, tenant: str, response: StoredResponse) -> None:
        """Keeps a response; one that exceeds the bounds by itself is dropped."""
        self.delete(tenant, response.id)
        self._responses.setdefault(tenant, OrderedDict())[response.id] = response
        self._count(tenant, _own_bytes(response))
        for item in response.items:
            self._uses[item] += 1
            if self._uses[item] == 1:
                self._count(tenant, _item_bytes(item))
            self._items[tenant, item.id] = item
        while self.num_bytes > self.max_bytes:
            self._drop_oldest(max(self._responses, key=lambda it: self._bytes[it]))
        while len(self) > self.max_responses:
            self._drop_oldest(max(self._responses, key=lambda it: len(self._responses[it])))

    def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        """Returns a response, which now is the most recently used one."""
        own = self._responses.get(tenant)
        if own is None or response_id not in own:
            return None
        own.move_to_end(response_id)
        return own[response_id]

    def item(self, tenant: str, item_id: str) -> StoredItem | None:
        """Returns an item of any response of the tenant."""
        return self._items.get((tenant, item_id))

    def delete(self, tenant: str, response_id: str) -> bool:
        """Forgets a response, but not the items that others share. Whether there was one."""
        own = self._responses.get(tenant)
        if own is None or response_id not in own:
            return False
        response = own.pop(response_id)
        if not own:
            del self._responses[tenant]  # there is no end of tenants
        self._count(tenant, -_own_bytes(response))
        for item in response.items:
            self._release(tenant, item)
        return True

    def _drop_oldest(self, tenant: str) -> None:
        self.delete(tenant, next(iter(self._responses[tenant])))

    def _release(self, tenant: str, item: StoredItem) -> None:
        self._uses[item] -= 1
        if self._uses[item]:
            return
        del self._uses[item]
        self._count(tenant, -_item_bytes(item))
        if self._items.get((tenant, item.id)) is item:
            del self._items[tenant, item.id]

    def _count(self, tenant: str, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._bytes[tenant] += num_bytes
        if not self._bytes[tenant]:
            del self._bytes[tenant]


def _own_bytes(response: StoredResponse) -> int:
    return len(response.json) + _REFERENCE_BYTES * len(response.items) + _OVERHEAD_BYTES


def _item_bytes(item: StoredItem) -> int:
    return len(item.json) + len(item.id) + _OVERHEAD_BYTES
