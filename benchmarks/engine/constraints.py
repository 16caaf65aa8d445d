"""What a grammar costs: host time of each mask, and tokens/s of bound rows, alone and beside free.

    python -m benchmarks.engine.constraints --config configs/smollm2_135m_fast.py [--rows 32]

Every row writes JSON of one schema, which it begins again when it is done, so that nobody ends
early. Each round measures, in turns:

- free: no row is bound, one decode step a run, as bound rows have.
- bound: all rows are.
- half: half of them are, the others keep their runs; `free half` is the same without grammars.
- half, ahead: as `half`, with sampling that is not truncated, where bound rows run ahead.

Medians over the rounds; times of masks are over all rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.engine import engines, options
from benchmarks.serving import report
from jserve.checkpoints.locate import text_assets_from_config
from jserve.core.request import ConstraintSpec, Request, SamplingParams
from jserve.engine.build.assembly import Engine
from jserve.engine.pipeline import Pipeline
from jserve.grammar.maker import ConstraintMaker
from jserve.scheduler.constraint import Constraint

_GRAMMAR = """\
start: document+
document: %json {
  "type": "object",
  "x-guidance": {"whitespace_flexible": false},
  "properties": {
    "name": {"type": "string"},
    "age": {"type": "integer", "minimum": 0, "maximum": 130},
    "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
    "kind": {"enum": ["one", "two", "three"]},
    "address": {
      "type": "object",
      "properties": {
        "street": {"type": "string"},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"}
      },
      "required": ["street", "zip"],
      "additionalProperties": false
    }
  },
  "required": ["name", "age", "tags", "kind", "address"],
  "additionalProperties": false
}
"""
_TRUNCATED = SamplingParams(temperature=0.7, top_p=0.9)
_WHOLE = SamplingParams(temperature=0.7)


class Timed:
    """A constraint whose processor time is noted, a number for each token that it takes.

    Not the time by the clock: the device of a CPU engine computes on the same cores.
    """

    def __init__(self, constraint: Constraint, times: list[float]) -> None:
        self._constraint = constraint
        self._times = times

    def mask(self) -> bytes | None:
        started_s = time.thread_time()
        mask = self._constraint.mask()
        self._times.append(time.thread_time() - started_s)
        return mask

    def accept(self, tokens: Any) -> int:
        started_s = time.thread_time()
        stand = self._constraint.accept(tokens)
        if self._times:
            self._times[-1] += time.thread_time() - started_s
        return stand


class Subject:
    """An engine, prompts, and grammars for as many rows as are asked for."""

    def __init__(self, engine: Engine, maker: ConstraintMaker, max_tokens: int) -> None:
        self._engine = engine
        self._maker = maker
        self._max_tokens = max_tokens
        self._serial = 0
        self.mask_s: list[float] = []

    def rates(
        self, rows: int, num_bound: int, sampling: SamplingParams, decode_steps: int | None
    ) -> tuple[float, float]:
        """Tokens/s of the free rows and of the bound ones, from the first token of all on."""
        scheduler = self._engine.scheduler
        planner = scheduler._planner  # pyright: ignore[reportPrivateUsage]
        planner._config = replace(  # pyright: ignore[reportPrivateUsage]
            planner._config,  # pyright: ignore[reportPrivateUsage]
            decode_steps=decode_steps,
        )
        counts: dict[str, int] = {}
        rng = np.random.default_rng(self._serial)
        for i in range(rows):
            self._serial += 1
            bound = i < num_bound
            request = Request(
                id=f"{'bound' if bound else 'free'} {self._serial}",
                prompt=tuple(rng.integers(10, self._engine.info.vocab, 30).tolist()),
                sampling=replace(
                    sampling, max_tokens=self._max_tokens, seed=self._serial, ignore_eos=True
                ),
            )
            counts[request.id] = 0
            constraint = self._make() if bound else None
            timed = None if constraint is None else Timed(constraint, self.mask_s)
            scheduler.add(request, time.perf_counter(), timed)
        return self._drive(counts)

    def _make(self) -> Constraint | None:
        spec = ConstraintSpec(grammar=_GRAMMAR)
        return self._maker.make(Request(id="", prompt=(0,), constraint=spec))

    def _drive(self, counts: dict[str, int]) -> tuple[float, float]:
        """Runs until the first row ends, and drops the others."""
        scheduler = self._engine.scheduler
        pipeline = Pipeline(scheduler, self._engine.executor)
        started_s, first = None, dict(counts)
        ended = False
        while not ended:
            for update in pipeline.turn(time.perf_counter) or ():
                counts[update.request_id] += len(update.tokens)
                ended |= update.finish is not None
            if started_s is None and all(counts.values()):
                started_s, first = time.perf_counter(), dict(counts)
        assert started_s is not None
        seconds = time.perf_counter() - started_s
        for name in counts:
            scheduler.abort(name)
        while pipeline.num_in_flight:
            pipeline.finish(time.perf_counter)

        def rate(kind: str) -> float:
            names = [name for name in counts if name.startswith(kind)]
            return sum(counts[name] - first[name] for name in names) / seconds

        return rate("free"), rate("bound")


def measure(subject: Subject, rows: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median rates of each case."""
    half = rows // 2
    cases: dict[str, Callable[[], tuple[float, float]]] = {
        "free, one step a run": lambda: subject.rates(rows, 0, _TRUNCATED, 1),
        "bound": lambda: subject.rates(rows, rows, _TRUNCATED, None),
        "free half": lambda: subject.rates(rows, 0, _TRUNCATED, None),
        "half": lambda: subject.rates(rows, half, _TRUNCATED, None),
        "half, ahead": lambda: subject.rates(rows, half, _WHOLE, None),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for done in range(rounds + 1):
        for name, run in cases.items():
            rates = run()
            if done:  # the first round warms up
                found[name].append(rates)
    return {
        name: {
            "free": round(statistics.median(free for free, _ in rates), 1),
            "bound": round(statistics.median(bound for _, bound in rates), 1),
        }
        for name, rates in found.items()
    }


def parse() -> argparse.Namespace:
    parser = options.parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=0, help="0: one for each slot")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_tokens", type=int, default=60)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    serve = options.serve_config(arguments)
    engine = engines.build(serve, arguments.backend).engine
    assets = text_assets_from_config(serve.model, lambda done_bytes, total_bytes: None)
    maker = ConstraintMaker(
        lambda: assets.tokenizer_json,
        vocab=engine.info.vocab,
        eos_token_ids=engine.info.eos_token_ids,
    )
    subject = Subject(engine, maker, arguments.max_tokens)
    rows = min(arguments.rows or engine.info.num_slots, engine.info.num_slots)
    found = measure(subject, rows, arguments.rounds)
    mask_us = np.array(subject.mask_s) * 1e6
    masks = {
        "mean": round(float(mask_us.mean()), 1),
        "p99": round(float(np.percentile(mask_us, 99)), 1),
        "max": round(float(mask_us.max()), 1),
    }
    print(f"{serve.model.name}, {rows} rows; tokens/s\n")
    table = [
        (name, report.number(it["free"]), report.number(it["bound"])) for name, it in found.items()
    ]
    print(report.grid(("", "free rows", "bound rows"), table))
    print(f"\nprocessor time of a token's mask and acceptance, µs: {masks}")
    print(
        report.json_line(
            "engine_constraints",
            options.config_of(arguments, serve),
            device=engines.device_of(engine),
            rates=found,
            mask_us=masks,
        )
    )


if __name__ == "__main__":
    options.run(main)
