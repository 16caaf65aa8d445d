"""Host time of the scheduler: CPU microseconds of plan and commit, for decode runs over many slots.

    python -m benchmarks.engine.host_scheduler [--slots 256] [--steps 8] [--rounds 5]

Each cell is measured in turns without and with the prefix cache, and the best round of each counts:
a busy machine only adds. Prompts share nothing. With the cache, pages of generated tokens are named
and kept as they fill, all rows in the same turn; so the means tell what the medians hide. Nothing
is computed and JAX is not needed; `host.py` measures the same in a real engine.
"""

import argparse
import statistics
import time

import numpy as np

from benchmarks.serving import report
from jserve.cache.kv_cache import KVCache, PrefixSharing
from jserve.cache.layout import single_group
from jserve.core.request import Request, SamplingParams
from jserve.core.step import FinishCode, Program, ProgramKind, StepPlan, StepResult
from jserve.engine.pipeline import Pipeline
from jserve.scheduler.config import SchedulerConfig
from jserve.scheduler.scheduler import Scheduler

_PROMPT_TOKENS = 100


def crowded_scheduler(num_slots: int, steps: int, max_tokens: int, prefix: bool) -> Scheduler:
    """A scheduler with a request for each slot, all decoding, their prompts computed."""
    programs = (
        Program(ProgramKind.MIXED, 4096, num_slots),
        Program(ProgramKind.DECODE, num_slots, num_slots, steps),
    )
    scheduler = Scheduler(
        SchedulerConfig(),
        cache=KVCache(
            single_group(16),
            num_slots * (max_tokens // 16 + 8),
            PrefixSharing() if prefix else None,
        ),
        num_slots=num_slots,
        max_model_len=max_tokens + _PROMPT_TOKENS,
        programs=programs,
    )
    for i in range(num_slots):
        sampling = SamplingParams(max_tokens=max_tokens)
        prompt = (i, *range(_PROMPT_TOKENS - 1))
        scheduler.add(Request(id=f"request-{i}", prompt=prompt, sampling=sampling), 0.0)
    return scheduler


class InstantExecutor:
    """Computes nothing, and notes when the scheduler's part of a turn ends and begins again."""

    def __init__(self) -> None:
        self.submitted_s = 0.0  # CPU seconds of the thread: the last plan was there
        self.collected_s = 0.0  # the last commit began

    def submit(self, plan: StepPlan) -> StepResult:
        self.submitted_s = time.thread_time()
        return outcome(plan)

    def collect(self, handle: StepResult) -> StepResult:
        self.collected_s = time.thread_time()
        return handle


def outcome(plan: StepPlan) -> StepResult:
    """Every row that samples yields all its tokens; nobody ends."""
    rows = plan.program.rows
    num_new = np.zeros(rows, np.int32)
    num_new[: len(plan.chunks)] = [chunk.max_new for chunk in plan.chunks]
    tokens = np.full((rows, plan.program.steps), 7, np.int32)
    return StepResult(plan.step_id, tokens, num_new, np.full(rows, FinishCode.RUNNING, np.int32))


def measure(num_slots: int, steps: int, repeats: int, prefix: bool) -> dict[str, float]:
    """CPU microseconds of the thread, which a busy machine blurs less than time."""
    scheduler = crowded_scheduler(num_slots, steps, steps * (repeats + 4) + 32, prefix)
    executor = InstantExecutor()
    pipeline = Pipeline(scheduler, executor)
    while (plan := pipeline.start(_now)) and plan.program.kind is not ProgramKind.DECODE:
        pipeline.finish(_now)
    plan_us: list[float] = []
    commit_us: list[float] = []
    for _ in range(repeats):
        start = time.thread_time()
        updates = pipeline.turn(_now)
        plan_us.append((executor.submitted_s - start) * 1e6)
        commit_us.append((time.thread_time() - executor.collected_s) * 1e6)
        if not updates or pipeline.num_in_flight < 1:
            raise RuntimeError("the scheduler ran dry; lower --repeats")
    both = [p + c for p, c in zip(plan_us, commit_us, strict=True)]
    return {
        "plan_us": round(statistics.median(plan_us), 1),
        "commit_us": round(statistics.median(commit_us), 1),
        "both_us": round(statistics.median(both), 1),
        "mean_us": round(statistics.fmean(both), 1),
        "both_p99_us": round(statistics.quantiles(both, n=100)[98], 1),
        "cached_tokens": scheduler.stats().prefix_hit_tokens,
    }


def best_of(rounds: int, slots: int, steps: int, repeats: int) -> list[dict[str, float]]:
    """The cells without and with the prefix cache, each with the smallest mean of its rounds."""
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for _ in range(rounds):
        for prefix, measured in found.items():
            measured.append(measure(slots, steps, repeats, prefix))
    return [
        {"slots": slots, "steps": steps, "prefix": float(prefix)}
        | min(measured, key=lambda cell: cell["mean_us"])
        for prefix, measured in found.items()
    ]


def _now() -> float:
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=200, help="turns of one round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    cells = [
        cell
        for slots in args.slots
        for steps in args.steps
        for cell in best_of(args.rounds, slots, steps, args.repeats)
    ]
    header = [
        "slots",
        "steps",
        "prefix",
        "plan µs",
        "commit µs",
        "both µs",
        "mean",
        "p99",
        "cached",
    ]
    print(report.grid(header, [[*map(report.number, cell.values())] for cell in cells]))
    print(report.json_line("host_scheduler", vars(args), cells=cells))


if __name__ == "__main__":
    main()
