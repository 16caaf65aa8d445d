"""The settings of the scheduler. Plain data."""

from dataclasses import dataclass

from jserve.core.errors import ConfigError
from jserve.core.field_types import check_types


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Settings that divide an engine's steps; capacities (slots, pages) are in `EngineConfig`.

    Raises:
        ConfigError: a value is out of range.
    """

    max_queue: int = 1024  # waiting sequences; beyond it requests are refused
    # Tokens of a mixed step, decodes included. It bounds the time between two tokens of a stream
    # while prompts are computed. None: as many as the largest mixed program holds.
    step_tokens: int | None = None
    # Most decode steps of one run. None: as many as the program holds.
    decode_steps: int | None = None
    # The same beside sequences whose next token waits for a mask: each result brings one of theirs.
    bound_decode_steps: int = 2
    # Longest time that a new request should wait for decode runs in flight. It limits the steps of
    # a run by the measured pace of earlier runs, so the first run may take longer. 0: no limit.
    decode_wait_s: float = 0.25
    # Prompts that may be half computed at once. 1 finishes each prompt before the next is begun;
    # a larger number lets short prompts pass a long one that came first.
    max_partial_prefills: int = 1
    # Pages that must stay free per running sequence when another is admitted. Without them, a
    # sequence could be admitted only to be preempted, and computed again, a few tokens later.
    headroom_pages: int = 1
    # Sequences that may be admitted before one that waits for a page which another is computing.
    max_overtakes: int = 8
    max_retry_after_s: float = 30.0  # longest wait that a refused client is told

    def __post_init__(self) -> None:
        check_types(self, "scheduler.")  # or the comparisons would fail without the name
        _at_least("max_queue", self.max_queue, 1)
        _at_least("step_tokens", self.step_tokens, 1)
        _at_least("decode_steps", self.decode_steps, 1)
        _at_least("bound_decode_steps", self.bound_decode_steps, 1)
        _at_least("decode_wait_s", self.decode_wait_s, 0)
        _at_least("max_partial_prefills", self.max_partial_prefills, 1)
        _at_least("headroom_pages", self.headroom_pages, 0)
        _at_least("max_overtakes", self.max_overtakes, 0)
        _at_least("max_retry_after_s", self.max_retry_after_s, 1)


def _at_least(name: str, value: float | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(f"scheduler.{name} is {value}; it must be at least {least}")
