"""Budget of the output that clients have not read: who exceeds it is told, and holds nothing."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jserve.core.errors import Overloaded
from jserve.core.logprobs import PackedLogprobs
from jserve.core.request import TokenLogprobs

_RETRY_AFTER_S = 1.0


@dataclass(slots=True)
class BufferBudget:
    """Bytes of output that one gateway holds, over all requests. Owned by its event loop."""

    max_bytes: int
    max_request_bytes: int
    used_bytes: int = 0
    accounts: set["BufferAccount"] = field(default_factory=set["BufferAccount"])

    def open(self, tenant: str) -> "BufferAccount":
        """Starts the account of one request of `tenant`."""
        account = BufferAccount(self, tenant)
        self.accounts.add(account)
        return account

    def largest(self) -> "BufferAccount":
        """Returns the largest account of the tenant who holds the most bytes."""
        held = Counter[str]()
        for account in self.accounts:
            held[account.tenant] += account.held_bytes
        return max(self.accounts, key=lambda it: (held[it.tenant], it.tenant, it.held_bytes))


@dataclass(slots=True, eq=False)
class BufferAccount:
    """Bytes that one request holds. `close` gives all of them back."""

    budget: BufferBudget
    tenant: str
    held_bytes: int = 0
    # Called with the error, once, when the request holds too much; they drop what they hold.
    on_full: list[Callable[[Overloaded], None]] = field(
        default_factory=list[Callable[[Overloaded], None]]
    )

    def add(self, num_bytes: int) -> None:
        """Counts bytes, negative ones when they are read.

        Over the request's budget the request ends. Over the gateway's, the largest request of the
        tenant who holds the most ends, until the rest fits: a tenant who reads loses nothing to
        one who does not.
        """
        budget = self.budget
        if self not in budget.accounts:
            return  # it has ended
        self.held_bytes += num_bytes
        budget.used_bytes += num_bytes
        if self.held_bytes > budget.max_request_bytes:
            self._fail(f"{budget.max_request_bytes} bytes (gateway.max_request_buffer_bytes)")
        while budget.used_bytes > budget.max_bytes:
            limit = f"of all requests {budget.max_bytes} bytes (gateway.max_buffer_bytes)"
            budget.largest()._fail(limit)

    def close(self) -> None:
        """Gives everything back; idempotent."""
        if self in self.budget.accounts:
            self.budget.accounts.discard(self)
            self.budget.used_bytes -= self.held_bytes
            self.held_bytes = 0
            self.on_full.clear()

    def _fail(self, limit: str) -> None:
        on_full = tuple(self.on_full)
        self.close()
        error = Overloaded(
            f"the output that has not been read exceeds {limit}; read faster, or ask for less "
            "at a time",
            retry_after_s=_RETRY_AFTER_S,
        )
        for callback in on_full:
            callback(error)


def logprobs_bytes(logprobs: Sequence[TokenLogprobs | None] | None) -> int:
    """Memory that log-probabilities take once they are packed."""
    if logprobs is None:
        return 0
    if isinstance(logprobs, PackedLogprobs):
        return logprobs.nbytes
    return sum(20 if it is None else 20 + 8 * len(it.top) for it in logprobs)
