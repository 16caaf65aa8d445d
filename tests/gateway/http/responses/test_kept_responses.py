"""Responses that are kept: fetched, continued, listed, deleted, cancelled; by their owner alone."""

import time
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import ResponseItem
from pydantic import TypeAdapter

from tests.gateway.http.http_serving import MODEL
from tests.gateway.http.responses.responding import (
    CALL,
    RESPONSES,
    WEATHER,
    client_of,
    create,
    raises,
    responding,
)

_ITEMS: TypeAdapter[Any] = TypeAdapter(ResponseItem)
LONG = "x" * 4000


def test_retrieve_is_what_was_created():
    with responding() as (_, client, _):
        created = create(client)
        assert client.responses.retrieve(created.id) == created
        with client.responses.stream(model=MODEL, input="hi") as stream:
            final = stream.get_final_response()
        assert client.responses.retrieve(final.id).output_text == "Hello!"


def test_a_conversation_goes_on():
    with responding("One.", "Two.", "Three.", "Four.") as (_, client, script):
        first = create(client, "1")
        second = create(client, "2", previous_response_id=first.id)
        assert script.prompts[1] == "user: 1\nassistant: One.\nuser: 2\nassistant: "
        client.responses.delete(first.id)  # what continues it has the conversation itself
        third = create(client, "3", previous_response_id=second.id, stream=True)
        last = list(third)[-1].response
        assert script.prompts[2].startswith("user: 1\nassistant: One.\nuser: 2\nassistant: Two.\n")
        # References to items instead of the items.
        items = client.responses.input_items.list(last.id, order="asc").data
        texts = [item.content[0].text for item in items]
        assert texts == ["1", "One.", "2", "Two.", "3"]
        given = [{"type": "item_reference", "id": items[0].id}, {"id": last.output[0].id}]
        create(client, given)
        assert script.prompts[3] == "user: 1\nassistant: Three.\nassistant: "


def test_a_conversation_goes_on_after_a_call_that_was_cut_off():
    with responding(CALL, "Hm.") as (_, client, script):
        cut = create(client, tools=[WEATHER], max_output_tokens=len(CALL.encode()) - 20)
        assert cut.output[0].status == "incomplete"
        output = {"type": "function_call_output", "call_id": cut.output[0].call_id, "output": "7"}
        create(client, [output], previous_response_id=cut.id)
        assert script.prompts[1] == "user: hi\nassistant: "


def test_input_items_in_pages():
    with responding(CALL) as (_, client, _):
        items: list[Any] = [
            {"role": "user", "content": "a"},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "1"},
        ]
        response = create(client, items)
        listed = list(client.responses.input_items.list(response.id, limit=2, order="asc"))
        for item in listed:
            _ITEMS.validate_python(item.model_dump(exclude_none=True))
        assert [item.type for item in listed] == [
            *("message", "reasoning", "message", "function_call", "function_call_output")
        ]
        newest = client.responses.input_items.list(response.id)
        assert [item.id for item in newest] == [item.id for item in listed][::-1]
        assert list(client.responses.input_items.list(response.id, after=listed[0].id)) == []
        for fields in (
            *({"limit": it} for it in ("0", "101", "00500", "9" * 9999, "-1", "²")),
            *({"order": "up"}, {"after": "msg_0"}),
        ):
            error = raises(
                openai.BadRequestError,
                client.responses.input_items.list,
                response.id,
                **fields,
            )
            assert error["param"] in fields


def test_store_false_and_delete():
    with responding() as (served, client, _):
        unkept = create(client, store=False)
        assert unkept.store is False
        kept = create(client)
        client.responses.delete(kept.id)
        for response_id in (unkept.id, kept.id, "resp_0"):
            for call in (
                client.responses.retrieve,
                client.responses.delete,
                client.responses.cancel,
                client.responses.input_items.list,
            ):
                error = raises(openai.NotFoundError, call, response_id)
                assert error["code"] == "response_not_found"
        error = raises(openai.NotFoundError, create, client, previous_response_id=kept.id)
        assert error["code"] == "previous_response_not_found"
        assert error["param"] == "previous_response_id"
        given = [{"type": "item_reference", "id": kept.output[0].id}]
        assert raises(openai.NotFoundError, create, client, given)["param"] == "input[0].id"
        answer = httpx.delete(f"{served.url}{RESPONSES}/{create(client).id}")
        assert answer.json()["deleted"] is True


def test_another_keys_response_is_not_there():
    with (
        responding(api_keys=("a", "b")) as (served, _, _),
        client_of(served, "a") as one,
        client_of(served, "b") as other,
    ):
        kept = create(one)
        running = create(one, background=True)
        for response_id in (kept.id, running.id):
            for call in (
                other.responses.retrieve,
                other.responses.delete,
                other.responses.cancel,
            ):
                raises(openai.NotFoundError, call, response_id)
        for fields in (
            {"previous_response_id": kept.id},
            {"given": [{"type": "item_reference", "id": kept.output[0].id}]},
        ):
            raises(openai.NotFoundError, create, other, **fields)
        assert one.responses.retrieve(kept.id) == kept


def test_the_number_is_bounded():
    with responding(max_stored_responses=2) as (_, client, _):
        first, second = create(client), create(client)
        client.responses.retrieve(first.id)
        create(client)
        client.responses.retrieve(first.id)
        raises(openai.NotFoundError, client.responses.retrieve, second.id)
    with responding(max_stored_responses=0) as (_, client, _):
        error = raises(openai.NotFoundError, create, client, previous_response_id=create(client).id)
        assert "gateway.max_stored_responses" in error["message"]


def wait_for(client: openai.OpenAI, response_id: str) -> Any:
    end_s = time.monotonic() + 10
    while time.monotonic() < end_s:
        response = client.responses.retrieve(response_id)
        if response.status not in ("queued", "in_progress"):
            return response
        time.sleep(0.01)
    raise AssertionError("it never ended")


def test_background():
    with responding() as (_, client, script):
        begun = create(client, background=True)
        assert begun.status in ("queued", "in_progress")
        done = wait_for(client, begun.id)
        assert (done.status, done.output_text, done.background) == ("completed", "Hello!", True)
        assert client.responses.cancel(begun.id) == done  # too late
        create(client, "and?", previous_response_id=begun.id)
        assert script.prompts[1] == "user: hi\nassistant: Hello!\nuser: and?\nassistant: "
        for fields in ({"store": False}, {"stream": True}):
            error = raises(openai.BadRequestError, create, client, background=True, **fields)
            assert error["param"] == "background"
        error = raises(openai.BadRequestError, client.responses.cancel, create(client).id)
        assert "background" in error["message"]


@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_ending_a_background_response_frees_the_engine(how: str):
    with responding(LONG, step_s=0.005) as (served, client, _):
        begun = create(client, background=True)
        if how == "cancel":
            cancelled = client.responses.cancel(begun.id)
            assert cancelled.status == "cancelled"
            assert client.responses.retrieve(begun.id) == cancelled
        else:
            client.responses.delete(begun.id)
            raises(openai.NotFoundError, client.responses.retrieve, begun.id)
        served.assert_idle()


def test_a_background_response_fails_with_the_engine():
    with responding(LONG, step_s=0.005) as (served, client, _):
        begun = create(client, background=True)
        time.sleep(0.05)
        served.do(served.engine.crash)
        failed = wait_for(client, begun.id)
        assert failed.status == "failed"
        assert failed.error.code == "server_error"
        served.do(served.engine.restart)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine(stream: bool):
    with responding(LONG, step_s=0.005) as (served, client, _):
        if stream:
            events = client.responses.create(model=MODEL, input="hi", stream=True)
            for _ in range(6):
                next(iter(events))
            events.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                create(client.with_options(timeout=0.2))
        served.assert_idle()
