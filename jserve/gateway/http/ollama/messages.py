"""Messages of the Ollama API → messages in OpenAI's form, which `conversation` takes."""

from collections.abc import Sequence
from typing import Any

from jserve.core.errors import RequestError
from jserve.gateway.http.fields import Fields, wrong_type
from jserve.gateway.messages import Message, check_num_messages

_FIELDS = ("role", "content", "thinking", "tool_calls", "tool_name", "tool_call_id", "name")
_UNSUPPORTED: dict[str, tuple[object, ...]] = {"images": ([],)}


def read_messages(values: Sequence[Any], *, most: int, ignored: list[str] | None) -> list[Message]:
    """Reads the messages. Raises RequestError naming the message and the field."""
    check_num_messages(len(values), most)
    calls = _CallIds()
    return [_message(f"messages[{i}]", value, calls, ignored) for i, value in enumerate(values)]


class _CallIds:
    """Ids of calls, which Ollama's messages need not have and templates may want.

    Owned by one request.
    """

    def __init__(self) -> None:
        self._number = 0
        self._waiting: list[tuple[str, str]] = []  # names and ids of calls without a result

    def add(self, name: str, given: str | None) -> str:
        """Returns the id of the next call. Nine letters and digits, as Mistral's templates want."""
        self._number += 1
        call_id = given or f"call{self._number:05}"
        self._waiting.append((name, call_id))
        return call_id

    def of_result(self, name: str | None) -> str | None:
        """Returns the id of the first call of a tool that has no result; by any name without."""
        for waiting in self._waiting:
            if name in (None, waiting[0]):
                self._waiting.remove(waiting)
                return waiting[1]
        return None


def _message(where: str, value: Any, calls: _CallIds, ignored: list[str] | None) -> Message:
    if not isinstance(value, dict):
        raise wrong_type(where, "an object", value)
    fields = Fields(value, where, ignored)
    message: Message = {"role": fields.string("role"), "content": fields.string("content") or ""}
    if thinking := fields.string("thinking"):
        message["reasoning_content"] = thinking
    if given := fields.array("tool_calls"):
        path = fields.name("tool_calls")
        message["tool_calls"] = [
            _call(f"{path}[{i}]", call, calls, ignored) for i, call in enumerate(given)
        ]
    older, call_id = fields.string("name"), fields.string("tool_call_id")
    name = fields.string("tool_name") or older
    fields.finish(_UNSUPPORTED, _FIELDS)
    if message["role"] == "tool":
        call_id = call_id or calls.of_result(name)
        if call_id:
            message["tool_call_id"] = call_id
    if name:
        message["name"] = name
    return message


def _call(where: str, value: Any, calls: _CallIds, ignored: list[str] | None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong_type(where, "an object", value)
    call = Fields(value, where, ignored)
    given = call.mapping("function")
    call_id = call.string("id")
    call.string("type")
    call.finish({}, ("function", "id", "type"))
    function = Fields(given or {}, f"{where}.function", ignored)
    name, arguments = function.string("name"), function.mapping("arguments") or {}
    function.integer("index")
    function.string("description")
    function.finish({}, ("name", "arguments", "index"))
    if not name:
        raise RequestError(f"{where} must be a call with function.name", param=where)
    read = {"name": name, "arguments": arguments}
    return {"id": calls.add(name, call_id), "type": "function", "function": read}
