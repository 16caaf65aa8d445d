"""Sequences that another engine began: they go on after their output, as if nothing had been."""

from dataclasses import replace

import pytest

from jserve.core.errors import Overloaded, PromptTooLong, RequestError
from jserve.core.request import FinishReason, Request, SamplingParams
from jserve.core.stats import EngineStats
from jserve.scheduler.config import SchedulerConfig
from tests.scheduler.rig import ENDLESS, Rig


def request(name: str = "a", max_tokens: int = 20, **sampling: object) -> Request:
    params = SamplingParams(max_tokens=max_tokens, seed=5, **sampling)  # type: ignore[arg-type]
    return Request(id=name, prompt=tuple(range(1, 12)), sampling=params)


@pytest.mark.parametrize("depth", [1, 2])
def test_every_cut_gives_the_rest_and_nothing_twice(depth: int) -> None:
    asked = request(logprobs=2)
    whole, finish = ENDLESS.generate(asked, 100)
    rig = Rig()
    for cut in range(20):
        resumed = replace(asked, id=f"cut{cut}", output=tuple(whole[:cut]), resumed=True)
        rig.scheduler.add(resumed, 0.0)
    rig.run(depth)
    for cut in range(20):
        assert rig.outputs[f"cut{cut}"] == list(whole[cut:]), cut
        assert rig.finished[f"cut{cut}"] is finish is FinishReason.LENGTH
    assert rig.is_empty()


def test_the_first_update_repeats_nothing_that_was_told() -> None:
    asked = request(prompt_logprobs=1, max_tokens=6)
    whole, _ = ENDLESS.generate(asked, 100)
    for output, is_new in ((), True), (tuple(whole[:2]), False):
        rig = Rig()
        rig.scheduler.add(replace(asked, output=output, resumed=True), 0.0)
        updates = []
        while rig.scheduler.has_work:
            plan, new = rig.step()
            assert any(chunk.prompt_targets for chunk in plan.chunks) <= is_new
            updates += new
        assert (updates[0].prompt_logprobs is not None) is is_new
        assert (updates[0].queue_s is not None) is is_new
        assert rig.outputs["a"] == list(whole[len(output) :])


def test_new_output_alone_is_counted() -> None:
    asked = request()
    whole, _ = ENDLESS.generate(asked, 100)
    rig = Rig()
    rig.scheduler.add(replace(asked, output=tuple(whole[:15])), 0.0)
    rig.run()
    stats: EngineStats = rig.scheduler.stats()
    assert stats.output_tokens == 5


def test_a_full_queue_refuses_new_sequences_only() -> None:
    rig = Rig(SchedulerConfig(max_queue=2))
    for number in range(2):
        rig.scheduler.add(request(f"r{number}"), 0.0)
    with pytest.raises(Overloaded):
        rig.scheduler.add(request("new"), 0.0)
    for number in range(5):
        rig.scheduler.add(replace(request(f"old{number}"), resumed=True), 0.0)
    rig.run()
    assert len(rig.finished) == 7


def test_output_that_leaves_nothing_to_do_is_refused() -> None:
    rig = Rig()
    with pytest.raises(RequestError, match="nothing is left"):
        rig.scheduler.add(replace(request(), output=(1,) * 20), 0.0)
    long = replace(request(max_tokens=200), output=(1,) * 89)
    with pytest.raises(PromptTooLong, match="with 90 of output"):
        rig.scheduler.add(long, 0.0)
    rig.scheduler.add(replace(long, output=(1,) * 88), 0.0)
    rig.run()
    assert len(rig.outputs["a"]) == 1
    assert rig.is_empty()
