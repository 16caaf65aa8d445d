"""What the scheduler counts."""

from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """Gauges of the present, then counters since the engine started."""

    num_waiting: int
    num_running: int  # in a slot, or with its last tokens in flight
    free_slots: int
    free_pages: int
    num_steps: int
    num_preemptions: int
    num_finished: int  # to their end; aborted and failed ones not counted
    num_aborted: int
    prompt_tokens: int  # of requests that were begun
    output_tokens: int
    recomputed_tokens: int  # computed, lost to a preemption


@dataclass(slots=True)
class Counters:
    """The counters of one scheduler, which alone changes them."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    recomputed_tokens: int = 0
    _recent_finishes_s: deque[float] = field(default_factory=lambda: deque[float](maxlen=128))

    def finished(self, now_s: float) -> None:
        """Counts a sequence that reached its end."""
        self.num_finished += 1
        self._recent_finishes_s.append(now_s)

    def snapshot(
        self, *, num_waiting: int, num_running: int, free_slots: int, free_pages: int
    ) -> SchedulerStats:
        """The counters with the given gauges."""
        return SchedulerStats(
            num_waiting=num_waiting,
            num_running=num_running,
            free_slots=free_slots,
            free_pages=free_pages,
            num_steps=self.num_steps,
            num_preemptions=self.num_preemptions,
            num_finished=self.num_finished,
            num_aborted=self.num_aborted,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            recomputed_tokens=self.recomputed_tokens,
        )

    def drain_s(self, num_waiting: int, most_s: float) -> float:
        """Seconds, 1 to `most_s`, in which `num_waiting` sequences leave at the recent rate."""
        if len(self._recent_finishes_s) < 2:
            return 1.0
        span_s = self._recent_finishes_s[-1] - self._recent_finishes_s[0]
        return min(max(1.0, num_waiting * span_s / (len(self._recent_finishes_s) - 1)), most_s)
