"""The contract of scheduler and executor: what runs in one step, and what came of it.

A step runs one device program. Row r of the program is `plan.chunks[r]`, and:

- A slot has at most one row in a step.
- Decode rows, whose `tokens` are empty, come first; prompt chunks follow. A `decode` program has
  decode rows only and admits nobody: a sequence that starts with a decode row, because its pages
  hold all its tokens but the last, does so in a mixed program.
- The tokens of a step are ragged: the index of a row's first token is the sum of `num_tokens` of
  the rows before it.
- A row yields at most `max_new` tokens: 0 if its last token is not to be sampled from, 1 in a
  mixed program, up to `num_steps` in a decode program. It may yield fewer, even none.
- Plans run in the order of their `step_id`, which counts from 0.
- Moves run before the program, in order, and copy values: a page that is copied OUT may be given
  away in the same plan, and one that is copied IN is read by its program. A host page may be
  copied IN once a result says that it has landed, and be written again only then, too.
"""

import enum
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from jserve.core.request import Request

HISTORY_PAIRS = 512  # different output tokens with their counts in one row of history


class ProgramKind(enum.Enum):
    """The two kinds of device program."""

    MIXED = "mixed"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Program:
    """The static shape of one compiled program.

    mixed: `tokens` ragged tokens of at most `rows` slots, one step.
    decode: one token of each of `rows` slots per decode step, at most `steps` decode steps;
    a plan asks for this many or fewer, and the run ends when every row has stopped.
    """

    kind: ProgramKind
    tokens: int  # == rows for a decode program
    rows: int
    steps: int = 1  # 1 for mixed

    @property
    def name(self) -> str:
        """Name of the program, for example `mixed[256]` or `decode[32x8]`."""
        if self.kind is ProgramKind.MIXED:
            return f"mixed[{self.tokens}]"
        return f"decode[{self.rows}x{self.steps}]"


def page_entries(program: Program, page_size: int, pages_per_slot: int) -> int:
    """New pages that one plan of `program` may give out, in each page group.

    A chunk of c tokens reaches into c / page_size + 2 pages; a mixed program has as many more as
    one sequence may bring when it is admitted.
    """
    if program.kind is ProgramKind.DECODE:
        return program.rows * (program.steps // page_size + 2)
    return program.tokens // page_size + 2 * program.rows + pages_per_slot


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence takes a slot: everything the device must know of it, sent once.

    `output` are the tokens generated before a preemption; they are computed again as chunk
    tokens but count as output for penalties, limits and the sampling key.

    The pages of a sequence may hold K and V of its first `num_computed` tokens already, computed
    by another sequence or moved in. Its first chunk starts there. With `last_token`, the newest
    of `output`, its first row is a decode row that computes this token. A sequence that holds the
    slot already keeps its pages: tokens after its output did not stand, and it goes on from there.
    """

    slot: int
    request: Request
    output: tuple[int, ...] = ()
    num_computed: int = 0
    last_token: int | None = None
    adapter: int = 0  # 0 is none

    @property
    def computed_output(self) -> tuple[int, ...]:
        """The tokens of `output` that no chunk will bring."""
        if self.last_token is not None:
            return self.output
        return self.output[: max(0, self.num_computed - len(self.request.prompt))]

    @property
    def history_rows(self) -> int:
        """Processor rows, at most, for the tokens that penalties count and no chunk will bring.

        A sequence whose history exceeds the engine's processor rows is admitted with fewer
        computed tokens.
        """
        if self.num_computed == 0 or not self.request.sampling.has_penalties:
            return 0
        return max(1, -(-len(self.computed_output) // HISTORY_PAIRS))

    @property
    def processor_rows(self) -> int:
        """Processor rows of the step's batch that this admission takes."""
        return max(self.history_rows, int(self.request.sampling.has_token_rules))


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
    drafts: tuple[int, ...] = ()  # guesses at the tokens after a decode row's own


class MoveKind(enum.Enum):
    """Source and target memory of a page copy."""

    OUT = "out"  # from the device to a host page
    IN = "in"  # from a host page, which must have landed, to the device
    COPY = "copy"  # from page to page on the device


class Move(NamedTuple):
    """A copy of one page: all layers of its group."""

    kind: MoveKind
    group: int  # index of the page group
    source: int  # page id; of a host page for IN
    target: int  # page id; of a host page for OUT


class MaskRow(NamedTuple):
    """The tokens that may be the first which a slot samples in this step.

    Those that it samples in later decode steps of the same run are not masked.
    """

    slot: int
    words: bytes  # uint32, little-endian; bit i % 32 of word i // 32: token id i is allowed


def mask_words(vocab: int) -> int:
    """Words of a mask over `vocab` token ids."""
    return -(-vocab // 32)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step; the module's docstring states the rules."""

    step_id: int
    program: Program
    num_steps: int  # most decode steps: the device stops where every row has; 1 for mixed
    chunks: tuple[Chunk, ...]
    admissions: tuple[Admission, ...] = ()
    moves: tuple[Move, ...] = ()  # run before the program, in this order
    masks: tuple[MaskRow, ...] = ()


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
    """The outcome of a step, row by row of its plan. Entries past `num_new[row]` are undefined."""

    step_id: int
    tokens: np.ndarray  # [rows, steps] int32
    num_new: np.ndarray  # [rows] int32, 0 ≤ num_new ≤ max_new of the row
    finish: np.ndarray  # [rows] int32, FinishCode
    logprobs: RowLogprobs | None = None  # present when a row's request asks for logprobs
    # By ragged token, chunk after chunk: of the token's `prompt_targets` entry, [tokens, 1, …].
    prompt_logprobs: RowLogprobs | None = None
    landed: tuple[int, ...] = ()  # host pages whose copy has arrived since the result before


class Executor(Protocol):
    """Runs plans in order on a device, or in a simulation."""

    def submit(self, plan: StepPlan) -> Any:
        """Starts a step and returns at once with a handle for `collect`."""
        ...

    def collect(self, handle: Any) -> StepResult:
        """Waits for the step of `handle`, in submission order."""
        ...
