"""Reports of an engine process to its supervisor: one JSON object a line."""

import json
import signal
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True)
class PhaseStarted:
    """The engine begins a phase of its start, for example `loading` or `compiled`."""

    phase: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class PhaseProgress:
    """A plain-text line about the running phase."""

    detail: str


@dataclass(frozen=True, slots=True)
class ModelPrepared:
    """The model's files are complete: a gateway may read its tokenizer."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine serves at `address`, `unix:…` or host:port, another one after every start.

    `summary` is shown to people, in order; `phases` are seconds.
    """

    address: str
    summary: dict[str, str] = field(default_factory=dict[str, str])
    phases: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine gives up. A config error will not go away by starting again."""

    message: str
    is_config_error: bool


EngineStatus = PhaseStarted | PhaseProgress | ModelPrepared | Ready | Failed

_KINDS: dict[str, type[EngineStatus]] = {
    cls.__name__: cls for cls in (PhaseStarted, PhaseProgress, ModelPrepared, Ready, Failed)
}


def encode(status: EngineStatus) -> bytes:
    """One line, newline included."""
    line = json.dumps({"kind": type(status).__name__, **asdict(status)}, ensure_ascii=False)
    return line.encode() + b"\n"


def decode(line: bytes) -> EngineStatus:
    """Reads what `encode` wrote. Raises ValueError for anything else."""
    try:
        fields = json.loads(line)
        return _KINDS[fields.pop("kind")](**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an engine status: {line[:200]!r}") from error


def describe_exit(code: int) -> str:
    """A process's exit code for people: `exit code 3` or `killed by SIGKILL`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
