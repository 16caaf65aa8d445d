"""The cost of one hostile client to others: attacks beside good streams, against quiet times.

    python -m benchmarks.serving.hostile --url http://127.0.0.1:8000 --grpc 127.0.0.1:8500

The victims are streams that follow each other, and a probe of `/health` every 20 ms. An attack runs
in a process of its own, which prepares its bytes before and only sends them, since it stands for
another machine. Before each attack the same is measured without one, and the table has medians of
several rounds. Exits with 1 where an attack makes the longest `/health`, or the longest gap in a
stream, more than 50 ms longer, or doubles the victims' p99 of gaps.

On a machine that the server shares with the attack, gaps have two causes: the event loop stops, or
the engine gets less of the processor. The rows without an attack show the second one alone: a busy
process that never talks to the server, with the niceness of attackers and of the gateway's helper
processes; or two of them.

With `--pid`, "waits" is how long the gateway's main thread, which has the event loop, was ready to
run but had no processor: a late loop that waited was not stopped by its own work.

The connections of a test are silent for as long as it takes: their time-outs have tests of their
own. Start the server with many descriptors (`ulimit -n`) and at least one slot more than streams.
The victims come from 127.0.0.2 where the server is on loopback, so that they are another tenant.

Endless templates need a model that has one: `jserve convert` a model to a folder, write
`{% if messages[0].content == "endless" %}{% for i in range(99999) %}{% for j in range(99999) %}
{% endfor %}{% endfor %}{% endif %}` at the start of its chat_template.jinja, and serve it with
`--set model.source=FOLDER`. Over `https://` the attacks on TLS are added.
"""

import argparse
import asyncio
import contextlib
import json
import sys
from asyncio.subprocess import PIPE
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import httpx
import uvloop

from benchmarks.serving import failures, report
from benchmarks.serving.hostile_attacks import ATTACKS, CONTROLS, TLS_ATTACKS
from benchmarks.serving.hostile_server import unverified
from benchmarks.serving.hostile_victims import Seen, Victims

_MOST_LONGER_MS = 50.0  # than the longest of the quiet time before
_MOST_GAPS = 2.0  # times those of the quiet time before
_MOST_TRIES = 5  # of a quiet time
_LOOPBACK = "127.0.0.1"
_VICTIMS_ADDRESS = "127.0.0.2"


@dataclass(frozen=True, slots=True)
class Round:
    """One quiet time and the attack after it."""

    quiet: Seen
    attacked: Seen
    attacker: dict[str, Any]  # `sent`, `answers` by status, `cpu_s`


def _medians(rounds: Sequence[Round], name: str) -> tuple[float, float]:
    quiet = median(getattr(each.quiet, name) for each in rounds)
    return quiet, median(getattr(each.attacked, name) for each in rounds)


def row_of(name: str, rounds: Sequence[Round]) -> dict[str, Any]:
    """One row of the table, medians over the rounds; `missed` names the bars that are not met."""
    health = _medians(rounds, "longest_health_ms")
    longest = _medians(rounds, "longest_gap_ms")
    p99 = _medians(rounds, "p99_gap_ms")
    errors = [error for each in rounds for error in each.attacked.errors]
    bars = {
        "/health": health[1] - health[0] <= _MOST_LONGER_MS,
        "longest gap": longest[1] - longest[0] <= _MOST_LONGER_MS,
        "gap p99": p99[1] <= _MOST_GAPS * p99[0],
        f"errors: {errors[:3]}": not errors,
    }
    return {
        "attack": name,
        "health_ms": health,
        "longest_gap_ms": longest,
        "gap_p99_ms": p99,
        "gap_p99_ratio": p99[1] / p99[0],
        "first_ms": _medians(rounds, "longest_first_ms"),
        "lag_ms": _medians(rounds, "lag_ms"),
        "waits": _medians(rounds, "waits"),
        "sent": median(each.attacker["sent"] for each in rounds),
        "attacker_cpu_s": median(each.attacker["cpu_s"] for each in rounds),
        "answers": rounds[-1].attacker["answers"],
        "missed": [bar for bar, is_met in bars.items() if not is_met],
    }


class Bench:
    """Runs attacks beside victims that never stop."""

    def __init__(self, arguments: argparse.Namespace, victims: Victims, facts: list[str]) -> None:
        """`facts` about the server are those that an attack is told."""
        self._arguments = arguments
        self._victims = victims
        self._facts = facts

    async def row(self, name: str) -> dict[str, Any]:
        """Measures one attack, with a quiet time before each round."""
        rounds = [await self._round(name) for _ in range(self._arguments.rounds)]
        return row_of(name, rounds)

    async def _round(self, name: str) -> Round:
        arguments = self._arguments
        command = [sys.executable, "-m", "benchmarks.serving.hostile_attacks", name]
        command += [arguments.url, arguments.grpc, *self._facts]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, start_new_session=True
        )
        assert process.stdin is not None
        assert process.stdout is not None
        if await process.stdout.readline() != b"ready\n":
            raise failures.BenchmarkError(f"the attack {name!r} cannot begin")
        quiet = await self._quiet_time()
        process.stdin.write(f"{arguments.seconds}\n".encode())
        attacked = await self._victims.watch(arguments.seconds)
        told = json.loads(await process.stdout.readline())
        await process.wait()
        await asyncio.sleep(arguments.pause)  # what the attack left behind ends
        return Round(quiet, attacked, told)

    async def _quiet_time(self) -> Seen:
        """Watches until the machine does no other work, for a while at most."""
        arguments, tries = self._arguments, 1
        quiet = await self._victims.watch(arguments.seconds)
        while quiet.waits > arguments.most_waits and tries < _MOST_TRIES:
            quiet = await self._victims.watch(arguments.seconds)
            tries += 1
        return quiet


async def measure(arguments: argparse.Namespace, names: Sequence[str]) -> list[dict[str, Any]]:
    """Runs the attacks one after another. Raises BenchmarkError if there is no server."""
    local = _VICTIMS_ADDRESS if urlsplit(arguments.url).hostname == _LOOPBACK else None
    transport = httpx.AsyncHTTPTransport(local_address=local, verify=unverified())
    async with httpx.AsyncClient(base_url=arguments.url, timeout=60, transport=transport) as client:
        try:
            served = (await client.get("/v1/models")).json()["data"][0]
            facts = [served["id"], str(arguments.vocab), str(served["max_model_len"])]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise failures.BenchmarkError(f"no server answers: {error!r}") from None
        victims = Victims(client, served["id"], arguments.streams, arguments.pid)
        running = asyncio.create_task(victims.run())
        await asyncio.sleep(2)
        bench = Bench(arguments, victims, facts)
        rows: list[dict[str, Any]] = []
        for name in names:
            rows.append(await bench.row(name))
            print(report.grid(["", *_HEADER[1:]], [_cells(rows[-1])]).splitlines()[1], flush=True)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    return rows


_HEADER = (
    *("attack", "/health", "longest gap", "gap p99", "ratio", "first token", "loop lag ≤"),
    *("waits %", "sent", "bars"),
)


def _cells(row: dict[str, Any]) -> list[str]:
    both = ("health_ms", "longest_gap_ms", "gap_p99_ms")
    cells = [f"{row[name][0]:.0f} → {row[name][1]:.0f}" for name in both]
    rest = [f"{row[name][0]:.0f} → {row[name][1]:.0f}" for name in ("first_ms", "lag_ms")]
    rest.append(f"{100 * row['waits'][0]:.0f} → {100 * row['waits'][1]:.0f}")
    missed = "; ".join(row["missed"])
    bars = "–" if row["attack"] in CONTROLS else f"missed: {missed}" if missed else "met"
    ratio, sent = f"{row['gap_p99_ratio']:.2f}", f"{row['sent']:g}"
    return [row["attack"], *cells, ratio, *rest, sent, bars]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default=f"http://{_LOOPBACK}:8000")
    parser.add_argument("--grpc", default=f"{_LOOPBACK}:8500", help="gRPC address, without TLS")
    parser.add_argument("--streams", type=int, default=4, help="victims")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each quiet time and attack")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds after each attack")
    parser.add_argument("--rounds", type=int, default=5, help="the table has their medians")
    parser.add_argument("--pid", type=int, help="of the launcher, whose main thread is watched")
    parser.add_argument(
        "--most_waits",
        type=float,
        default=0.1,
        help="share of waits above which other programs are at work, and a quiet time is repeated",
    )
    parser.add_argument("--vocab", type=int, default=49_152, help="token ids are below it")
    parser.add_argument(
        "--only", default="", help="attacks with one of these, by |, in their names"
    )
    arguments = parser.parse_args()
    attacks = ATTACKS | (TLS_ATTACKS if arguments.url.startswith("https:") else {})
    names = [name for name in attacks if any(it in name for it in arguments.only.split("|"))]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        rows = runner.run(measure(arguments, names))
    print(report.grid([*_HEADER], [_cells(row) for row in rows]))
    print("ms, a quiet time → the attack after it; medians of", arguments.rounds, "rounds")
    print(report.json_line("hostile", vars(arguments), rows=rows))
    attacked = (row for row in rows if row["attack"] not in CONTROLS)
    return 1 if any(row["missed"] for row in attacked) else 0


if __name__ == "__main__":
    failures.run(main)
