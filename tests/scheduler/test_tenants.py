"""Waiting sequences of several tenants take turns; a tenant holds no more slots than it may."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from jserve.core.request import Request, SamplingParams
from tests.scheduler.rig import Rig


def add(rig: Rig, name: str, tenant: str, *, max_tokens: int = 1, **fields: int) -> None:
    request = Request(
        id=name, prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    )
    rig.scheduler.add(replace(request, tenant=tenant, **fields), 0.0)


def admitted(rig: Rig) -> list[str]:
    """Ids in the order of their first admission."""
    ids = [it.request.id for plan in rig.executor.plans for it in plan.admissions]
    return list(dict.fromkeys(ids))


def run(rig: Rig) -> None:
    for _ in range(2000):
        if not rig.scheduler.has_work:
            return
        rig.step()
        assert not rig.scheduler.audit().problems
    raise AssertionError("it never ends")


def test_tenants_take_turns():
    rig = Rig(num_slots=1)
    for i in range(6):
        add(rig, f"a{i}", "ann")
    for i in range(2):
        add(rig, f"b{i}", "bob")
    add(rig, "c0", "cid")
    run(rig)
    assert admitted(rig) == ["a0", "b0", "c0", "a1", "b1", "a2", "a3", "a4", "a5"]


def test_who_returns_after_each_answer_gets_no_more_than_a_share():
    rig = Rig(num_slots=1)
    for i in range(10):
        add(rig, f"b{i}", "bob")
    add(rig, "a0", "ann")
    for i in range(1, 40):
        while f"a{i - 1}" not in admitted(rig):
            rig.step()
        add(rig, f"a{i}", "ann")
    assert sum(name.startswith("b") for name in admitted(rig)[:20]) == 10
    run(rig)


def test_one_request_waits_for_one_slot_and_not_for_all_of_another_tenant():
    rig = Rig(num_slots=2)
    for i in range(50):
        add(rig, f"a{i}", "ann", max_tokens=4)
    rig.step()
    add(rig, "b0", "bob")
    run(rig)
    assert admitted(rig).index("b0") <= 3


def test_priority_comes_before_turns():
    rig = Rig(num_slots=1)
    add(rig, "a0", "ann")
    add(rig, "b0", "bob", priority=1)
    add(rig, "a1", "ann")
    add(rig, "c0", "cid", priority=-1)
    run(rig)
    assert admitted(rig) == ["c0", "a0", "a1", "b0"]


def test_a_tenant_holds_no_more_slots_than_it_may():
    rig = Rig(num_slots=4)
    for i in range(8):
        add(rig, f"a{i}", "ann", max_tokens=6, tenant_slots=2)
    rig.step()
    assert rig.scheduler.stats().free_slots == 2
    add(rig, "b0", "bob", max_tokens=6)
    rig.step()
    assert "b0" in admitted(rig)
    assert rig.scheduler.stats().free_slots == 1
    run(rig)
    assert len(admitted(rig)) == 9


@given(
    tenants=st.lists(st.sampled_from("abc"), min_size=1, max_size=20),
    num_pages=st.integers(8, 30),
    most=st.integers(0, 2),
)
def test_everybody_ends_with_few_pages(tenants, num_pages, most):
    """Preemptions included: nobody is lost, and the counts of slots stay right."""
    rig = Rig(num_pages=num_pages)
    for i, tenant in enumerate(tenants):
        add(rig, str(i), tenant, max_tokens=2 + i % 7, tenant_slots=most)
    run(rig)
    assert sorted(admitted(rig)) == sorted(map(str, range(len(tenants))))
