"""A table for people, one JSON line for machines, and where a benchmark ran."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.metrics import LATENCIES, PERCENTILES

Summary = Mapping[str, Any]
_NAMES = {
    "ttft_ms": "TTFT ms",
    "itl_ms": "ITL ms",
    "chunk_gap_ms": "chunk gap ms",
    "tpot_ms": "TPOT ms",
    "e2e_ms": "E2E ms",
}


def percentile_rows() -> list[tuple[str, Callable[[Summary], float | None]]]:
    """Name and value of each percentile of each latency."""

    def value(latency: str, percentile: str) -> Callable[[Summary], float | None]:
        return lambda summary: (summary[latency] or {}).get(percentile)

    return [
        (f"{_NAMES[latency]} p{q}", value(latency, f"p{q}"))
        for latency in LATENCIES
        for q in PERCENTILES
    ]


def throughput_rows() -> list[tuple[str, Callable[[Summary], float | None]]]:
    """Name and value of each rate, and of the goodput."""
    return [
        ("requests/s", lambda summary: summary["requests_per_s"]),
        ("output tokens/s", lambda summary: summary["output_tokens_per_s"]),
        ("total tokens/s", lambda summary: summary["total_tokens_per_s"]),
        ("goodput share", lambda summary: (summary["goodput"] or {}).get("share")),
        ("goodput requests/s", lambda summary: (summary["goodput"] or {}).get("requests_per_s")),
    ]


def table(labels: Sequence[str], summaries: Sequence[Summary]) -> str:
    """One column per load, one row per metric; metrics that nothing has are left out."""
    counts: list[tuple[str, Callable[[Summary], Any]]] = [
        ("requests", lambda summary: summary["requests"]),
        ("errors", lambda summary: summary["errors"]),
        ("seconds", lambda summary: summary["duration_s"]),
        ("prompt tokens each", lambda summary: _each(summary, "prompt_tokens")),
        ("cached tokens", lambda summary: summary["cached_tokens"]),
        ("output tokens each", lambda summary: _each(summary, "output_tokens")),
        ("tokens a chunk", _tokens_a_chunk),
    ]
    client: list[tuple[str, Callable[[Summary], Any]]] = [
        ("send lag ms p99", lambda summary: (summary["send_lag_ms"] or {}).get("p99")),
        ("client CPU s", lambda summary: summary["client_cpu_s"]),
    ]
    rows = [
        (name, [value(summary) for summary in summaries])
        for name, value in (*counts, *throughput_rows(), *percentile_rows(), *client)
    ]
    shown = [(name, values) for name, values in rows if any(v is not None for v in values)]
    return grid(["", *labels], [[name, *map(number, values)] for name, values in shown])


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def number(value: float | None) -> str:
    """Four significant digits, or all of a whole number."""
    if value is None:
        return "–"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def notes(summary: Summary) -> list[str]:
    """Notes that a reader needs to trust the numbers."""
    found: list[str] = []
    if summary["tokens_counted_by"] not in (None, "usage"):
        found.append("the server told no usage: each chunk counts as one token")
    if summary["tokens_of_chunks"] == "estimated":
        found.append("ITL: the tokens of each chunk are estimated from the length of its text")
    found += _surprises(summary)
    lag = summary["send_lag_ms"]
    if lag and lag["p99"] > 20:
        found.append(f"requests were sent up to {lag['max']:.0f} ms late: the client was too busy")
    for message, count in summary["error_kinds"].items():
        found.append(f"{count} × {message}")
    return found


def _surprises(summary: Summary) -> list[str]:
    """Differences between the work that was asked for and the work that was done."""
    prompt, output = summary["asked_tokens"]
    found: list[str] = []
    if prompt and summary["prompt_tokens"] not in (0, prompt):
        ratio = summary["prompt_tokens"] / prompt
        found.append(f"prompts had {ratio:.3g} times the tokens that were asked for")
    if output and summary["output_tokens"] != output:
        ratio = summary["output_tokens"] / output
        found.append(f"answers had {ratio:.3g} times the tokens that were asked for")
    return found


def json_line(benchmark: str, config: Mapping[str, Any], **fields: Any) -> str:
    """One line for machines: benchmark, commit, host, config and results."""
    return json.dumps(
        {"benchmark": benchmark, "commit": commit(), "host": host(), "config": config, **fields}
    )


def commit() -> str | None:
    """The checkout's commit, with a + when files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def host() -> dict[str, Any]:
    """The machine of the client, which is the server's, too, on loopback."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        cpu = next(
            (it.partition(":")[2].strip() for it in lines if it.startswith("model name")), cpu
        )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "devices": _gpus(),
    }


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def _each(summary: Summary, name: str) -> float | None:
    complete = summary["requests"] - summary["errors"]
    return summary[name] / complete if complete and summary[name] else None


def _tokens_a_chunk(summary: Summary) -> float | None:
    return summary["output_tokens"] / summary["chunks"] if summary["chunks"] else None
