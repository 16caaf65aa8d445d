"""What a request takes from stored responses, and how responses are stored."""

from collections.abc import Sequence

import orjson

from jserve.gateway.http.errors import HttpError
from jserve.gateway.http.responses.items import REFERENCE, Item
from jserve.gateway.http.responses.store import ResponseStore, StoredItem, StoredResponse


def conversation(
    store: ResponseStore, tenant: str, previous_id: str | None, given: Sequence[Item]
) -> tuple[StoredItem, ...]:
    """Returns the items of the previous response and those given, with references resolved.

    Raises HttpError (404) for what is not stored for this tenant.
    """
    items: list[StoredItem] = []
    if previous_id is not None:
        previous = store.get(tenant, previous_id)
        if previous is None:
            raise not_found(previous_id, store, param="previous_response_id")
        items += previous.items
    items += (_resolved(store, tenant, i, item) for i, item in enumerate(given))
    return tuple(items)


def stored_response(
    response_id: str,
    encoded: bytes,
    before: Sequence[StoredItem],
    output: Sequence[Item],
    *,
    background: bool,
) -> StoredResponse:
    """Makes what is stored of a response."""
    items = tuple(map(_stored_item, output))
    return StoredResponse(response_id, encoded, tuple(before), items, background)


def not_found(response_id: str, store: ResponseStore, *, param: str | None = None) -> HttpError:
    """The error for a response that is not there, or not the tenant's."""
    what = "response" if param is None else "previous response"
    message = (
        f"{what} {response_id[:100]!r} is not stored here: it was never, was deleted, or made room "
        f"for others ({store.max_responses} are kept: gateway.max_stored_responses)"
    )
    code = "response_not_found" if param is None else "previous_response_not_found"
    return HttpError(404, message, code=code, param=param)


def _resolved(store: ResponseStore, tenant: str, index: int, item: Item) -> StoredItem:
    if item["type"] != REFERENCE:
        return _stored_item(item)
    found = store.item(tenant, item["id"])
    if found is None:
        where = f"input[{index}].id"
        message = f"{where}: no item {item['id'][:100]!r} is stored here; send the item itself"
        raise HttpError(404, message, code="item_not_found", param=where)
    return found


def _stored_item(item: Item) -> StoredItem:
    """Encodes an item, without its log-probabilities: the response has them."""
    if item["type"] == "message":
        content = [
            {**part, "logprobs": []} if "logprobs" in part else part for part in item["content"]
        ]
        item = item | {"content": content}
    return StoredItem(item["id"], orjson.dumps(item))
