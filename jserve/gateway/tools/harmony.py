"""Harmony's calls, of gpt-oss: a message in the commentary channel to a function.

The reasoning format `openai_gptoss` reads the channels and leaves calls as text in this form.
"""

import re
from collections.abc import Sequence

from jserve.gateway.tools.call_parser import CallParser, Marked
from jserve.gateway.tools.format import ChoiceMode, Schema, Tool, WantedCalls, openai_call_id
from jserve.gateway.tools.grammar import TEXT, Lark, any_call
from jserve.gateway.tools.reading import NotACall, Reading, Steps
from jserve.gateway.tools.values import JSON, read_value

_OPENING = "<|channel|>commentary to=functions."
_CONSTRAIN, _MESSAGE, _CALL = "<|constrain|>", "<|message|>", "<|call|>"
_NAME = re.compile(r"[^\s<>]*")
_TYPE = re.compile(r"[ a-z]*")


class Harmony:
    """The format `harmony`."""

    name = "harmony"
    markers = ("<|channel|>", _CONSTRAIN, _MESSAGE, _CALL)

    def parser(self, tools: Sequence[Tool]) -> CallParser:
        return CallParser(tools, [Marked(_OPENING, _read_call, (_CALL,))])

    def grammar(self, wanted: WantedCalls) -> str | None:
        """Spans the answer with its reasoning: channels are part of the format.

        An answer has one call, since `<|call|>` ends it as an end token does.
        """
        if wanted.free:
            return None
        lark = Lark(wanted.special)
        text = lark.terminal(TEXT)

        def message(channel: str) -> str:
            return f"{lark.literal(f'<|channel|>{channel}{_MESSAGE}')} {text}"

        more = lark.literal("<|end|><|start|>assistant")
        before = lark.any_of(f"{message(channel)} {more}" for channel in ("analysis", "commentary"))
        call = any_call(lark, wanted, _write_call)
        last = [f"{lark.literal(_OPENING)} {call}"]
        if wanted.choice.mode is ChoiceMode.AUTO:
            last.append(message("final"))
        lark.rule(f"{before}* {lark.any_of(last)}", name="start")
        return lark.text()

    def call_id(self) -> str:
        return openai_call_id()


def _write_call(lark: Lark, tool: Tool, schema: Schema) -> str:
    head = lark.literal(f"{tool.name} {_CONSTRAIN}json{_MESSAGE}")
    return f"{head} {lark.schema(schema)}"


def _read_call(reading: Reading) -> Steps[None]:
    name = yield from reading.word(_NAME)
    if name not in reading.tools:
        raise NotACall
    yield from reading.word(_TYPE)
    if (yield from reading.take(_CONSTRAIN)):
        yield from reading.word(_TYPE)
    yield from reading.expect(_MESSAGE)
    yield from reading.space()
    if (yield from reading.peek()) != "{":
        raise NotACall
    reading.begin(name)
    yield from read_value(reading, JSON, reading.arguments)
