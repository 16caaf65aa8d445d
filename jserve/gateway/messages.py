"""Messages of a conversation: checked, and in the form that chat templates read.

The form is OpenAI's as Hugging Face's templates know it: calls of tools are in `tool_calls`, their
arguments are objects, and an answer to one has the role tool.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from jserve.core.errors import RequestError
from jserve.gateway.tools.format import Tool
from jserve.gateway.validation import is_deeper

_FIELDS = frozenset({"role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id"})
# Fields of answers, which clients send back with the message. They say nothing to a template.
_REPLAYED_FIELDS = frozenset(
    {
        *("annotations", "cache_control", "created_at", "id", "images", "parsed", "phase"),
        *("provider_specific_fields", "reasoning", "reasoning_details", "status"),
        *("thinking_blocks", "type"),
    }
)
# Types of a part that is text, and the field that holds it.
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_ROLES = {"developer": "system", "function": "tool"}  # newer and older names
# Variables of a template that come from the server; a request may only name what they are.
_SERVER_VARIABLES = frozenset(
    {"messages", "tools", "documents", "continue_final_message", "tokenize", "chat_template"}
)
_NEUTRAL: tuple[Any, ...] = (None, False, [], {})
_MAX_CALLS = 256  # of one message
_MAX_ARGUMENTS_DEPTH = 64

Message = dict[str, Any]


def check_messages(
    value: Any, *, max_messages: int, ignored: list[str] | None = None
) -> list[Message]:
    """Returns messages for a template; text parts are joined by line ends, as in vLLM.

    What an assistant's answer has beside its text may come back with it: empty fields and those
    that say nothing to a template are dropped. Unknown fields are named in `ignored`, or refused
    without it. Raises RequestError naming the message and the field.
    """
    if not isinstance(value, list | tuple) or not value:
        raise RequestError("messages must be a list with at least one message", param="messages")
    check_num_messages(len(value), max_messages)
    return [_check_message(f"messages[{i}]", message, ignored) for i, message in enumerate(value)]


def check_num_messages(number: int, most: int) -> None:
    """Raises RequestError if there are more than `most`."""
    if number > most:
        raise RequestError(f"messages has {number} entries; at most {most}", param="messages")


def checked_variables(where: str, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a request's variables for a template without those that come from the server.

    Raises RequestError if one of these says anything.
    """
    for name in _SERVER_VARIABLES & variables.keys():
        if variables[name] not in _NEUTRAL:
            path = f"{where}.{name}"
            raise RequestError(f"{path}: not supported yet; leave it out", param=path)
    return {name: it for name, it in variables.items() if name not in _SERVER_VARIABLES}


def tool_json(tool: Tool) -> dict[str, Any]:
    """A tool as templates read it."""
    function: dict[str, Any] = {"name": tool.name, "description": tool.description}
    return {"type": "function", "function": {**function, "parameters": dict(tool.parameters)}}


def with_described_tools(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Messages for a template without tools: they, calls and answers become text.

    The texts are those that Hermes and Qwen models are trained on.
    """
    texts = [_as_text(message) for message in messages]
    if not tools:
        return texts
    lines = "\n".join(json.dumps(tool_json(tool), ensure_ascii=False) for tool in tools)
    described = (
        "You may call one or more functions to answer the user.\n\n"
        f"The functions are described within <tools></tools> tags:\n<tools>\n{lines}\n</tools>\n\n"
        "For each call return a JSON object with its name and arguments within "
        "<tool_call></tool_call> tags:\n<tool_call>\n"
        '{"name": <name>, "arguments": <object>}\n</tool_call>'
    )
    if texts[0]["role"] == "system":
        first = {**texts[0], "content": f"{texts[0]['content']}\n\n{described}"}
        return [first, *texts[1:]]
    return [{"role": "system", "content": described}, *texts]


def _as_text(message: Message) -> Message:
    content = message["content"]
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [content] if content else []
    for call in calls:
        function = call["function"]
        call_json = {"name": function["name"], "arguments": function["arguments"]}
        text = json.dumps(call_json, ensure_ascii=False)
        texts.append(f"<tool_call>\n{text}\n</tool_call>")
    kept = {name: it for name, it in message.items() if name != "tool_calls"}
    return {**kept, "content": "\n".join(texts)}


def _check_message(where: str, message: Any, ignored: list[str] | None) -> Message:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object", param=where)
    fields = {name: value for name, value in message.items() if value not in (None, "", [], {})}
    role = message.get("role")
    if not isinstance(role, str):
        raise RequestError(f"{where}.role must be a string", param=f"{where}.role")
    refusal = fields.pop("refusal", "")
    checked: Message = {"role": _ROLES.get(role, role)}
    calls = _calls(where, role, fields)
    content = fields.get("content", message.get("content"))
    if content is None and (role == "assistant" or role in ("tool", "function")):
        content = refusal  # it declined, said nothing, or called a tool; an answer may be empty
    for name in sorted(fields.keys() - _FIELDS - _REPLAYED_FIELDS):
        _refuse_field(where, name, ignored)
    for name in ("name", "reasoning_content", "tool_call_id"):
        if not isinstance(text := fields.get(name, ""), str):
            raise RequestError(f"{where}.{name} must be a string", param=f"{where}.{name}")
        if text:
            checked[name] = text
    if isinstance(reasoning := fields.get("reasoning"), str):  # vLLM's newer name
        checked.setdefault("reasoning_content", reasoning)
    checked["content"] = checked_content(f"{where}.content", content)
    if calls:
        checked["tool_calls"] = calls
    return checked


def _calls(where: str, role: str, fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Reads the calls of an assistant's message, also of the older form with a single one."""
    given = fields.pop("tool_calls", None)
    older = fields.pop("function_call", None)
    if role != "assistant":
        for name, value in (("tool_calls", given), ("function_call", older)):
            if value is not None:
                path = f"{where}.{name}"
                raise RequestError(f"{path}: only an assistant's message has calls", param=path)
        return []
    if given is None:
        return [] if older is None else [_call(f"{where}.function_call", {"function": older})]
    path = f"{where}.tool_calls"
    if not isinstance(given, list | tuple):
        raise RequestError(f"{path} must be a list", param=path)
    if len(given) > _MAX_CALLS:
        raise RequestError(f"{path} has {len(given)} calls; at most {_MAX_CALLS}", param=path)
    return [_call(f"{path}[{i}]", call) for i, call in enumerate(given)]


def _call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"{where} must be a call with function.name", param=where)
    call_id = call.get("id")
    if call_id is not None and not isinstance(call_id, str):
        raise RequestError(f"{where}.id must be a string", param=f"{where}.id")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(f"{where}.function.arguments", arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        path = f"{where}.function.arguments"
        raise RequestError(f"{path} must be a JSON object", param=path)
    read = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return read if call_id is None else {"id": call_id, **read}


def _parsed(path: str, text: str) -> Any:
    """Reads arguments, which are empty for a call without any."""
    try:
        arguments = orjson.loads(text) if text.strip() else {}
    except ValueError as error:
        raise RequestError(f"{path} is not JSON: {error}", param=path) from None
    if is_deeper(arguments, _MAX_ARGUMENTS_DEPTH):
        message = f"{path} is nested deeper than {_MAX_ARGUMENTS_DEPTH} levels"
        raise RequestError(message, param=path)
    return arguments


def _refuse_field(where: str, name: str, ignored: list[str] | None) -> None:
    """Raises RequestError, unless the field is only unknown and those are ignored."""
    path = f"{where}.{name[:60]}"
    if name == "audio" or ignored is None:
        raise RequestError(f"{path} is not supported", param=path)
    ignored.append(path)


def checked_content(where: str, content: Any) -> str:
    """Returns the text of a message; RequestError if it is anything else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise RequestError(f"{where} must be a string or a list of text parts", param=where)
    texts: list[str] = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or kind not in _TEXT_PARTS:
            raise RequestError(f"{where}[{i}] must be of type text", param=f"{where}[{i}]")
        field = _TEXT_PARTS[kind]
        if not isinstance(part.get(field), str):
            param = f"{where}[{i}].{field}"
            raise RequestError(f"{param} must be a string", param=param)
        texts.append(part[field])
    return "\n".join(texts)
