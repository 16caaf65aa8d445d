"""What binds an answer, over HTTP and gRPC: it arrives whole in the engine, or is a 400."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from jserve.gateway.grpc_messages import grammar_source
from jserve.grammar.source import GrammarKind, Whitespace
from jserve.proto import inference_pb2
from tests.gateway.grpc_serving import all_of, failure, generate
from tests.gateway.grpc_serving import serving as grpc_serving
from tests.gateway.http.http_serving import Served, serving

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
MESSAGES = [{"role": "user", "content": "no word of it here"}]
TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}],
    "triggers": ["<f"],
}
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "json_object": ({"response_format": {"type": "json_object"}}, '"type": "object"'),
    "json_schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA},
            }
        },
        '"required": ["a"]',
    ),
    "structural_tag": ({"response_format": TAG}, "TEXT"),
    "outputs_json": ({"structured_outputs": {"json": SCHEMA}}, '"required": ["a"]'),
    "outputs_regex": ({"structured_outputs": {"regex": "a+b"}}, "/a+b/"),
    "outputs_choice": ({"structured_outputs": {"choice": ["red", "blue"]}}, "CHOICE"),
    "outputs_grammar": ({"structured_outputs": {"grammar": 'root ::= "x"'}}, "start"),
    "guided_json": ({"guided_json": json.dumps(SCHEMA)}, '"required": ["a"]'),
    "guided_regex": ({"guided_regex": "a+b"}, "/a+b/"),
    "guided_choice": ({"guided_choice": ["red", "blue"]}, "CHOICE"),
    "guided_grammar": ({"guided_grammar": 'start: "x"'}, "start"),
}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=30) as client:
        yield client


def ask(http: httpx.Client, route: str, fields: dict[str, Any]) -> httpx.Response:
    if route == "chat":
        body = {"messages": MESSAGES, "max_tokens": 3, **fields}
        return http.post("/v1/chat/completions", json=body)
    return http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 3, **fields})


@pytest.mark.parametrize("route", ["chat", "completions"])
@pytest.mark.parametrize("name", FORMS)
def test_the_constraint_of_every_choice_arrives(
    served: Served, http: httpx.Client, route: str, name: str
) -> None:
    served.engine.submitted.clear()
    fields, part = FORMS[name]
    answer = ask(http, route, {**fields, "n": 2})
    assert answer.status_code == 200, answer.text
    first, second = served.engine.submitted
    assert first.constraint is not None
    assert first.constraint == second.constraint
    assert part in json.dumps(json.loads(first.constraint.grammar), ensure_ascii=False).replace(
        '\\"', '"'
    )


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_text_is_bound_by_nothing(served: Served, http: httpx.Client, route: str) -> None:
    served.engine.submitted.clear()
    assert ask(http, route, {"response_format": {"type": "text"}}).status_code == 200
    assert [request.constraint for request in served.engine.submitted] == [None]


@pytest.mark.parametrize("route", ["chat", "completions"])
@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "schema"),
        ({"guided_json": {"uniqueItems": True}}, "guided_json", "uniqueItems"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "regular"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "empty"),
        ({"guided_grammar": "start: y"}, "guided_grammar", "unknown name"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "guided_json"),
        ({"guided_regex": "a", "min_tokens": 1}, "min_tokens", "grammar"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "grammar"),
        ({"guided_regex": "a", "allowed_token_ids": [97]}, "allowed_token_ids", "grammar"),
        ({"guided_json": {"properties": {"x": {"not": {}}}}}, "guided_json", "properties.x.not"),
    ],
)
def test_what_is_wrong_is_a_400_of_openai_s_shape(
    http: httpx.Client, route: str, fields: dict[str, Any], param: str, word: str
) -> None:
    answer = ask(http, route, {**fields, "stream": True})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert word in error["message"]


def test_a_large_schema_is_read_in_another_process(served: Served, http: httpx.Client) -> None:
    served.engine.submitted.clear()
    names = [f"{i} " + "x" * 60 for i in range(2000)]
    assert ask(http, "chat", {"guided_choice": names}).status_code == 200
    (request,) = served.engine.submitted
    assert request.constraint is not None
    assert names[-1] in request.constraint.grammar


def test_where_only_the_prompt_is_looked_at_nothing_is_bound(
    served: Served, http: httpx.Client
) -> None:
    served.engine.submitted.clear()
    fields = {"guided_regex": "a", "echo": True, "max_tokens": 0}
    assert ask(http, "completions", fields).status_code == 200
    assert [request.constraint for request in served.engine.submitted] == [None]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (GrammarKind.JSON, {"json_schema": json.dumps(SCHEMA)}),
        (GrammarKind.JSON_OBJECT, {"json_object": True}),
        (GrammarKind.REGEX, {"regex": "a+"}),
        (GrammarKind.CHOICE, {"choice": {"values": ["a", "b"]}}),
        (GrammarKind.GRAMMAR, {"grammar": 'start: "a"'}),
        (GrammarKind.STRUCTURAL_TAG, {"structural_tag": json.dumps(TAG)}),
    ],
)
def test_every_kind_over_grpc(kind: GrammarKind, fields: dict[str, Any]) -> None:
    async def main() -> None:
        async with grpc_serving() as (stub, engine, plane, _):
            request = generate(max_tokens=2, n=2)
            request.structured_output.CopyFrom(inference_pb2.StructuredOutput(**fields))
            source = grammar_source(request)
            assert source is not None
            assert source.kind is kind
            await all_of(stub.Generate(request))
            expected = await plane.constraint(source)
            assert [it.constraint for it in engine.submitted] == [expected] * 2
            plane.grammars.close()

    asyncio.run(main())


def test_a_fault_over_grpc_is_an_invalid_argument() -> None:
    async def main() -> None:
        async with grpc_serving() as (stub, _, plane, _):
            for fields in ({"regex": "("}, {"json_object": False}, {}):
                request = generate(max_tokens=2)
                request.structured_output.CopyFrom(inference_pb2.StructuredOutput(**fields))
                request.structured_output.whitespace = 1
                error = await failure(all_of(stub.Generate(request)))
                assert error.code().name == "INVALID_ARGUMENT"
            plane.grammars.close()

    asyncio.run(main())


def test_whitespace_over_grpc() -> None:
    output = inference_pb2.StructuredOutput(json_object=True)
    message = inference_pb2.GenerateRequest(structured_output=output)

    def whitespace() -> Any:
        source = grammar_source(message)
        assert source is not None
        return source.whitespace

    assert whitespace() is Whitespace.ONE
    message.structured_output.whitespace = inference_pb2.StructuredOutput.WHITESPACE_ANY
    assert whitespace() is Whitespace.ANY
    message.structured_output.whitespace_pattern = " ?"
    assert whitespace() == " ?"
