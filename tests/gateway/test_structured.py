"""The fields that bind an answer: their forms, and what excludes each other."""

from typing import Any

import pytest

from jserve.core.errors import RequestError
from jserve.core.request import ConstraintSpec, Request, SamplingParams
from jserve.gateway.engine_client import LiveStreams
from jserve.gateway.fake_engine import FakeEngine
from jserve.gateway.structured import STRUCTURED_FIELDS, check_sampling, read_structured
from jserve.grammar.source import GrammarKind, GrammarSource, Whitespace
from tests.gateway.fixtures import INFO

SCHEMA = {"type": "object"}
TAG = {"type": "structural_tag", "structures": [], "triggers": []}


def source(kind: str, value: Any, field: str, whitespace: Any = Whitespace.ONE) -> GrammarSource:
    return GrammarSource(kind=GrammarKind(kind), value=value, field=field, whitespace=whitespace)


def formatted(value: Any) -> dict[str, Any]:
    return {"response_format": value}


def outputs(**value: Any) -> dict[str, Any]:
    return {"structured_outputs": value}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        (dict.fromkeys(STRUCTURED_FIELDS), None),
        (formatted({"type": "text"}), None),
        (formatted({"type": "json_object"}), source("json_object", True, "response_format")),
        (
            formatted({"type": "json_object", "schema": SCHEMA}),
            source("json", SCHEMA, "response_format.schema"),
        ),
        (
            formatted({"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}),
            source("json", SCHEMA, "response_format.json_schema.schema"),
        ),
        (
            formatted({"type": "json_schema", "json_schema": {"strict": True, "schema": SCHEMA}}),
            source("json", SCHEMA, "response_format.json_schema.schema"),
        ),
        (formatted(TAG), source("structural_tag", TAG, "response_format")),
        (formatted({"type": "regex", "regex": "a"}), source("regex", "a", "response_format.regex")),
        (formatted({"type": "ebnf", "ebnf": "g"}), source("grammar", "g", "response_format.ebnf")),
        (outputs(json=SCHEMA), source("json", SCHEMA, "structured_outputs.json")),
        (outputs(json="{}"), source("json", "{}", "structured_outputs.json")),
        (outputs(regex="a", choice=None), source("regex", "a", "structured_outputs.regex")),
        (outputs(choice=["a"]), source("choice", ["a"], "structured_outputs.choice")),
        (outputs(grammar="g"), source("grammar", "g", "structured_outputs.grammar")),
        (
            outputs(structural_tag=TAG),
            source("structural_tag", TAG, "structured_outputs.structural_tag"),
        ),
        (outputs(json_object=True), source("json_object", True, "structured_outputs.json_object")),
        (
            outputs(json=SCHEMA, whitespace="any"),
            source("json", SCHEMA, "structured_outputs.json", Whitespace.ANY),
        ),
        (
            outputs(json=SCHEMA, disable_any_whitespace=True),
            source("json", SCHEMA, "structured_outputs.json", Whitespace.NONE),
        ),
        (
            outputs(json=SCHEMA, whitespace_pattern="[ ]?"),
            source("json", SCHEMA, "structured_outputs.json", "[ ]?"),
        ),
        ({"guided_json": SCHEMA}, source("json", SCHEMA, "guided_json")),
        ({"guided_regex": "a"}, source("regex", "a", "guided_regex")),
        ({"guided_choice": ["a"]}, source("choice", ["a"], "guided_choice")),
        ({"guided_grammar": "g"}, source("grammar", "g", "guided_grammar")),
        (
            {"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"},
            source("json", SCHEMA, "guided_json", " ?"),
        ),
        ({"regex": "a"}, source("regex", "a", "regex")),
        ({"ebnf": "g"}, source("grammar", "g", "ebnf")),
        ({"grammar": "g"}, source("grammar", "g", "grammar")),
        ({"json_schema": SCHEMA}, source("json", SCHEMA, "json_schema")),
    ],
)
def test_every_form_is_read(given: dict[str, Any], expected: GrammarSource | None) -> None:
    assert read_structured(given) == expected


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (formatted("text"), "response_format"),
        (formatted({"type": "xml"}), "response_format.type"),
        (formatted({"schema": {}}), "response_format.type"),
        (formatted({"type": "json_schema"}), "response_format.json_schema"),
        (
            formatted({"type": "json_schema", "json_schema": {"name": "x"}}),
            "response_format.json_schema.schema",
        ),
        (
            formatted({"type": "json_schema", "json_schema": {"name": 5, "schema": {}}}),
            "response_format.json_schema.name",
        ),
        (
            formatted({"type": "json_schema", "json_schema": {"strict": "yes", "schema": {}}}),
            "response_format.json_schema.strict",
        ),
        (formatted({"type": "regex"}), "response_format.regex"),
        (outputs(), "structured_outputs"),
        (outputs(json_object=False), "structured_outputs"),
        (outputs(json=SCHEMA, regex="a"), "structured_outputs"),
        (outputs(jsn=SCHEMA), "structured_outputs.jsn"),
        (outputs(json=SCHEMA, whitespace="two"), "structured_outputs.whitespace"),
        (outputs(json=SCHEMA, whitespace=["one"]), "structured_outputs.whitespace"),
        (
            outputs(json=SCHEMA, whitespace="one", whitespace_pattern=" "),
            "structured_outputs.whitespace",
        ),
        (outputs(json=SCHEMA, whitespace_pattern=5), "structured_outputs.whitespace_pattern"),
        (
            outputs(json=SCHEMA, disable_additional_properties=True),
            "structured_outputs.disable_additional_properties",
        ),
        ({"structured_outputs": "json"}, "structured_outputs"),
        ({"guided_json": SCHEMA, "guided_whitespace_pattern": 1}, "guided_whitespace_pattern"),
    ],
)
def test_a_wrong_form_is_named(given: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_structured(given)
    assert caught.value.param == param
    assert param.split(".")[-1] in str(caught.value)


def test_two_bindings_are_both_named() -> None:
    given = formatted({"type": "json_object"}) | {"guided_regex": "a"}
    with pytest.raises(RequestError, match="response_format and guided_regex") as caught:
        read_structured(given)
    assert caught.value.param == "guided_regex"
    with pytest.raises(RequestError, match="not json and regex"):
        read_structured(outputs(json=SCHEMA, regex="a"))


@pytest.mark.parametrize(
    "sampling",
    [
        {"min_tokens": 1},
        {"ignore_eos": True},
        {"allowed_token_ids": (5,)},
        {"bad_token_ids": (5,)},
    ],
)
def test_sampling_that_contradicts_a_grammar(sampling: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        check_sampling(SamplingParams(**sampling), ConstraintSpec(grammar="g"), INFO)
    assert caught.value.param in sampling
    check_sampling(SamplingParams(**sampling), ConstraintSpec(), INFO)
    biased = SamplingParams(logit_bias=((5, -100.0),), stop_token_ids=(7,))
    check_sampling(biased, ConstraintSpec(grammar="g"), INFO)


def test_the_next_engine_gets_the_constraint_too() -> None:
    client = FakeEngine(INFO)
    streams = LiveStreams()
    constraint = ConstraintSpec(grammar="g")
    streams.open(client, [Request(id="a", prompt=(5,), constraint=constraint)])
    streams.lose(0.0)
    (resumed,) = streams.resume()
    assert resumed.constraint is constraint
