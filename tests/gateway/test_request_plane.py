"""The request plane over a scripted engine: choices, merging, ends of every kind."""

import asyncio

import pytest

from jserve.core.errors import (
    EngineError,
    Overloaded,
    PromptTooLong,
    RequestError,
    Unavailable,
    UnknownModel,
)
from jserve.core.request import FinishReason
from jserve.gateway.fake_engine import FakeEngine
from jserve.gateway.request_plane import Prompt
from jserve.gateway.tenants import Caller
from jserve.gateway.validation import SamplingFields
from tests.gateway.fixtures import INFO, closing, eventually, make_plane


def run(scenario, **engine_options):
    """Runs `scenario(plane, engine)` in a loop of its own."""

    async def main():
        async with closing(FakeEngine(INFO, **engine_options)) as engine:
            await scenario(make_plane(engine), engine)

    asyncio.run(main())


def prepare(plane, *, text="Hello ", max_tokens=5, **fields):
    sampling = fields.pop("sampling", {})
    return plane.prepare(
        id="g",
        prompt=Prompt(tuple(plane.tokenizer.encode(text)), text),
        sampling=SamplingFields(max_tokens=max_tokens, **sampling),
        **fields,
    )


def test_choices_interleave_and_all_end():
    async def scenario(plane, engine):
        deltas = [p async for p in plane.run(prepare(plane, n=3))]
        for index in range(3):
            mine = [p for p in deltas if p.index == index]
            assert [p.finish for p in mine][-1] is FinishReason.LENGTH
            assert sum(len(p.token_ids) for p in mine) == 5
            assert mine[0].ttft_s is not None
            assert mine[0].queue_s == 0.0
            assert all(p.ttft_s is None for p in mine[1:])
        assert {p.index for p in deltas[:3]} == {0, 1, 2}
        assert len({r.id for r in engine.submitted}) == 3
        assert len({r.sampling.seed for r in engine.submitted}) == 1
        assert (plane.num_live, engine.aborted) == (0, [])

    run(scenario)


def test_reader_that_pauses_gets_one_merged_piece():
    async def scenario(plane, engine):
        deltas = plane.run(prepare(plane, max_tokens=400, sampling={"logprobs": 0}))
        first = await anext(deltas)
        await eventually(lambda: engine.stats.num_running == 0)
        second = await anext(deltas)
        assert len(first.token_ids) + len(second.token_ids) == 400
        assert len(second.logprobs) == len(second.token_ids)
        assert second.finish is FinishReason.LENGTH
        with pytest.raises(StopAsyncIteration):
            await anext(deltas)

    run(scenario)


def test_a_tenant_who_does_not_read_ends_no_request_of_another():
    async def main():
        async with closing(FakeEngine(INFO)) as engine:
            plane = make_plane(engine, max_buffer_bytes=4900)  # a token takes 4
            ann, bob = Caller("ann"), Caller("bob")
            unread = [plane.run(prepare(plane, max_tokens=400, caller=bob)) for _ in range(2)]
            await eventually(lambda: engine.stats.num_steps == 400)
            larger = plane.run(prepare(plane, max_tokens=450, caller=ann))
            await eventually(lambda: engine.stats.num_steps == 850)
            assert sum([len(delta.token_ids) async for delta in larger]) == 450
            results = await asyncio.gather(*(anext(it) for it in unread), return_exceptions=True)
            assert [isinstance(it, Overloaded) for it in results].count(True) == 1

    asyncio.run(main())


def test_a_timeout_while_waiting_loses_nothing():
    async def scenario(plane, engine):
        deltas = plane.run(prepare(plane, text="abc", max_tokens=3))
        text, timeouts = "", 0
        while True:
            try:
                text += (await asyncio.wait_for(anext(deltas), 0.005)).text
            except TimeoutError:
                timeouts += 1
            except StopAsyncIteration:
                break
        assert text == "abc"
        assert timeouts > 0

    run(scenario, step_s=0.02)


def test_closing_aborts_and_ends_a_pending_read():
    async def scenario(plane, engine):
        deltas = plane.run(prepare(plane, n=2))
        reading = asyncio.create_task(anext(deltas, None))
        await asyncio.sleep(0)
        deltas.close()
        deltas.close()
        assert await reading is None
        assert len(engine.aborted) == 2
        assert plane.num_live == 0
        assert await plane.drain(0)

    run(scenario, step_s=60)


def test_stopped_choice_is_aborted_alone():
    def reply(request):
        return [5 + request.choice] * 50

    async def scenario(plane, engine):
        asked = prepare(plane, n=2, max_tokens=50, stop=plane.tokenizer.token_text(6) * 2)
        deltas = [p async for p in plane.run(asked)]
        counts = [sum(len(p.token_ids) for p in deltas if p.index == i) for i in (0, 1)]
        assert counts == [50, 2]
        assert len(engine.aborted) == 1

    run(scenario, reply=reply)


def test_prompt_only_and_echo():
    async def scenario(plane, engine):
        asked = prepare(plane, text="Hello", max_tokens=0, echo=True)
        (delta,) = [p async for p in plane.run(asked)]
        assert (delta.text, delta.token_ids) == ("Hello", ())
        assert delta.finish is FinishReason.LENGTH
        with pytest.raises(RequestError, match="max_tokens"):
            prepare(plane, max_tokens=0)

    run(scenario)


def test_the_salt_reaches_every_choice_and_is_text_that_can_be_sent():
    async def scenario(plane, engine):
        assert [p async for p in plane.run(prepare(plane, n=2, cache_salt="s" * 256))]
        assert [it.cache_salt for it in engine.submitted] == ["given:" + "s" * 256] * 2
        for wrong in ("", "s" * 257, "half \ud800", b"bytes", 0):
            with pytest.raises(RequestError, match="cache_salt must be a text") as caught:
                prepare(plane, cache_salt=wrong)
            assert caught.value.param == "cache_salt"

    run(scenario)


def test_errors_of_the_engine_reach_the_reader():
    async def scenario(plane, engine):
        held = plane.run(prepare(plane, n=12))
        with pytest.raises(Overloaded):
            await anext(plane.run(prepare(plane)))
        engine.crash()
        with pytest.raises(EngineError):
            await anext(held)
        with pytest.raises(Unavailable):
            plane.run(prepare(plane))
        assert not plane.ready
        assert plane.num_live == 0
        engine.restart()
        assert plane.ready

    run(scenario, step_s=60)


def test_before_the_engine_was_seen_nothing_is_accepted():
    async def scenario(plane, engine):
        engine.info = None
        with pytest.raises(Unavailable, match="loading"):
            prepare(plane)
        assert plane.model_name == ""

    run(scenario)


def test_names_prompts_and_ids_are_checked():
    async def scenario(plane, engine):
        plane.check_model("tiny")
        plane.check_model("")
        plane.check_model(None)
        with pytest.raises(UnknownModel, match="'x' is not served here; 'tiny' is"):
            plane.check_model("x")
        with pytest.raises(RequestError, match="lone surrogate at character 1"):
            await plane.prompts.of_text("a\ud800")
        for bad in ("", "a" * 129, "é", "a\n"):
            with pytest.raises(RequestError, match="request id"):
                plane.prepare(id=bad, prompt=Prompt((5,)), sampling=SamplingFields())
        with pytest.raises(RequestError, match="n must be from 1 to 12"):
            prepare(plane, n=13)
        with pytest.raises(PromptTooLong, match="at least"):
            await plane.prompts.of_text("x" * 10**6)
        chat = await plane.prompts.of_chat([{"role": "user", "content": "<s>x"}])
        assert chat.text == "[user] <s>x\n[assistant] "
        assert chat.ids.count(0) == 1

    run(scenario)
