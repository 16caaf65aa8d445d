"""Step time, tokens/s and use of the device of a real engine, by live rows, context and prompt.

    python -m benchmarks.engine.steps
    python -m benchmarks.engine.steps --config configs/smollm2_135m.py --rows 1 8 32
    python -m benchmarks.engine.steps --model llama-3.1-8b --dtype bfloat16 --contexts 512 2048

MBU and MFU are shares of what a stream and a matrix product reach in the same run; `counting.py`
says what is counted. `ms` is one decode step; `host` is CPU time for one run of the program, which
makes several decode steps (`--set scheduler.decode_steps=1` for one). Prints two tables, one JSON
line.
"""

import argparse
import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks.engine import ceilings, drive, engines, options
from benchmarks.engine.counting import Counter, Work
from benchmarks.engine.drive import Driver, Turn
from benchmarks.serving import report

_GIGA, _TERA = 1e9, 1e12


def parse() -> argparse.Namespace:
    parser = options.parser_of(__doc__)
    parser.add_argument("--rows", type=int, nargs="*", help="live rows; default: powers of two")
    parser.add_argument("--contexts", type=int, nargs="*", default=[128, 512, 2048])
    parser.add_argument("--turns", type=int, default=6, help="runs of the program that are timed")
    parser.add_argument("--prompts", type=int, nargs="*", default=[32, 128, 512, 2048])
    parser.add_argument("--at_once", type=int, nargs="*", default=[1, 4], help="prompts that come")
    parser.add_argument("--most_tokens", type=int, default=0, help="of all rows; 0: by device")
    parser.add_argument("--stream_mib", type=int, default=1024, help="of each streamed array")
    parser.add_argument("--product_dim", type=int, default=0, help="0: by device")
    return parser.parse_args()


def measure_decode(
    driver: Driver, counter: Counter, best: ceilings.Ceilings, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measures one row for each context and number of live rows that fits."""
    slots = driver.engine.info.num_slots
    most = most_tokens(arguments)
    rows = arguments.rows or [1 << i for i in range(slots.bit_length())]
    found: list[dict[str, Any]] = []
    for context in arguments.contexts:
        levels = sorted({n for n in rows if n <= slots and n * context <= most})
        levels = drive.fitting(driver.engine, levels, context, arguments.turns)
        for turns in drive.decode(driver, levels, context, arguments.turns) if levels else ():
            cell = decode_cell(turns, counter, best)
            found.append({"prompt": context, **cell})
            _progress(f"decode {cell['rows']} x {cell['context']}")
    return found


def most_tokens(arguments: argparse.Namespace) -> int:
    """Most tokens of all rows of a cell, so that it computes in seconds."""
    on_cpu = jax.default_backend() == "cpu"
    return arguments.most_tokens or (8192 if on_cpu else 131072)


def decode_cell(turns: list[Turn], counter: Counter, best: ceilings.Ceilings) -> dict[str, Any]:
    """Table cell of the turns with one number of rows."""
    steps = np.array([turn.plan.num_steps for turn in turns])
    seconds = np.array([turn.device_s for turn in turns])
    starts = [chunk.start for turn in turns for chunk in turn.plan.chunks]
    tokens = sum(turn.num_tokens for turn in turns)
    host_us = np.array([turn.host for turn in turns]) * 1e6
    return {
        "rows": len(turns[0].plan.chunks),
        "context": round(float(np.mean(starts)) + float(np.mean(steps)) / 2),
        "steps_a_run": round(float(steps.mean()), 1),
        "step_ms": percentiles(seconds / steps * 1e3),
        "tokens_per_s": round(tokens / float(seconds.sum()), 1),
        **used(turns, counter, best),
        "host_us": dict(zip(drive.HostTimes._fields, _median(host_us), strict=True)),
        "host_total_us": percentiles(host_us.sum(axis=1)),
        "host_share": round(float(np.median(host_us.sum(axis=1) / 1e6 / seconds)), 4),
    }


def measure_prefill(
    driver: Driver, counter: Counter, best: ceilings.Ceilings, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measures a row for each length and number of prompts that fits, in two seconds or one run."""
    info = driver.engine.info
    found: list[dict[str, Any]] = []
    for count in arguments.at_once:
        for length in arguments.prompts:
            pages = count * (-(-length // info.page_size) + 2)
            fits = pages <= info.num_pages and length < info.max_model_len
            if not fits or count > info.num_slots or count * length > most_tokens(arguments):
                continue
            runs: list[list[Turn]] = []
            until = time.monotonic() + 2
            while not runs or (time.monotonic() < until and len(runs) < 20):
                runs.append(drive.prefill(driver, count, length))
            found.append(prefill_cell(runs, count, length, counter, best))
            _progress(f"prefill {count} x {length}")
    return found


def prefill_cell(
    runs: list[list[Turn]], count: int, length: int, counter: Counter, best: ceilings.Ceilings
) -> dict[str, Any]:
    """Table cell of repeated prefills of the same prompts."""
    seconds = np.array([run[-1].ended_s - run[0].started_s for run in runs])
    return {
        "at_once": count,
        "prompt": length,
        "runs": len(runs),
        "steps": len(runs[0]),
        "ms": percentiles(seconds * 1e3),
        "tokens_per_s": round(count * length / float(np.median(seconds)), 1),
        **used([turn for run in runs for turn in run], counter, best),
    }


def used(turns: list[Turn], counter: Counter, best: ceilings.Ceilings) -> dict[str, Any]:
    """Work of the turns, counted, and its share of the ceilings."""
    work = sum((counter.plan(turn.plan) for turn in turns), Work())
    steps = sum(turn.plan.num_steps for turn in turns)
    seconds = sum(turn.device_s for turn in turns)
    return {
        "bytes_a_step": round(work.bytes / steps),
        "operations_a_step": round(work.operations / steps),
        "gb_per_s": round(work.bytes / seconds / _GIGA, 2),
        "tera_operations_per_s": round(work.operations / seconds / _TERA, 4),
        "mbu": round(work.bytes / seconds / best.bytes_per_s, 4),
        "mfu": round(work.operations / seconds / best.operations_per_s, 4),
    }


def percentiles(values: np.ndarray) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(values, q)), 3) for q in (50, 90)}


def decode_table(cells: list[dict[str, Any]]) -> str:
    header = ["rows", "context", "ms p50", "p90", "tokens/s", "GB/s", "MBU %", "MFU %"]
    header += ["steps a run", "host µs p50", "p90", "% of run"]
    rows = [
        [
            *(report.number(cell[name]) for name in ("rows", "context")),
            *map(report.number, cell["step_ms"].values()),
            *_used_columns(cell),
            report.number(cell["steps_a_run"]),
            *map(report.number, map(round, cell["host_total_us"].values())),
            f"{cell['host_share']:.1%}".rstrip("%"),
        ]
        for cell in cells
    ]
    return report.grid(header, rows)


def prefill_table(cells: list[dict[str, Any]]) -> str:
    header = ["prompt", "at once", "ms p50", "p90", "tokens/s", "GB/s", "MBU %", "MFU %"]
    rows = [
        [
            *(report.number(cell[name]) for name in ("prompt", "at_once")),
            *map(report.number, cell["ms"].values()),
            *_used_columns(cell),
        ]
        for cell in cells
    ]
    return report.grid(header, rows)


def ceilings_line(best: ceilings.Ceilings) -> str:
    """One line with the best rates of the device."""
    return (
        f"ceilings: triad {best.triad_bytes_per_s / _GIGA:.1f} GB/s, "
        f"read {best.read_bytes_per_s / _GIGA:.1f} GB/s, "
        f"matrix product {best.operations_per_s / _TERA:.3g} TFLOP/s"
    )


def main() -> None:
    arguments = parse()
    serve = options.serve_config(arguments)
    subject = engines.build(serve, arguments.backend)
    engine, counter = subject.engine, subject.counter
    dim = arguments.product_dim or ceilings.default_product_dim()
    best = ceilings.measure(subject.dtype, stream_mib=arguments.stream_mib, product_dim=dim)
    compiles = engine.num_compiles()  # the ceilings have compiled, too
    driver = Driver(engine)
    driver.warm_up()
    decode = measure_decode(driver, counter, best, arguments)
    prefill = measure_prefill(driver, counter, best, arguments)
    device = engines.device_of(engine)
    weights_mb = counter.weights.total_bytes / 1e6
    print(
        f"{serve.model.name}, {serve.model.dtype.value}, {weights_mb:,.0f} MB of weights, "
        f"{device['backend']} ops on {device['kind']} with {device['cores']} cores\n"
        f"{ceilings_line(best)}\n\n{decode_table(decode)}\n\n{prefill_table(prefill)}\n"
        f"cached tokens {engine.scheduler.stats().prefix_hit_tokens}\n"
    )
    print(
        report.json_line(
            "engine_steps",
            options.config_of(arguments, serve),
            device=device,
            ceilings={name: getattr(best, name) for name in best.__slots__},
            weights_bytes=counter.weights.total_bytes,
            compiles=engine.num_compiles() - compiles,
            decode=decode,
            prefill=prefill,
        )
    )


def _used_columns(cell: dict[str, Any]) -> list[str]:
    return [
        report.number(cell["tokens_per_s"]),
        report.number(cell["gb_per_s"]),
        f"{100 * cell['mbu']:.1f}",
        f"{100 * cell['mfu']:.1f}",
    ]


def _median(host_us: np.ndarray) -> list[float]:
    return np.round(np.median(host_us, axis=0), 1).tolist()


def _progress(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{what:<40}", end="", file=sys.stderr)


if __name__ == "__main__":
    options.run(main)
