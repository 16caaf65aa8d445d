"""A plan as one int32 buffer: only what changed since the step before, sent in one transfer.

`layout` declares the sections of a program's buffer once; the host writes them by name (`pack`)
and the device reads them by name (`unpack`). Unused entries are addressed out of range, where
scatters drop them.
"""

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from jserve.core.step import (
    Chunk,
    Move,
    Program,
    ProgramKind,
    StepPlan,
    mask_words,
    page_entries,
)
from jserve.engine.program.admissions import pack_admissions
from jserve.engine.program.layout import Layout
from jserve.model.sampling.history import history_row_dtype
from jserve.model.sampling.state import SLOT_ROW_WORDS, processor_row_dtype


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The static sizes that, with a program, fix its buffer."""

    num_slots: int
    vocab: int
    page_size: int
    processor_rows: int
    pages_per_slot: int
    page_groups: int = 1
    # Sections of width 0 take no room in the buffer.
    history_rows: int = 0  # rows of `history_*` in one step
    # No program reads the following sections yet: `make_step` refuses a shape that has one of them,
    # or several page groups.
    has_adapters: bool = False
    decode_tokens: int = 1  # that a decode row computes: its last token and drafts after it

    @property
    def masks(self) -> tuple[int, int]:
        """The shape of a step's masks: [slots, words]. They do not travel with the buffer.

        Most steps have none, and all masks together are larger than all else that is sent.
        """
        return self.num_slots, mask_words(self.vocab)


@functools.cache
def layout(program: Program, shape: BatchShape) -> Layout:
    """The buffer of one program.

    Mixed programs have the tokens of prompt chunks in addition, and the sequences that take a slot
    in this step: their sampling scalars (`admit_*`) and, for the few that need them, masks and
    biases (`processor_*`) and the counts of tokens that no chunk brings (`history_*`).
    """
    rows = program.rows
    pages = (shape.page_groups, page_entries(program, shape.page_size, shape.pages_per_slot))
    sections: dict[str, tuple[int, ...]] = {
        "num_rows": (),
        "num_steps": (),
        "row_slot": (rows,),
        "page_slot": pages,
        "page_index": pages,
        "page_id": pages,
        "num_masks": (),
        "mask_slot": (shape.num_slots,),  # of each row of the masks
        "row_num_drafts": (rows * (shape.decode_tokens > 1),),
        "row_drafts": (rows, shape.decode_tokens - 1),
    }
    if program.kind is ProgramKind.DECODE:
        sections["row_limit"] = (rows,)  # tokens that the row yields at most
    else:
        processors, vocab = shape.processor_rows, shape.vocab
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
            "admit_computed": (rows,),  # tokens whose K and V are in the pages
            "admit_last_token": (rows,),
            "admit_adapter": (rows * shape.has_adapters,),
            "admit_words": (rows, SLOT_ROW_WORDS),
            "processor_slot": (processors,),
            "processor_words": (processors, processor_row_dtype(vocab).itemsize // 4),
            "history_slot": (shape.history_rows,),
            "history_words": (shape.history_rows, history_row_dtype(vocab).itemsize // 4),
        }
    return Layout(sections)


@dataclass(frozen=True, slots=True)
class Batch:
    """A packed plan."""

    program: Program
    # Both are owned by the device once submitted, and never written again.
    buffer: np.ndarray  # int32
    masks: np.ndarray | None  # [slots, words] int32, the first `num_masks` rows; None: no masks
    slots: np.ndarray  # [len(plan.chunks)] slot of each row
    has_targets: bool  # whether log-probabilities of prompt tokens are wanted
    moves: tuple[Move, ...]

    @property
    def checksum(self) -> int:
        """CRC-32 of buffer, masks and moves: tells whether two processes packed the same."""
        masks = b"" if self.masks is None else self.masks.data
        return zlib.crc32(
            repr(self.moves).encode(), zlib.crc32(masks, zlib.crc32(self.buffer.data))
        )


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
    masks = _pack_masks(views, plan, shape)
    if any(map(_drafts, chunks)):
        _pack_drafts(views, chunks, shape)
    has_targets = False
    if program.kind is ProgramKind.DECODE:
        views["row_limit"][: len(chunks)] = [chunk.max_new for chunk in chunks]
    else:
        first = _pack_tokens(views, chunks, program)
        has_targets = _pack_targets(views, chunks, first)
        pack_admissions(
            views,
            plan.admissions,
            num_slots=shape.num_slots,
            vocab=shape.vocab,
            eos_token_ids=eos_token_ids,
        )
    return Batch(program, buffer, masks, slots, has_targets, plan.moves)


def _pack_pages(views: dict[str, np.ndarray], chunks: Sequence[Chunk], shape: BatchShape) -> None:
    grown: list[tuple[list[int], list[int], list[int]]] = [
        ([], [], []) for _ in range(shape.page_groups)
    ]
    for chunk in chunks:
        for group, first, ids in chunk.pages:
            slots, places, pages = grown[group]
            slots += [chunk.slot] * len(ids)
            places += range(first, first + len(ids))
            pages += ids
    views["page_slot"].fill(shape.num_slots)
    room = views["page_slot"].shape[1]
    for group, columns in enumerate(grown):
        count = len(columns[0])
        if count > room:
            raise ValueError(f"{count} new pages in one step; the buffer holds {room}")
        for name, values in zip(("page_slot", "page_index", "page_id"), columns, strict=True):
            views[name][group, :count] = values


def _pack_masks(
    views: dict[str, np.ndarray], plan: StepPlan, shape: BatchShape
) -> np.ndarray | None:
    if not plan.masks:
        return None
    if len(plan.masks) > shape.num_slots:
        raise ValueError(f"{len(plan.masks)} masks in one step; there are {shape.num_slots} slots")
    masks = np.zeros(shape.masks, np.int32)
    views["num_masks"][...] = len(plan.masks)
    for i, (slot, words) in enumerate(plan.masks):
        views["mask_slot"][i] = slot
        masks[i] = np.frombuffer(words, "<i4")
    return masks


_drafts = attrgetter("drafts")  # runs for every row of every step


def _pack_drafts(views: dict[str, np.ndarray], chunks: Sequence[Chunk], shape: BatchShape) -> None:
    most = shape.decode_tokens - 1
    for row, chunk in enumerate(chunks):
        if count := len(chunk.drafts):
            if count > most:
                raise ValueError(f"{count} drafts in a row; the buffer holds {most}")
            views["row_num_drafts"][row] = count
            views["row_drafts"][row, :count] = chunk.drafts


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
