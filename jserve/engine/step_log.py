"""The step log: one JSON line per committed step, for cost models and the simulator.

docs/extending.md describes the fields.
"""

import errno
import json
import logging
import os
import weakref
from pathlib import Path
from typing import NamedTuple

from jserve.core.errors import ConfigError
from jserve.core.step import ProgramKind, StepPlan, StepResult
from jserve.engine.config import EngineConfig

_log = logging.getLogger(__name__)


class StepFeatures(NamedTuple):
    """The work that a step did, on which its time depends."""

    program: str
    num_steps: int  # decode steps that ran, 0 if every row had stopped before; 1 for mixed
    decode_rows: int  # rows that decoded; one that had stopped when the step began is none
    prompt_tokens: int  # summed over the chunks
    decode_context: int  # tokens that the first decode step of each such row attends to, summed
    chunk_context: int  # tokens of a chunk × tokens that its last one attends to, summed


def features(plan: StepPlan, result: StepResult) -> StepFeatures:
    """The features of the step of `plan`, whose rows may have yielded less than planned."""
    num_new: list[int] = result.num_new.tolist()
    decode_rows = prompt_tokens = decode_context = chunk_context = 0
    for chunk, new in zip(plan.chunks, num_new, strict=False):  # rows without a chunk follow
        end = chunk.start + chunk.num_tokens
        if chunk.tokens:
            prompt_tokens += chunk.num_tokens
            chunk_context += chunk.num_tokens * end
        elif new:
            decode_rows += 1
            decode_context += end
    is_decode = plan.program.kind is ProgramKind.DECODE
    # The device stops when no row is left that goes on, so the longest row says how far it came.
    num_steps = max(num_new) if is_decode else 1
    return StepFeatures(
        plan.program.name, num_steps, decode_rows, prompt_tokens, decode_context, chunk_context
    )


class StepLog:
    """Appends to one file. Owned by the thread that commits steps.

    A write that fails, on a full disk say, is reported once and ends the log, never the engine.
    """

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if `path` cannot be opened, or is a pipe, say, that could block."""
        try:
            if path.exists() and not path.is_file():
                raise ConfigError(f"engine.step_log is {str(path)!r}, which is no regular file")
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                f"engine.step_log is {str(path)!r}, which cannot be opened: {reason}"
            ) from error
        size = os.fstat(self._file).st_size
        # A process that was killed, or a full disk, may have left a part of a line.
        self._is_torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
        self._close = weakref.finalize(self, os.close, self._file)
        self._path = path
        self._committed_s = float("-inf")  # time of the previous commit

    def write(
        self,
        plan: StepPlan,
        result: StepResult,
        *,
        planned_s: float,
        submitted_s: float,
        committed_s: float,
    ) -> None:
        """Writes the line of one committed step; times are monotonic seconds."""
        started_s = max(planned_s, self._committed_s)
        self._committed_s = committed_s
        if not self._close.alive:
            return
        line = {
            "step": plan.step_id,
            **features(plan, result)._asdict(),
            "output_tokens": int(result.num_new[: len(plan.chunks)].sum()),
            "planned_s": planned_s,
            "submitted_s": submitted_s,
            "started_s": started_s,
            "committed_s": committed_s,
        }
        try:
            self._append(json.dumps(line).encode() + b"\n")
        except OSError as error:
            self.close()
            _log.warning("the step log %s ends here: %s", self._path, error.strerror)

    def close(self) -> None:
        """Ends the log: later steps are not written. A log nobody closed ends with its process."""
        self._close()

    def _append(self, line: bytes) -> None:
        if self._is_torn:
            line = b"\n" + line
        written = os.write(self._file, line)
        if written != len(line):
            end = os.lseek(self._file, 0, os.SEEK_CUR)
            if end == os.fstat(self._file).st_size:  # or another process has appended meanwhile
                os.ftruncate(self._file, end - written)
            raise OSError(errno.ENOSPC, "only a part of a line was written")
        self._is_torn = False


def open_step_log(config: EngineConfig) -> StepLog | None:
    """The log that `config` asks for. Raises ConfigError if its file cannot be opened."""
    if config.step_log is None:
        return None
    if not config.step_log:
        raise ConfigError("engine.step_log is empty; name a file, or write None for no log")
    try:
        path = Path(config.step_log).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"engine.step_log is {config.step_log!r}, whose home folder is not known"
        ) from error
    return StepLog(path)
