"""Constraints between gateway and loop: compiled beside it, refused, or not wanted any more."""

import asyncio
import threading

import pytest

from jserve.core.errors import EngineError, RequestError
from jserve.core.request import ConstraintSpec, Request, SamplingParams
from jserve.engine.inbox import Abort, Inbox, Outbox, Submit
from jserve.engine.worker.session_server import serve_sessions
from jserve.scheduler.constraint import Constraint
from tests.engine.worker.test_session import collect, connect
from tests.gateway.fixtures import INFO, closing, eventually, unix_address
from tests.scheduler.rules import Rule

BOUND = ConstraintSpec(grammar="start: x")


def request(name: str, constraint: ConstraintSpec | None = BOUND) -> Request:
    sampling = SamplingParams(max_tokens=7)
    return Request(id=name, prompt=(7, 8), sampling=sampling, constraint=constraint)


class Compiler:
    """Waits until it may go on."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.asked: list[Request] = []
        self.rule = Rule(INFO.vocab)

    def __call__(self, request: Request) -> Constraint:
        self.asked.append(request)
        assert self.may_go_on.wait(10)
        assert request.constraint is not None
        if request.constraint.grammar == "broken":
            raise ValueError("a bug")
        if request.constraint.grammar == "wrong":
            raise RequestError("the grammar is wrong", param="grammar")
        return self.rule


def test_a_grammar_is_compiled_beside_everything_else() -> None:
    async def main() -> None:
        inbox, compiler = Inbox(), Compiler()
        server = await serve_sessions(unix_address(), INFO, inbox, Outbox(), constrain=compiler)
        async with closing(await connect(server.address)) as client:
            client.submit([request("bound")])
            client.submit([request("free", None)])
            await eventually(lambda: len(compiler.asked) == 1 and inbox.wait(0))
            [free] = inbox.drain()
            assert isinstance(free, Submit)
            assert free.constraint is None
            assert [it.constraint for it in compiler.asked] == [BOUND]
            compiler.may_go_on.set()
            await eventually(lambda: inbox.wait(0))
            [bound] = inbox.drain()
            assert isinstance(bound, Submit)
            assert bound.constraint is compiler.rule
            assert bound.request.constraint == BOUND
        await server.stop()

    asyncio.run(main())


def test_a_wrong_grammar_is_a_refusal_and_no_more() -> None:
    async def main() -> None:
        inbox, compiler = Inbox(), Compiler()
        compiler.may_go_on.set()
        server = await serve_sessions(unix_address(), INFO, inbox, Outbox(), constrain=compiler)
        async with closing(await connect(server.address)) as client:
            with pytest.raises(RequestError, match="the grammar is wrong"):
                await collect(client.submit([request("a", ConstraintSpec(grammar="wrong"))]))
            with pytest.raises(EngineError, match="could not be made: a bug"):
                await collect(client.submit([request("d", ConstraintSpec(grammar="broken"))]))
            client.submit([request("b")])
            await eventually(lambda: inbox.wait(0))
            assert [type(command) for command in inbox.drain()] == [Submit]
        await server.stop()
        server = await serve_sessions(unix_address(), INFO, inbox, Outbox())
        async with closing(await connect(server.address)) as client:
            with pytest.raises(RequestError, match="knows no constraints"):
                await collect(client.submit([request("c")]))
        await server.stop()

    asyncio.run(main())


def test_what_nobody_wants_any_more_is_not_submitted() -> None:
    async def main() -> None:
        inbox, compiler = Inbox(), Compiler()
        server = await serve_sessions(unix_address(), INFO, inbox, Outbox(), constrain=compiler)
        async with closing(await connect(server.address)) as client:
            stream = client.submit([request("a")])
            await eventually(lambda: len(compiler.asked) == 1)
            stream.close()
            await eventually(lambda: inbox.wait(0))
            assert [type(command) for command in inbox.drain()] == [Abort]
            compiler.may_go_on.set()
            await asyncio.sleep(0.1)
            assert inbox.drain() == []
        await server.stop()

    asyncio.run(main())
