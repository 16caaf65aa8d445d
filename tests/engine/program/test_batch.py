"""Sections of the batch that no program reads yet, and the bounds of the others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jserve.core.request import Request, SamplingParams
from jserve.core.step import (
    Admission,
    Chunk,
    MaskRow,
    NewPages,
    Program,
    ProgramKind,
    StepPlan,
    page_entries,
)
from jserve.engine.program.batch import BatchShape, layout, pack
from jserve.engine.program.layout import result_layout
from jserve.engine.program.step import make_step
from jserve.model.functional import Model
from jserve.model.sharding import device_mesh
from tests.engine.engine_harness import TINY

MIXED, DECODE = Program(ProgramKind.MIXED, 16, 4), Program(ProgramKind.DECODE, 4, 4, 8)
PLAIN = BatchShape(num_slots=4, vocab=70, page_size=4, processor_rows=2, pages_per_slot=30)
WITH_HISTORY = dataclasses.replace(PLAIN, history_rows=2)
TWO_GROUPS = dataclasses.replace(PLAIN, page_groups=2)
RICH = dataclasses.replace(
    TWO_GROUPS,
    has_adapters=True,
    decode_tokens=4,
)
LATER = (
    "row_num_drafts",
    "row_drafts",
    "admit_adapter",
    "history_slot",
    "history_words",
)


def views(plan: StepPlan, shape: BatchShape) -> dict[str, np.ndarray]:
    return layout(plan.program, shape).views(pack(plan, shape, ()).buffer)


@pytest.mark.parametrize("program", [MIXED, DECODE])
def test_sections_of_no_width_take_no_room(program: Program) -> None:
    parts = layout(program, PLAIN)
    assert {name: parts[name].stop - parts[name].start for name in LATER if name in parts} == (
        dict.fromkeys((name for name in LATER if name in parts), 0)
    )
    assert ("admit_adapter" in parts) == (program is MIXED)


def test_what_is_declared_packs_in_both_kinds_of_program() -> None:
    chunks = (
        Chunk(2, "a", 9, 1, max_new=1, pages=(NewPages(1, 3, (5, 6)),), drafts=(7, 8)),
        Chunk(0, "b", 4, 1, max_new=1, pages=(NewPages(0, 1, (9,)), NewPages(1, 1, (3,)))),
    )
    words = np.array([[2**32 - 1, 1, 0], [0, 5, 6]], "<u4")
    masks = (MaskRow(2, words[0].tobytes()), MaskRow(0, words[1].tobytes()))
    asked = Request(id="b", prompt=(1, 2, 3, 4), sampling=SamplingParams(max_tokens=9))
    admission = Admission(0, asked, (6,), 4, 6, adapter=3)
    for plan in (
        StepPlan(0, DECODE, 2, (chunks[0]._replace(max_new=2), chunks[1]), masks=masks),
        StepPlan(0, MIXED, 1, chunks, (admission,), masks=masks),
    ):
        found = views(plan, RICH)
        assert found["num_masks"] == 2
        assert found["mask_slot"].tolist() == [2, 0, 0, 0]
        sent = pack(plan, RICH, ()).masks
        assert sent is not None
        assert sent.tolist() == [[-1, 1, 0], [0, 5, 6], [0, 0, 0], [0, 0, 0]]
        if plan.program is DECODE:
            assert found["row_limit"].tolist() == [2, 1, 0, 0]
        assert found["row_num_drafts"].tolist() == [2, 0, 0, 0]
        assert found["row_drafts"][:2].tolist() == [[7, 8, 0], [0, 0, 0]]
        assert found["page_slot"][:, :4].tolist() == [[0, 4, 4, 4], [2, 2, 0, 4]]
        assert found["page_index"][:, :3].tolist() == [[1, 0, 0], [3, 4, 1]]
        assert found["page_id"][:, :3].tolist() == [[9, 0, 0], [5, 6, 3]]
        if plan.program is MIXED:
            assert found["admit_adapter"].tolist() == [3, 0, 0, 0]
            assert found["admit_computed"].tolist() == [4, 0, 0, 0]
            assert found["admit_last_token"].tolist() == [6, 0, 0, 0]
        assert pack(dataclasses.replace(plan, masks=()), RICH, ()).masks is None
        five = (*masks, *masks, masks[0])
        with pytest.raises(ValueError, match="5 masks in one step; there are 4 slots"):
            pack(dataclasses.replace(plan, masks=five), RICH, ())
        with pytest.raises(ValueError, match="2 drafts in a row; the buffer holds 0"):
            pack(plan, TWO_GROUPS, ())


@pytest.mark.parametrize("program", [MIXED, DECODE])
@pytest.mark.parametrize(
    "feature",
    [
        {"has_adapters": True},
        {"decode_tokens": 4},
        {"page_groups": 2},
    ],
    ids=lambda feature: next(iter(feature)),
)
def test_a_program_refuses_a_feature_that_it_does_not_read(
    program: Program, feature: dict[str, int]
) -> None:
    mesh = device_mesh(jax.devices()[:1], model=1)
    model = Model(TINY, jnp.float32)
    make_step(model, mesh, program, PLAIN)
    with pytest.raises(ValueError, match=f"do not implement {next(iter(feature))} of"):
        make_step(model, mesh, program, dataclasses.replace(PLAIN, **feature))


def test_a_result_of_another_shape_than_declared_is_refused() -> None:
    parts = result_layout(DECODE)
    values = parts.zeros()
    assert parts.pack(values).shape == (parts.size,)
    with pytest.raises(ValueError, match=r"tokens has shape \(8, 4\), not \(4, 8\)"):
        parts.pack(values | {"tokens": values["tokens"].T})


def test_an_adapter_that_the_buffer_has_no_room_for_is_refused() -> None:
    asked = Request(id="b", prompt=(1, 2), sampling=SamplingParams(max_tokens=9))
    chunk = Chunk(0, "b", 0, 2, (1, 2), pages=(NewPages(0, 0, (9,)),))
    plan = StepPlan(0, MIXED, 1, (chunk,), (Admission(0, asked, adapter=3),))
    with pytest.raises(ValueError, match="b wants an adapter"):
        pack(plan, PLAIN, ())


def test_a_result_holds_every_token_of_a_decode_step() -> None:
    assert result_layout(DECODE, 4)["tokens"].shape == (4, 32)
    assert result_layout(DECODE)["tokens"].shape == (4, 8)


def test_new_pages_of_a_long_start_fit() -> None:
    """A sequence may bring a whole page table, beside the pages that the step's chunks need."""
    entries = page_entries(MIXED, PLAIN.page_size, PLAIN.pages_per_slot)
    assert entries == 16 // 4 + 2 * 4 + 30
    assert page_entries(DECODE, PLAIN.page_size, PLAIN.pages_per_slot) == 4 * (8 // 4 + 2)
    chunk = Chunk(0, "a", 0, 1, (1,), pages=(NewPages(0, 0, tuple(range(1, entries + 1))),))
    asked = Request(id="a", prompt=(1,), sampling=SamplingParams(max_tokens=1))
    found = views(StepPlan(0, MIXED, 1, (chunk,), (Admission(0, asked),)), PLAIN)
    assert found["page_id"][0].tolist() == list(range(1, entries + 1))
    more = chunk._replace(pages=(NewPages(0, 0, tuple(range(1, entries + 2))),))
    with pytest.raises(ValueError, match="43 new pages in one step; the buffer holds 42"):
        pack(StepPlan(0, MIXED, 1, (more,), (Admission(0, asked),)), PLAIN, ())


def test_rows_of_history_are_bounded_as_those_of_masks_are() -> None:
    asked = Request(
        id="a",
        prompt=(1, 69),
        sampling=SamplingParams(max_tokens=9, frequency_penalty=0.1, bad_token_ids=(3,)),
    )
    chunks = tuple(Chunk(slot, "a", 3, 1, (5,)) for slot in range(3))
    admissions = tuple(Admission(slot, asked, (6, 6, 5), num_computed=4) for slot in range(3))
    found = views(StepPlan(0, MIXED, 1, chunks[:2], admissions[:2]), WITH_HISTORY)
    assert found["history_slot"].tolist() == [0, 1]
    assert found["processor_slot"].tolist() == [0, 1]
    words = found["history_words"][1]
    assert words[:3].tolist() == [1 << 1, 0, 1 << (69 - 64)]
    assert words[3:5].tolist() == [6, 70]  # the tokens before the chunk, then unused entries
    assert words[3 + 512 : 3 + 514].tolist() == [2, 0]
    with pytest.raises(ValueError, match="more than 2 processor rows"):
        pack(StepPlan(0, MIXED, 1, chunks, admissions), WITH_HISTORY, ())
    with pytest.raises(ValueError, match="more than 0 history rows"):
        pack(StepPlan(0, MIXED, 1, chunks[:2], admissions[:2]), PLAIN, ())
