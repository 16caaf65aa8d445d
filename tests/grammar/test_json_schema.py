"""JSON Schema: a grammar accepts valid documents, no others, and what it can't follow is refused.

The shapes are those of the public JSON-Schema-Test-Suite. `jsonschema` judges every document, so
that a mistake in the table is none in the code.
"""

import json
import re
import warnings
from collections.abc import Iterator
from functools import cache
from random import Random
from typing import Any

import pytest
from jsonschema import (
    Draft7Validator,
    Draft202012Validator,
    FormatChecker,
    ValidationError,
    validators,
)
from llguidance import LLMatcher
from tokenizers import Tokenizer

from jserve.checkpoints.text_assets import byte_level_assets
from jserve.core.errors import RequestError
from jserve.grammar.check import check_source
from jserve.grammar.compiler import GrammarCompiler
from jserve.grammar.source import GrammarKind, GrammarSource
from tests.gateway.tiny_tokenizers import byte_level_json
from tests.grammar.schema_cases import CASES, FORMATS, OLD_ARRAYS, REFUSED, Case

EOS = 256


def ecma_pattern(validator: Any, pattern: str, text: Any, schema: Any) -> Iterator[ValidationError]:
    """Pattern as ECMA-262 has it, with the nearest that Python offers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # [[ and && are characters here
        pattern = re.sub(r"(?<!\\)\$$", r"\\Z", pattern.replace("(?<y", "(?P<y"))
        wanted = re.compile(pattern, re.ASCII)
    if isinstance(text, str) and not wanted.search(text):
        yield ValidationError(f"{text!r} does not match {pattern!r}")


Judge = validators.extend(Draft202012Validator, {"pattern": ecma_pattern})
NOT_JUDGED = {"time"}  # by jsonschema, which wants no offset
ALL = [
    pytest.param(case, id=f"{name}-{i}")
    for name, cases in CASES.items()
    for i, case in enumerate(cases)
]
# With a space or a line break between the tokens, or nothing.
SPACINGS = [(", ", ": "), (",", ":"), (",\n", ":"), (" ,", " :")]


@cache
def bytes_compiler() -> GrammarCompiler:
    return GrammarCompiler(
        byte_level_assets(EOS + 1, (EOS,)).tokenizer_json, vocab=EOS + 1, eos_token_ids=(EOS,)
    )


@cache
def merged_compiler() -> GrammarCompiler:
    return GrammarCompiler(byte_level_json(), vocab=410, eos_token_ids=(1, 2))


@cache
def merged_tokenizer() -> Tokenizer:
    return Tokenizer.from_str(byte_level_json())


def text_of(schema: Any) -> str:
    source = GrammarSource(kind=GrammarKind.JSON, value=schema, field="schema")
    return check_source(source, bytes_compiler(), {})


def accepts(matcher: LLMatcher, tokens: list[int]) -> bool:
    """Whether the tokens are taken one by one, and the text may end after them."""
    for token in tokens:
        if not matcher.compute_bitmask()[token // 8] >> token % 8 & 1:
            return False
        assert matcher.consume_token(token)
    return matcher.is_accepting()


def accepts_text(grammar: str, text: str) -> bool:
    return accepts(bytes_compiler().matcher(grammar), list(text.encode()))


def written(document: Any, separators: tuple[str, str] = (", ", ": ")) -> str:
    return json.dumps(document, ensure_ascii=False, separators=separators)


def check(case: Case, validator: Any) -> None:
    grammar = text_of(case.schema)
    for document in case.valid:
        assert validator.is_valid(document), f"the table is wrong: {document}"
        for separators in SPACINGS:
            text = written(document, separators)
            assert accepts_text(grammar, text), f"{text} is refused"
        ids = merged_tokenizer().encode(written(document), add_special_tokens=False).ids
        assert accepts(merged_compiler().matcher(grammar), ids), f"{ids} are refused"
    for document in case.invalid:
        assert not validator.is_valid(document), f"the table is wrong: {document}"
        text = written(document)
        assert not accepts_text(grammar, text), f"{text} is accepted"
        ids = merged_tokenizer().encode(text, add_special_tokens=False).ids
        assert not accepts(merged_compiler().matcher(grammar), ids)


@pytest.mark.parametrize("case", ALL)
def test_valid_documents_are_accepted_and_no_others(case: Case) -> None:
    check(case, Judge(case.schema))


def random_text(grammar: str, random: Random, most: int = 300) -> str | None:
    """A text that the grammar accepts, byte by byte; None if it has none in `most` bytes."""
    matcher = bytes_compiler().matcher(grammar)
    tokens: list[int] = []
    while len(tokens) < most:
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [token for token in range(EOS) if mask >> token & 1]
        if not allowed or (matcher.is_accepting() and random.random() < 0.3):
            assert matcher.is_accepting(), f"nothing goes on after {bytes(tokens)!r}"
            return bytes(tokens).decode()
        ends = [token for token in allowed if chr(token) in '"]}']
        token = random.choice(ends if ends and random.random() < 0.3 else allowed)
        assert matcher.consume_token(token)
        tokens.append(token)
    return None


@pytest.mark.parametrize("case", ALL)
def test_whatever_a_grammar_writes_is_valid(case: Case) -> None:
    grammar = text_of(case.schema)
    random = Random(7)
    texts = {random_text(grammar, random) for _ in range(12)} - {None}
    for text in texts:
        document = json.loads(str(text))
        assert Judge(case.schema).is_valid(document), text


@pytest.mark.parametrize("case", OLD_ARRAYS)
def test_forms_of_older_drafts(case: Case) -> None:
    check(case, Draft7Validator(case.schema))


def test_there_are_many_cases() -> None:
    assert len(ALL) + len(OLD_ARRAYS) + len(REFUSED) + len(FORMATS) >= 200


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str) -> None:
    grammar = text_of({"type": "string", "format": name})
    judge = FormatChecker()
    for text in FORMATS[name][0]:
        assert accepts_text(grammar, written(text)), text
        assert name in NOT_JUDGED or judge.conforms(text, name)
    for text in FORMATS[name][1]:
        assert not accepts_text(grammar, written(text)), text


@pytest.mark.parametrize(
    ("schema", "keyword"), [pytest.param(*it, id=f"{i}-{it[1]}") for i, it in enumerate(REFUSED)]
)
def test_what_no_grammar_follows_is_refused_by_name(schema: Any, keyword: str) -> None:
    with pytest.raises(RequestError) as caught:
        text_of(schema)
    assert keyword in str(caught.value)
    assert caught.value.param == "schema"


@pytest.mark.parametrize(
    ("wrong", "end"),
    [
        ({"uniqueItems": True}, ".uniqueItems"),
        ({"format": "nope"}, ".format"),
        ({"oneOf": [{"minimum": 1}, {"maximum": 2}]}, ""),
        ({"type": "string", "pattern": "a$b"}, ""),
        ({"type": "string", "pattern": "(?=a)"}, ".pattern"),
        ({"type": "number", "multipleOf": 0.007}, ""),
    ],
)
def test_the_path_is_named(wrong: Any, end: str) -> None:
    where = "schema.properties.list.items.anyOf[1]"
    schema = {"properties": {"list": {"items": {"anyOf": [{"type": "null"}, wrong]}}}}
    with pytest.raises(RequestError) as caught:
        text_of(schema)
    assert str(caught.value).startswith(f"{where}{end}: ")


def test_the_path_leads_into_definitions() -> None:
    schema = {"$ref": "#/$defs/a", "$defs": {"a": {"properties": {"x": {"not": {}}}}}}
    with pytest.raises(RequestError, match=r"schema\.\$defs\.a\.properties\.x\.not: not "):
        text_of(schema)


@pytest.mark.parametrize(
    "text",
    [
        '{"\\u0061": "x"}',  # the name of a property, spelled in another way
        '{"b": 1, "a": 2}',  # in another order
        '{"a":  1}',  # two spaces
        ' {"a": 1}',
        '{"a": 1} ',
        '{"a": 01}',
        '{"a": 1,}',
        "{'a': 1}",
        '{"a": 1, "a": "x"}',
    ],
)
def test_texts_that_no_document_has(text: str) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "additionalProperties": {"type": "string"},
    }
    grammar = text_of(schema)
    assert accepts_text(grammar, '{"a": 1, "b": 2, "c": "x"}')
    assert not accepts_text(grammar, text)


def test_options_of_llguidance_are_not_the_client_s() -> None:
    schema = {"x-guidance": {"lenient": True}, "uniqueItems": True}
    with pytest.raises(RequestError, match="uniqueItems"):
        text_of(schema)
    grammar = text_of({"type": "object", "x-guidance": {"whitespace_flexible": True}})
    assert not accepts_text(grammar, '{"a":  1}')


def test_a_reference_to_itself_that_adds_nothing_is_left_out() -> None:
    options = {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}  # jsonschema never ends here
    grammar = text_of({"$defs": {"a": options}, "$ref": "#/$defs/a"})
    assert accepts_text(grammar, "null")
    assert not accepts_text(grammar, "1")


def test_annotations_are_not_sent_to_engines() -> None:
    text = text_of({"type": "integer", "description": "long " * 100, "$defs": {"a": {}}})
    assert "long" not in text
    assert "$defs" not in text
