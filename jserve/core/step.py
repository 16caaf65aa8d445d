"""The contract of scheduler and executor: what runs in one step, and what came of it.

A step runs one device program. Row r of the program is `plan.chunks[r]`, and:

- A slot has at most one row in a step.
- Decode rows, whose `tokens` are empty, come first; prompt chunks follow. A `decode` program has
  decode rows only and admits nobody.
- The tokens of a step are ragged: the index of a row's first token is the sum of `num_tokens` of
  the rows before it.
- A row yields at most `max_new` tokens: 0 if its last token is not to be sampled from, 1 in a
  mixed program, up to `num_steps` in a decode program. It may yield fewer, even none.
- Plans run in the order of their `step_id`, which counts from 0.
"""

import enum
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from jserve.core.request import Request


class ProgramKind(enum.Enum):
    """The two kinds of device program."""

    MIXED = "mixed"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Program:
    """The static shape of one compiled program.

    mixed: `tokens` ragged tokens of at most `rows` slots, one step.
    decode: one token of each of `rows` slots per decode step, at most `steps` decode steps;
    the number really run is an input.
    """

    kind: ProgramKind
    tokens: int  # == rows for a decode program
    rows: int
    steps: int = 1  # 1 for mixed

    @property
    def name(self) -> str:
        """For example `mixed[256]` or `decode[32x8]`."""
        if self.kind is ProgramKind.MIXED:
            return f"mixed[{self.tokens}]"
        return f"decode[{self.rows}x{self.steps}]"


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence takes a slot: everything the device must know of it, sent once.

    `output` are the tokens generated before a preemption; they are computed again as chunk
    tokens but count as output for penalties, limits and the sampling key.
    """

    slot: int
    request: Request
    output: tuple[int, ...] = ()


class NewPages(NamedTuple):
    """Pages appended to a slot's page table of one page group."""

    group: int  # index of the page group
    first: int  # index in the slot's page table of ids[0]
    ids: tuple[int, ...]


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence in one step. A tuple: each step makes one per row.

    `tokens` is empty for a decode row: its one token is the slot's last token, on the device.
    """

    slot: int
    request_id: str
    start: int  # absolute position of the first token
    num_tokens: int  # 1 for a decode row of any program
    tokens: tuple[int, ...] = ()
    max_new: int = 1  # the most tokens that the row may yield
    # The prompt token after each token, where their log-probabilities are asked for; the
    # prompt's last token has none.
    prompt_targets: tuple[int, ...] = ()
    pages: tuple[NewPages, ...] = ()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step; the module's docstring states the rules."""

    step_id: int
    program: Program
    num_steps: int  # decode steps really run; 1 for mixed
    chunks: tuple[Chunk, ...]
    admissions: tuple[Admission, ...] = ()


class FinishCode(enum.IntEnum):
    """The device's verdict on a row."""

    RUNNING = 0
    STOP = 1
    LENGTH = 2


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Raw log-probabilities of sampled tokens; see `TokenLogprobs`."""

    token: np.ndarray  # [rows, steps] float32
    rank: np.ndarray  # [rows, steps] int32, from 1
    top_ids: np.ndarray  # [rows, steps, MAX_LOGPROBS] int32
    top: np.ndarray  # [rows, steps, MAX_LOGPROBS] float32


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced, row by row of its plan. Entries past `num_new[row]` mean nothing."""

    step_id: int
    tokens: np.ndarray  # [rows, steps] int32
    num_new: np.ndarray  # [rows] int32, 0 ≤ num_new ≤ max_new of the row
    finish: np.ndarray  # [rows] int32, FinishCode
    logprobs: RowLogprobs | None = None  # present when a row's request asks for logprobs
    # By ragged token, chunk after chunk: of the token's `prompt_targets` entry, [tokens, 1, …].
    prompt_logprobs: RowLogprobs | None = None


class Executor(Protocol):
    """Runs plans in order on a device, or in a simulation."""

    def submit(self, plan: StepPlan) -> Any:
        """Starts a step and returns at once with a handle for `collect`."""
        ...

    def collect(self, handle: Any) -> StepResult:
        """Waits for the step of `handle`, in submission order."""
        ...
