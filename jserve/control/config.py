"""Settings for restarting and stopping engine processes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlConfig:
    """Supervision of the engine process.

    A crashed engine is started again after `restart_delay_s`, doubled for every crash in a row up
    to `max_restart_delay_s`; an engine that served `healthy_after_s` starts the count anew.
    """

    stop_timeout_s: float = 5.0  # the engine process gets this long before it is killed
    restart_delay_s: float = 0.5
    max_restart_delay_s: float = 30.0
    healthy_after_s: float = 60.0
