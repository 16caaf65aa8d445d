"""Requests outlive their engine: the next one continues them, and nobody sees a difference."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from jserve.core.errors import EngineError, Overloaded, Unavailable
from jserve.core.request import EngineInfo, FinishReason, Request, SamplingParams, SequenceUpdate
from jserve.core.stats import EngineStats
from jserve.engine.worker.session_server import serve_sessions
from jserve.gateway import grpc_engine_client
from jserve.gateway.engine_client import UpdateStream
from jserve.gateway.grpc_engine_client import GrpcEngineClient
from jserve.gateway.request_plane import Prompt
from jserve.gateway.validation import SamplingFields
from tests.gateway.fixtures import (
    INFO,
    LoopThread,
    closing,
    eventually,
    make_plane,
    unix_address,
)

ROOMY = replace(INFO, num_slots=2, max_queue=2)


def scripted(request: Request) -> list[int]:
    """Different tokens for every choice, at every position."""
    return [(7 * i + 31 * request.choice + request.prompt[0]) % 400 + 5 for i in range(100)]


def request(name: str, max_tokens: int = 40, **sampling: object) -> Request:
    params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return Request(id=name, prompt=(7, 8, 9), sampling=params)


class Site:
    """An address at which engines live, one after the other, and a gateway's client of it."""

    def __init__(self, resume_wait_s: float = 10.0) -> None:
        self.address = unix_address()
        self.client = GrpcEngineClient(self.address, reconnect_s=0.01, resume_wait_s=resume_wait_s)

    @asynccontextmanager
    async def engine(self, info: EngineInfo = ROOMY) -> AsyncIterator[LoopThread]:
        """An engine whose sequences make no step before `paused` is cleared."""
        loop = LoopThread(info, scripted)
        loop.paused.set()
        loop.step_s = 0.005
        with loop.running():
            server = await serve_sessions(self.address, info, loop.inbox, loop.outbox)
            await asyncio.wait_for(self.client.wait_ready(), 5)
            yield loop
            await server.stop()
            await eventually(lambda: not self.client.ready)


def run(main: Callable[[Site], Awaitable[None]], resume_wait_s: float = 10.0) -> None:
    async def start() -> None:
        site = Site(resume_wait_s)
        site.client.start()
        async with closing(site.client):
            await asyncio.wait_for(main(site), 30)

    asyncio.run(start())


async def take(stream: UpdateStream, num_tokens: int) -> list[SequenceUpdate]:
    updates: list[SequenceUpdate] = []
    while sum(len(update.tokens) for update in updates) < num_tokens:
        updates.append(await anext(stream))
    return updates


def tokens(updates: list[SequenceUpdate], name: str = "a") -> list[int]:
    return [token for it in updates if it.request_id == name for token in it.tokens]


def test_a_stream_goes_on_in_the_next_engine_again_and_again() -> None:
    async def main(site: Site) -> None:
        updates: list[SequenceUpdate] = []
        stream = None
        for _ in range(3):
            async with site.engine() as loop:
                if stream is None:
                    stream = site.client.submit([request("a", logprobs=1)])
                loop.paused.clear()
                updates += await take(stream, 5)
                loop.paused.set()
        async with site.engine() as loop:
            loop.paused.clear()
            assert stream is not None
            updates += [update async for update in stream]
        assert tokens(updates) == scripted(request("a"))[:40]
        scored = [it.token_id for update in updates for it in update.logprobs or ()]
        assert scored == tokens(updates)
        assert [update.finish for update in updates if update.finish] == [FinishReason.LENGTH]
        assert len([update for update in updates if update.queue_s is not None]) == 1

    run(main)


def test_the_next_engine_gets_the_tokens_as_output_and_refuses_nobody() -> None:
    async def main(site: Site) -> None:
        async with site.engine() as first:
            streams = [site.client.submit([request(f"r{i}", prompt_logprobs=1)]) for i in range(4)]
            first.paused.clear()
            updates = await take(streams[0], 3)
            first.paused.set()
        async with site.engine(replace(ROOMY, max_queue=0)) as second:
            await eventually(lambda: second.num_added == 4)
            requests = [it.request for it in second.sequences.waiting]
            assert all(it.resumed for it in requests)
            # Beyond what the client has read, the gateway may have received more.
            output = requests[0].output
            assert list(output[:3]) == tokens(updates, "r0")
            assert list(output) == scripted(requests[0])[: len(output)]
            assert [it.id.split(".")[0] for it in requests] == ["r0", "r1", "r2", "r3"]
            second.paused.clear()
            for number, stream in enumerate(streams):
                rest = [update async for update in stream]
                whole = (updates if number == 0 else []) + rest
                assert tokens(whole, f"r{number}") == scripted(request("a"))[:40]
                assert len([it for it in whole if it.prompt_logprobs is not None]) == 1

    run(main)


def test_the_engines_own_failure_is_a_death_like_any_other() -> None:
    """Its loop reports the failure to every sequence before the process ends."""

    async def main(site: Site) -> None:
        async with site.engine() as first:
            stream = site.client.submit([request("a")])
            await eventually(lambda: first.num_live == 1)
            name = first.sequences.waiting[0].request.id
            failed = SequenceUpdate(name, (), FinishReason.ERROR, error="the device is on fire")
            first.outbox.post([failed], EngineStats(num_steps=1))
            await asyncio.sleep(0.05)
        async with site.engine() as second:
            second.paused.clear()
            assert tokens([update async for update in stream]) == scripted(request("a"))[:40]

    run(main)


def test_those_that_were_aborted_meanwhile_are_not_resumed() -> None:
    async def main(site: Site) -> None:
        async with site.engine():
            gone = site.client.submit([request("gone")])
            kept = site.client.submit([request("kept"), request("dropped")])
        gone.close()
        kept.drop("dropped")
        async with site.engine() as second:
            second.paused.clear()
            updates = [update async for update in kept]
            assert {update.request_id for update in updates} == {"kept"}
            assert second.num_added == 1
        assert len(site.client._streams) == 0

    run(main)


def test_nobody_waits_longer_than_the_deadline() -> None:
    async def main(site: Site) -> None:
        async with site.engine() as loop:
            begun, queued = (site.client.submit([request(name)]) for name in "ab")
            loop.paused.clear()
            await take(begun, 1)
            loop.paused.set()
        for stream in (begun, queued):
            with pytest.raises(Unavailable, match="send it again") as refused:
                _ = [update async for update in stream]
            assert refused.value.retry_after_s > 0
        assert len(site.client._streams) == 0

    run(main, resume_wait_s=0.3)


def test_a_new_request_waits_for_the_next_engine_as_well() -> None:
    async def main(site: Site) -> None:
        with pytest.raises(Unavailable):  # nobody knows yet whether it can be answered
            site.client.submit([request("early")])
        async with site.engine() as first:
            old = site.client.submit([request("old")])
            await eventually(lambda: first.num_added == 1)
        new, gone = (site.client.submit([request(name)]) for name in ("new", "gone"))
        gone.close()
        assert not site.client.ready
        async with site.engine() as second:
            await eventually(lambda: second.num_added == 2)
            waiting = [it.request for it in second.sequences.waiting]
            # The queue may be full for a request that no engine has accepted.
            assert [(it.id.split(".")[0], it.resumed) for it in waiting] == [
                ("old", True),
                ("new", False),
            ]
            second.paused.clear()
            for name, stream in (("old", old), ("new", new)):
                assert tokens([it async for it in stream], name) == scripted(request(name))[:40]

    run(main)


def test_a_new_request_waits_no_longer_than_the_others_and_has_the_same_bound() -> None:
    async def main(site: Site) -> None:
        async with site.engine():
            pass
        most = ROOMY.num_slots + ROOMY.max_queue + 64
        streams = [site.client.submit([request(f"r{number}")]) for number in range(most)]
        with pytest.raises(Overloaded):
            site.client.submit([request("one too many")])
        for stream in streams:
            with pytest.raises(Unavailable, match="send it again"):
                await anext(stream)
        assert len(site.client._streams) == 0

    run(main, resume_wait_s=0.3)


def test_a_request_that_ends_every_engine_ends_itself() -> None:
    async def main(site: Site) -> None:
        stream = None
        for num_deaths in range(1, 4):
            async with site.engine() as loop:
                stream = stream or site.client.submit([request("poison")])
                await eventually(lambda loop=loop: loop.num_added == 1)
            assert (len(site.client._streams) == 0) is (num_deaths == 3)
        assert stream is not None
        with pytest.raises(Unavailable):
            await anext(stream)

    run(main)


def test_a_token_forgets_the_deaths_before_it() -> None:
    async def main(site: Site) -> None:
        stream = None
        for life in range(4):  # the fourth death is the second since the token
            async with site.engine() as loop:
                stream = stream or site.client.submit([request("a")])
                await eventually(lambda loop=loop: loop.num_added == 1)
                if life == 2:
                    loop.paused.clear()
                    await take(stream, 1)
                    loop.paused.set()
        assert len(site.client._streams) == 1

    run(main)


def test_time_in_the_next_engine_is_no_time_without_one() -> None:
    async def main(site: Site) -> None:
        async with site.engine():
            stream = site.client.submit([request("a")])
        async with site.engine() as second:
            await asyncio.sleep(0.8)  # in its queue
            second.paused.clear()
            assert tokens([update async for update in stream]) == scripted(request("a"))[:40]

    run(main, resume_wait_s=0.3)


def test_a_request_that_cannot_be_sent_fails_alone() -> None:
    async def main(site: Site) -> None:
        async with site.engine() as loop:
            loop.paused.clear()
            bad = site.client.submit([replace(request("bad"), tenant_slots=2**31)])
            good = site.client.submit([request("a")])
            with pytest.raises(EngineError, match="cannot be sent to the engine"):
                await anext(bad)
            assert tokens([update async for update in good]) == scripted(request("a"))[:40]
        assert len(site.client._streams) == 0

    run(main)


def test_a_session_whose_writer_ends_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    num_sessions = 0
    write = grpc_engine_client._write

    async def fail_once(*args: Any) -> None:
        nonlocal num_sessions
        num_sessions += 1
        if num_sessions == 1:
            raise OSError("a fault of the writer")
        await write(*args)

    async def main(site: Site) -> None:
        async with site.engine() as loop:
            stream = site.client.submit([request("a")])
            loop.paused.clear()
            assert tokens([update async for update in stream]) == scripted(request("a"))[:40]
        assert num_sessions == 2

    monkeypatch.setattr(grpc_engine_client, "_write", fail_once)
    run(main)


def test_only_an_equal_engine_continues_what_has_begun() -> None:
    async def main(site: Site) -> None:
        async with site.engine(replace(ROOMY, numerics="one")) as loop:
            begun = site.client.submit([request("a")])
            loop.paused.clear()
            await take(begun, 1)
            loop.paused.set()
            queued = site.client.submit([request("b")])
            await eventually(lambda: loop.num_added == 2)
        async with site.engine(replace(ROOMY, numerics="other")) as loop:
            with pytest.raises(Unavailable, match="another engine"):
                _ = [update async for update in begun]
            loop.paused.clear()
            assert tokens([update async for update in queued], "b") == scripted(request("b"))[:40]

    run(main)


@pytest.mark.parametrize("stop", [None, "z"])
def test_the_text_of_every_choice_is_that_of_one_engine(stop: str | None) -> None:
    async def main(site: Site) -> None:
        plane = make_plane(site.client)

        async def answer(deaths: int) -> list[tuple[str, int]]:
            texts: dict[int, str] = {}
            counts: dict[int, int] = {}
            deltas = None
            for life in range(deaths + 1):
                async with site.engine(replace(INFO, num_slots=8)) as loop:
                    if deltas is None:
                        generation = plane.prepare(
                            id="g",
                            prompt=Prompt((50, 51)),
                            sampling=SamplingFields(max_tokens=60, seed=3),
                            n=3,
                            stop=stop,
                        )
                        deltas = plane.run(generation)
                    loop.paused.clear()
                    until = None if life == deaths else sum(counts.values()) + 8
                    async for delta in deltas:
                        texts[delta.index] = texts.get(delta.index, "") + delta.text
                        counts[delta.index] = counts.get(delta.index, 0) + len(delta.token_ids)
                        if until is not None and sum(counts.values()) >= until:
                            break
                    loop.paused.set()
            return [(texts[index], counts[index]) for index in sorted(texts)]

        undisturbed = await answer(0)
        assert len(undisturbed) == 3
        assert await answer(4) == undisturbed

    run(main)
