"""Grammars in processes of their own: bounds, what is kept, and the loop that goes on meanwhile."""

import asyncio
import json
import time
from typing import Any

import pytest

from jserve.core.errors import RequestError
from jserve.core.request import EngineInfo
from jserve.gateway.grammar_process import GrammarProcess
from jserve.gateway.job_process import JobLimits, JobProcesses
from jserve.grammar.source import MAX_SOURCE_BYTES, GrammarKind, GrammarSource
from tests.gateway.fixtures import INFO
from tests.gateway.tiny_tokenizers import byte_level_json

DEEP: Any = {"type": "null"}
for _ in range(500):
    DEEP = {"type": "array", "items": DEEP}
TOO_MUCH = {
    "a schema of 1 MB": ("json", {"enum": ["x" * MAX_SOURCE_BYTES]}),
    "a schema of 1 MB of properties": (
        "json",
        {"type": "object", "properties": {f"name of property {i}": {} for i in range(30_000)}},
    ),
    "an exploding regex": ("regex", "(a{1000}){1000}{1000}"),
    "a regex of many ends": ("regex", "(a|b)*a(a|b){20}" * 200 + "("),
    "a reference to itself": ("json", {"$ref": "#"}),
    "references without end": (
        "json",
        {"properties": {"a": {"$ref": "#"}}, "required": ["a"], "type": "object"},
    ),
    "a combination that explodes": (
        "json",
        {"allOf": [{"anyOf": [{"minimum": i}, {"multipleOf": i + 1}]} for i in range(40)]},
    ),
    "nesting": ("json", DEEP),
    "nested text": ("json", "[" * 100_000),
    "a root without end": ("grammar", 'start: x\nx: "a" x'),
    "a grammar without root": ("grammar", 'x: "a"'),
    "a grammar with an unknown rule": ("grammar", "start: y"),
    "deep parentheses": ("grammar", "start: " + "(" * 50_000),
    "deep EBNF": ("grammar", "root ::= " + "(" * 50_000),
    "100,000 choices": ("choice", [str(i) for i in range(100_000)]),
    "half a character": ("regex", "\\ud800"),
}


def made(kind: str, value: Any) -> GrammarSource:
    return GrammarSource(kind=GrammarKind(kind), value=value, field="field")


def process(info: EngineInfo = INFO, limits: JobLimits | None = None) -> GrammarProcess:
    bounds = {} if limits is None else {"limits": limits}
    return GrammarProcess(byte_level_json(), lambda: info, **bounds)


@pytest.fixture(scope="module")
def grammars():
    processes = process()
    yield processes
    processes.close()


async def num_beats(until: asyncio.Task[Any]) -> int:
    """Counts the turns of the event loop until a task is done."""
    beats = 0
    while not until.done():
        await asyncio.sleep(0.001)
        beats += 1
    return beats


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_is_too_much_is_a_400_in_bounded_time(grammars: GrammarProcess, name: str) -> None:
    async def main() -> None:
        started = time.process_time()
        with pytest.raises(RequestError) as caught:
            await grammars.text(made(*TOO_MUCH[name]))
        assert caught.value.param == "field"
        assert str(caught.value).startswith("field")
        assert len(str(caught.value)) < 1000
        # The other process has 2 s (`test_time_is_bounded`); this one has next to nothing to do.
        assert time.process_time() - started < 1
        # Others are served as ever.
        assert "json_schema" in await grammars.text(made("json_object", True))

    asyncio.run(main())


def test_ten_thousand_choices_are_fine(grammars: GrammarProcess) -> None:
    names = [f"name of choice {i}" for i in range(10_000)]
    for source in (made("choice", names), made("json", {"enum": names})):
        assert len(asyncio.run(grammars.text(source))) > 100_000


def test_the_loop_goes_on_while_a_grammar_is_compiled() -> None:
    async def main() -> None:
        starting = process()  # it reads the tokenizer first, which takes longer than a grammar
        try:
            task = asyncio.ensure_future(starting.text(made(*TOO_MUCH["an exploding regex"])))
            beats = await num_beats(task)
            with pytest.raises(RequestError, match="too many expressions"):
                await task
            assert beats > 10
        finally:
            starting.close()

    asyncio.run(main())


def test_a_grammar_is_compiled_once(
    grammars: GrammarProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[bytes] = []
    call = JobProcesses.call

    async def counted(self: JobProcesses, job: bytes, tenant: str = "") -> bytes:
        jobs.append(job)
        return await call(self, job, tenant)

    monkeypatch.setattr(JobProcesses, "call", counted)

    async def main() -> None:
        source = made("json", {"type": "object", "properties": {"once": {"type": "integer"}}})
        first, second = await asyncio.gather(grammars.text(source), grammars.text(source))
        assert first is second
        for _ in range(100):
            assert await grammars.text(source) is first
        assert len(jobs) == 1

    asyncio.run(main())


def test_who_leaves_does_not_stop_it_for_others(grammars: GrammarProcess) -> None:
    async def main() -> None:
        source = made("regex", "left (alone|together)")
        first = asyncio.ensure_future(grammars.text(source))
        second = asyncio.ensure_future(grammars.text(source))
        await asyncio.sleep(0)
        first.cancel()
        assert "left" in await second
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(main())


def test_another_engine_has_its_own_vocabulary() -> None:
    async def main() -> None:
        infos = [INFO]
        processes = GrammarProcess(byte_level_json(), lambda: infos[-1])
        try:
            await processes.text(made("regex", "a"))
            infos.append(EngineInfo("other", 512, 64, 1, 8, 16, 1, (3,)))
            assert "a" in await processes.text(made("regex", "a"))
        finally:
            processes.close()

    asyncio.run(main())


def test_time_is_bounded() -> None:
    async def main() -> None:
        processes = process(limits=JobLimits(cpu_s=0.2, memory_bytes=1 << 30))
        try:
            with pytest.raises(RequestError, match="it takes longer than"):
                await processes.text(made(*TOO_MUCH["an exploding regex"]))
        finally:
            processes.close()

    asyncio.run(main())


def test_a_tokenizer_that_grammars_do_not_know_is_told() -> None:
    async def main() -> None:
        processes = process(EngineInfo("none", 410, 64, 1, 8, 16, 1, ()))
        try:
            with pytest.raises(RequestError, match="not supported with this model") as caught:
                await processes.text(made("regex", "a"))
            assert caught.value.param == "field"
        finally:
            processes.close()

    asyncio.run(main())


def test_a_special_token_is_one_in_a_tag(grammars: GrammarProcess) -> None:
    schema = {"type": "object"}
    tag = {
        "triggers": ["<|im_end|>"],
        "structures": [{"begin": "<|im_end|>x", "schema": schema, "end": "</s>"}],
    }
    text = json.loads(asyncio.run(grammars.text(made("structural_tag", tag))))
    lark = text["grammars"][0]["lark_grammar"]
    assert "TEXT <[2]>" in lark
    assert "<[1]>" in lark
