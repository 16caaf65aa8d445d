"""The budget of unread output: whose request ends when it is exceeded."""

import pytest

from jserve.core.errors import Overloaded
from jserve.gateway.buffers import BufferAccount, BufferBudget


def opened(
    budget: BufferBudget, tenant: str, num_bytes: int, ended: list[str], name: str
) -> BufferAccount:
    account = budget.open(tenant)
    account.on_full.append(lambda error: ended.append(f"{name}: {error}"))
    account.add(num_bytes)
    return account


@pytest.mark.parametrize("writer", ["other", "smaller", "larger"])
def test_the_largest_request_of_the_heaviest_tenant_ends_whoever_writes(writer: str) -> None:
    budget, ended = BufferBudget(max_bytes=100, max_request_bytes=100), list[str]()
    accounts = {
        "other": opened(budget, "a", 40, ended, "other"),
        "smaller": opened(budget, "b", 20, ended, "smaller"),
        "larger": opened(budget, "b", 35, ended, "larger"),
    }
    accounts[writer].add(6)
    assert [it.partition(":")[0] for it in ended] == ["larger"]
    assert "max_buffer_bytes" in ended[0]
    assert budget.used_bytes == 40 + 20 + (6 if writer != "larger" else 0)


def test_as_many_requests_end_as_must() -> None:
    budget, ended = BufferBudget(max_bytes=100, max_request_bytes=100), list[str]()
    for number in range(9):
        opened(budget, "b", 10, ended, f"b{number}")
    opened(budget, "a", 35, ended, "a")
    assert len(ended) == 3
    assert not any(it.startswith("a:") for it in ended)
    assert budget.used_bytes == 60 + 35


def test_a_request_over_its_own_bound_ends_alone() -> None:
    budget, errors = BufferBudget(max_bytes=100, max_request_bytes=50), list[Overloaded]()
    ended = list[str]()
    opened(budget, "b", 40, ended, "b")
    account = budget.open("a")
    account.on_full.append(errors.append)
    account.add(51)
    account.add(10)  # what still comes counts no more
    assert "max_request_buffer_bytes" in str(errors[0])
    assert (len(errors), ended, budget.used_bytes) == (1, [], 40)
