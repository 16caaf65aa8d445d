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
