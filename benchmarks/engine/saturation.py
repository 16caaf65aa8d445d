"""Tokens/s when more requests wait than there are slots, by scheduler and engine alone.

    python -m benchmarks.engine.saturation --prompt_tokens 100 --max_tokens 50
    python -m benchmarks.engine.saturation --model llama-3.1-8b --dtype bfloat16

All requests come at once, with prompts of random tokens that share nothing but the first
`--shared_tokens`; only their limit ends them. Rates are over everything from the first step to the
last, prompts and the end in which slots become free included, as offline benchmarks of other
engines count. Prints a table, one JSON line.
"""

import argparse
import time
from typing import Any

from benchmarks.engine import engines, options
from benchmarks.engine.drive import Driver
from benchmarks.serving import report
from jserve.core.errors import ConfigError


def parse() -> argparse.Namespace:
    parser = options.parser_of(__doc__)
    parser.add_argument("--requests", type=int, default=0, help="0: three for each slot")
    parser.add_argument("--prompt_tokens", type=int, default=1000)
    parser.add_argument("--max_tokens", type=int, default=1000)
    parser.add_argument("--shared_tokens", type=int, default=0, help="with which prompts begin")
    return parser.parse_args()


def measure(
    driver: Driver, requests: int, prompt_tokens: int, max_tokens: int, shared_tokens: int
) -> dict[str, Any]:
    """Rates over all steps. Raises ConfigError where a request does not fit the engine."""
    info, scheduler = driver.engine.info, driver.engine.scheduler
    if not 0 <= shared_tokens < prompt_tokens:
        raise ConfigError(f"--shared_tokens is {shared_tokens}; prompts have {prompt_tokens}")
    if prompt_tokens + max_tokens > info.max_model_len:
        raise ConfigError(f"a request is longer than engine.max_model_len, {info.max_model_len}")
    driver.warm_up()
    before = scheduler.stats()
    driver.add(requests, prompt_tokens, max_tokens, shared_tokens)
    started_s = time.perf_counter()
    turns = list(driver.turns())
    seconds = turns[-1].ended_s - started_s
    after = scheduler.stats()
    return {
        "requests": requests,
        "seconds": round(seconds, 3),
        "output_tokens_per_s": round((after.output_tokens - before.output_tokens) / seconds, 1),
        "prompt_tokens_per_s": round((after.prompt_tokens - before.prompt_tokens) / seconds, 1),
        "steps": after.num_steps - before.num_steps,
        "host_share": round(sum(sum(turn.host) for turn in turns) / seconds, 4),
        "cached_tokens": after.prefix_hit_tokens - before.prefix_hit_tokens,
        "preemptions": after.num_preemptions - before.num_preemptions,
    }


def main() -> None:
    arguments = parse()
    serve = options.serve_config(arguments)
    subject = engines.build(serve, arguments.backend)
    requests = arguments.requests or 3 * subject.engine.info.num_slots
    found = measure(
        Driver(subject.engine),
        requests,
        arguments.prompt_tokens,
        arguments.max_tokens,
        arguments.shared_tokens,
    )
    device = engines.device_of(subject.engine)
    print(
        f"{serve.model.name}, {serve.model.dtype.value}, {device['backend']} ops on "
        f"{device['kind']}: "
        f"{requests} requests, {arguments.prompt_tokens} in, {arguments.max_tokens} out\n"
    )
    rows = [(name.replace("_", " "), report.number(value)) for name, value in found.items()]
    print(report.grid(("", ""), rows))
    print(
        report.json_line(
            "engine_saturation", options.config_of(arguments, serve), device=device, **found
        )
    )


if __name__ == "__main__":
    options.run(main)
