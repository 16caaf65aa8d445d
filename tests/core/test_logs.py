"""Log lines as people and machines read them."""

import json
import logging
import sys

import pytest

from jserve.core.logs import LogFormat, StructuredFormatter


def _record(message: str, **extra: object) -> logging.LogRecord:
    record = logging.makeLogRecord(
        {"name": "jserve.test", "levelname": "INFO", "levelno": 20, "msg": message, "created": 0.25}
    )
    vars(record).update(extra)
    return record


def test_text_line_has_fields_as_pairs() -> None:
    line = StructuredFormatter(LogFormat.TEXT).format(
        _record("request done", id="a b", tokens=3, empty="", quote='"')
    )
    assert line == (
        "1970-01-01T00:00:00.250Z INFO    jserve.test request done "
        'id="a b" tokens=3 empty="" quote="\\""'
    )


def test_json_line_is_one_object() -> None:
    line = StructuredFormatter(LogFormat.JSON).format(_record("two\nlines", tokens=3))
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:00.250Z",
        "level": "info",
        "logger": "jserve.test",
        "message": "two\nlines",
        "tokens": 3,
    }


@pytest.mark.parametrize("kind", LogFormat)
def test_exception_is_kept(kind: LogFormat) -> None:
    try:
        raise ValueError("deep reason")
    except ValueError:
        line = StructuredFormatter(kind).format(_record("failed", exc_info=sys.exc_info()))
    assert "deep reason" in line
    assert "Traceback" in line


FORGED = "2026-01-01T00:00:00.000Z ERROR   root FORGED"
# Line feeds of every kind, escape sequences (also of one byte), a right-to-left override.
CONTROLS = "\n \r \x00 \x1b[2J \x7f \x85 \x9b2J \u2028 \u2029 \u202e \ufeff \t".split(" ")


@pytest.mark.parametrize("kind", LogFormat)
@pytest.mark.parametrize("control", CONTROLS)
def test_no_value_forges_a_line_or_reaches_the_terminal(kind: LogFormat, control: str) -> None:
    text = f"/{control}{FORGED}"
    record = _record("GET %s", args=(text,), path=text, nested=(text,))
    vars(record)["key" + control] = 1
    line = StructuredFormatter(kind).format(record)
    assert line.isprintable()
    assert line.count("FORGED") == 3
    if kind is LogFormat.JSON:
        assert json.loads(line)["message"] == f"GET {text}"


@pytest.mark.parametrize("kind", LogFormat)
def test_an_exception_forges_no_line(kind: LogFormat) -> None:
    try:
        raise ValueError(f"bad\n{FORGED}\x1b[2J\r{FORGED}\u2028")
    except ValueError:
        lines = StructuredFormatter(kind).format(_record("failed", exc_info=sys.exc_info()))
    first, *rest = lines.splitlines()
    assert first.startswith(("1970-01-01T", '{"time": "1970-01-01T'))
    assert all(line.startswith("  ") for line in rest)
    assert "\x1b" not in lines


def test_a_message_of_several_lines_is_one() -> None:
    line = StructuredFormatter(LogFormat.TEXT).format(_record("warning: a\n  b()\n"))
    assert line.endswith("jserve.test warning: a\\n  b()")
    line = StructuredFormatter(LogFormat.TEXT).format(_record("Grüße 你好 👍", name2="ü"))
    assert line.endswith("Grüße 你好 👍 name2=ü")
