"""Tenants: who is one, what one may have, and whose priority counts."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc.aio
import httpx
import pytest

from jserve.core.errors import Overloaded
from jserve.gateway.tenants import Caller, TenantCounts, at_address, host_of_peer, most_sequences
from jserve.proto import inference_pb2
from tests.gateway.grpc_serving import failure, generate
from tests.gateway.grpc_serving import serving as serving_grpc
from tests.gateway.http.http_serving import CHAT, COMPLETIONS, Served, error_of, serving

ANN, BOB = {"authorization": "Bearer ann"}, {"authorization": "Bearer bob"}
KEYS = ("ann", "bob")


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        ("ipv4:127.0.0.1:5000", "address 127.0.0.1"),
        ("ipv6:%5B::1%5D:5000", "address ::1"),
        ("ipv6:[2001:db8:1:2:3::4]:80", "address 2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:10.0.0.7%5D:80", "address 10.0.0.7"),
        ("ipv6:%5Bfe80::1%25eth0%5D:80", "address fe80::/64"),
        ("unix:", "address unknown"),
    ],
)
def test_an_address_is_a_tenant(peer, name):
    assert at_address(host_of_peer(peer).replace("%25", "%")).name == name


def test_counts():
    counts, ann, bob = TenantCounts(), Caller("ann"), Caller("bob")
    with counts.preparing(ann, 3, 4):
        with pytest.raises(Overloaded, match="of this client"), counts.preparing(ann, 2, 4):
            pass
        with counts.preparing(bob, 4, 4):
            pass
        counts.start(ann, 3, 4)
    with pytest.raises(Overloaded):
        counts.start(ann, 2, 4)
    counts.start(ann, 1, 4)
    counts.end(ann, 4)
    assert counts == TenantCounts()
    assert most_sequences(4, 1024, None) == 4 + 1024 - 64
    assert most_sequences(4, 8, None) == 12
    assert most_sequences(4, 8, 5) == 5


def post(served: Served, body: dict, headers: dict[str, str], path: str = COMPLETIONS):
    return httpx.post(served.url + path, json=body, headers=headers)


def test_a_request_is_of_the_tenant_of_its_key_and_priority_is_not_everybodys():
    with serving(api_keys=KEYS, max_tenant_slots=3) as served:
        for headers in (ANN, BOB, ANN):
            body = {"prompt": "x", "max_tokens": 1, "priority": -5}
            assert post(served, body, headers).status_code == 200
        messages = [{"role": "user", "content": "x"}]
        body = {"messages": messages, "max_tokens": 1, "priority": 2**40}
        assert error_of(post(served, body, ANN, CHAT), 400)["param"] == "priority"
        first, second, third = served.engine.submitted
        assert first.tenant == third.tenant != second.tenant
        assert "ann" not in first.tenant  # the key itself goes nowhere
        assert [it.priority for it in (first, second, third)] == [0, 0, 0]
        assert first.tenant_slots == 3
    with serving(any_priority=True) as served:
        assert post(served, {"prompt": "x", "max_tokens": 1, "priority": -5}, {}).is_success
        (request,) = served.engine.submitted
        assert (request.tenant, request.priority) == ("address 127.0.0.1", -5)


def test_one_tenant_is_told_to_wait_and_another_is_served():
    with serving(api_keys=KEYS, max_tenant_sequences=6, step_s=0.01) as served:
        many = {"prompt": ["a", "b"], "n": 3, "max_tokens": 3000, "stream": True}
        url = served.url + COMPLETIONS
        with httpx.stream("POST", url, json=many, headers=ANN) as running:
            lines = running.iter_lines()  # kept: the stream is closed with it
            next(lines)
            accounts = served.do(lambda: list(served.plane.buffers.accounts))
            assert [it.tenant for it in accounts] == ["key key-1"]
            one = {"prompt": "x", "max_tokens": 1}
            assert "of this client" in error_of(post(served, one, ANN), 429)["message"]
            assert post(served, one, BOB).status_code == 200
            for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
                error_of(post(served, body, ANN, path), 429)
                assert post(served, body, BOB, path).status_code == 200
        served.assert_idle()
        assert post(served, {"prompt": "x"}, ANN, "/tokenize").json()["tokens"] == [ord("x")]
        assert post(served, one, ANN).status_code == 200
        # Counted before the prompts are looked at.
        too_many = {"prompt": [[1], [2], [999999]], "n": 3}
        error_of(post(served, too_many, ANN), 429)
        assert served.do(lambda: served.plane.tenants) == TenantCounts()


LONG = " " * (70 << 10)  # another process reads a body of this length


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "from {}"}], "max_tokens": 1}),
        ("/tokenize", {"messages": [{"role": "user", "content": "from {}"}]}),
        (COMPLETIONS, {"prompt": "from {}" + LONG, "suffix": ""}),  # refused in that process
    ],
)
def test_tenants_take_turns_at_the_helper_processes(path: str, fields: dict):
    """Each of the two processes is busy with a job of one tenant, and more of its jobs wait."""
    with serving(api_keys=KEYS) as served, ThreadPoolExecutor(4) as threads:
        templates = served.plane.prompts._templates
        processes = served.bodies._large if path == COMPLETIONS else templates._processes
        run, begun, may_go = processes._run, [], threading.Event()

        def wait_and_run(job: bytes) -> bytes:
            begun.append("bob" if b"from bob" in job else "ann")
            assert may_go.wait(20)
            return run(job)

        def num_jobs() -> int:
            waiting = processes._turns._waiting.values()
            return len(begun) + served.do(lambda: sum(map(len, waiting)))

        processes._run = wait_and_run
        answers = []
        for number, name in enumerate(("ann", "ann", "ann", "bob")):
            body = json.loads(json.dumps(fields).replace("{}", name))
            headers = {"authorization": f"Bearer {name}"}
            answers.append(threads.submit(post, served, body, headers, path))
            deadline_s = time.monotonic() + 20
            while num_jobs() <= number:
                assert time.monotonic() < deadline_s
                time.sleep(0.002)
        may_go.set()
        status = 400 if path == COMPLETIONS else 200
        assert [answer.result().status_code for answer in answers] == [status] * 4
        assert begun == ["ann", "ann", "bob", "ann"]


def test_grpc_calls_are_of_the_tenant_of_their_key():
    async def main():
        async with serving_grpc(api_keys=KEYS, max_tenant_sequences=2, step_s=0.01) as (
            stub,
            engine,
            plane,
            _,
        ):
            ann = (("authorization", "Bearer ann"),)
            bob = (("authorization", "Bearer bob"),)
            long = generate(n=2, max_tokens=200, priority=-3)
            call = stub.Generate(long, metadata=ann)
            await call.read()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(generate(max_tokens=1), metadata=ann).read()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            text = inference_pb2.TokenizeRequest(text="x")
            ids = inference_pb2.DetokenizeRequest(token_ids=[5])
            for method, message in ((stub.Tokenize, text), (stub.Detokenize, ids)):
                refused = await failure(method(message, metadata=ann))
                assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                await method(message, metadata=bob)
            stream = stub.GenerateStream(metadata=bob)
            start = generate(max_tokens=1, request_id="r")
            await stream.write(inference_pb2.GenerateStreamRequest(start=start))
            await stream.done_writing()
            assert [message.request_id async for message in stream] == ["r"]
            call.cancel()
            first, _, last = engine.submitted
            assert (first.priority, first.tenant) == (0, engine.submitted[1].tenant)
            assert first.tenant != last.tenant
            while plane.num_live:
                await asyncio.sleep(0.001)
            assert plane.tenants == TenantCounts()

    asyncio.run(main())
