"""Plans between the processes of one engine: tokens once, at admission, then only what changes.

A writer and a reader go together: both see every step, in order.
"""

from collections.abc import Sequence
from itertools import repeat
from typing import NamedTuple

from jserve.core.errors import EngineError
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
from jserve.proto import group_pb2
from jserve.proto.convert import request_from_proto, request_to_proto


class StepWriter:
    """The leader's end. Owns the count of steps."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self._programs = {program: index for index, program in enumerate(programs)}
        self._number = 0

    def write(self, plan: StepPlan, checksum: int) -> group_pb2.Step:
        """The next step; `checksum` is of the buffer that the plan packs to, 32 bits."""
        chunks = plan.chunks
        step = group_pb2.Step(
            number=self._number,
            checksum=checksum,
            program=self._programs[plan.program],
            num_steps=plan.num_steps,
            slots=[chunk.slot for chunk in chunks],
        )
        self._number += 1
        if plan.program.kind is ProgramKind.MIXED:
            step.starts.extend([chunk.start for chunk in chunks])
            _write_chunks(step, chunks)
            step.admissions.extend(map(_write_admission, plan.admissions))
        limited = [row for row, chunk in enumerate(chunks) if chunk.max_new != plan.num_steps]
        step.limit_rows.extend(limited)
        step.limits.extend([chunks[row].max_new for row in limited])
        _write_pages(step, chunks)
        _write_drafts(step, chunks)
        step.moves.extend(map(_write_move, plan.moves))
        step.masks.extend(group_pb2.StepMask(slot=slot, words=words) for slot, words in plan.masks)
        return step


class StepReader:
    """A follower's end. Owns the contexts of the slots: at most one context a slot."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self._programs = tuple(programs)
        self._number = 0
        self._contexts: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}  # prompt, all

    def read(self, step: group_pb2.Step) -> StepPlan:
        """The plan of `step` without request ids and the starts of a decode program's rows.

        Raises EngineError for a step out of order.
        """
        if step.number != self._number:
            raise EngineError(f"step {step.number} came instead of step {self._number}")
        self._number += 1
        admissions = tuple(map(_read_admission, step.admissions))
        for admission in admissions:
            prompt = admission.request.prompt
            self._contexts[admission.slot] = (prompt, prompt + admission.output)
        rows = len(step.slots)
        columns = _Columns(
            slots=list(step.slots),
            starts=list(step.starts) or [0] * rows,
            num_tokens=[1] * rows,
            tokens=[()] * rows,
            max_new=[step.num_steps] * rows,
            prompt_targets=[()] * rows,
            pages=[()] * rows,
            drafts=[()] * rows,
        )
        self._read_chunks(step, columns)
        for row, limit in zip(step.limit_rows, step.limits, strict=True):
            columns.max_new[row] = limit
        _read_pages(step, columns)
        _read_drafts(step, columns)
        return StepPlan(
            step_id=step.number,
            program=self._programs[step.program],
            num_steps=step.num_steps,
            chunks=columns.chunks(),
            admissions=admissions,
            moves=tuple(map(_read_move, step.moves)),
            masks=tuple(MaskRow(mask.slot, mask.words) for mask in step.masks),
        )

    def _read_chunks(self, step: group_pb2.Step, columns: "_Columns") -> None:
        for row, num_tokens, targets in zip(
            step.chunk_rows, step.chunk_tokens, step.chunk_targets, strict=True
        ):
            start = columns.starts[row]
            end = start + num_tokens
            prompt, context = self._contexts[columns.slots[row]]
            columns.num_tokens[row] = num_tokens
            columns.tokens[row] = context[start:end]
            if targets:
                columns.prompt_targets[row] = prompt[start + 1 : end + 1]


class _Columns(NamedTuple):
    """The fields of the chunks that are read, row by row."""

    slots: list[int]
    starts: list[int]
    num_tokens: list[int]
    tokens: list[tuple[int, ...]]
    max_new: list[int]
    prompt_targets: list[tuple[int, ...]]
    pages: list[tuple[NewPages, ...]]
    drafts: list[tuple[int, ...]]

    def chunks(self) -> tuple[Chunk, ...]:
        slots, *others = self
        return tuple(map(Chunk._make, zip(slots, repeat(""), *others, strict=False)))


def _write_chunks(step: group_pb2.Step, chunks: Sequence[Chunk]) -> None:
    for row, chunk in enumerate(chunks):
        if chunk.tokens:
            step.chunk_rows.append(row)
            step.chunk_tokens.append(chunk.num_tokens)
            step.chunk_targets.append(bool(chunk.prompt_targets))


def _write_pages(step: group_pb2.Step, chunks: Sequence[Chunk]) -> None:
    for row, chunk in enumerate(chunks):
        for group, first, ids in chunk.pages:
            step.page_rows.append(row)
            step.page_groups.append(group)
            step.page_firsts.append(first)
            step.page_counts.append(len(ids))
            step.page_ids.extend(ids)
    if not any(step.page_groups):
        del step.page_groups[:]


def _read_pages(step: group_pb2.Step, columns: _Columns) -> None:
    ids, taken = tuple(step.page_ids), 0
    groups = step.page_groups or repeat(0, len(step.page_rows))
    for row, group, first, count in zip(
        step.page_rows, groups, step.page_firsts, step.page_counts, strict=True
    ):
        columns.pages[row] += (NewPages(group, first, ids[taken : taken + count]),)
        taken += count


def _write_drafts(step: group_pb2.Step, chunks: Sequence[Chunk]) -> None:
    for row, chunk in enumerate(chunks):
        if chunk.drafts:
            step.draft_rows.append(row)
            step.draft_counts.append(len(chunk.drafts))
            step.drafts.extend(chunk.drafts)


def _read_drafts(step: group_pb2.Step, columns: _Columns) -> None:
    drafts, taken = tuple(step.drafts), 0
    for row, count in zip(step.draft_rows, step.draft_counts, strict=True):
        columns.drafts[row] = drafts[taken : taken + count]
        taken += count


_MOVE_KINDS = {
    MoveKind.OUT: group_pb2.StepMove.OUT,
    MoveKind.IN: group_pb2.StepMove.IN,
    MoveKind.COPY: group_pb2.StepMove.COPY,
}
_MOVE_KIND_OF = {number: kind for kind, number in _MOVE_KINDS.items()}


def _write_move(move: Move) -> group_pb2.StepMove:
    kind, group, source, target = move
    return group_pb2.StepMove(kind=_MOVE_KINDS[kind], group=group, source=source, target=target)


def _read_move(message: group_pb2.StepMove) -> Move:
    return Move(_MOVE_KIND_OF[message.kind], message.group, message.source, message.target)


def _write_admission(admission: Admission) -> group_pb2.StepAdmission:
    return group_pb2.StepAdmission(
        slot=admission.slot,
        request=request_to_proto(admission.request),
        output=admission.output,
        num_computed=admission.num_computed,
        last_token=admission.last_token,
        adapter=admission.adapter,
    )


def _read_admission(message: group_pb2.StepAdmission) -> Admission:
    return Admission(
        message.slot,
        request_from_proto(message.request),
        tuple(message.output),
        message.num_computed,
        message.last_token if message.HasField("last_token") else None,
        message.adapter,
    )
