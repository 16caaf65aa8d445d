"""The rate at which sequences leave the engine."""

from collections import deque


class FinishRate:
    """Moments of the latest finishes. Owned by one scheduler."""

    def __init__(self) -> None:
        self._recent_s = deque[float](maxlen=128)

    def record(self, now_s: float) -> None:
        self._recent_s.append(now_s)

    def drain_s(self, num_waiting: int, most_s: float) -> float:
        """Seconds, 1 to `most_s`, in which `num_waiting` sequences leave at the recent rate."""
        if len(self._recent_s) < 2:
            return 1.0
        span_s = self._recent_s[-1] - self._recent_s[0]
        return min(max(1.0, num_waiting * span_s / (len(self._recent_s) - 1)), most_s)
