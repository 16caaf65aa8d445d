"""Calls of FunctionGemma and Gemma 4: `call:name{key:value,...}` between two special tokens.

Values are JSON's, but for keys without quotes and strings between special tokens, which have no
escapes.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from jserve.gateway.tools.call_parser import CallParser, Marked
from jserve.gateway.tools.format import Schema, Tool, WantedCalls, openai_call_id
from jserve.gateway.tools.gemma_values import GemmaValues
from jserve.gateway.tools.grammar import Lark, Layout, call_grammar
from jserve.gateway.tools.properties import refuse
from jserve.gateway.tools.reading import NotACall, Reading, Steps
from jserve.gateway.tools.values import Dialect, read_value

_NAME = re.compile(r"[^{}<>\s]*")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")


@dataclass(frozen=True, slots=True)
class Gemma:
    """One of the two formats; they differ in their tokens alone."""

    name: str
    opening: str
    closing: str
    quote: str

    @property
    def markers(self) -> tuple[str, ...]:
        return self.opening, self.closing, self.quote

    def parser(self, tools: Sequence[Tool]) -> CallParser:
        dialect = Dialect(
            quotes={self.quote: self.quote},
            brackets={"[": "]"},
            plain=re.compile(r'[^<"\\\x00-\x1f]+'),
            escape=None,
            word=re.compile(r"[^,{}\[\]<]*"),
            scalar=_scalar,
            bare_keys=re.compile(r"[^:,{}\[\]<]*"),
        )

        def read_call(reading: Reading) -> Steps[None]:
            yield from reading.expect("call:")
            name = yield from reading.word(_NAME)
            if name not in reading.tools or (yield from reading.peek()) != "{":
                raise NotACall
            reading.begin(name)
            yield from read_value(reading, dialect, reading.arguments)

        return CallParser(tools, [Marked(self.opening, read_call, (self.closing,))])

    def grammar(self, wanted: WantedCalls) -> str | None:
        layout = Layout(each=(self.opening, self.closing), marker=self.opening)

        def write_call(lark: Lark, tool: Tool, schema: Schema) -> str:
            if not _NAME.fullmatch(tool.name):
                raise refuse(tool.name, "its name, which the format cannot hold")
            values = GemmaValues(lark, tool.name, schema, self.quote)
            return f"{lark.literal('call:' + tool.name)} {values.arguments()}"

        return call_grammar(wanted, layout, write_call)

    def call_id(self) -> str:
        return openai_call_id()


FUNCTION_GEMMA = Gemma("functiongemma", "<start_function_call>", "<end_function_call>", "<escape>")
GEMMA_4 = Gemma("gemma4", "<|tool_call>", "<tool_call|>", '<|"|>')


def _scalar(word: str) -> str | None:
    """Models leave out the quotes of single words, so what is no JSON is a string."""
    word = word.strip()
    if _SCALAR.fullmatch(word):
        return word
    return json.dumps(word, ensure_ascii=False) if word else None
