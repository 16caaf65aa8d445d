"""`LLM` in one process: batches equal single runs, streams equal whole texts, nothing is lost."""

import asyncio
import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from jserve.cache.kv_cache import KVCache
from jserve.cache.layout import single_group
from jserve.checkpoints.config import RandomWeights
from jserve.config import load
from jserve.core.errors import ConfigError, EngineError, PromptTooLong, RequestError
from jserve.core.request import EngineInfo, FinishReason, Request, SequenceUpdate
from jserve.core.step import Program, ProgramKind, StepPlan, StepResult
from jserve.engine.config import Platform
from jserve.gateway.engine_client import UpdateStream
from jserve.gateway.request_plane import GenerationRequest, OutputStream
from jserve.gateway.validation import SamplingFields
from jserve.offline import LLM
from jserve.scheduler.config import SchedulerConfig
from jserve.scheduler.scheduler import Scheduler
from jserve.scheduler.simulated_executor import SimulatedExecutor
from jserve.scheduler.simulated_model import SimulatedModel

GREEDY = SamplingFields(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def llm() -> LLM:
    """An engine with one program of each kind; these tests do not depend on their number."""
    sizes = ("mixed_tokens=64", "decode_rows=8")
    changes = ["scheduler.max_queue=4", *(f"engine.{size}" for size in sizes)]
    config = load("configs/tiny_random.py", ["gateway.tool_parser=hermes", *changes])
    assert isinstance(config.model.source, RandomWeights)
    spec = dataclasses.replace(config.model.source.spec, eos_token_ids=(511,))  # ends a grammar
    model = dataclasses.replace(config.model, source=RandomWeights(spec=spec))
    return LLM(dataclasses.replace(config, model=model))


def test_a_batch_larger_than_slots_and_queue_equals_single_runs(llm: LLM) -> None:
    prompts = [f"prompt number {index} " * (1 + index % 7) for index in range(30)]
    together = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [completion.prompt for completion in together] == prompts
    for index in (0, 7, 29):
        (alone,) = llm.generate(prompts[index], GREEDY, use_tqdm=False)
        assert alone == together[index]
    stats = llm.stats
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert (stats.free_slots, stats.free_pages) == (llm.info.num_slots, llm.info.num_pages)


def test_stream_is_the_text_in_pieces(llm: LLM) -> None:
    (whole,) = llm.generate("a stream", GREEDY, use_tqdm=False)
    assert "".join(llm.stream("a stream", GREEDY)) == whole.text


def test_token_ids_are_a_prompt(llm: LLM) -> None:
    by_text = llm.generate("ids", GREEDY, use_tqdm=False)
    by_ids = llm.generate(list(b"ids"), GREEDY, use_tqdm=False)  # the tokenizer is byte-level
    assert by_ids[0].token_ids == by_text[0].token_ids


def test_no_prompt_is_dropped(llm: LLM) -> None:
    texts = ["one", "two"]
    by_list = llm.generate(texts, GREEDY, use_tqdm=False)
    assert llm.generate((text for text in texts), GREEDY, use_tqdm=False) == by_list
    ids = np.array([list(text.encode()) for text in texts])
    found = [
        llm.generate(ids, GREEDY, use_tqdm=False),
        llm.generate(ids[0], GREEDY, use_tqdm=False),
    ]
    assert [it.token_ids for it in found[0]] == [it.token_ids for it in by_list]
    assert found[1][0].token_ids == by_list[0].token_ids
    for prompts, message in (
        (["ab", 5, "cd"], r"prompts\[1\] is a token id, but prompts\[0\] is a prompt"),
        ([5, "ab"], r"prompts\[1\] is a prompt"),
        (["ab", None], r"prompts\[1\] is None; a prompt is"),
        (None, "prompts is None; give a text"),
        ([True, 5], "prompt holds True"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.generate(prompts, GREEDY, use_tqdm=False)  # type: ignore[arg-type]


def test_a_chat_reads_calls_and_binds_them(llm: LLM) -> None:
    city = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
    function = {"name": "weather", "parameters": {**city, "additionalProperties": False}}
    options = {
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "chat_template": "{{ messages[0].content }}{{ tools and tools[0].function.name }}>",
        "use_tqdm": False,
    }
    fields = SamplingFields(temperature=0, max_tokens=200)
    talks = [[{"role": "user", "content": text}] for text in ("Hi", "Ho")]
    for completion in llm.chat(talks, fields, n=2, **options):
        (call,) = completion.tool_calls
        assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Rome"})
        assert completion.text == ""
    (one,) = llm.chat(talks[1], GREEDY, chat_template="Ho weather>", use_tqdm=False)
    (plain,) = llm.generate("Ho weather>", GREEDY, use_tqdm=False)
    assert (one.prompt, one.text, one.tool_calls) == ("Ho weather>", plain.text, ())
    for wrong, message in (
        ({"tool": []}, "tool"),
        ({"stream": True}, "stream is not an option"),
        ({"echo": True}, "echo is not an option"),
        ({"tool_choice": "required"}, "there are no tools"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.chat(talks, GREEDY, use_tqdm=False, **wrong)
    with pytest.raises(RequestError, match="1 entries for 2 prompts"):
        llm.chat(talks, [GREEDY], use_tqdm=False)


def test_choices_differ_and_a_seed_repeats_them(llm: LLM) -> None:
    fields = SamplingFields(temperature=1.0, max_tokens=8, seed=3)
    first = llm.generate("choices", fields, n=3, use_tqdm=False)
    assert len({completion.token_ids for completion in first}) == 3
    assert llm.generate("choices", fields, n=3, use_tqdm=False) == first


def test_a_sampling_for_each_prompt(llm: LLM) -> None:
    fields = [SamplingFields(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 5)]
    found = llm.generate(["one", "two"], fields, use_tqdm=False)
    assert [len(completion.token_ids) for completion in found] == [3, 5]
    with pytest.raises(RequestError, match="2 entries for 1 prompts"):
        llm.generate("one", fields, use_tqdm=False)


def test_stop_string_cuts_the_text_and_frees_the_slot(llm: LLM) -> None:
    fields = SamplingFields(temperature=0, max_tokens=64)
    (whole,) = llm.generate("stop here", fields, use_tqdm=False)
    stop = whole.text[5:8]
    (cut,) = llm.generate("stop here", fields, stop=stop, use_tqdm=False)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason is FinishReason.STOP
    assert cut.stop_reason == stop
    llm.generate("another", GREEDY, use_tqdm=False)  # its first step takes the abort along
    assert llm.stats.free_slots == llm.info.num_slots


def test_options_of_a_served_request_are_options_here(llm: LLM) -> None:
    (plain,) = llm.generate("options", GREEDY, use_tqdm=False)
    (echoed,) = llm.generate("options", GREEDY, echo=True, use_tqdm=False)
    assert echoed.text == "options" + plain.text
    stop = plain.text[3:5]
    options = {"stop": [stop], "include_stop_str_in_output": True, "use_tqdm": False}
    (stopped,) = llm.generate("options", GREEDY, **options)
    assert stopped.text == plain.text[: plain.text.index(stop)] + stop
    assert "".join(llm.stream("options", GREEDY, echo=True)) == echoed.text
    scored = SamplingFields(temperature=0, max_tokens=0, prompt_logprobs=0)
    (prompt_only,) = llm.generate("options", scored, echo=True, use_tqdm=False)
    assert (prompt_only.text, prompt_only.token_ids) == ("options", ())
    assert len(prompt_only.prompt_logprobs or ()) == len("options")
    with pytest.raises(RequestError, match="n must be at least 1"):
        llm.generate("options", GREEDY, n=0, use_tqdm=False)


def test_a_salt_goes_in_and_cached_tokens_come_out(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plain,) = llm.generate("cached", GREEDY, use_tqdm=False)
    submit, post = llm._engine.submit, llm._engine._streams.post
    salts: list[str] = []

    def submitted(requests: Sequence[Request]) -> UpdateStream:
        salts.extend(request.cache_salt for request in requests)
        return submit(requests)

    def posted(update: SequenceUpdate) -> None:
        post(update._replace(cached_tokens=4))  # of which those after the first do not count

    monkeypatch.setattr(llm._engine, "submit", submitted)
    monkeypatch.setattr(llm._engine._streams, "post", posted)
    salted = llm.generate(["cached"] * 2, GREEDY, cache_salt="mine", use_tqdm=False)
    assert [completion.num_cached_tokens for completion in salted] == [4, 4]
    assert salted == [plain] * 2  # what was found changes no answer
    llm.generate("cached", GREEDY, use_tqdm=False)
    assert salts == ["given:mine", "given:mine", ""]


def test_an_unknown_option_is_a_type_error(llm: LLM) -> None:
    with pytest.raises(TypeError, match="max_tokens: no such option; options are stop, n, "):
        llm.generate("hi", GREEDY, use_tqdm=False, max_tokens=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="stpo"):
        list(llm.stream("hi", GREEDY, stpo="a"))  # type: ignore[call-arg]


def test_more_choices_than_the_engine_holds(llm: LLM) -> None:
    fields = SamplingFields(temperature=1.0, max_tokens=4, seed=5, ignore_eos=True)
    n = llm.info.num_slots + llm.info.max_queue + 1
    found = llm.generate(["many", "more"], fields, n=n, use_tqdm=False)
    assert [len(completion.token_ids) for completion in found] == [4] * (2 * n)
    assert llm.generate(["many", "more"], fields, n=n, use_tqdm=False) == found


def test_inside_a_running_event_loop_as_in_a_notebook(llm: LLM) -> None:
    (outside,) = llm.generate("cell", GREEDY, use_tqdm=False)

    async def cell() -> tuple[str, str]:
        (whole,) = llm.generate("cell", GREEDY, use_tqdm=False)
        return whole.text, "".join(llm.stream("cell", GREEDY))

    assert asyncio.run(cell()) == (outside.text, outside.text)


def test_an_interrupt_aborts_what_runs(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    long = SamplingFields(temperature=0, max_tokens=200, ignore_eos=True)
    result, calls = Future.result, itertools.count()

    def interrupted(future: Future[object], timeout: float | None = None) -> object:
        if next(calls) == 0:  # the preparation; the second call waits for the answers
            return result(future, timeout)
        deadline_s = time.monotonic() + 60
        while llm.stats.num_running < 3 and time.monotonic() < deadline_s:
            time.sleep(0.001)
        assert llm.stats.num_running == 3
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["interrupted"] * 3, long, use_tqdm=False)
    llm.generate("another", GREEDY, use_tqdm=False)  # its first step takes the aborts along
    assert (llm.stats.num_running, llm.stats.num_waiting) == (0, 0)
    assert llm.stats.free_slots == llm.info.num_slots


def test_the_request_plane_runs_on_its_event_loop(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, loops = llm._plane.run, list[asyncio.AbstractEventLoop]()

    def recorded(generation: GenerationRequest) -> OutputStream:
        loops.append(asyncio.get_running_loop())  # raises on a thread without one
        return run(generation)

    monkeypatch.setattr(llm._plane, "run", recorded)
    llm.generate("whole", GREEDY, use_tqdm=False)
    list(llm.stream("in pieces", GREEDY))
    assert len(loops) == 2
    assert loops[0] is loops[1]


def test_an_abandoned_stream_gives_its_slot_back(llm: LLM) -> None:
    stream = llm.stream("abandoned", SamplingFields(temperature=0, max_tokens=200))
    next(stream)
    stream.close()
    llm.generate("another", GREEDY, use_tqdm=False)
    assert llm.stats.free_slots == llm.info.num_slots


def test_wrong_requests_are_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(RequestError, match="temperature"):
        llm.generate("x", SamplingFields(temperature=-1.0), use_tqdm=False)
    with pytest.raises(PromptTooLong):
        llm.generate(["fine", "x" * 5000], use_tqdm=False)
    with pytest.raises(RequestError, match="empty"):
        llm.generate("", use_tqdm=False)
    assert llm.generate([], use_tqdm=False) == []
    assert llm.stats.num_running == 0


class Breaking(SimulatedExecutor):
    """Fails once, in the part of a step that is named."""

    breaks_in = ""

    def submit(self, plan: StepPlan) -> StepResult:
        self._break("submit")
        return super().submit(plan)

    def collect(self, handle: StepResult) -> StepResult:
        self._break("collect")
        return super().collect(handle)

    def _break(self, part: str) -> None:
        if self.breaks_in == part:
            self.breaks_in = ""
            raise RuntimeError("the device is gone")


@pytest.mark.parametrize("part", ["submit", "collect"])
def test_a_failed_step_ends_the_engine_with_one_error(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = (Program(ProgramKind.MIXED, 64, 8), Program(ProgramKind.DECODE, 8, 8, 8))
    executor = Breaking(programs, model=SimulatedModel(), num_slots=8, num_pages=200, page_size=4)
    scheduler = Scheduler(
        SchedulerConfig(max_queue=4),
        cache=KVCache(single_group(4), 200),
        num_slots=8,
        max_model_len=200,
        programs=programs,
    )
    info = EngineInfo(
        model="simulated",
        vocab=256,
        max_model_len=200,
        num_slots=8,
        num_pages=200,
        page_size=4,
        max_queue=4,
        eos_token_ids=(0,),
    )
    engine = SimpleNamespace(
        info=info, scheduler=scheduler, executor=executor, num_compiles=lambda: 0
    )
    monkeypatch.setattr("jserve.offline.start_engine", lambda *_, **__: engine)
    llm = LLM(load("configs/tiny_random.py"))
    fields = SamplingFields(max_tokens=8, ignore_eos=True)
    held = llm.stream("held", SamplingFields(max_tokens=100, ignore_eos=True))
    next(held)
    executor.breaks_in = part
    message = "^the engine failed: the device is gone; make a new LLM$"
    with pytest.raises(EngineError, match=message) as failed:
        llm.generate(["more than slots and queue"] * 30, fields, use_tqdm=False)
    assert isinstance(failed.value.__cause__, RuntimeError)
    for _ in range(2):
        with pytest.raises(EngineError, match=message):
            llm.generate("again", fields, use_tqdm=False)
    with pytest.raises(EngineError, match=message):
        list(llm.stream("again", fields))
    with pytest.raises(EngineError, match=message):
        list(held)


def test_another_backend_than_the_running_one_is_refused() -> None:
    config = load("configs/tiny_random.py")
    platform = dataclasses.replace(config.platform, backend=Platform.GPU)
    with pytest.raises(ConfigError, match="already runs JAX"):
        LLM(dataclasses.replace(config, platform=platform))
