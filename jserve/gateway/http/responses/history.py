"""Items of the Responses API → the messages of a chat."""

from collections.abc import Sequence
from typing import Any

from jserve.core.errors import RequestError
from jserve.gateway.http.responses.items import Item, call_arguments, text_of

Message = dict[str, Any]

_INSTRUCTING = ("system", "developer")


def chat_messages(items: Sequence[Item], instructions: str | None) -> list[Message]:
    """Returns the conversation in OpenAI's chat form.

    `instructions` and the system messages at the beginning become one message, since many templates
    take no second one. The reasoning, text and calls of one turn become one message. Calls that
    were cut off are left out, with their outputs. Raises RequestError for an output without a call.
    """
    history = _History()
    for item in items:
        history.add(item)
    return _with_instructions(history.messages, instructions)


class _History:
    """Messages so far. Owned by one conversion."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._names: dict[str, str | None] = {}  # by call id; None: the call was cut off

    def add(self, item: Item) -> None:
        match item["type"]:
            case "message" if item["role"] == "assistant":
                self._turn("content", "tool_calls")["content"] = text_of(item["content"])
            case "message":
                message = {"role": item["role"], "content": text_of(item["content"])}
                self.messages.append(message)
            case "reasoning":
                text = "\n".join(part["text"] for part in item["content"] or item["summary"])
                if text:
                    self._turn("reasoning_content", "content", "tool_calls")[
                        "reasoning_content"
                    ] = text
            case "function_call":
                self._add_call(item)
            case _:
                self._add_output(item)

    def _add_call(self, item: Item) -> None:
        arguments = call_arguments(item)
        self._names[item["call_id"]] = None if arguments is None else item["name"]
        if arguments is not None:
            function = {"name": item["name"], "arguments": arguments}
            call = {"id": item["call_id"], "type": "function", "function": function}
            self._turn().setdefault("tool_calls", []).append(call)

    def _add_output(self, item: Item) -> None:
        call_id: str = item["call_id"]
        if call_id not in self._names:
            raise RequestError(
                f"input: no function_call with the call_id {call_id[:60]!r} comes before its "
                "function_call_output; send the call as well, or previous_response_id",
                param="input",
            )
        name = self._names[call_id]
        if name is not None:
            message = {"role": "tool", "name": name, "tool_call_id": call_id}
            self.messages.append({**message, "content": item["output"]})

    def _turn(self, *unless: str) -> Message:
        """The assistant's message that the items belong to: a new one if it has any of `unless`."""
        last = self.messages[-1] if self.messages else None
        if last is None or last["role"] != "assistant" or any(name in last for name in unless):
            last = {"role": "assistant"}
            self.messages.append(last)
        return last


def _with_instructions(messages: list[Message], instructions: str | None) -> list[Message]:
    count = next(
        (i for i, it in enumerate(messages) if it["role"] not in _INSTRUCTING), len(messages)
    )
    texts = [message["content"] for message in messages[:count]]
    if instructions:
        texts.insert(0, instructions)
    if not texts:
        return messages
    return [{"role": "system", "content": "\n\n".join(texts)}, *messages[count:]]
