"""Bound sequences beside free ones: every token is the one that a mask at every step gives."""

import random

import pytest

from jserve.cache.kv_cache import KVCache, PrefixSharing
from jserve.cache.layout import single_group
from jserve.core.errors import RequestError
from jserve.core.request import FinishReason, Request, SamplingParams
from jserve.scheduler.config import SchedulerConfig
from jserve.scheduler.simulated_model import SimulatedModel
from tests.scheduler.rig import Rig
from tests.scheduler.rules import Rule

VOCAB = 97
MODEL = SimulatedModel(vocab=VOCAB, eos_token_ids=(0,))


def request(name: str = "a", **sampling: object) -> Request:
    return Request(
        id=name,
        prompt=(1, 2, 3),
        sampling=SamplingParams(**{"max_tokens": 20, **sampling}),  # pyright: ignore
    )


def expected(asked: Request, rule: Rule, max_model_len: int = 100) -> list[int]:
    return MODEL.generate(asked, max_model_len, rule)[0]


TRUNCATED = {"top_k": 7}  # its tokens may not be sampled without their mask


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("sampling", [{}, TRUNCATED], ids=["whole", "truncated"])
def test_tokens_are_those_of_a_mask_at_every_step(depth: int, sampling: dict[str, int]) -> None:
    rig = Rig(model=MODEL)
    asked = request(ignore_eos=True, **sampling)
    rig.scheduler.add(asked, 0.0, Rule(VOCAB))
    free = rig.add("free", max_tokens=30, ignore_eos=True)
    rig.run(depth)
    assert rig.outputs["a"] == expected(asked, Rule(VOCAB))
    assert rig.outputs["free"] == MODEL.generate(free, 100)[0]
    assert rig.outputs["a"] != MODEL.generate(asked, 100)[0]
    assert rig.is_empty()


def test_free_rows_keep_decode_steps_beside_one_that_waits() -> None:
    rig = Rig(SchedulerConfig(bound_decode_steps=4), model=MODEL)
    rig.scheduler.add(request(ignore_eos=True, **TRUNCATED), 0.0, Rule(VOCAB))
    rig.add("free", max_tokens=40, ignore_eos=True)
    rig.step()
    plan, _ = rig.step()
    assert {chunk.request_id: chunk.max_new for chunk in plan.chunks} == {"a": 1, "free": 4}
    assert [mask.slot for mask in plan.masks] == [0]


def test_a_bound_row_waits_for_its_result() -> None:
    rig = Rig(model=MODEL)
    rig.scheduler.add(request(**TRUNCATED), 0.0, Rule(VOCAB))
    rig.plan()
    assert rig.pipeline.start(rig.now) is None
    rig.commit()
    assert rig.plan().masks


@pytest.mark.parametrize("depth", [1, 2])
def test_a_row_that_is_not_truncated_runs_ahead_beside_free_ones(depth: int) -> None:
    rig = Rig(model=MODEL)
    asked = request(ignore_eos=True, max_tokens=60)
    rig.scheduler.add(asked, 0.0, Rule(VOCAB, step=1))  # nothing is ever forbidden
    rig.add("free", max_tokens=60, ignore_eos=True)
    plans = rig.run(depth)
    assert rig.outputs["a"] == expected(asked, Rule(VOCAB, step=1))
    assert len(plans) <= 10
    rig.scheduler.add(request("alone", ignore_eos=True, max_tokens=60), 0.0, Rule(VOCAB, step=1))
    assert len(rig.run(depth)) == 60  # what does not stand would cost time there


def test_a_row_that_guesses_wrong_waits_for_its_masks() -> None:
    rig = Rig(model=MODEL)
    rig.scheduler.add(request(ignore_eos=True, max_tokens=60), 0.0, Rule(VOCAB, step=30))
    rig.add("free", max_tokens=60, ignore_eos=True)
    plans = rig.run(2)
    wide = [c for plan in plans for c in plan.chunks if c.request_id == "a" and c.max_new > 1]
    assert 0 < len(wide) < 8


def test_it_ends_where_nothing_may_come() -> None:
    rig = Rig(model=MODEL)
    asked = request(ignore_eos=True, **TRUNCATED)
    rig.scheduler.add(asked, 0.0, Rule(VOCAB, end=5, ends=True))
    rig.run(2)
    assert rig.outputs["a"] == expected(asked, Rule(VOCAB))[:5]
    assert rig.finished["a"] is FinishReason.STOP
    assert rig.is_empty()


def test_it_is_refused_where_nothing_may_come_first() -> None:
    rig = Rig(model=MODEL)
    with pytest.raises(RequestError, match="leave no token"):
        rig.scheduler.add(request(), 0.0, Rule(VOCAB, end=0, ends=True))
    only = next(i for i in range(VOCAB) if i % 3)
    with pytest.raises(RequestError, match="leave no token"):
        rig.scheduler.add(request(allowed_token_ids=(only,)), 0.0, Rule(VOCAB))
    assert not rig.scheduler.has_work


@pytest.mark.parametrize("start", [0, 4])
def test_output_of_another_engine_is_replayed(start: int) -> None:
    asked = request(ignore_eos=True, **TRUNCATED)
    whole = expected(asked, Rule(VOCAB, start=start))
    for count in (1, 7, 19):
        rig = Rig(model=MODEL)
        resumed = Request(
            id="a", prompt=asked.prompt, sampling=asked.sampling, output=tuple(whole[:count])
        )
        rule = Rule(VOCAB, start=start)
        assert all(rule.accept((token,)) for token in resumed.output)
        rig.scheduler.add(resumed, 0.0, rule)
        rig.run(2)
        assert rig.outputs["a"] == whole[count:]


def test_a_device_that_ignores_masks_is_found_out() -> None:
    class Deaf(Rule):
        def mask(self) -> bytes | None:  # allows what `accept` refuses
            return b"\xff" * 16

    rig = Rig(model=MODEL)
    rig.scheduler.add(request(ignore_eos=True), 0.0, Deaf(VOCAB, step=91))
    rig.run(1)
    assert rig.finished["a"] is FinishReason.ERROR  # and the engine goes on
    assert rig.is_empty()


@pytest.mark.parametrize("seed", range(150))
def test_random_ones_beside_each_other(seed: int) -> None:
    """With preemptions, aborts, shared pages, phases that are free, and several steps in flight."""
    pick = random.Random(seed)
    sharing = PrefixSharing(compare_tokens=True) if pick.random() < 0.7 else None
    num_pages = pick.choice((12, 20, 60))
    rig = Rig(
        SchedulerConfig(decode_steps=pick.choice((None, 2, 4)), headroom_pages=0),
        model=MODEL,
        num_pages=num_pages,
        max_model_len=44,
        max_processor_rows=pick.choice((1, 2, 8)),
        cache=KVCache(single_group(4), num_pages, sharing),
    )
    rig.pipeline.depth = pick.choice((1, 2, 3))
    wanted: dict[str, list[int]] = {}
    count = 0
    while count < 30 or rig.scheduler.has_work:
        if count < 30 and pick.random() < 0.5 and rig.scheduler.num_live < 9:
            sampling = SamplingParams(
                seed=pick.randrange(1 << 30),
                max_tokens=pick.choice((1, 2, 9, 30)),
                min_tokens=0,
                ignore_eos=pick.random() < 0.5,
                top_k=pick.choice((0, 7)),
                presence_penalty=pick.choice((0.0, 0.5)),
                logprobs=pick.choice((None, 2)),
            )
            prompt = tuple(random.Random(pick.randrange(3)).choices(range(VOCAB), k=9))
            asked = Request(id=f"{count}", prompt=prompt[: pick.randint(1, 9)], sampling=sampling)
            count += 1
            start = pick.choice((0, 0, 3, 10))
            rule = {
                "step": pick.choice((1, 2, 3, 20, VOCAB)),
                "start": start,
                "end": start + pick.choice((1, 5, 100)),
                "ends": False,
            }
            bound = pick.random() < 0.7
            rig.scheduler.add(asked, rig.now_s, Rule(VOCAB, **rule) if bound else None)
            wanted[asked.id] = MODEL.generate(asked, 44, Rule(VOCAB, **rule) if bound else None)[0]
        live = [name for name in wanted if rig.scheduler.is_live(name)]
        if live and pick.random() < 0.02:
            name = pick.choice(live)
            rig.scheduler.abort(name)
            assert rig.outputs.get(name, []) == wanted.pop(name)[: len(rig.outputs.get(name, []))]
        rig.now_s += 1
        rig.note(rig.pipeline.turn(rig.now) or [])
        assert not rig.scheduler.audit().problems
    for name, tokens in wanted.items():
        assert rig.outputs[name] == tokens, name
    assert rig.scheduler.stats().free_slots == 4
    assert rig.scheduler.stats().free_pages == num_pages


def test_tokens_that_must_come_need_no_step_each() -> None:
    rig = Rig(model=MODEL)
    asked = request(ignore_eos=True, max_tokens=40, **TRUNCATED)
    rule = Rule(VOCAB, step=VOCAB, start=5, end=25)  # one token may come at a time
    rig.scheduler.add(asked, 0.0, rule)
    plans = rig.run(2)
    assert rig.outputs["a"] == expected(asked, Rule(VOCAB, step=VOCAB, start=5, end=25))
    assert len(plans) < 25
    scored = request("b", ignore_eos=True, max_tokens=40, logprobs=1)
    rig.scheduler.add(scored, 0.0, Rule(VOCAB, step=VOCAB, start=5, end=25))
    assert len(rig.run(2)) >= 40 - 15  # log-probabilities come from steps
    assert rig.outputs["b"] == expected(scored, Rule(VOCAB, step=VOCAB, start=5, end=25))
