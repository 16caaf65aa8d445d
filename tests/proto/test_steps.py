"""Steps between processes: the very buffer of the leader, rebuilt from little."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jserve.cache.kv_cache import KVCache
from jserve.cache.layout import single_group
from jserve.core.errors import EngineError
from jserve.core.request import Request, SamplingParams
from jserve.core.step import (
    Admission,
    Chunk,
    MaskRow,
    Move,
    MoveKind,
    NewPages,
    Program,
    ProgramKind,
    StepPlan,
)
from jserve.engine.program.batch import BatchShape, pack
from jserve.proto import group_pb2
from jserve.proto.steps import StepReader, StepWriter
from jserve.scheduler.config import SchedulerConfig
from jserve.scheduler.scheduler import Scheduler
from tests.scheduler.drill import MODEL, Drill, Engine, engines
from tests.scheduler.rig import Rig

MAX_BYTES = 4096  # bytes of a step that admits nobody


def _sent(message: group_pb2.Step) -> group_pb2.Step:
    return group_pb2.Step.FromString(message.SerializeToString())


def _shape(engine: Engine) -> BatchShape:
    return BatchShape(
        engine.num_slots,
        MODEL.vocab,
        engine.page_size,
        engine.max_processor_rows,
        pages_per_slot=engine.num_pages,
        history_rows=engine.max_processor_rows,
    )


def _check(plans: list[StepPlan], programs: tuple[Program, ...], shape: BatchShape) -> None:
    writer, reader = StepWriter(programs), StepReader(programs)
    for plan in plans:
        batch = pack(plan, shape, MODEL.eos_token_ids)
        step = _sent(writer.write(plan, batch.checksum))
        rebuilt = pack(reader.read(step), shape, MODEL.eos_token_ids)
        np.testing.assert_array_equal(rebuilt.buffer, batch.buffer)
        assert rebuilt.program == batch.program
        assert rebuilt.checksum == step.checksum


@settings(max_examples=30)
@given(engine=engines(), seed=st.integers(0, 2**32))
def test_a_follower_rebuilds_the_buffer_of_every_step(engine: Engine, seed: int) -> None:
    drill = Drill(engine, seed)
    drill.run(150)
    _check(drill.plans, engine.programs, _shape(engine))


def test_preempted_aborted_and_logged_sequences_are_among_them() -> None:
    programs = (Program(ProgramKind.MIXED, 16, 4), Program(ProgramKind.DECODE, 4, 4, 4))
    config = SchedulerConfig(max_queue=8, step_tokens=12, max_partial_prefills=2)
    drill = Drill(Engine(4, 14, 4, 40, programs, 2, config), seed=1)
    drill.run(600)
    stats = drill.scheduler.stats()
    assert stats.num_preemptions > 3
    assert any(admission.output for plan in drill.plans for admission in plan.admissions)
    assert any(chunk.prompt_targets for plan in drill.plans for chunk in plan.chunks)
    _check(drill.plans, programs, _shape(drill.engine))


def test_the_checksum_tells_plans_apart_that_differ_only_in_moves() -> None:
    rig = Rig()
    rig.add("a")
    plan, shape = rig.plan(), BatchShape(4, rig.model.vocab, 4, 2, pages_per_slot=25)
    there = (Move(MoveKind.COPY, 0, 1, 2),)
    elsewhere = (Move(MoveKind.COPY, 0, 1, 3),)
    checksums = {
        pack(replace(plan, moves=moves), shape, ()).checksum
        for moves in ((), there, elsewhere, there + elsewhere, elsewhere + there)
    }
    assert len(checksums) == 5


def test_a_step_of_256_rows_takes_less_than_4_kb() -> None:
    programs = (Program(ProgramKind.MIXED, 1024, 256), Program(ProgramKind.DECODE, 256, 256, 8))
    scheduler = Scheduler(
        SchedulerConfig(),
        cache=KVCache(single_group(16), 60_000),
        num_slots=256,
        max_model_len=8192,
        programs=programs,
    )
    rng = np.random.default_rng(0)
    for i, length in enumerate(rng.integers(40, 400, 256)):
        prompt = tuple(map(int, rng.integers(0, 120_000, length)))
        scheduler.add(
            Request(id=str(i), prompt=prompt, sampling=SamplingParams(max_tokens=60)), 0.0
        )
    writer = StepWriter(programs)
    sizes: list[int] = []
    num_pages: list[int] = []
    prompt_bytes = 0
    while scheduler.has_work and (plan := scheduler.plan(0.0)) is not None:
        size = writer.write(plan, 2**32 - 1).ByteSize()
        if plan.admissions:
            prompt_bytes += size
        else:
            sizes.append(size)
            num_pages.append(sum(len(new.ids) for chunk in plan.chunks for new in chunk.pages))
    assert len(sizes) > 6
    assert max(num_pages) > 64
    assert max(sizes) < MAX_BYTES
    # Every prompt token once, in at most three bytes, beside what was asked for and the decodes.
    tokens = scheduler.stats().prompt_tokens
    assert prompt_bytes < 3 * tokens + 256 * 200 + 64 * MAX_BYTES // 2


@pytest.mark.parametrize("kind", ProgramKind)
def test_the_largest_step_of_256_rows_takes_less_than_4_kb(kind: ProgramKind) -> None:
    """Every row takes a page, of a million, near the end of a context of a million tokens."""
    program = Program(kind, 1024 if kind is ProgramKind.MIXED else 256, 256)
    chunks = tuple(
        Chunk(slot, "", 999_000 + slot, 1, pages=(NewPages(0, 62_000 + slot, (1_000_000 + slot,)),))
        for slot in range(256)
    )
    plan = StepPlan(0, program, 1, chunks)
    step = StepWriter((program,)).write(plan, 2**32 - 1)
    assert 2000 < step.ByteSize() < MAX_BYTES
    rebuilt = StepReader((program,)).read(_sent(step))
    assert [chunk.pages for chunk in rebuilt.chunks] == [c.pages for c in chunks]


def test_a_missing_step_is_an_error() -> None:
    program = Program(ProgramKind.DECODE, 2, 2)
    writer, reader = StepWriter((program,)), StepReader((program,))
    plan = StepPlan(0, program, 1, (Chunk(0, "", 3, 1),))
    reader.read(writer.write(plan, 0))
    writer.write(plan, 0)
    with pytest.raises(EngineError, match="step 2 came instead of step 1"):
        reader.read(writer.write(plan, 0))


def test_all_that_a_plan_may_carry_arrives() -> None:
    """Everything but request ids, which a follower has no use for."""
    sampling = SamplingParams(max_tokens=9, presence_penalty=0.5, allowed_token_ids=(1, 2))
    asked = Request(id="a", prompt=tuple(range(20)), sampling=sampling)
    other = Request(id="b", prompt=(3, 4, 5), sampling=SamplingParams(max_tokens=4))
    programs = (Program(ProgramKind.MIXED, 16, 4), Program(ProgramKind.DECODE, 4, 4, 4))
    mixed = StepPlan(
        0,
        programs[0],
        1,
        (
            Chunk(3, "", 21, 1, pages=(NewPages(0, 0, (9, 8)), NewPages(1, 2, (70,)))),
            Chunk(1, "", 16, 3, (16, 17, 18), 0, (17, 18, 19), (NewPages(1, 0, (5, 6, 7)),)),
            Chunk(0, "", 0, 3, (3, 4, 5), 1),
        ),
        (
            Admission(3, asked, (7, 8), 21, 8, adapter=4),
            Admission(1, asked, num_computed=16),
            Admission(0, other),
        ),
        moves=(
            Move(MoveKind.OUT, 1, 2**20, 0),
            Move(MoveKind.IN, 0, 0, 9),
            Move(MoveKind.COPY, 0, 9, 8),
            Move(MoveKind.OUT, 0, 9, 1),
        ),
        masks=(MaskRow(1, bytes(range(12))), MaskRow(3, b"\xff" * 12)),
    )
    decode = StepPlan(
        1,
        programs[1],
        4,
        (
            Chunk(3, "", 0, 1, max_new=4),
            Chunk(0, "", 0, 1, max_new=2, drafts=(5, 6)),
            Chunk(1, "", 0, 1, max_new=4, pages=(NewPages(1, 3, (4,)),), drafts=(0,)),
        ),
        moves=(Move(MoveKind.COPY, 1, 3, 4),),
        masks=(MaskRow(0, bytes(12)),),
    )
    writer, reader = StepWriter(programs), StepReader(programs)
    for plan in (mixed, decode):
        assert reader.read(_sent(writer.write(plan, 0))) == plan
