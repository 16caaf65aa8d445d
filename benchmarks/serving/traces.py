"""Request traces: when requests came, and how many tokens they took in and gave out.

Read are the CSV of Azure's LLM inference traces of 2023 (`TIMESTAMP,ContextTokens,GeneratedTokens`)
and Mooncake's JSON lines (`timestamp` in ms, `input_length`, `output_length`).
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.serving.failures import BenchmarkError

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOONCAKE = ("timestamp", "input_length", "output_length")


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace."""

    at_s: float  # from the first one
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class _Raw:
    line: int
    values: tuple[Any, Any, Any]  # time, prompt tokens, output tokens, as the file has them


def read_trace(path: str, limit: int | None = None) -> list[TraceRow]:
    """The first `limit` requests of a trace; `.csv` is Azure's format, `.jsonl` Mooncake's.

    Raises BenchmarkError that names file, line and what is wrong.
    """
    readers = {".csv": (_azure, _AZURE, _time_of_day), ".jsonl": (_mooncake, _MOONCAKE, _ms)}
    suffix = Path(path).suffix
    if suffix not in readers:
        raise BenchmarkError(f"{path}: a trace is a .csv (Azure) or a .jsonl (Mooncake) file")
    read, names, seconds = readers[suffix]
    rows: list[TraceRow] = []
    start_s = None
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            for raw in islice(read(path, file), limit):
                where = f"{path}:{raw.line}"
                at_s = seconds(raw.values[0], f"{where}: {names[0]}")
                start_s = at_s if start_s is None else start_s
                if rows and at_s - start_s < rows[-1].at_s:
                    raise BenchmarkError(f"{where}: {names[0]} is earlier than on the line before")
                counts = (
                    _count(value, f"{where}: {name}")
                    for value, name in zip(raw.values[1:], names[1:], strict=True)
                )
                rows.append(TraceRow(at_s - start_s, *counts))
    except OSError as error:
        raise BenchmarkError(f"{path}: {error.strerror}; mend --trace") from None
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path}: not a text file: {error}") from None
    if not rows:
        raise BenchmarkError(f"{path}: no requests in it")
    return rows


def reshape(
    rows: Sequence[TraceRow],
    *,
    length_divisor: float = 1,
    time_stretch: float = 1,
    rate: float | None = None,
) -> list[TraceRow]:
    """A trace for a smaller machine: lengths divided (at least 1 token), gaps stretched.

    `rate` stretches to that many requests a second on average instead.
    """
    if not length_divisor > 0 or not time_stretch > 0:
        raise BenchmarkError("--length_divisor and --time_stretch must be above 0")
    if rate is not None:
        if not rate > 0:
            raise BenchmarkError(f"--rate is {rate:g}; it must be above 0 (or inf)")
        span_s = rows[-1].at_s
        time_stretch = (len(rows) - 1) / rate / span_s if span_s > 0 else 1
    return [
        replace(
            row,
            at_s=row.at_s * time_stretch,
            prompt_tokens=max(1, round(row.prompt_tokens / length_divisor)),
            output_tokens=max(1, round(row.output_tokens / length_divisor)),
        )
        for row in rows
    ]


def _azure(path: str, file: Any) -> Iterator[_Raw]:
    reader = csv.reader(file)
    header = next(reader, [])
    if [name.strip() for name in header] != list(_AZURE):
        raise BenchmarkError(f"{path}:1: the header must be {','.join(_AZURE)}, not {header}")
    for values in reader:
        if not values:
            continue  # an empty line
        if len(values) != len(_AZURE):
            raise BenchmarkError(
                f"{path}:{reader.line_num}: {len(values)} columns, not {len(_AZURE)}"
            )
        yield _Raw(reader.line_num, (values[0], values[1], values[2]))


def _mooncake(path: str, file: Any) -> Iterator[_Raw]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise BenchmarkError(f"{path}:{line}: not JSON: {error}") from None
        missing = [name for name in _MOONCAKE if not isinstance(row, dict) or name not in row]
        if missing:
            raise BenchmarkError(f"{path}:{line}: no {missing[0]}")
        yield _Raw(line, (row["timestamp"], row["input_length"], row["output_length"]))


def _time_of_day(value: str, name: str) -> float:
    # The trace has seven decimals of a second, datetime takes six.
    text, dot, decimals = value.strip().partition(".")
    try:
        return datetime.fromisoformat(text).timestamp() + (float(f"0.{decimals}") if dot else 0)
    except ValueError:
        raise BenchmarkError(
            f"{name} is {value!r}, not a time like 2023-11-16 18:15:46.6805900"
        ) from None


def _ms(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e15:
        raise BenchmarkError(f"{name} is {value!r}, not a number of milliseconds")
    return value / 1e3


def _count(value: Any, name: str) -> int:
    is_number = (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, str) and value.strip().isascii() and value.strip().isdigit()
    )
    if not is_number or int(value) < 1:
        raise BenchmarkError(f"{name} is {value!r}, not a whole number of tokens from 1")
    return int(value)
