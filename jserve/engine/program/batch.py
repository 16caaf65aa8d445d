"""A plan as one int32 buffer: only what changed since the step before, sent in one transfer.

`layout` declares the sections of a program's buffer once; the host writes them by name (`pack`)
and the device reads them by name (`unpack`). Unused entries are addressed out of range, where
scatters drop them.
"""

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jserve.core.step import Admission, Chunk, Program, ProgramKind, StepPlan
from jserve.engine.program.layout import Layout
from jserve.model.sampling.host import host_row
from jserve.model.sampling.state import SLOT_ROW_WORDS, processor_row_dtype


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The static sizes that, with a program, fix its buffer."""

    num_slots: int
    vocab: int
    page_size: int
    processor_rows: int


@functools.cache
def layout(program: Program, shape: BatchShape) -> Layout:
    """The buffer of one program.

    rows: the slot of each row. For mixed programs also the tokens of prompt chunks, and the
    sequences that take a slot in this step: their sampling scalars (`admit_*`) and, for the few
    that have masks or biases, those (`processor_*`).
    """
    rows = program.rows
    # A chunk of c tokens touches at most c/page + 2 pages; summed over the rows:
    pages = rows * (program.steps // shape.page_size + 2)
    if program.kind is ProgramKind.MIXED:
        pages = program.tokens // shape.page_size + 2 * rows
    sections: dict[str, tuple[int, ...]] = {
        "num_rows": (),
        "num_steps": (),
        "row_slot": (rows,),
        "page_slot": (pages,),
        "page_index": (pages,),
        "page_id": (pages,),
    }
    if program.kind is ProgramKind.MIXED:
        sections |= {
            "num_decode": (),
            "num_tokens": (),
            "row_start": (rows,),  # absolute; of prompt rows
            "row_tokens": (rows,),
            "row_first": (rows,),  # ragged index of the row's first token
            "row_max_new": (rows,),
            "tokens": (program.tokens,),
            "token_row": (program.tokens,),
            "token_target": (program.tokens,),  # next prompt token, for its logprob
            "admit_slot": (rows,),
            "admit_prompt": (rows,),  # tokens of the prompt; those after are output
            "admit_words": (rows, SLOT_ROW_WORDS),
            "processor_slot": (shape.processor_rows,),
            "processor_words": (
                shape.processor_rows,
                processor_row_dtype(shape.vocab).itemsize // 4,
            ),
        }
    return Layout(sections)


@dataclass(frozen=True, slots=True)
class Batch:
    """A packed plan."""

    program: Program
    buffer: np.ndarray  # int32; owned by the device once submitted, never written again
    slots: np.ndarray  # [len(plan.chunks)] slot of each row
    has_targets: bool  # whether log-probabilities of prompt tokens are wanted

    @property
    def checksum(self) -> int:
        """CRC-32 of the buffer: tells whether two processes packed the same."""
        return zlib.crc32(self.buffer.data)


def pack(plan: StepPlan, shape: BatchShape, eos_token_ids: tuple[int, ...]) -> Batch:
    """Writes a plan into a fresh buffer, row by row in the order of its chunks."""
    program, chunks = plan.program, plan.chunks
    if len(chunks) > program.rows:
        raise ValueError(f"{program.name}: {len(chunks)} rows do not fit")
    parts = layout(program, shape)
    buffer = np.zeros(parts.size, np.int32)
    views = parts.views(buffer)
    views["num_rows"][...] = len(chunks)
    views["num_steps"][...] = plan.num_steps
    views["row_slot"].fill(shape.num_slots)
    slots = np.array([chunk.slot for chunk in chunks])
    views["row_slot"][: len(chunks)] = slots
    _pack_pages(views, chunks, shape)
    has_targets = False
    if program.kind is ProgramKind.MIXED:
        first = _pack_tokens(views, chunks, program)
        has_targets = _pack_targets(views, chunks, first)
        _pack_admissions(views, plan.admissions, shape, eos_token_ids)
    return Batch(program, buffer, slots, has_targets)


def _pack_pages(views: dict[str, np.ndarray], chunks: Sequence[Chunk], shape: BatchShape) -> None:
    slots: list[int] = []
    places: list[int] = []
    pages: list[int] = []
    for chunk in chunks:
        for _, first, ids in chunk.pages:
            slots += [chunk.slot] * len(ids)
            places += range(first, first + len(ids))
            pages += ids
    views["page_slot"].fill(shape.num_slots)
    for name, values in (("page_slot", slots), ("page_index", places), ("page_id", pages)):
        views[name][: len(values)] = values


def _pack_tokens(
    views: dict[str, np.ndarray], chunks: Sequence[Chunk], program: Program
) -> np.ndarray:
    counts = np.array([chunk.num_tokens for chunk in chunks])
    first = np.cumsum(counts) - counts
    if first[-1] + counts[-1] > program.tokens:
        raise ValueError(f"{program.name}: {counts.sum()} tokens do not fit")
    views["num_decode"][...] = sum(not chunk.tokens for chunk in chunks)
    views["num_tokens"][...] = counts.sum()
    rows = slice(0, len(chunks))
    views["row_start"][rows] = [chunk.start for chunk in chunks]
    views["row_tokens"][rows] = counts
    views["row_first"][rows] = first
    views["row_max_new"][rows] = [chunk.max_new for chunk in chunks]
    views["token_row"][: counts.sum()] = np.repeat(np.arange(len(chunks)), counts)
    for chunk, at in zip(chunks, first, strict=True):
        if chunk.tokens:
            views["tokens"][at : at + chunk.num_tokens] = chunk.tokens
    return first


def _pack_targets(views: dict[str, np.ndarray], chunks: Sequence[Chunk], first: np.ndarray) -> bool:
    """Writes the prompt tokens whose log-probabilities are wanted; false if there are none."""
    views["token_target"].fill(-1)
    found = False
    for chunk, at in zip(chunks, first, strict=True):
        if chunk.prompt_targets:
            found = True
            views["token_target"][at : at + len(chunk.prompt_targets)] = chunk.prompt_targets
    return found


def _pack_admissions(
    views: dict[str, np.ndarray],
    admissions: tuple[Admission, ...],
    shape: BatchShape,
    eos_token_ids: tuple[int, ...],
) -> None:
    views["admit_slot"].fill(shape.num_slots)
    views["processor_slot"].fill(shape.num_slots)
    processors = 0
    for i, admission in enumerate(admissions):
        request = admission.request
        row = host_row(
            request.sampling,
            choice=request.choice,
            eos_token_ids=eos_token_ids,
            prompt_len=len(request.prompt),
            vocab=shape.vocab,
        )
        views["admit_slot"][i] = admission.slot
        views["admit_prompt"][i] = len(request.prompt)
        views["admit_words"][i] = row.slot.reshape(1).view(np.int32)
        if row.processors is None:
            continue
        if processors == shape.processor_rows:
            raise ValueError(f"more than {shape.processor_rows} processor rows in one step")
        views["processor_slot"][processors] = admission.slot
        views["processor_words"][processors] = row.processors.reshape(1).view(np.int32)
        processors += 1
