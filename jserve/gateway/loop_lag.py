"""Measures how late the event loop is: everything that waits for it is as late."""

import asyncio
import contextlib

from jserve.gateway.metrics import GatewayMetrics

_INTERVAL_S = 0.02


async def measure_lag(metrics: GatewayMetrics) -> None:
    """Counts the loop's lateness into `event_loop_lag_seconds`, until it is cancelled."""
    loop = asyncio.get_running_loop()
    due_s = loop.time() + _INTERVAL_S
    while True:
        await asyncio.sleep(due_s - loop.time())
        now_s = loop.time()
        metrics.event_loop_lag_seconds.add(max(now_s - due_s, 0.0))
        due_s = now_s + _INTERVAL_S


class LoopLag:
    """Runs `measure_lag` between `start` and `stop`. Owned by the loop that it measures."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._metrics = metrics
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to measure the running loop."""
        self._task = asyncio.get_running_loop().create_task(measure_lag(self._metrics))

    async def stop(self) -> None:
        """Ends the measurement."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
