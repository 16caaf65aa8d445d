"""Who asks: a caller by the name of its key or by its address, and what one of them may have."""

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from jserve.core.errors import Overloaded

_RESERVED = 16  # one of so many places in the engine's queue is for the other tenants


@dataclass(frozen=True, slots=True)
class Caller:
    """One tenant: all requests with the same name count as one's, and take turns with others'."""

    name: str
    may_set_priority: bool = False
    max_slots: int | None = None  # None: `gateway.max_tenant_slots`
    # Of requests that give none; empty for all callers without a key, who share computed prompts.
    cache_salt: str = field(default="", repr=False)


LOCAL = Caller("", may_set_priority=True)  # a program that runs the engine itself


def at_address(host: str | None, *, may_set_priority: bool = False) -> Caller:
    """The caller without a key. Of IPv6 a client has all addresses of a /64 network."""
    try:
        address = ipaddress.ip_address((host or "").partition("%")[0])
    except ValueError:
        return Caller(f"address {host or 'unknown'}", may_set_priority)
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return Caller(f"address {address.ipv4_mapped}", may_set_priority)
        if not address.is_loopback:
            network = ipaddress.ip_network((address, 64), strict=False)
            return Caller(f"address {network}", may_set_priority)
    return Caller(f"address {address}", may_set_priority)


def host_of_peer(peer: str) -> str:
    """The host in gRPC's name of a peer: `ipv4:127.0.0.1:5000`, `ipv6:%5B::1%5D:5000`, `unix:`."""
    _, _, rest = peer.partition(":")
    host = rest.rpartition(":")[0].removeprefix("%5B").removesuffix("%5D")
    return host.removeprefix("[").removesuffix("]")


@dataclass(slots=True)
class TenantCounts:
    """Sequences that each tenant has in flight or is about to start. Owned by one event loop."""

    _in_flight: dict[str, int] = field(default_factory=dict[str, int])
    _preparing: dict[str, int] = field(default_factory=dict[str, int])

    @contextmanager
    def preparing(self, caller: Caller, count: int, most: int) -> Iterator[None]:
        """Counts `count` sequences while their prompts are rendered and tokenized.

        Raises Overloaded if they are more than `most` with those in flight, or by themselves.
        """
        self._check(caller, self._preparing.get(caller.name, 0) + count, most)
        _add(self._preparing, caller.name, count)
        try:
            yield
        finally:
            _add(self._preparing, caller.name, -count)

    def start(self, caller: Caller, count: int, most: int) -> None:
        """Counts sequences that run from now on. Raises Overloaded as `preparing` does."""
        self._check(caller, count, most)
        _add(self._in_flight, caller.name, count)

    def end(self, caller: Caller, count: int) -> None:
        """They have ended."""
        _add(self._in_flight, caller.name, -count)

    def in_flight(self, caller: Caller) -> int:
        return self._in_flight.get(caller.name, 0)

    def _check(self, caller: Caller, count: int, most: int) -> None:
        running = self.in_flight(caller)
        if running + count > most:
            raise Overloaded(
                f"{count} sequences (prompts × n) beside {running} of this client in flight are "
                f"more than the {most} that one client may have; ask for less, or try again",
                retry_after_s=1.0,
            )


def most_sequences(num_slots: int, max_queue: int, configured: int | None) -> int:
    """The most sequences of one tenant; by default they leave the others a part of the queue."""
    room = num_slots + max_queue - max_queue // _RESERVED
    return room if configured is None else min(configured, num_slots + max_queue)


def _add(counts: dict[str, int], name: str, count: int) -> None:
    counts[name] = counts.get(name, 0) + count
    if not counts[name]:
        del counts[name]
