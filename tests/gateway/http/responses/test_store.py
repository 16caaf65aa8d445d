import hypothesis
from hypothesis import strategies as st

from jserve.gateway.http.responses.store import ResponseStore, StoredItem, StoredResponse


def response(name: str, *items: StoredItem, size: int = 100) -> StoredResponse:
    return StoredResponse(name, b"x" * size, items, (StoredItem(f"out-{name}", b"y" * size),))


def test_the_tenant_who_holds_most_makes_room():
    store = ResponseStore(max_responses=3, max_bytes=1 << 20)
    store.put("small", response("s"))
    for name in "abcd":
        store.put("large", response(name))
    assert store.get("small", "s") is not None
    assert [name for name in "abcd" if store.get("large", name)] == ["c", "d"]
    store = ResponseStore(max_responses=100, max_bytes=4000)
    store.put("small", response("s"))
    for name in "abcd":
        store.put("large", response(name, size=700))
    assert store.get("small", "s") is not None
    assert store.get("large", "d") is not None
    assert store.num_bytes <= 4000


def test_one_that_is_too_large_is_dropped():
    store = ResponseStore(max_responses=9, max_bytes=1000)
    store.put("a", response("a", size=2000))
    assert len(store) == store.num_bytes == 0
    assert store.item("a", "out-a") is None


def test_shared_items_count_once_and_stay_with_the_last():
    store = ResponseStore(max_responses=9, max_bytes=1 << 20)
    shared = StoredItem("it", b"z" * 10_000)
    store.put("a", response("a", shared))
    before = store.num_bytes
    store.put("a", response("b", shared, shared))
    assert store.num_bytes - before < 1000
    assert store.delete("a", "a")
    assert store.item("a", "it") is shared
    assert store.item("b", "it") is None
    assert store.delete("a", "b")
    assert store.item("a", "it") is None
    assert store.num_bytes == 0
    assert not store.delete("a", "b")


@hypothesis.given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"),
            st.sampled_from("wxyz"),
            st.sampled_from(["put", "get", "delete"]),
            st.integers(0, 400),
        ),
        max_size=40,
    )
)
def test_bounds_hold_and_nothing_is_lost(steps):
    store = ResponseStore(max_responses=3, max_bytes=3000)
    shared = {tenant: StoredItem("it", b"z" * 50) for tenant in "ab"}
    for tenant, name, what, size in steps:
        if what == "put":
            store.put(tenant, response(name, shared[tenant], size=size))
            found = store.get(tenant, name)  # unless its tenant holds the most by it alone
            assert found is None or len(found.json) == size
        elif what == "get":
            found = store.get(tenant, name)
            assert found is None or found.id == name
        else:
            store.delete(tenant, name)
            assert store.get(tenant, name) is None
        assert len(store) <= 3
        assert 0 <= store.num_bytes <= 3000
    for tenant in "ab":
        for name in "wxyz":
            store.delete(tenant, name)
    assert store == ResponseStore(max_responses=3, max_bytes=3000)
