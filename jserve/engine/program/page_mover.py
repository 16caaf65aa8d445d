"""Runs the moves of plans: starts copy programs, and keeps pages that left the device."""

import enum
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import jax
import numpy as np

from jserve.core.errors import EngineError
from jserve.core.step import Move, MoveKind
from jserve.engine.program.page_moves import MAX_PAYLOADS, MOVE_SIZES, LayerPages, MoveProgram


class HostArena:
    """Host pages of one page group: of each layer, the shares of this process's devices.

    So the processes of an engine keep their own heads of a page under the same id. Memory is
    taken by the system as pages are written.
    """

    def __init__(self, layers: LayerPages, num_pages: int) -> None:
        self._shardings = [layer.sharding for layer in layers]
        self._shapes = [layer.shape[1:] for layer in layers]
        self._devices = [shard.device for shard in layers[0].addressable_shards]
        self._shares = [
            [
                np.empty((num_pages, *shard.data.shape[1:]), layer.dtype)
                for shard in layer.addressable_shards
            ]
            for layer in layers
        ]

    def write(self, ids: Sequence[int], payload: LayerPages) -> None:
        """Stores the first rows of a payload as host pages `ids`. Waits for the copies."""
        for layer, shares in zip(payload, self._shares, strict=True):
            of_device = {shard.device: shard.data for shard in layer.addressable_shards}
            for device, share in zip(self._devices, shares, strict=True):
                share[list(ids)] = np.asarray(of_device[device])[: len(ids)]

    def payload(self, ids: Sequence[int], size: int) -> LayerPages:
        """Host pages `ids` as the first of `size` rows on the devices."""
        layers = zip(self._shares, self._shardings, self._shapes, strict=True)
        return tuple(
            jax.make_array_from_single_device_arrays(
                (size, *shape),
                sharding,
                [
                    jax.device_put(_rows(share, ids, size), device)
                    for device, share in zip(self._devices, shares, strict=True)
                ],
            )
            for shares, sharding, shape in layers
        )


def _rows(share: np.ndarray, ids: Sequence[int], size: int) -> np.ndarray:
    # A fresh array: a device on the host may use it in place.
    rows = np.empty((size, *share.shape[1:]), share.dtype)
    rows[: len(ids)] = share[list(ids)]
    return rows


class _Arriving(NamedTuple):
    """Pages on their way to the device; the payload is freed once the run is done."""

    done: jax.Array


class _Leaving(NamedTuple):
    """Pages on their way to the host."""

    group: int
    host_pages: tuple[int, ...]
    payload: LayerPages


class _HostPage(enum.Enum):
    NEVER_WRITTEN = 0
    LEAVING = 1
    LANDED = 2


class PageMover:
    """Runs the moves of plans, in order. Owns the host arena; used by one thread.

    At most MAX_PAYLOADS payloads lie on the device at once, as `KVBudget` counts them: a further
    run waits until the first of them is done.
    """

    def __init__(
        self,
        programs: Mapping[MoveProgram, jax.stages.Compiled],
        kv: Sequence[LayerPages],
        num_host_pages: int,
    ) -> None:
        self._programs = programs
        self._arenas = [HostArena(layers, num_host_pages) for layers in kv]
        self._host = [_HostPage.NEVER_WRITTEN] * num_host_pages
        self._in_flight: deque[_Leaving | _Arriving] = deque()
        self._num_out = 0
        self._num_landed = 0  # OUT runs whose pages are in the arena
        self._unreported: list[int] = []

    @property
    def num_out(self) -> int:
        """Runs of an OUT program so far: a mark for `land`."""
        return self._num_out

    def run(self, kv: Sequence[LayerPages], moves: Iterable[Move]) -> tuple[LayerPages, ...]:
        """Starts the moves; returns the pages after them. Those given must not be used again."""
        after = list(kv)
        for (kind, group), found in groupby(moves, key=lambda move: (move.kind, move.group)):
            rest = [(move.source, move.target) for move in found]
            while rest:
                size = next((size for size in MOVE_SIZES if size >= len(rest)), MOVE_SIZES[-1])
                part, rest = rest[:size], rest[size:]
                after[group] = self._run(MoveProgram(kind, group, size), after[group], part)
        return tuple(after)

    def land(self, mark: int) -> tuple[int, ...]:
        """Waits for the OUT runs before `mark`; returns what landed since the last call."""
        while self._num_landed < mark:
            self._finish_first()
        landed, self._unreported = tuple(self._unreported), []
        return landed

    def _run(
        self, program: MoveProgram, pages: LayerPages, part: list[tuple[int, int]]
    ) -> LayerPages:
        call = self._programs[program]
        table = np.full((program.size, 2), -1, np.int32)
        used = table[: len(part)]
        used[...] = part
        if program.kind is MoveKind.COPY:
            return call(pages, table)
        if program.kind is MoveKind.IN:
            used[:, 0] = range(len(part))
            host_pages = [source for source, _ in part]
            self._await(host_pages)
            self._make_room()
            payload = self._arenas[program.group].payload(host_pages, program.size)
            pages, done = call(pages, payload, table)
            self._in_flight.append(_Arriving(done))
            return pages
        used[:, 1] = range(len(part))
        self._make_room()
        payload = call(pages, table)
        for layer in payload:
            layer.copy_to_host_async()
        leaving = _Leaving(program.group, tuple(target for _, target in part), payload)
        for page in leaving.host_pages:
            self._host[page] = _HostPage.LEAVING
        self._in_flight.append(leaving)
        self._num_out += 1
        return pages

    def _make_room(self) -> None:
        while len(self._in_flight) >= MAX_PAYLOADS:
            self._finish_first()

    def _await(self, host_pages: Iterable[int]) -> None:
        """Lands what still is on its way. Raises EngineError for a page never written.

        Only a follower may have to wait: a leader plans an IN after its page has landed.
        """
        for page in host_pages:
            while self._host[page] is _HostPage.LEAVING:
                self._finish_first()
            if self._host[page] is _HostPage.NEVER_WRITTEN:
                raise EngineError(f"host page {page} is to be copied in, but was never written")

    def _finish_first(self) -> None:
        """Waits for the oldest run, and for its pages to land if it is an OUT."""
        first = self._in_flight.popleft()
        if isinstance(first, _Arriving):
            first.done.block_until_ready()
            return
        self._arenas[first.group].write(first.host_pages, first.payload)
        for page in first.host_pages:
            self._host[page] = _HostPage.LANDED
        self._unreported += first.host_pages
        self._num_landed += 1
