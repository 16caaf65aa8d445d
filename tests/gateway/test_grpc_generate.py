"""`Generate` and the calls about text over real sockets: answers, errors, clients that leave."""

import asyncio

import grpc
import pytest

from jserve.gateway.prompts import PromptMaker
from jserve.proto import inference_pb2, types_pb2
from tests.gateway.fixtures import INFO, eventually
from tests.gateway.grpc_serving import PROMPT, all_of, failure, generate, serving


def test_generate_streams_text_that_joins_to_the_answer():
    async def main():
        async with serving() as (stub, engine, plane, _):
            num_prompt = len(plane.tokenizer.encode(PROMPT))
            request = generate(max_tokens=num_prompt + 2, request_id="mine", echo=True)
            messages = await all_of(stub.Generate(request))
            assert {m.request_id for m in messages} == {"mine"}
            text = "".join(m.text for m in messages)
            assert text == PROMPT + PROMPT + "Hello,"
            assert not any("\ufffd" in m.text for m in messages)
            last = messages[-1]
            assert last.finish_reason == types_pb2.FINISH_REASON_LENGTH
            assert last.usage.prompt_tokens == num_prompt
            assert last.usage.completion_tokens == num_prompt + 2
            assert sum(len(m.token_ids) for m in messages) == num_prompt + 2
            assert 0 < last.timings.ttft_s <= last.timings.total_s
            assert all(not m.HasField("usage") for m in messages[:-1])
            assert engine.aborted == []

    asyncio.run(main())


@pytest.mark.parametrize("n", [1, 3])
def test_usage_says_what_the_first_choice_found_of_the_prompt(n):
    async def main():
        async with serving(cached=lambda request: 32 - 16 * request.choice) as (stub, _, _, _):
            *others, last = await all_of(stub.Generate(generate(max_tokens=3, n=n)))
            assert last.usage.cached_tokens == 32
            assert not any(message.HasField("usage") for message in others)
        async with serving() as (stub, _, _, _):
            *_, last = await all_of(stub.Generate(generate(max_tokens=3, n=n)))
            assert last.HasField("usage")
            assert last.usage.cached_tokens == 0

    asyncio.run(main())


def test_every_sampling_field_reaches_the_engine():
    async def main():
        async with serving(any_priority=True) as (stub, engine, _, _):
            sampling = types_pb2.SamplingParams(
                temperature=0.5,
                top_k=7,
                top_p=0.25,
                min_p=0.125,
                repetition_penalty=1.5,
                presence_penalty=-1,
                frequency_penalty=2,
                logit_bias={5: -100, 3: 1.5},
                allowed_token_ids=[3, 4, 5],
                bad_token_ids=[4],
                seed=-(2**63),
                max_tokens=3,
                min_tokens=2,
                ignore_eos=True,
                stop_token_ids=[300],
                logprobs=2,
                prompt_logprobs=0,
            )
            messages = await all_of(stub.Generate(generate(sampling=sampling, priority=-4, n=2)))
            got = engine.submitted[1].sampling
            assert (got.temperature, got.top_k, got.top_p, got.min_p) == (0.5, 7, 0.25, 0.125)
            assert (got.presence_penalty, got.frequency_penalty) == (-1, 2)
            assert got.repetition_penalty == 1.5
            assert got.logit_bias == ((3, 1.5), (5, -100.0))
            assert (got.allowed_token_ids, got.bad_token_ids) == ((3, 4, 5), (4,))
            assert (got.seed, got.max_tokens, got.min_tokens) == (-(2**63), 3, 2)
            assert (got.ignore_eos, got.stop_token_ids) == (True, (300,))
            assert (got.logprobs, got.prompt_logprobs) == (2, 0)
            assert [r.choice for r in engine.submitted] == [0, 1]
            assert {r.priority for r in engine.submitted} == {-4}
            first = next(m for m in messages if m.index == 1)
            chosen = first.logprobs[0].chosen
            assert (chosen.token, chosen.raw) == ("Hello", b"Hello")
            assert [top.token_id for top in first.logprobs[0].top] == [
                chosen.token_id,
                chosen.token_id + 1,
            ]
            assert not first.prompt_logprobs[0].HasField("chosen")
            assert first.prompt_logprobs[1].chosen.token_id == engine.submitted[0].prompt[1]

    asyncio.run(main())


def test_a_cache_salt_is_the_given_one_or_that_of_the_key():
    async def main():
        async with serving(api_keys=("one", "two")) as (stub, engine, _, _):
            for key, fields in (
                ("one", {}),
                ("one", {"cache_salt": "shared"}),
                ("two", {}),
                ("two", {"cache_salt": "shared"}),
            ):
                metadata = (("authorization", f"Bearer {key}"),)
                await all_of(stub.Generate(generate(max_tokens=1, **fields), metadata=metadata))
            one, given, two, given_by_two = (request.cache_salt for request in engine.submitted)
            assert given == given_by_two == "given:shared"
            assert one != two
            assert one.startswith("tenant:")
            assert two.startswith("tenant:")
        async with serving() as (stub, engine, _, _):
            await all_of(stub.Generate(generate(max_tokens=1)))
            assert engine.submitted[0].cache_salt == ""

    asyncio.run(main())


def test_unset_fields_take_defaults_and_unseeded_requests_differ():
    async def main():
        async with serving() as (stub, engine, _, _):
            for _ in range(2):
                await all_of(stub.Generate(generate()))
            first, second = (r.sampling for r in engine.submitted)
            assert (first.temperature, first.top_k, first.ignore_eos) == (1.0, 0, False)
            assert first.max_tokens == INFO.max_model_len - len(engine.submitted[0].prompt)
            assert first.seed != second.seed
            assert first.logprobs is None

    asyncio.run(main())


def test_stop_string_across_tokens_cuts_text_and_usage_and_aborts():
    async def main():
        async with serving(step_s=0.001) as (stub, engine, plane, _):
            messages = await all_of(stub.Generate(generate(stop=["nope", "好 👍"], n=2)))
            for index in (0, 1):
                mine = [m for m in messages if m.index == index]
                assert "".join(m.text for m in mine) == "Hello, 你"
                assert mine[-1].finish_reason == types_pb2.FINISH_REASON_STOP
                assert mine[-1].stop_reason == "好 👍"
                ids = [i for m in mine for i in m.token_ids]
                assert plane.tokenizer.decode(ids) == "Hello, 你好 👍"
            assert messages[-1].usage.completion_tokens == 2 * len(ids)
            assert len(engine.aborted) == 2
            assert plane.num_live == 0

    asyncio.run(main())


@pytest.mark.parametrize("include", [None, False, True])
def test_stop_string_stays_in_the_text_where_asked(include):
    async def main():
        async with serving() as (stub, _, _, _):
            asked = {} if include is None else {"include_stop_str_in_output": include}
            request = generate("ab STOP cd", stop=["STOP"], max_tokens=60, **asked)
            messages = await all_of(stub.Generate(request))
            text = "".join(m.text for m in messages)
            assert text == ("ab STOP" if include else "ab ")
            assert messages[-1].stop_reason == "STOP"

    asyncio.run(main())


def test_chat_tokenize_detokenize_and_models():
    async def main():
        async with serving(served_model_name="public") as (stub, engine, plane, _):
            chat = inference_pb2.Chat(
                messages=[inference_pb2.ChatMessage(role="user", content="Hi")]
            )
            rendered = "[user] Hi\n[assistant] "
            tokens = await stub.Tokenize(inference_pb2.TokenizeRequest(chat=chat, model="public"))
            assert tokens.max_model_len == INFO.max_model_len
            text = await stub.Detokenize(
                inference_pb2.DetokenizeRequest(token_ids=tokens.token_ids)
            )
            assert text.text == rendered
            plain = await stub.Tokenize(inference_pb2.TokenizeRequest(text=rendered))
            assert plain.token_ids == tokens.token_ids
            request = inference_pb2.GenerateRequest(chat=chat)
            request.sampling.max_tokens = 1
            await all_of(stub.Generate(request))
            assert engine.submitted[0].prompt == tuple(tokens.token_ids)
            ids = inference_pb2.GenerateRequest(token_ids={"ids": [5, 6]})
            ids.sampling.max_tokens = 1
            await all_of(stub.Generate(ids))
            assert engine.submitted[1].prompt == (5, 6)
            models = await stub.ListModels(inference_pb2.ListModelsRequest())
            assert [(m.id, m.max_model_len) for m in models.models] == [("public", 512)]
            plane.prompts.close()
            plane.prompts = PromptMaker(plane.tokenizer, None, plane.config, lambda: plane.info)
            error = await failure(stub.Tokenize(inference_pb2.TokenizeRequest(chat=chat)))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "no chat template" in error.details()

    asyncio.run(main())


BAD = {
    "empty": (generate(""), "INVALID_ARGUMENT", "prompt is empty"),
    "no input": (inference_pb2.GenerateRequest(), "INVALID_ARGUMENT", "no input"),
    "model": (generate(model="gpt-9"), "NOT_FOUND", "'gpt-9' is not served here; 'tiny' is"),
    "temperature": (
        generate(sampling=types_pb2.SamplingParams(temperature=-1)),
        "INVALID_ARGUMENT",
        "temperature must be from 0 to 100",
    ),
    "nan": (
        generate(sampling=types_pb2.SamplingParams(top_p=float("nan"))),
        "INVALID_ARGUMENT",
        "top_p must be above 0 and at most 1, not nan",
    ),
    "ids": (
        inference_pb2.GenerateRequest(token_ids={"ids": [5, 410]}),
        "INVALID_ARGUMENT",
        "prompt holds 410; token ids of this model are integers from 0 to 409",
    ),
    "too long": (generate("x" * 600), "INVALID_ARGUMENT", "the prompt has 600 tokens"),
    "max_tokens": (
        generate("xyz", max_tokens=510),
        "INVALID_ARGUMENT",
        "maximum context length is 512 tokens, which 3 prompt tokens + max_tokens 510 = 513 exceed",
    ),
    "n": (generate(n=-1), "INVALID_ARGUMENT", "n must be from 1 to"),
    "stop": (generate(stop=[""]), "INVALID_ARGUMENT", "stop string has 0 characters"),
    "id": (generate(request_id="a\nb"), "INVALID_ARGUMENT", "printable ASCII"),
    "empty salt": (generate(cache_salt=""), "INVALID_ARGUMENT", "cache_salt must be a text of 1"),
    "salt": (generate(cache_salt="s" * 257), "INVALID_ARGUMENT", "cache_salt must be a text of 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_request_gets_a_typed_error_and_the_next_one_an_answer(case):
    request, code, message = BAD[case]

    async def main():
        async with serving() as (stub, engine, plane, _):
            error = await failure(all_of(stub.Generate(request)))
            assert error.code() is grpc.StatusCode[code]
            assert message in error.details()
            assert engine.submitted == []
            assert await all_of(stub.Generate(generate(max_tokens=2)))
            assert plane.num_live == 0

    asyncio.run(main())


def test_overload_and_absence_say_when_to_retry():
    async def main():
        async with serving(step_s=60) as (stub, engine, _, _):
            calls = [stub.Generate(generate()) for _ in range(12)]
            await eventually(lambda: len(engine.submitted) == 12)
            error = await failure(all_of(stub.Generate(generate())))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert dict(error.trailing_metadata())["retry-after"] == "1"
            engine.crash()
            for call in calls:
                error = await failure(all_of(call))
                assert error.code() is grpc.StatusCode.INTERNAL
                assert "engine stopped" in error.details()
            error = await failure(all_of(stub.Generate(generate())))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert "retry-after" in dict(error.trailing_metadata())

    asyncio.run(main())


@pytest.mark.parametrize("how", ["cancel", "deadline", "disconnect"])
def test_client_that_goes_away_aborts_every_choice(how):
    async def main():
        async with serving(step_s=0.005) as (stub, engine, plane, channel):
            request = generate(n=3)
            call = stub.Generate(request, timeout=0.1 if how == "deadline" else None)
            await anext(aiter(call))
            assert engine.stats.num_running == 3
            # The engine drops them by itself, too, if this process should not live to say so.
            deadlines = {sent.deadline_s for sent in engine.submitted}
            if how == "deadline":
                assert 0 < deadlines.pop() <= 0.1
            else:
                assert deadlines == {None}
            if how == "cancel":
                call.cancel()
            elif how == "disconnect":
                await channel.close()
            else:
                error = await failure(all_of(call))
                assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await eventually(lambda: len(engine.aborted) == 3)
            assert engine.stats.num_running == 0
            assert plane.num_live == 0

    asyncio.run(main())


def test_slow_reader_is_held_back_and_slows_nobody():
    def long_answer(request):
        return [5 + i % 300 for i in range(request.sampling.max_tokens)]

    async def main():
        # Large answers per token and a small window fill the transport soon.
        options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
        async with serving(reply=long_answer, channel_options=options) as (stub, engine, _, _):
            sampling = types_pb2.SamplingParams(logprobs=20, ignore_eos=True)
            slow = stub.Generate(generate(sampling=sampling))
            await anext(aiter(slow))
            await eventually(lambda: engine.stats.num_running == 0)
            quick = await all_of(stub.Generate(generate(max_tokens=3)))
            assert quick[-1].usage.completion_tokens == 3
            rest = await all_of(slow)
            num_tokens = 512 - len(engine.submitted[0].prompt)
            assert rest[-1].usage.completion_tokens == num_tokens
            # Everything that waited for the reader came, in few, large messages.
            assert max(len(m.token_ids) for m in rest) > 20
            assert sum(len(m.logprobs) for m in rest) == num_tokens - 1

    asyncio.run(main())
