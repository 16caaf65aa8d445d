"""Whether an engine gets on with its work: one that hangs stands still, or says nothing."""

import enum

from jserve.proto.limits import HEARTBEAT_S

_MAX_TICK_S = 1.0  # a longer pause between two looks was this process's own


class Verdict(enum.Enum):
    """What a gateway does about an engine."""

    FINE = "fine"
    SUSPECT = "suspect"  # it gets no new work
    HUNG = "hung"  # its work is given up


class EngineWatch:
    """Counts the seconds in which an engine with work neither ended a step nor sent a message.

    Only time that this process saw pass counts, so its own stalls accuse nobody. The counts stand
    while there is no work: clients that give up early do not clear an engine. Only a step clears
    it, or a message where it was silent. Once it is suspected they go on without work, since it
    gets none. Owned by an engine client.
    """

    def __init__(self, *, suspect_s: float = 5.0, hang_s: float = 30.0) -> None:
        """A step may take less than `suspect_s`; one of `hang_s` never ends."""
        self._suspect_s = suspect_s
        self._hang_s = hang_s
        self._silence_s = 2.5 * HEARTBEAT_S  # less silence means nothing
        self.reset()

    @property
    def tick_s(self) -> float:
        """Seconds between two calls of `tick`."""
        return min(0.25, self._suspect_s / 8)

    @property
    def verdict(self) -> Verdict:
        """The verdict as of the last tick."""
        if self._exceeds(self._hang_s):
            return Verdict.HUNG
        return Verdict.SUSPECT if self._exceeds(self._suspect_s) else Verdict.FINE

    @property
    def reason(self) -> str:
        """What speaks against the engine, for people."""
        if self._silent_s >= self._silence_s:
            return f"it has sent nothing for {self._silent_s:.1f} s"
        return f"it has ended no step for {self.standing_s:.1f} s"

    def reset(self) -> None:
        """Another connection: everything counts anew."""
        self.standing_s = 0.0  # with work, and without the end of a step
        self._silent_s = 0.0
        self._num_steps: int | None = None
        self._compiling = False
        self._ticked_s: float | None = None

    def heard(self, num_steps: int, *, compiling: bool | None = None) -> None:
        """Notes a message of the engine, with the number of steps that have ended.

        While it compiles, as it last said (None: this message does not say), time does not count.
        """
        self._silent_s = 0.0
        if num_steps != self._num_steps:
            self._num_steps = num_steps
            self.standing_s = 0.0
            self._compiling = False
        if compiling is not None:
            self._compiling = compiling

    def tick(self, now_s: float, *, busy: bool) -> Verdict:
        """Counts the time since the last tick; `busy`: the engine owes something."""
        last_s, self._ticked_s = self._ticked_s, now_s
        if last_s is not None and (busy or self.verdict is not Verdict.FINE):
            passed_s = min(now_s - last_s, _MAX_TICK_S)
            self._silent_s += passed_s
            if not self._compiling:
                self.standing_s += passed_s
        return self.verdict

    def _exceeds(self, limit_s: float) -> bool:
        return self.standing_s >= limit_s or self._silent_s >= max(limit_s, self._silence_s)
