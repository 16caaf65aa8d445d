"""Chats over gRPC: tools, reasoning, replayed calls, prefills, and fields that are wrong."""

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import grpc
import pytest

from jserve.core.clock import WallClock
from jserve.core.request import EngineInfo
from jserve.gateway.chat import ChatTemplate
from jserve.gateway.defaults import SamplingDefaults
from jserve.gateway.fake_engine import FakeEngine
from jserve.gateway.request_plane import RequestPlane
from jserve.proto import inference_pb2, types_pb2
from tests.gateway.fixtures import CONFIG
from tests.gateway.grpc_serving import all_of, failure, serving_plane
from tests.gateway.http.agent_serving import TEMPLATE, WEATHER, call_text
from tests.gateway.http.http_serving import END, byte_tokenizer

INFO = EngineInfo(
    model="agent",
    vocab=END + 1,
    max_model_len=4096,
    num_slots=4,
    num_pages=1000,
    page_size=16,
    max_queue=8,
    eos_token_ids=(END,),
)
TOOL = inference_pb2.Tool(name="weather", description="By city.", parameters=json.dumps(WEATHER))
CALL = call_text("weather", '{"city": "Köln"}')
AUTO, NONE = inference_pb2.ToolChoice.MODE_AUTO, inference_pb2.ToolChoice.MODE_NONE
REQUIRED, NAMED = inference_pb2.ToolChoice.MODE_REQUIRED, inference_pb2.ToolChoice.MODE_NAMED
STOP = types_pb2.FINISH_REASON_STOP


@asynccontextmanager
async def chatting(says="ok", **config):
    """Serves a model that always says the same, one byte a token; yields (stub, engine, plane)."""
    engine = FakeEngine(INFO, reply=lambda request: [*says.encode(), END])
    plane = RequestPlane(
        tokenizer=byte_tokenizer(),
        chat_template=ChatTemplate(TEMPLATE, special_tokens={}),
        defaults=SamplingDefaults(),
        engine=engine,
        config=replace(CONFIG, **config),
        clock=WallClock(),
    )
    async with serving_plane(plane, engine) as (stub, _, _, _):
        yield stub, engine, plane


def asking(text="Hi", *, messages=None, request=None, **chat):
    messages = messages or [inference_pb2.ChatMessage(role="user", content=text)]
    given = inference_pb2.Chat(messages=messages, **chat)
    return inference_pb2.GenerateRequest(chat=given, **(request or {}))


@dataclass
class Answer:
    """The joined pieces of one choice."""

    text: str = ""
    reasoning: str = ""
    calls: list = field(default_factory=list)  # [id, name, arguments] of each
    num_pieces: int = 0  # of calls
    last: inference_pb2.GenerateResponse | None = None

    def add(self, response):
        self.text += response.text
        self.reasoning += response.reasoning
        for piece in response.tool_calls:
            self.num_pieces += 1
            if piece.index == len(self.calls):
                self.calls.append([piece.id, piece.name, ""])
            else:
                assert not piece.id
                assert not piece.name
            self.calls[piece.index][2] += piece.arguments
        self.last = response


async def answers(stub, request, n=1):
    found = [Answer() for _ in range(n)]
    for response in await all_of(stub.Generate(request)):
        found[response.index].add(response)
    return found


async def answer(stub, request):
    (found,) = await answers(stub, request)
    return found


def prompt_of(engine):
    return bytes(engine.submitted[-1].prompt).decode()


def grammar_of(engine):
    constraint = engine.submitted[-1].constraint
    return "" if constraint is None else constraint.grammar


def test_calls_come_in_pieces_apart_from_the_text():
    async def main():
        async with chatting("Let me see. " + CALL + CALL) as (stub, engine, _):
            both = await answers(stub, asking(tools=[TOOL], request={"n": 2}), n=2)
            assert '"name": "weather"' in prompt_of(engine)
            for found in both:
                assert found.text.strip() == "Let me see."
                assert [name for _, name, _ in found.calls] == ["weather"] * 2
                for _, _, arguments in found.calls:
                    assert json.loads(arguments) == {"city": "Köln"}
                assert found.num_pieces >= 2
                assert found.last.finish_reason == STOP
                assert found.last.finished_with_calls
            assert len({call[0] for found in both for call in found.calls}) == 4
            plain = await answer(stub, asking())
            assert plain.text == "Let me see. " + CALL + CALL
            assert plain.calls == []
            assert not plain.last.finished_with_calls

    asyncio.run(main())


@pytest.mark.parametrize(
    ("mode", "name", "binds", "ends_with_calls"),
    [(AUTO, "", False, True), (REQUIRED, "", True, True), (NAMED, "weather", True, False)],
)
def test_required_and_named_calls_bind_the_answer(mode, name, binds, ends_with_calls):
    async def main():
        async with chatting(CALL) as (stub, engine, _):
            choice = inference_pb2.ToolChoice(mode=mode, name=name)
            found = await answer(stub, asking(tools=[TOOL], tool_choice=choice))
            assert len(found.calls) == 1
            assert found.last.finished_with_calls is ends_with_calls
            assert ("weather" in grammar_of(engine)) is binds

    asyncio.run(main())


def test_strict_tools_one_call_and_no_tools_at_all():
    async def main():
        async with chatting(CALL) as (stub, engine, _):
            strict = inference_pb2.Tool(strict=True)
            strict.MergeFrom(TOOL)
            await answer(stub, asking(tools=[strict]))
            assert "city" in grammar_of(engine)
            required = inference_pb2.ToolChoice(mode=REQUIRED)
            await answer(stub, asking(tools=[TOOL], tool_choice=required))
            several = grammar_of(engine)
            one = asking(tools=[TOOL], tool_choice=required, parallel_tool_calls=False)
            await answer(stub, one)
            assert grammar_of(engine) != several
            none = inference_pb2.ToolChoice(mode=NONE)
            found = await answer(stub, asking(tools=[TOOL], tool_choice=none))
            assert found.text == CALL
            assert "weather" not in prompt_of(engine)

    asyncio.run(main())


def test_reasoning_is_apart_counted_and_left_out():
    async def main():
        async with chatting("<think>\nHm.\n</think>\n\nYes." + CALL) as (stub, engine, _):
            found = await answer(stub, asking(tools=[TOOL], max_reasoning_tokens=9))
            assert found.reasoning.strip() == "Hm."
            assert found.text == "Yes."
            assert len(found.calls) == 1
            num_reasoning = found.last.usage.reasoning_tokens
            assert 3 <= num_reasoning < found.last.usage.completion_tokens
            assert engine.submitted[-1].constraint.max_reasoning_tokens == 9
            found = await answer(stub, asking(tools=[TOOL], include_reasoning=False))
            assert (found.reasoning, found.text) == ("", "Yes.")
            assert found.last.usage.reasoning_tokens == num_reasoning

    asyncio.run(main())


def test_calls_answers_and_reasoning_are_replayed():
    async def main():
        call = inference_pb2.ToolCall(id="call_1", name="weather", arguments='{"city":"Köln"}')
        messages = [
            inference_pb2.ChatMessage(role="user", content="Hi", name="Ada"),
            inference_pb2.ChatMessage(role="assistant", tool_calls=[call], reasoning="Hm."),
            inference_pb2.ChatMessage(role="tool", tool_call_id="call_1", content="rain"),
        ]
        async with chatting() as (stub, engine, _):
            await answer(stub, asking(messages=messages, tools=[TOOL]))
            prompt = prompt_of(engine)
            assert "user Ada: Hi\n" in prompt
            assert "<think>Hm.</think>" in prompt
            assert '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}' in prompt
            assert prompt.endswith("tool: rain\nassistant:")
            chat = inference_pb2.Chat(messages=messages, tools=[TOOL])
            tokens = await stub.Tokenize(inference_pb2.TokenizeRequest(chat=chat))
            assert tuple(tokens.token_ids) == engine.submitted[-1].prompt

    asyncio.run(main())


def test_what_a_template_reads():
    async def main():
        async with chatting() as (stub, engine, _):
            await answer(stub, asking(template_variables='{"enable_thinking": false}'))
            assert prompt_of(engine) == "user: Hi\nassistant:<think></think>"
            await answer(stub, asking(add_generation_prompt=False))
            assert prompt_of(engine) == "user: Hi\n"
            shows = "{{ documents[0].title }}|{{ messages[0].content }}"
            await answer(stub, asking(documents=['{"title": "T"}'], chat_template=shows))
            assert prompt_of(engine) == "T|Hi"
            begun = [
                inference_pb2.ChatMessage(role="user", content="Hi"),
                inference_pb2.ChatMessage(role="assistant", content="Well,"),
            ]
            await answer(stub, asking(messages=begun, continue_final_message=True))
            assert prompt_of(engine) == "user: Hi\nassistant: Well,"

    asyncio.run(main())


def test_an_echoed_prompt_is_text_whatever_it_holds():
    async def main():
        async with chatting(CALL) as (stub, engine, _):
            request = {"echo": True, "n": 2}
            for found in await answers(stub, asking(CALL, tools=[TOOL], request=request), n=2):
                assert found.text == prompt_of(engine)
                assert len(found.calls) == 1
            request["sampling"] = types_pb2.SamplingParams(max_tokens=0)
            for found in await answers(stub, asking(tools=[TOOL], request=request), n=2):
                assert found.text == prompt_of(engine)
                assert found.calls == []

    asyncio.run(main())


@pytest.mark.parametrize("fit", [False, True])
def test_a_structured_output_may_have_to_fit(fit):
    async def main():
        output = inference_pb2.StructuredOutput(json_schema='{"type": "boolean"}', fit=fit)
        async with chatting("true") as (stub, engine, _):
            request = asking(request={"structured_output": output})
            assert (await answer(stub, request)).text == "true"
            assert engine.submitted[-1].constraint.fit is fit
            text = inference_pb2.GenerateRequest(text="Hi", structured_output=output)
            await all_of(stub.Generate(text))
            assert engine.submitted[-1].constraint.fit is fit

    asyncio.run(main())


def test_a_stream_of_chats():
    async def main():
        async with chatting(CALL) as (stub, _, _):
            request = asking(tools=[TOOL], request={"request_id": "a"})
            bad = asking(documents=["["], request={"request_id": "b"})
            stream = stub.GenerateStream(
                iter([inference_pb2.GenerateStreamRequest(start=it) for it in (request, bad)])
            )
            found, errors = Answer(), []
            async for response in stream:
                if response.request_id == "a":
                    found.add(response)
                else:
                    errors.append(response.error.message)
            assert len(found.calls) == 1
            (error,) = errors
            assert error.startswith("documents[0] is not JSON")

    asyncio.run(main())


DEEP = '{"a":' * 40 + "1" + "}" * 40


def tool(**fields):
    return [inference_pb2.Tool(**{"name": "f", **fields})]


def replayed(arguments):
    calls = [inference_pb2.ToolCall(name="f", arguments=arguments)]
    return [inference_pb2.ChatMessage(role="assistant", tool_calls=calls)]


BAD = {
    "parameters": (asking(tools=tool(parameters="{")), "tools[0].parameters is not JSON"),
    "list": (asking(tools=tool(parameters="[]")), "tools[0].parameters must be the JSON text of"),
    "deep": (asking(tools=tool(parameters=DEEP)), "tools[0].parameters is nested deeper than 32"),
    "deeper": (asking(template_variables="[" * 100_000), "template_variables is not JSON"),
    "large": (
        asking(template_variables='{"a": "' + "x" * (1 << 20) + '"}'),
        "template_variables has 1048585 characters; at most 1048576",
    ),
    "server's": (
        asking(template_variables='{"tools": [1]}'),
        "template_variables.tools: not supported yet",
    ),
    "document": (asking(documents=["{}", "1"]), "documents[1] must be the JSON text of an object"),
    "name": (asking(tools=tool(name="a b")), "tools[0].name must have 1 to 128 letters"),
    "twice": (
        asking(tools=tool() + tool()),
        "tools[1].name: there is another tool of the name 'f'",
    ),
    "many": (asking(tools=tool() * 513), "tools has 513 tools; at most 512"),
    "no tools": (asking(tool_choice={"mode": REQUIRED}), "there are no tools"),
    "other": (asking(tools=tool(), tool_choice={"mode": NAMED, "name": "g"}), "names 'g'"),
    "unnamed": (asking(tools=tool(), tool_choice={"mode": NAMED}), "tool_choice.name goes with"),
    "auto": (asking(tools=tool(), tool_choice={"name": "f"}), "tool_choice.name goes with"),
    "mode": (asking(tools=tool(), tool_choice={"mode": 9}), "tool_choice.mode 9 is unknown"),
    "budget": (asking(max_reasoning_tokens=-1), "max_reasoning_tokens must be at least 0, not -1"),
    "prompt": (
        asking(add_generation_prompt=True, continue_final_message=True),
        "continue_final_message and add_generation_prompt exclude each other",
    ),
    "replayed": (
        asking(messages=replayed("{")),
        "messages[0].tool_calls[0].function.arguments is not JSON",
    ),
    "replayed list": (asking(messages=replayed("[1]")), "must be a JSON object"),
    "replayed deep": (
        asking(messages=replayed('{"a":' * 70 + "1" + "}" * 70)),
        "arguments is nested deeper than 64",
    ),
    "role": (
        asking(
            messages=[inference_pb2.ChatMessage(role="user", tool_calls=[{"name": "f"}])],
        ),
        "only an assistant's message has calls",
    ),
    "twice bound": (
        asking(tools=tool(), request={"structured_output": {"regex": "a"}}),
        "structured_output.regex beside tools binds the answer twice",
    ),
}


def test_what_is_wrong_is_named():
    async def main():
        async with chatting() as (stub, engine, _):
            for name, (request, fault) in BAD.items():
                error = await failure(all_of(stub.Generate(request)))
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, name
                assert fault in error.details(), name
            assert engine.submitted == []
        async with chatting(tool_parser="none") as (stub, _, _):
            error = await failure(all_of(stub.Generate(asking(tools=[TOOL]))))
            assert "takes no tools" in error.details()

    asyncio.run(main())
