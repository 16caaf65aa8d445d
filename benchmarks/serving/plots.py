"""Pictures of loads: how latencies are distributed, and how they grow with the load."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.failures import BenchmarkError
from benchmarks.serving.metrics import samples_of
from benchmarks.serving.session import Run

_SUFFIXES = (".png", ".svg")


def check(path: str) -> None:
    """Raises BenchmarkError before any load is run for a picture that could not be written."""
    if Path(path).suffix not in _SUFFIXES:
        raise BenchmarkError(f"--plot {path}: name a file that ends in {' or '.join(_SUFFIXES)}")
    if not Path(path).absolute().parent.is_dir():
        raise BenchmarkError(f"--plot {path}: there is no folder {Path(path).parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BenchmarkError("--plot needs matplotlib; pip install matplotlib") from None


def draw(path: str, runs_by_server: Mapping[str, Sequence[Run]]) -> None:
    """Writes one picture of all loads; a color is a load, a line style is a server."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    panels = (("ttft_ms", "TTFT"), ("itl_ms", "ITL"), ("e2e_ms", "E2E"))
    for axis, (latency, title) in zip(axes[0], panels, strict=True):
        _shares(axis, runs_by_server, latency, title)
    _by_load(axes[1][0], runs_by_server, "ttft_ms", "TTFT")
    _by_load(axes[1][1], runs_by_server, "itl_ms", "ITL")
    _throughput(axes[1][2], runs_by_server)
    axes[0][0].legend(fontsize="small")
    axes[1][0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


_STYLES = ("-", "--", ":", "-.")


def _shares(axis: Any, runs_by_server: Mapping[str, Sequence[Run]], latency: str, title: str):
    """Share of samples that are at most x."""
    from matplotlib import ticker

    for style, (server, runs) in zip(_STYLES * 9, runs_by_server.items(), strict=False):
        for color, run in enumerate(runs):
            values = np.sort(getattr(samples_of(run.load.records), latency))
            if len(values):
                shares = np.arange(1, len(values) + 1) / len(values)
                label = f"{server}, {run.point.label}"
                axis.step(values, shares, style, where="post", color=f"C{color % 10}", label=label)
    axis.set(title=title, xlabel="ms", ylabel="share of samples at most x", xscale="log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.grid(alpha=0.3)


def _by_load(axis: Any, runs_by_server: Mapping[str, Sequence[Run]], latency: str, title: str):
    """p50 and p99 by streams or rate."""
    for color, (server, runs) in enumerate(runs_by_server.items()):
        known = [run for run in runs if run.summary[latency]]
        labels = [run.point.label for run in known]
        for percentile, style in (("p50", "o-"), ("p99", "o--")):
            values = [run.summary[latency][percentile] for run in known]
            axis.plot(labels, values, style, color=f"C{color}", label=f"{server} {percentile}")
    axis.set(title=f"{title} by load", ylabel="ms", ylim=(0, None))
    axis.grid(alpha=0.3)


def _throughput(axis: Any, runs_by_server: Mapping[str, Sequence[Run]]):
    for color, (server, runs) in enumerate(runs_by_server.items()):
        labels = [run.point.label for run in runs]
        values = [run.summary["output_tokens_per_s"] for run in runs]
        axis.plot(labels, values, "o-", color=f"C{color}", label=server)
    axis.set(title="Throughput by load", ylabel="output tokens/s", ylim=(0, None))
    axis.grid(alpha=0.3)
