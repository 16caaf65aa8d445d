"""Input items of the Responses API: checked, and in the form in which they are stored and listed.

Every item gets an id and a type. Texts become lists of parts.
"""

import secrets
from collections.abc import Callable
from typing import Any, TypeAlias

import orjson

from jserve.core.errors import RequestError
from jserve.gateway.http.fields import Fields, wrong_type

Item: TypeAlias = dict[str, Any]
Reader: TypeAlias = Callable[[Fields], Item]

REFERENCE = "item_reference"

_MAX_ID_CHARS = 128
_PARTS_PER_ITEM = 4  # on average; more would only take time
_ROLES = ("user", "assistant", "system", "developer")
_STATUSES = ("in_progress", "completed", "incomplete")
# Fields of answers, which clients send back with the item. They say nothing to a template.
_REPLAYED = (
    *("annotations", "async", "caller", "created_by", "encrypted_content", "logprobs"),
    *("namespace", "parsed", "parsed_arguments", "phase", "prompt_cache_breakpoint"),
)
# Types of a part that is text, and the field that holds it.
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}


def new_id(prefix: str) -> str:
    """Makes an id of a response or an item, as OpenAI's API has them."""
    return f"{prefix}_{secrets.token_hex(24)}"


def read_input(value: Any, *, most: int, ignored: list[str] | None) -> tuple[Item, ...]:
    """Reads `input`, a text or a list of at most `most` items.

    References to other items are left as they are. Unknown fields are added to `ignored`, or
    refused without it. Raises RequestError, naming the item and the field.
    """
    if isinstance(value, str):
        return (_message_item("user", [{"type": "input_text", "text": value}]),)
    if value is None:
        raise RequestError("input is missing: give a text or a list of items", param="input")
    if not isinstance(value, list):
        raise wrong_type("input", "a string or a list of items", value)
    if not value:
        raise RequestError("input must not be empty", param="input")
    if len(value) > most:
        raise RequestError(f"input has {len(value)} items; at most {most}", param="input")
    items = tuple(_read_item(f"input[{i}]", item, ignored) for i, item in enumerate(value))
    num_parts = sum(len(item.get("content", ())) + len(item.get("summary", ())) for item in items)
    if num_parts > _PARTS_PER_ITEM * most:
        message = f"input has {num_parts} parts of content; at most {_PARTS_PER_ITEM * most}"
        raise RequestError(message, param="input")
    return items


def text_of(parts: list[Item]) -> str:
    """Joins the texts of a message's parts by line ends, as in a chat."""
    return "\n".join(part[_TEXT_PARTS[part["type"]]] for part in parts)


def call_arguments(item: Item) -> dict[str, Any] | None:
    """The arguments of a function call; None if they are no JSON object."""
    text: str = item["arguments"]
    try:
        arguments = orjson.loads(text) if text.strip() else {}
    except orjson.JSONDecodeError:
        return None
    return arguments if isinstance(arguments, dict) else None


def _read_item(where: str, value: Any, ignored: list[str] | None) -> Item:
    if not isinstance(value, dict):
        raise wrong_type(where, "an object", value)
    fields = Fields(value, where, ignored)
    kind = fields.string("type")
    if kind is None:  # messages and references may leave it out
        kind = "message" if "role" in value else REFERENCE
    read = _READERS.get(kind)
    if read is None:
        served = ", ".join(_READERS)
        message = f"{where}.type {kind[:40]!r} is not supported; {served} are"
        raise RequestError(message, param=f"{where}.type")
    item = read(fields)
    for name in _REPLAYED:
        fields.raw(name)
    fields.finish({}, ())
    return item


def _message(fields: Fields) -> Item:
    role = _required(fields, "role")
    if role not in _ROLES:
        name = fields.name("role")
        message = f"{name} must be one of {', '.join(_ROLES)}, not {role[:40]!r}"
        raise RequestError(message, param=name)
    parts = _parts(fields, "content", answer=role == "assistant")
    return _message_item(role, parts, _id(fields), _status(fields))


def _message_item(
    role: str, parts: list[Item], item_id: str | None = None, status: str = "completed"
) -> Item:
    item_id = item_id or new_id("msg")
    return {"id": item_id, "type": "message", "role": role, "status": status, "content": parts}


def _function_call(fields: Fields) -> Item:
    item: Item = {
        "id": _id(fields) or new_id("fc"),
        "type": "function_call",
        "call_id": _required(fields, "call_id"),
        "name": _required(fields, "name"),
        "arguments": _required(fields, "arguments"),
        "status": _status(fields),
    }
    if call_arguments(item) is None and item["status"] != "incomplete":
        name = fields.name("arguments")
        raise RequestError(f"{name} must be the text of a JSON object", param=name)
    return item


def _function_call_output(fields: Fields) -> Item:
    call_id = _required(fields, "call_id")
    fields.string("name")
    parts = _parts(fields, "output", answer=False)
    return {
        "id": _id(fields) or new_id("fco"),
        "type": "function_call_output",
        "call_id": call_id,
        "output": text_of(parts),
        "status": _status(fields),
    }


def _reasoning(fields: Fields) -> Item:
    return {
        "id": _id(fields) or new_id("rs"),
        "type": "reasoning",
        "summary": _reasoning_texts(fields, "summary", "summary_text"),
        "content": _reasoning_texts(fields, "content", "reasoning_text"),
        "status": _status(fields),
    }


def _reference(fields: Fields) -> Item:
    return {"type": REFERENCE, "id": _required(fields, "id")}


_READERS: dict[str, Reader] = {
    "message": _message,
    "function_call": _function_call,
    "function_call_output": _function_call_output,
    "reasoning": _reasoning,
    REFERENCE: _reference,
}


def _parts(fields: Fields, key: str, *, answer: bool) -> list[Item]:
    """Reads a text, or a list of parts that are texts."""
    value, name = fields.raw(key), fields.name(key)
    if isinstance(value, str):
        return [_text_part(value, answer=answer)]
    if not isinstance(value, list):
        raise wrong_type(name, "a string or a list of text parts", value)
    return [_part(f"{name}[{i}]", part, fields.ignored, answer) for i, part in enumerate(value)]


def _part(where: str, value: Any, ignored: list[str] | None, answer: bool) -> Item:
    if not isinstance(value, dict):
        raise wrong_type(where, "an object", value)
    fields = Fields(value, where, ignored)
    kind = _required(fields, "type")
    if kind not in _TEXT_PARTS:
        name = fields.name("type")
        message = f"{name} {kind[:40]!r} is not supported; input_text and output_text are"
        raise RequestError(message, param=name)
    text = _required(fields, _TEXT_PARTS[kind])
    for name in _REPLAYED:
        fields.raw(name)
    fields.finish({}, ())
    return {"type": kind, "refusal": text} if kind == "refusal" else _text_part(text, answer=answer)


def _text_part(text: str, *, answer: bool) -> Item:
    if answer:
        return {"type": "output_text", "text": text, "annotations": []}
    return {"type": "input_text", "text": text}


def _reasoning_texts(fields: Fields, key: str, kind: str) -> list[Item]:
    texts: list[Item] = []
    for i, value in enumerate(fields.array(key) or ()):
        where = f"{fields.name(key)}[{i}]"
        if not isinstance(value, dict):
            raise wrong_type(where, "an object", value)
        part = Fields(value, where, fields.ignored)
        part.string("type")
        texts.append({"type": kind, "text": _required(part, "text")})
        part.finish({}, ("type", "text"))
    return texts


def _required(fields: Fields, key: str) -> str:
    value = fields.string(key)
    if value is None:
        raise RequestError(f"{fields.name(key)} is missing", param=fields.name(key))
    return value


def _id(fields: Fields) -> str | None:
    value = fields.string("id")
    if value is not None and len(value) > _MAX_ID_CHARS:
        name = fields.name("id")
        raise RequestError(f"{name} is longer than {_MAX_ID_CHARS} characters", param=name)
    return value


def _status(fields: Fields) -> str:
    status = fields.string("status")
    return status if status in _STATUSES else "completed"
