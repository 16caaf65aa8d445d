"""Calls written as JSON objects with a name and arguments."""

import json
from typing import Any

from jserve.gateway.tools.reading import NotACall, Reading, Steps
from jserve.gateway.tools.values import JSON, read_value

_ARGUMENTS = ("arguments", "parameters")


def read_json_calls(reading: Reading) -> Steps[None]:
    """Reads one call, an array of calls, or calls separated by semicolons, commas or white space.

    The first must be held; of a later one that is none, what is held begins with the separator.
    """
    yield from reading.space()
    if (yield from reading.take("[")):
        yield from reading.space()
        yield from read_json_array(reading)
        return
    yield from read_json_call(reading)
    while True:
        reading.hold()
        yield from reading.space()
        yield from reading.take(";", ",")
        yield from reading.space()
        if (yield from reading.peek()) != "{":
            return
        yield from read_json_call(reading)


def read_json_array(reading: Reading) -> Steps[None]:
    """Reads the calls of an array, after its bracket and white space, and its end."""
    yield from read_json_call(reading)
    while True:
        reading.hold()
        yield from reading.space()
        if (yield from reading.expect(",", "]")) == "]":
            reading.drop()
            return
        yield from reading.space()
        yield from read_json_call(reading)


def read_json_call(reading: Reading) -> Steps[None]:
    """Reads one object; the call begins as soon as its name and the start of its arguments are in.

    Other keys are read over. A call without arguments has the empty object.
    """
    name: str | None = None
    early: str | None = None  # arguments that came before the name
    seen = False
    yield from reading.expect("{")
    first = True
    while True:
        yield from reading.space()
        if first and (yield from reading.take("}")):
            break
        first = False
        key = yield from _read_text(reading)
        yield from reading.space()
        yield from reading.expect(":")
        yield from reading.space()
        if key == "name":
            if name is not None:
                raise NotACall
            name = yield from _read_text(reading)
            if name not in reading.tools:
                raise NotACall
            if early is not None:
                reading.begin(name)
                reading.arguments(early)
        elif key in _ARGUMENTS:
            if seen:
                raise NotACall
            seen = True
            if name is None:
                early = yield from _read_whole_arguments(reading)
            elif (yield from reading.peek()) == "{":
                reading.begin(name)
                yield from read_value(reading, JSON, reading.arguments)
            else:
                arguments = yield from _read_whole_arguments(reading)
                reading.begin(name)
                reading.arguments(arguments)
        else:
            yield from read_value(reading, JSON, _nowhere)
        yield from reading.space()
        if (yield from reading.expect(",", "}")) == "}":
            break
    if name is None:
        raise NotACall
    if not seen:
        reading.begin(name)
        reading.arguments("{}")


def _nowhere(_: str) -> None:
    pass


def _read_text(reading: Reading) -> Steps[str]:
    if (yield from reading.peek()) != '"':
        raise NotACall
    pieces: list[str] = []
    yield from read_value(reading, JSON, pieces.append)
    return json.loads("".join(pieces))


def _read_whole_arguments(reading: Reading) -> Steps[str]:
    """Reads arguments that cannot be given out as they come; returns their JSON.

    Some models write the document into a string, and null where there are none.
    """
    pieces: list[str] = []
    yield from read_value(reading, JSON, pieces.append)
    text = "".join(pieces)
    if text.startswith('"'):
        text = json.loads(text).strip() or "{}"
        if not isinstance(_loaded(text), dict):
            raise NotACall
    elif text == "null":
        return "{}"
    elif not text.startswith("{"):
        raise NotACall
    return text


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotACall from error
