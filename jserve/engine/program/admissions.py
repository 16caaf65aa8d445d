"""Sequences that take a slot, as sections of a mixed program's buffer."""

import numpy as np

from jserve.core.step import Admission
from jserve.model.sampling.history import history_rows
from jserve.model.sampling.host import host_row


def pack_admissions(
    views: dict[str, np.ndarray],
    admissions: tuple[Admission, ...],
    *,
    num_slots: int,
    vocab: int,
    eos_token_ids: tuple[int, ...],
) -> None:
    """Writes the `admit_*`, `processor_*` and `history_*` sections."""
    for name in ("admit_slot", "processor_slot", "history_slot"):
        views[name].fill(num_slots)
    processors = history = 0
    for i, admission in enumerate(admissions):
        request, last = admission.request, admission.last_token
        row = host_row(
            request.sampling,
            choice=request.choice,
            eos_token_ids=eos_token_ids,
            prompt_len=len(request.prompt),
            vocab=vocab,
        )
        views["admit_slot"][i] = admission.slot
        views["admit_prompt"][i] = len(request.prompt)
        views["admit_computed"][i] = admission.num_computed
        views["admit_last_token"][i] = 0 if last is None else last
        if admission.adapter and not views["admit_adapter"].size:
            raise ValueError(f"{request.id} wants an adapter; this engine's buffer holds none")
        views["admit_adapter"][i : i + 1] = admission.adapter
        views["admit_words"][i] = row.slot.reshape(1).view(np.int32)
        if row.processors is not None:
            records = row.processors.reshape(1)
            processors = _add_rows(views, "processor", processors, admission.slot, records)
        if admission.history_rows:
            prompt = request.prompt[: admission.num_computed]
            records = history_rows(prompt, admission.computed_output, vocab)
            history = _add_rows(views, "history", history, admission.slot, records)


def _add_rows(
    views: dict[str, np.ndarray], kind: str, used: int, slot: int, records: np.ndarray
) -> int:
    """Writes records [rows] of one slot behind the `used` rows; returns the rows used then."""
    slots, end = views[f"{kind}_slot"], used + len(records)
    if end > len(slots):
        raise ValueError(f"more than {len(slots)} {kind} rows in one step")
    slots[used:end] = slot
    views[f"{kind}_words"][used:end] = records.view(np.int32).reshape(len(records), -1)
    return end
