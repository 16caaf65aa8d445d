"""Settings for restarting and stopping engine processes."""

from dataclasses import dataclass

from jserve.core.errors import ConfigError
from jserve.core.field_types import check_types


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlConfig:
    """Supervision of the engine process.

    A crashed engine is started again after `restart_delay_s`, doubled for every crash in a row up
    to `max_restart_delay_s`; an engine that served `healthy_after_s` starts the count anew.

    An engine that has work and ends no step, or says nothing, for `suspect_s` gets no more work;
    after `hang_s` its clients are told, and it is started again. Time in which it compiles does not
    count. A step of a healthy engine must take less than `suspect_s`.
    """

    stop_timeout_s: float = 5.0  # the engine process gets this long before it is killed
    restart_delay_s: float = 0.1
    max_restart_delay_s: float = 30.0
    healthy_after_s: float = 1.0
    suspect_s: float = 5.0
    hang_s: float = 30.0

    def __post_init__(self) -> None:
        check_types(self, "control.")
        if not 0 < self.suspect_s <= self.hang_s:
            raise ConfigError(
                f"control.suspect_s is {self.suspect_s} and control.hang_s {self.hang_s}; the "
                "first must be above 0 and at most the second"
            )
