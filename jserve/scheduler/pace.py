"""Estimates the time of a decode step from the times of commits."""

_NEW = 0.5  # weight of the newest run: rows come and go, and the pace changes with them


class Pace:
    """A moving average of the seconds of one decode step. Owned by the scheduler."""

    def __init__(self) -> None:
        self._step_s: float | None = None
        self._last_commit_s = float("-inf")

    def committed(self, planned_s: float, now_s: float, num_steps: int) -> None:
        """Updates the average with a run of `num_steps` decode steps; 0 for a mixed step.

        The device began the run when it was planned or, if it was busy then, at the commit before.
        """
        began_s = max(planned_s, self._last_commit_s)
        self._last_commit_s = now_s
        if num_steps:
            step_s = (now_s - began_s) / num_steps
            before_s = step_s if self._step_s is None else self._step_s
            self._step_s = before_s + _NEW * (step_s - before_s)

    def steps_within(self, wait_s: float) -> int | None:
        """Most decode steps of a run so that two runs end within `wait_s`; None if unlimited.

        A request that arrives waits for two runs: one is on the device, one in flight behind it.
        """
        if not self._step_s or not wait_s:
            return None
        return max(1, int(wait_s / (2 * self._step_s)))
