"""Tokens/s when more requests wait than there are slots, by scheduler and engine alone.

    python -m benchmarks.engine.saturation --prompt_tokens 100 --max_tokens 50
    python -m benchmarks.engine.saturation --model llama-3.1-8b --dtype bfloat16

All requests come at once, with prompts of random tokens that share nothing; only their limit ends
them. `all` is from the first step to the last; `full` leaves out the end, when none waits any
more. Prints a table, one JSON line.
"""

import argparse
import time
from typing import Any

from benchmarks.engine import engines, options
from benchmarks.engine.drive import Driver, Turn
from benchmarks.serving import report
from jserve.core.errors import ConfigError


def parse() -> argparse.Namespace:
    """The flags."""
    parser = options.parser_of(__doc__)
    parser.add_argument("--requests", type=int, default=0, help="0: three for each slot")
    parser.add_argument("--prompt_tokens", type=int, default=1000)
    parser.add_argument("--max_tokens", type=int, default=1000)
    return parser.parse_args()


def measure(driver: Driver, requests: int, prompt_tokens: int, max_tokens: int) -> dict[str, Any]:
    """Rates of all steps, and of those up to the last one that left somebody waiting.

    Raises ConfigError where a request does not fit the engine.
    """
    info = driver.engine.info
    if prompt_tokens + max_tokens > info.max_model_len:
        raise ConfigError(f"a request is longer than engine.max_model_len, {info.max_model_len}")
    driver.warm_up()
    scheduler = driver.engine.scheduler
    preempted = scheduler.stats().num_preemptions
    driver.add(requests, prompt_tokens, max_tokens)
    turns: list[tuple[Turn, bool]] = []
    started_s = time.perf_counter()
    for turn in driver.turns():
        turns.append((turn, scheduler.stats().num_waiting > 0))
    last = max((i for i, (_, waits) in enumerate(turns) if waits), default=len(turns) - 1)
    full = [turn for turn, _ in turns[: last + 1]]
    return {
        "requests": requests,
        "all": _rates([turn for turn, _ in turns], started_s),
        "full": _rates(full, started_s),
        "preemptions": scheduler.stats().num_preemptions - preempted,
    }


def _rates(turns: list[Turn], started_s: float) -> dict[str, float]:
    seconds = turns[-1].ended_s - started_s
    sampled = sum(turn.num_tokens for turn in turns)
    prompts = sum(len(chunk.tokens) for turn in turns for chunk in turn.plan.chunks)
    host_s = sum(sum(turn.host) for turn in turns)
    return {
        "seconds": round(seconds, 3),
        "output_tokens_per_s": round(sampled / seconds, 1),
        "prompt_tokens_per_s": round(prompts / seconds, 1),
        "host_share": round(host_s / seconds, 4),
    }


def main() -> None:
    """Measures, prints the table and the line."""
    arguments = parse()
    serve = options.serve_config(arguments)
    subject = engines.build(serve, arguments.backend)
    requests = arguments.requests or 3 * subject.engine.info.num_slots
    found = measure(Driver(subject.engine), requests, arguments.prompt_tokens, arguments.max_tokens)
    device = engines.device_of(subject.engine)
    print(
        f"{serve.model.name}, {serve.model.dtype}, {device['backend']} ops on {device['kind']}: "
        f"{requests} requests, {arguments.prompt_tokens} in, {arguments.max_tokens} out\n"
    )
    names = list(found["all"])
    rows = [
        [part, *(report.number(found[part][name]) for name in names)] for part in ("all", "full")
    ]
    print(report.grid(["", *(name.replace("_", " ") for name in names)], rows))
    print(
        report.json_line(
            "engine_saturation", options.config_of(arguments, serve), device=device, **found
        )
    )


if __name__ == "__main__":
    options.run(main)
