"""The step log against the plans that ran, and when the disk is full."""

import errno
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jserve.cache.kv_cache import KVCache
from jserve.cache.layout import single_group
from jserve.core.errors import ConfigError
from jserve.core.request import Request, SamplingParams
from jserve.core.step import Program, ProgramKind, StepPlan, StepResult
from jserve.engine.config import EngineConfig
from jserve.engine.pipeline import Pipeline
from jserve.engine.step_log import StepFeatures, StepLog, open_step_log
from jserve.scheduler.config import SchedulerConfig
from jserve.scheduler.scheduler import Scheduler
from jserve.scheduler.simulated_executor import SimulatedExecutor
from jserve.scheduler.simulated_model import SimulatedModel

PROGRAMS = (Program(ProgramKind.MIXED, 8, 4), Program(ProgramKind.DECODE, 4, 4, 3))
MODEL = SimulatedModel(eos_token_ids=())


class Recording(SimulatedExecutor):
    """Remembers plans and results."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(PROGRAMS, model=MODEL, **sizes)
        self.plans: list[StepPlan] = []
        self.results: list[StepResult] = []

    def submit(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        return super().submit(plan)

    def collect(self, handle: StepResult) -> StepResult:
        self.results.append(super().collect(handle))
        return self.results[-1]


class Clock:
    """A second passes with every look at it."""

    now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def request(name: str, length: int, max_tokens: int, stop: int | None = None) -> Request:
    """A request that ends at its output token number `stop`, from 0; None: at `max_tokens`."""
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    made = Request(id=name, prompt=tuple(range(length)), sampling=sampling)
    if stop is None:
        return made
    tokens = MODEL.generate(made, 64)[0]
    assert tokens[stop] not in tokens[:stop]
    return replace(made, sampling=replace(sampling, stop_token_ids=(tokens[stop],)))


def run(log: StepLog | None, prompts: dict[str, int], max_tokens: int) -> Recording:
    return run_requests(log, [request(*item, max_tokens) for item in prompts.items()])


def run_requests(log: StepLog | None, requests: list[Request]) -> Recording:
    sizes = {"num_slots": 4, "num_pages": 40, "page_size": 4}
    cache = KVCache(single_group(4), 40)
    scheduler = Scheduler(
        SchedulerConfig(), cache=cache, num_slots=4, max_model_len=64, programs=PROGRAMS
    )
    executor = Recording(**sizes)
    for asked in requests:
        scheduler.add(asked, 0.0)
    pipeline, clock = Pipeline(scheduler, executor, log=log), Clock()
    while pipeline.has_work:
        pipeline.turn(clock)
    return executor


def work(line: dict[str, Any]) -> tuple[Any, ...]:
    """The features of a line, and its output tokens."""
    return tuple(line[name] for name in (*StepFeatures._fields, "output_tokens"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_features_of_one_request_by_hand(tmp_path: Path) -> None:
    run(StepLog(tmp_path / "steps"), {"a": 10}, max_tokens=4)
    found = lines(tmp_path / "steps")
    assert [work(line) for line in found] == [
        ("mixed[8]", 1, 0, 8, 0, 64, 0),
        ("mixed[8]", 1, 0, 2, 0, 20, 1),
        ("decode[4x3]", 3, 1, 0, 11, 0, 3),
    ]
    # Looks at the clock: plan 0, submit 0; plan 1, submit 1, commit 0; plan 2, submit 2, …
    times = ("planned_s", "submitted_s", "started_s", "committed_s")
    assert [tuple(line[name] for name in times) for line in found] == [
        (1, 2, 1, 5),
        (3, 4, 5, 8),
        (6, 7, 8, 10),
    ]


def test_a_stop_ends_the_run_and_the_run_planned_behind_it_does_nothing(tmp_path: Path) -> None:
    run_requests(StepLog(tmp_path / "steps"), [request("a", 8, max_tokens=20, stop=2)])
    assert [work(line) for line in lines(tmp_path / "steps")] == [
        ("mixed[8]", 1, 0, 8, 0, 64, 1),
        ("decode[4x3]", 2, 1, 0, 9, 0, 2),
        ("decode[4x3]", 0, 0, 0, 0, 0, 0),
    ]


def test_a_row_that_has_stopped_is_not_counted_beside_one_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "steps"
    run_requests(StepLog(path), [request("a", 4, 20, stop=2), request("b", 3, 8)])
    assert [work(line) for line in lines(path)] == [
        ("mixed[8]", 1, 0, 7, 0, 16 + 9, 2),
        ("decode[4x3]", 3, 2, 0, 5 + 4, 0, 2 + 3),
        ("decode[4x3]", 3, 1, 0, 7, 0, 3),
        ("decode[4x3]", 1, 1, 0, 10, 0, 1),
    ]


def test_a_prompt_runs_beside_a_decode_that_has_stopped(tmp_path: Path) -> None:
    path = tmp_path / "steps"
    run_requests(StepLog(path), [request("a", 4, 20, stop=1), request("b", 17, 1)])
    assert [work(line) for line in lines(path)] == [
        ("mixed[8]", 1, 0, 8, 0, 16 + 16, 1),
        ("mixed[8]", 1, 1, 7, 5, 7 * 11, 1),
        ("mixed[8]", 1, 0, 6, 0, 6 * 17, 1),
    ]


def test_every_step_is_there_with_the_features_of_its_plan(tmp_path: Path) -> None:
    """Each feature is counted again, position by position, from what the device was given."""
    path = tmp_path / "steps"
    ran = run(StepLog(path), {name: 3 + 7 * i for i, name in enumerate("abcdef")}, max_tokens=9)
    found = lines(path)
    assert [line["step"] for line in found] == list(range(len(ran.plans)))
    computed: dict[str, int] = {}  # tokens by request, as the device counts them
    kinds: set[tuple[bool, bool]] = set()
    for line, plan, result in zip(found, ran.plans, ran.results, strict=True):
        decodes = [chunk for chunk in plan.chunks if not chunk.tokens]
        prompts = [chunk for chunk in plan.chunks if chunk.tokens]
        kinds.add((bool(decodes), bool(prompts)))
        assert (line["program"], line["num_steps"]) == (plan.program.name, plan.num_steps)
        assert line["decode_rows"] == len(decodes)
        assert line["prompt_tokens"] == sum(len(chunk.tokens) for chunk in prompts)
        assert line["decode_context"] == sum(computed[c.request_id] + 1 for c in decodes)
        assert line["chunk_context"] == sum(
            len(c.tokens) * (computed.get(c.request_id, 0) + len(c.tokens)) for c in prompts
        )
        assert line["output_tokens"] == sum(map(int, result.num_new))
        for row, chunk in enumerate(plan.chunks):
            steps = len(chunk.tokens) or int(result.num_new[row])
            computed[chunk.request_id] = computed.get(chunk.request_id, 0) + steps
    assert kinds == {(True, True), (True, False), (False, True)}


def test_a_log_goes_on_where_another_process_ended(tmp_path: Path) -> None:
    path = tmp_path / "steps"
    for _ in range(2):
        log = StepLog(path)
        run(log, {"a": 3}, max_tokens=1)
        log.close()
    assert [line["step"] for line in lines(path)] == [0, 0]


def test_a_full_disk_is_one_warning_and_leaves_whole_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write, disk_bytes = tmp_path / "steps", os.write, 500

    def write_to_small_disk(file: int, data: bytes) -> int:
        left = disk_bytes - os.fstat(file).st_size
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[:left])

    monkeypatch.setattr("jserve.engine.step_log.os.write", write_to_small_disk)
    with caplog.at_level(logging.WARNING):
        ran = run(StepLog(path), {"a": 10}, max_tokens=20)
    assert len(ran.results) > 5
    assert len(caplog.records) == 1
    assert f"{path} ends here: only a part of a line" in caplog.text
    monkeypatch.undo()
    before = len(lines(path))
    assert before > 0
    run(StepLog(path), {"a": 3}, max_tokens=1)
    assert len(lines(path)) == before + 1


def test_a_torn_line_stays_alone(tmp_path: Path) -> None:
    path = tmp_path / "steps"
    path.write_text('{"step": 0}\n{"st')
    run(StepLog(path), {"a": 3}, max_tokens=3)
    first, torn, *added = path.read_text().splitlines()
    assert (first, torn) == ('{"step": 0}', '{"st')
    assert [json.loads(line)["step"] for line in added] == list(range(len(added)))
    assert added


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "engine.step_log is empty"),
        ("~nosuchuser/x", "engine.step_log is '~nosuchuser/x'"),
        ("a\0b", "engine.step_log is .* cannot be opened"),
        ("x" * 5000, "cannot be opened: File name too long"),
        ("/dev/null", "is no regular file"),
    ],
)
def test_a_wrong_name_is_a_config_error(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_step_log(EngineConfig(step_log=name))


def test_a_pipe_without_a_reader_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is no regular file"):
        StepLog(tmp_path / "pipe")


def test_the_config_names_the_file(tmp_path: Path) -> None:
    assert open_step_log(EngineConfig()) is None
    log = open_step_log(EngineConfig(step_log=str(tmp_path / "steps")))
    assert log is not None
    run(log, {"a": 3}, max_tokens=1)
    assert len(lines(tmp_path / "steps")) == 1
    with pytest.raises(ConfigError, match=r"engine.step_log is .*missing/steps.*No such file"):
        open_step_log(EngineConfig(step_log=str(tmp_path / "missing" / "steps")))
