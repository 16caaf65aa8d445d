"""Places for work, and turns of the event loop, that are fewer than the requests for them."""

import asyncio
from collections import Counter, deque


class TenantTurns:
    """Gives free places to those who wait. Owned by one event loop.

    The next place goes to the waiting tenant who holds the fewest; of several such tenants to the
    one who has waited the longest since its last turn; of one tenant in order of arrival. So a
    tenant gets a second place only while no tenant without one waits.
    """

    def __init__(self, num_places: int) -> None:
        self._num_free = num_places
        self._held = Counter[str]()
        # By tenant, in order of their turns. Cancelled futures are skipped when their turn comes.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def take(self, tenant: str) -> None:
        """Waits for a place, which the caller then holds until `give_back`."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        self._serve()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was given a place at the same moment
                self.give_back(tenant)
            raise

    def give_back(self, tenant: str) -> None:
        """Frees a place of `tenant` for the next one who waits."""
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]  # there is no end of tenants
        self._num_free += 1
        self._serve()

    def _serve(self) -> None:
        while self._num_free and self._waiting:
            tenant = min(self._waiting, key=lambda it: self._held[it])
            turns = self._waiting.pop(tenant)
            turn = turns.popleft()
            if not turn.cancelled():
                self._num_free -= 1
                self._held[tenant] += 1
                turn.set_result(None)
            if turns:
                self._waiting[tenant] = turns  # behind the others


class LoopTurns:
    """Lets one request at a time begin in an iteration of the event loop; tenants take turns.

    Checking a request takes up to a millisecond. Without turns all that come at once would begin in
    one iteration, in which nobody else is served. Owned by one event loop.
    """

    def __init__(self) -> None:
        self._turns = TenantTurns(1)

    async def take(self, tenant: str) -> None:
        """Waits for a turn; it is over when the caller next waits for anything."""
        await self._turns.take(tenant)
        asyncio.get_running_loop().call_soon(self._turns.give_back, tenant)
