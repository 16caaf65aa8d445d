"""The engine as a process: the loop in a thread of its own, its session server on asyncio."""

import asyncio
import contextlib
import gc
import signal
import threading
from collections.abc import Callable

from jserve.core.clock import WallClock
from jserve.core.errors import EngineError
from jserve.core.step import Executor
from jserve.engine.build.assembly import Engine
from jserve.engine.inbox import Inbox, Outbox
from jserve.engine.loop import EngineLoop
from jserve.engine.step_log import StepLog
from jserve.engine.worker.session import Constrain
from jserve.engine.worker.session_server import serve_sessions


def serve(
    engine: Engine,
    executor: Executor,
    address: str,
    *,
    drain_timeout_s: float,
    step_log: StepLog | None,
    on_ready: Callable[[str], None],
    token: str | None = None,
    constrain: Constrain | None = None,
) -> None:
    """Serves gateways at `address` until SIGTERM; then finishes what runs, within the timeout.

    `executor` is the engine's own, or leads others. `address`, `token` and `constrain` are those of
    `serve_sessions`; `on_ready` gets the address with the port or socket that was chosen. Raises
    EngineError when the loop died: the process should end.
    """
    asyncio.run(
        _serve(engine, executor, address, drain_timeout_s, step_log, on_ready, token, constrain)
    )


async def _serve(
    engine: Engine,
    executor: Executor,
    address: str,
    drain_timeout_s: float,
    step_log: StepLog | None,
    on_ready: Callable[[str], None],
    token: str | None,
    constrain: Constrain | None,
) -> None:
    inbox, outbox = Inbox(), Outbox()
    loop = EngineLoop(
        engine.scheduler, executor, inbox, outbox, WallClock(), engine.num_compiles, step_log
    )
    events = asyncio.get_running_loop()
    ended: asyncio.Future[None] = events.create_future()
    thread = threading.Thread(
        target=_run_loop, args=(loop, events, ended), name="engine-loop", daemon=True
    )
    server = await serve_sessions(
        address,
        engine.info,
        inbox,
        outbox,
        token,
        is_compiling=engine.is_compiling,
        constrain=constrain,
    )
    thread.start()
    asked = asyncio.Event()
    events.add_signal_handler(signal.SIGTERM, asked.set)
    stopped = asyncio.create_task(_drain_when(asked, loop, ended, drain_timeout_s))
    # Objects made at start-up stay for good: the collector need not scan them between steps.
    gc.collect()
    gc.freeze()
    on_ready(server.address)
    try:
        await ended
    finally:
        stopped.cancel()
        # One more round, so that the last events, errors among them, reach the gateways.
        await asyncio.sleep(0.1)
        await server.stop()


def _run_loop(
    loop: EngineLoop, events: asyncio.AbstractEventLoop, ended: asyncio.Future[None]
) -> None:
    try:
        loop.run()
    except BaseException as error:  # whatever it was, the process must not outlive its loop
        failure = EngineError(f"the engine loop ended: {type(error).__name__}: {error}")
        failure.__cause__ = error
        events.call_soon_threadsafe(_settle, ended, failure)
    else:
        events.call_soon_threadsafe(_settle, ended, None)


def _settle(ended: asyncio.Future[None], failure: EngineError | None) -> None:
    if not ended.done():
        if failure is None:
            ended.set_result(None)
        else:
            ended.set_exception(failure)


async def _drain_when(
    asked: asyncio.Event, loop: EngineLoop, ended: asyncio.Future[None], timeout_s: float
) -> None:
    """Once asked, gives the loop its time to finish; then stops it where it is."""
    await asked.wait()
    loop.drain()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(ended), timeout_s)
    loop.stop()
