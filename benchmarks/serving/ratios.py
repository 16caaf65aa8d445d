"""The rounds of several servers under one load, side by side. Pure."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from benchmarks.serving import report
from benchmarks.serving.report import Summary


def by_round(
    value: Callable[[Summary], float | None],
    first: Sequence[Summary],
    other: Sequence[Summary],
) -> list[float]:
    """First to other, round by round; rounds without a value are left out."""
    pairs = [(value(a), value(b)) for a, b in zip(first, other, strict=True)]
    return [a / b for a, b in pairs if a is not None and b]


def table(by_server: Mapping[str, Sequence[Summary]]) -> str:
    """One load: each server's median of the rounds, and the ratios with their range."""
    names = list(by_server)
    header = ["median of rounds", *names]
    for other in names[1:]:
        header += [f"{names[0]} / {other}", "lowest–highest"]
    rows: list[list[str]] = []
    for name, value in (*report.throughput_rows(), *report.percentile_rows()):
        row = [name]
        for summaries in by_server.values():
            values = [v for v in map(value, summaries) if v is not None]
            row.append(report.number(median(values) if values else None))
        for other in names[1:]:
            found = by_round(value, by_server[names[0]], by_server[other])
            row.append(f"{median(found):.3f}" if found else "–")
            row.append(f"{min(found):.3f}–{max(found):.3f}" if found else "–")
        if any(cell != "–" for cell in row[1:]):
            rows.append(row)
    return report.grid(header, rows)


def cached(by_server: Mapping[str, Sequence[Summary]]) -> str:
    """One line with the prompt tokens that each server has told it did not compute."""
    each: list[str] = []
    for name, summaries in by_server.items():
        told = [it["cached_tokens"] for it in summaries if it["cached_tokens"] is not None]
        each.append(f"{name} {report.number(sum(told) if told else None)}")
    return f"cached tokens: {', '.join(each)}"


def unequal(by_server: Mapping[str, Sequence[Summary]]) -> list[str]:
    """Differences in the work that the servers did, in words."""
    found: list[str] = []
    for kind in ("prompt_tokens", "output_tokens"):
        each: dict[str, float] = {}
        for name, summaries in by_server.items():
            complete = sum(it["requests"] - it["errors"] for it in summaries)
            each[name] = round(sum(it[kind] for it in summaries) / max(complete, 1), 2)
        if len(set(each.values())) > 1:
            told = ", ".join(f"{name} {number:g}" for name, number in each.items())
            found.append(f"not the same work: {kind} of a request: {told}")
    for name, summaries in by_server.items():
        if errors := sum(it["errors"] for it in summaries):
            found.append(f"{name}: {errors} requests failed")
        if any(it["tokens_counted_by"] not in (None, "usage") for it in summaries):
            found.append(f"{name} told no usage: each chunk counts as one token")
    return found
