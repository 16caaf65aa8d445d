"""Structured logs: one formatter for every logger of a process, to standard error."""

import datetime
import enum
import json
import logging
import os
import sys
from dataclasses import dataclass

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# Libraries that tell more of themselves at level info than an operator wants to read.
_QUIET = ("absl", "jax", "orbax", "grpc", "asyncio", "httpx", "uvicorn")


class LogFormat(enum.Enum):
    """Format of a log line: `key=value` pairs for people, JSON for machines."""

    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """Structured logging to standard error."""

    format: LogFormat = LogFormat.TEXT
    level: str = "info"  # debug, info, warning or error


class StructuredFormatter(logging.Formatter):
    """`time level logger message key=value …`, or the same as one JSON object.

    Fields come from `extra=`; a value with spaces or quotes is written as JSON. A message is one
    line whatever it holds, and control characters are escaped, since clients choose parts of it;
    the lines of a traceback are indented, so that none can pass for a message.
    """

    def __init__(self, kind: LogFormat) -> None:
        super().__init__()
        self._kind = kind

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        time = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        message = record.getMessage()
        fields = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        error = self.formatException(record.exc_info) if record.exc_info else None
        if self._kind is LogFormat.JSON:
            head = {
                "time": time,
                "level": record.levelname.lower(),
                "logger": record.name,
                "message": message,
            }
            return json.dumps(head | fields | ({"exception": error} if error else {}), default=str)
        pairs = "".join(f" {_escaped(key)}={_text(value)}" for key, value in fields.items())
        line = f"{time} {record.levelname:<7} {record.name} {_escaped(message.rstrip())}{pairs}"
        below = (f"\n  {_escaped(text)}" for text in (error or "").split("\n") if text)
        return line + "".join(below)


def configure(config: LogConfig) -> None:
    """Makes the root logger write structured lines, and nothing else write."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(StructuredFormatter(config.format))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(config.level.upper())
    logging.captureWarnings(True)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # its C core logs by itself
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def _text(value: object) -> str:
    text = str(value)
    plain = text.isprintable() and text and not any(char in text for char in " \"'=")
    return text if plain else _escaped(json.dumps(text, ensure_ascii=False))


def _escaped(text: str) -> str:
    r"""`text` with every character that a terminal or a log reader may obey written as `\x1b`."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
