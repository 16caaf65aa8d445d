"""What a request takes from stored responses, and how responses are stored."""

from collections.abc import Sequence
from typing import TypeAlias

import orjson

from jserve.gateway.http.errors import HttpError
from jserve.gateway.http.responses.items import REFERENCE, Item
from jserve.gateway.http.responses.store import ResponseStore, StoredItem, StoredResponse

Context: TypeAlias = Sequence[Item | StoredItem]  # a conversation: stored items, and new ones


def find_context(
    store: ResponseStore, tenant: str, previous_id: str | None, given: Sequence[Item]
) -> Context:
    """Returns the items of the previous response and those given, with references resolved.

    Raises HttpError (404) for what is not stored for this tenant.
    """
    items: list[Item | StoredItem] = []
    if previous_id is not None:
        previous = store.get(tenant, previous_id)
        if previous is None:
            raise not_found(previous_id, store, param="previous_response_id")
        items += previous.items
    items += (_resolved(store, tenant, i, item) for i, item in enumerate(given))
    return items


def decoded(context: Context) -> list[Item]:
    """The items as objects."""
    return [orjson.loads(it.json) if isinstance(it, StoredItem) else it for it in context]


def encoded(context: Context) -> tuple[StoredItem, ...]:
    """The items as they are stored; those that are stored already are shared."""
    return tuple(it if isinstance(it, StoredItem) else _stored_item(it) for it in context)


def stored_response(
    response_id: str,
    body: bytes,
    before: tuple[StoredItem, ...],
    output: Sequence[Item],
    *,
    background: bool,
) -> StoredResponse:
    """Makes what is stored of a response."""
    return StoredResponse(response_id, body, before, encoded(output), background)


def not_found(response_id: str, store: ResponseStore, *, param: str | None = None) -> HttpError:
    """The error for a response that is not there, or not the tenant's."""
    what = "response" if param is None else "previous response"
    message = (
        f"{what} {response_id[:100]!r} is not stored here: it was never, was deleted, or made room "
        f"for others ({store.max_responses} are kept: gateway.max_stored_responses)"
    )
    code = "response_not_found" if param is None else "previous_response_not_found"
    return HttpError(404, message, code=code, param=param)


def _resolved(store: ResponseStore, tenant: str, index: int, item: Item) -> Item | StoredItem:
    if item["type"] != REFERENCE:
        return item
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
