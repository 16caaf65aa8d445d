"""Messages of the Anthropic API → messages in OpenAI's form, which `conversation` takes."""

from collections.abc import Mapping, Sequence
from typing import Any

from jserve.core.errors import RequestError
from jserve.gateway.http.fields import Fields, wrong_type
from jserve.gateway.messages import Message, check_num_messages

_ROLES = ("user", "assistant", "system")
# Fields of blocks that are not served, with the values that ask for nothing.
_UNSUPPORTED_TEXT: dict[str, tuple[object, ...]] = {"citations": ([],)}
_UNSUPPORTED_CALL: dict[str, tuple[object, ...]] = {"toolset_name": ()}


def system_text(fields: Fields) -> str:
    """Reads the field `system`, a string or blocks of text; empty if there is none."""
    value = fields.raw("system")
    return "" if value is None else _text("system", value, fields.ignored)


def read_messages(
    value: Any, system: str, *, most: int, ignored: list[str] | None
) -> tuple[list[Message], bool]:
    """Returns the messages, and whether the answer continues the last one.

    It does if that is the assistant's and has text. As in Anthropic's API, messages of one role
    that follow each other are one turn. Raises RequestError naming the block.
    """
    if not isinstance(value, list) or not value:
        raise RequestError("messages must be a list with at least one message", param="messages")
    check_num_messages(len(value), most)
    reader = _Reader(ignored)
    if system:
        reader.add({"role": "system", "content": system})
    for i, message in enumerate(value):
        reader.read(f"messages[{i}]", message)
    messages = reader.messages
    if messages[-1]["role"] != "assistant":
        return messages, False
    if messages[-1].get("tool_calls"):
        message = "messages: the last one calls tools; send their tool_result blocks after it"
        raise RequestError(message, param="messages")
    if messages[-1]["content"].strip():
        return messages, True
    if len(messages) == 1:
        raise RequestError("messages: the only one is empty", param="messages")
    return messages[:-1], False


class _Reader:
    """Collects messages in OpenAI's form. Owned by one request."""

    def __init__(self, ignored: list[str] | None) -> None:
        self.messages: list[Message] = []
        self._ignored = ignored
        self._tools: dict[str, str] = {}  # names of tools by the ids of their calls

    def read(self, where: str, message: Any) -> None:
        if not isinstance(message, Mapping):
            raise RequestError(f"{where} must be an object", param=where)
        fields = Fields(message, where, self._ignored)
        role = fields.string("role")
        if role not in _ROLES:
            path = f"{where}.role"
            raise RequestError(f"{path} must be one of {', '.join(_ROLES)}", param=path)
        content = fields.raw("content")
        fields.finish({}, ("role", "content"))
        path = f"{where}.content"
        if isinstance(content, str):
            self.add({"role": role, "content": content})
        elif not isinstance(content, list):
            raise wrong_type(path, "a string or a list of blocks", content)
        else:
            if not content:
                self.add({"role": role, "content": ""})
            for i, block in enumerate(content):
                self._block(f"{path}[{i}]", role, block)

    def add(self, message: Message) -> None:
        """Appends a message, or joins it to the last one if that is of the same turn."""
        last: Message = self.messages[-1] if self.messages else {"role": ""}
        if message["role"] != last["role"] or message["role"] == "tool":
            self.messages.append(message)
            return
        for name in ("content", "reasoning_content"):
            texts = [text for text in (last.get(name), message.get(name)) if text]
            if texts:
                last[name] = "\n".join(texts)
        if "tool_calls" in message:
            last.setdefault("tool_calls", []).extend(message["tool_calls"])

    def _block(self, where: str, role: str, block: Any) -> None:
        if not isinstance(block, Mapping):
            raise RequestError(f"{where} must be a block, an object with a type", param=where)
        fields = Fields(block, where, self._ignored)
        kind = fields.string("type")
        fields.mapping("cache_control")  # every prompt's computed pages are kept as it is
        match kind:
            case "text":
                self.add({"role": role, "content": _text_block(fields)})
            case "thinking" if role == "assistant":
                thinking = fields.string("thinking") or ""
                fields.string("signature")
                fields.finish({}, ("type", "thinking", "signature"))
                self.add({"role": role, "content": "", "reasoning_content": thinking})
            case "redacted_thinking" if role == "assistant":
                pass  # another server's secret: there is nothing to read in it
            case "tool_use" if role == "assistant":
                self._tool_use(fields)
            case "tool_result" if role == "user":
                self._tool_result(fields)
            case _:
                message = f"{where}: content of type {str(kind)[:60]!r} is not supported here"
                raise RequestError(message, param=f"{where}.type")

    def _tool_use(self, fields: Fields) -> None:
        call_id, name = _required(fields, "id"), _required(fields, "name")
        arguments = fields.mapping("input") or {}
        fields.mapping("caller")
        fields.finish(_UNSUPPORTED_CALL, ("type", "id", "name", "input", "cache_control"))
        self._tools[call_id] = name
        call = {"id": call_id, "function": {"name": name, "arguments": arguments}}
        self.add({"role": "assistant", "content": "", "tool_calls": [call]})

    def _tool_result(self, fields: Fields) -> None:
        call_id = _required(fields, "tool_use_id")
        failed = fields.boolean("is_error") or False
        content = fields.raw("content")
        known = ("type", "tool_use_id", "content", "is_error", "cache_control")
        fields.finish(_UNSUPPORTED_CALL, known)
        path = fields.name("content")
        text = "" if content is None else _text(path, content, self._ignored)
        if failed:  # templates have no field for it
            text = f"Error: {text}"
        message = {"role": "tool", "tool_call_id": call_id, "content": text}
        if call_id in self._tools:  # some templates write the name
            message["name"] = self._tools[call_id]
        self.messages.append(message)


def _text(where: str, value: Any, ignored: list[str] | None) -> str:
    """Joins blocks of text by line ends."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong_type(where, "a string or a list of text blocks", value)
    return "\n".join(_texts(where, value, ignored))


def _texts(where: str, blocks: Sequence[Any], ignored: list[str] | None) -> list[str]:
    texts: list[str] = []
    for i, block in enumerate(blocks):
        path = f"{where}[{i}]"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind != "text":
            message = f"{path}: content of type {str(kind)[:60]!r} is not supported here; send text"
            raise RequestError(message, param=path)
        fields = Fields(block, path, ignored)
        fields.string("type")
        fields.mapping("cache_control")
        texts.append(_text_block(fields))
    return texts


def _text_block(fields: Fields) -> str:
    text = _required(fields, "text")
    fields.raw("parsed_output")  # the client's own reading of an answer that comes back
    fields.finish(_UNSUPPORTED_TEXT, ("type", "text", "cache_control"))
    return text


def _required(fields: Fields, key: str) -> str:
    value = fields.string(key)
    if value is None:
        path = fields.name(key)
        raise RequestError(f"{path} is missing; give a string", param=path)
    return value
