"""An engine process without a model, behind jserve's own `Engine/Session` socket.

    python -m benchmarks.serving.simulated_engine --address unix:/private/folder/engine.sock

The folder must have mode 0700. Over TCP (--address 127.0.0.1:8600) gateway and engine find their
token in JSERVE_ENGINE_TOKEN.

Every step gives each running sequence `tokens_per_step` tokens, which repeat its prompt. What a
gateway sees (the messages, one for all sequences per step) is what a real engine sends.
"""

import argparse
import asyncio
import os
import signal
import threading
import time

from jserve.core.errors import JserveError
from jserve.core.request import EngineInfo
from jserve.engine.inbox import Inbox, Outbox, Submit
from jserve.engine.worker.session_server import serve_sessions
from jserve.gateway.fake_engine import ScriptedSequences


class SteppingThread(threading.Thread):
    """Steps scripted sequences from an inbox to an outbox, at most once per `step_s`."""

    def __init__(self, info: EngineInfo, step_s: float, tokens_per_step: int) -> None:
        super().__init__(name="engine-loop", daemon=True)
        self.inbox, self.outbox = Inbox(), Outbox()
        self._sequences = ScriptedSequences(info)
        self._step_s = step_s
        self._tokens_per_step = tokens_per_step

    def run(self) -> None:
        """Steps until the process ends."""
        next_s = 0.0
        while True:
            self._take_commands()
            if not (self._sequences.running or self._sequences.waiting):
                self.inbox.wait(0.1)
                continue
            wait_s = next_s - time.monotonic()
            if wait_s > 0:
                time.sleep(wait_s)
            next_s = max(next_s, time.monotonic() - self._step_s) + self._step_s
            updates = self._sequences.step(self._tokens_per_step)
            self.outbox.post(updates, self._sequences.stats())

    def _take_commands(self) -> None:
        for command in self.inbox.drain():
            if isinstance(command, Submit):
                try:
                    self._sequences.add(command.request)
                except JserveError as error:
                    self.outbox.reject(command.request.id, error)
            else:
                self._sequences.abort(command.request_id)


async def serve(arguments: argparse.Namespace) -> None:
    """Listens until SIGTERM."""
    info = EngineInfo(
        model="simulated",
        vocab=arguments.vocab,
        max_model_len=1 << 16,
        num_slots=arguments.slots,
        num_pages=1 << 20,
        page_size=16,
        max_queue=arguments.slots,
        eos_token_ids=(),
    )
    stepping = SteppingThread(info, arguments.step_ms / 1e3, arguments.tokens_per_step)
    token = os.environ.get("JSERVE_ENGINE_TOKEN")
    server = await serve_sessions(arguments.address, info, stepping.inbox, stepping.outbox, token)
    stepping.start()
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    await asked.wait()
    await server.stop()


def main() -> None:
    """Parses the flags and serves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", required=True, help="unix:/folder/name or host:port")
    parser.add_argument("--slots", type=int, default=1000)
    parser.add_argument("--step_ms", type=float, default=50, help="0: as fast as it can")
    parser.add_argument("--tokens_per_step", type=int, default=1)
    parser.add_argument("--vocab", type=int, default=512, help="at most that of the tokenizer")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
