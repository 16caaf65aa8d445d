"""The flags that every load shares, and what they mean: a target and the loads to put on it."""

import argparse
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from benchmarks.serving import driver, workload
from benchmarks.serving.driver import Load, OnDone
from benchmarks.serving.failures import BenchmarkError
from benchmarks.serving.grpc_target import GrpcTarget
from benchmarks.serving.http_target import HttpOptions, HttpTarget
from benchmarks.serving.metrics import Slo
from benchmarks.serving.target import ServerInfo, Target
from benchmarks.serving.traces import read_trace, reshape
from benchmarks.serving.workload import Job


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the shape of requests, their arrival, and the limits of good ones."""
    load = parser.add_argument_group("load: closed loop, open loop or trace")
    load.add_argument("--streams", type=int, nargs="+", help="closed loop: so many at any time")
    load.add_argument("--seconds", type=float, default=20, help="closed loop: how long")
    load.add_argument("--rate", type=float, nargs="+", help="open loop: requests/s; inf: at once")
    load.add_argument("--cv", type=float, default=1, help="of the gaps; 1: Poisson, more: bursts")
    load.add_argument("--requests", type=int, default=100, help="open loop: how many")
    load.add_argument("--trace", help="open loop: .csv (Azure 2023) or .jsonl (Mooncake)")
    load.add_argument("--limit", type=int, help="trace: only the first so many requests")
    load.add_argument("--length_divisor", type=float, default=1, help="trace: shorter requests")
    load.add_argument("--time_stretch", type=float, default=1, help="trace: longer gaps")
    load.add_argument("--clip_tokens", type=int, help="trace: prompt and output tokens at most")
    load.add_argument("--prompt_tokens", type=int, default=128)
    load.add_argument("--max_tokens", type=int, default=128, help="output tokens of each request")
    load.add_argument(
        "--shared_tokens", type=int, default=0, help="with which all prompts begin: cache hits"
    )
    load.add_argument(
        "--seed",
        type=int,
        # A server that keeps what it has computed would find the prompts of the run before.
        default=secrets.randbelow(1 << 31),
        help="of prompts and arrivals; default: another one each time",
    )
    load.add_argument("--warmup", type=int, default=2, help="requests that are not measured")
    load.add_argument("--timeout_s", type=float, default=600, help="of one request")
    server = parser.add_argument_group("how the server is asked")
    server.add_argument("--api", choices=["completions", "chat"], default="completions")
    server.add_argument("--model", help="default: the first one that is served")
    server.add_argument("--api_key")
    server.add_argument(
        "--prompt", choices=["auto", "ids", "text"], default="auto", help="ids have exact lengths"
    )
    server.add_argument(
        "--token_ids", type=int, nargs=2, default=[100, 500], metavar=("FIRST", "LAST")
    )
    slo = parser.add_argument_group("goodput: the limits of a good request")
    slo.add_argument("--slo_ttft_ms", type=float)
    slo.add_argument("--slo_tpot_ms", type=float)
    slo.add_argument("--slo_itl_ms", type=float, help="of the request's own p99")


def config_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags as they go into a report: without secrets."""
    shown = {name: value for name, value in vars(arguments).items() if name != "api_key"}
    if arguments.rate:
        shown["rate"] = [rate if math.isfinite(rate) else "inf" for rate in arguments.rate]
    return shown


def slo_of(arguments: argparse.Namespace) -> Slo:
    """The limits of a good request."""
    return Slo(
        ttft_ms=arguments.slo_ttft_ms,
        tpot_ms=arguments.slo_tpot_ms,
        itl_ms=arguments.slo_itl_ms,
    )


def target_of(arguments: argparse.Namespace, url: str, dialect: str = "auto") -> Target:
    """A server, asked as the flags say: OpenAI-compatible, or jserve's gRPC at grpc://host:port."""
    token_ids = tuple(arguments.token_ids)
    if url.startswith("grpc://"):
        return GrpcTarget(
            url.removeprefix("grpc://").rstrip("/"),
            model=arguments.model,
            prompt=arguments.prompt,
            token_ids=token_ids,
            api_key=arguments.api_key,
        )
    options = HttpOptions(
        api=arguments.api,
        model=arguments.model,
        dialect=dialect,
        prompt=arguments.prompt,
        token_ids=token_ids,
        api_key=arguments.api_key,
    )
    return HttpTarget(url, options)


@dataclass(frozen=True, slots=True)
class Point:
    """One load of a benchmark."""

    label: str
    num_requests: int | None  # None: as many as fit the time
    send: Callable[[Target, ServerInfo, OnDone], Any]  # → awaitable Load


def points_of(arguments: argparse.Namespace, seed: Sequence[int] = ()) -> list[Point]:
    """The loads that the flags ask for. `seed` sets rounds apart, so that no prompt repeats."""
    _check(arguments)
    seed = (arguments.seed, *seed)
    if arguments.trace:
        rates = arguments.rate or [None]
        return [_trace_point(arguments, rate, (*seed, i)) for i, rate in enumerate(rates)]
    if arguments.rate:
        return [_rate_point(arguments, rate, (*seed, i)) for i, rate in enumerate(arguments.rate)]
    return [
        _streams_point(arguments, streams, (*seed, i))
        for i, streams in enumerate(arguments.streams or [1, 8, 32])
    ]


def warm_up_jobs(arguments: argparse.Namespace, seed: Sequence[int] = ()) -> list[Job]:
    """Requests that come before the first load, one after another."""
    key = (arguments.seed, *seed, 1 << 20)
    prompt, output = arguments.prompt_tokens, arguments.max_tokens
    if arguments.trace:
        prompt, output = 64, 32
    return [Job(0, prompt, output, (*key, i)) for i in range(arguments.warmup)]


def _check(arguments: argparse.Namespace) -> None:
    if arguments.streams and (arguments.rate or arguments.trace):
        raise BenchmarkError("--streams is a closed loop, --rate and --trace are open; choose one")
    for name in ("prompt_tokens", "max_tokens", "requests", "limit", "warmup", "shared_tokens"):
        value, least = getattr(arguments, name), int(name not in ("warmup", "shared_tokens"))
        if value is not None and value < least:
            raise BenchmarkError(f"--{name} is {value}; it must be at least {least}")
    for streams in arguments.streams or []:
        if streams < 1:
            raise BenchmarkError(f"--streams is {streams}; it must be at least 1")


def _streams_point(arguments: argparse.Namespace, streams: int, seed: Sequence[int]) -> Point:
    first = Job(
        0, arguments.prompt_tokens, arguments.max_tokens, (*seed, 0), arguments.shared_tokens
    )

    async def send(target: Target, info: ServerInfo, on_done: OnDone) -> Load:
        workload.check_fits([first], info.max_model_len)
        jobs = (replace(first, seed=(*seed, i)) for i in count())
        return await driver.closed_loop(
            target,
            jobs,
            streams=streams,
            seconds=arguments.seconds,
            timeout_s=arguments.timeout_s,
            on_done=on_done,
        )

    return Point(f"{streams} stream{'s' * (streams > 1)}", None, send)


def _rate_point(arguments: argparse.Namespace, rate: float, seed: Sequence[int]) -> Point:
    jobs = workload.open_loop(
        rate,
        arguments.cv,
        arguments.requests,
        arguments.prompt_tokens,
        arguments.max_tokens,
        seed,
    )
    label = "all at once" if rate == float("inf") else f"{rate:g}/s"
    return _open_point(arguments, label, jobs)


def _trace_point(arguments: argparse.Namespace, rate: float | None, seed: Sequence[int]) -> Point:
    rows = reshape(
        read_trace(arguments.trace, arguments.limit),
        length_divisor=arguments.length_divisor,
        time_stretch=arguments.time_stretch,
        rate=rate,
    )
    jobs = workload.clip(workload.of_trace(rows, seed), arguments.clip_tokens)
    span_s = rows[-1].at_s
    own_rate = (len(rows) - 1) / span_s if span_s > 0 else float("inf")
    return _open_point(arguments, f"trace {own_rate:.3g}/s", jobs)


def _open_point(arguments: argparse.Namespace, label: str, jobs: Sequence[Job]) -> Point:
    jobs = [replace(job, shared_tokens=arguments.shared_tokens) for job in jobs]

    async def send(target: Target, info: ServerInfo, on_done: OnDone) -> Load:
        workload.check_fits(jobs, info.max_model_len)
        return await driver.open_loop(target, jobs, timeout_s=arguments.timeout_s, on_done=on_done)

    return Point(label, len(jobs), send)
