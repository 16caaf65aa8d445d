"""Dataclasses survive the wire, and nothing of them is forgotten."""

import struct
import time
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jserve.core.errors import (
    EngineError,
    Overloaded,
    PromptTooLong,
    RequestError,
    Unavailable,
)
from jserve.core.request import (
    ConstraintSpec,
    EngineInfo,
    FinishReason,
    Request,
    SamplingParams,
    SequenceUpdate,
    TokenLogprobs,
)
from jserve.core.stats import EngineStats
from jserve.proto import engine_pb2, types_pb2
from jserve.proto.convert import (
    RequestReader,
    RequestWriter,
    error_from_rejection,
    info_from_proto,
    info_to_proto,
    rejection_to_proto,
    request_from_proto,
    request_to_proto,
    sampling_from_proto,
    sampling_to_proto,
    stats_from_proto,
    stats_to_proto,
    update_from_proto,
    updates_to_proto,
)
from tests.sampling_values import unusual_sampling

IDS = st.integers(0, 2**31 - 1)
INT32 = st.integers(-(2**31), 2**31 - 1)
FLOAT32 = st.floats(width=32, allow_nan=False)
ID_LISTS = st.lists(IDS, max_size=5).map(tuple)
SAMPLING = st.builds(
    SamplingParams,
    temperature=FLOAT32,
    top_k=INT32,
    top_p=FLOAT32,
    min_p=FLOAT32,
    repetition_penalty=FLOAT32,
    presence_penalty=FLOAT32,
    frequency_penalty=FLOAT32,
    logit_bias=st.dictionaries(IDS, FLOAT32, max_size=4).map(lambda d: tuple(sorted(d.items()))),
    allowed_token_ids=ID_LISTS,
    bad_token_ids=ID_LISTS,
    seed=st.integers(-(2**63), 2**63 - 1),
    max_tokens=IDS,
    min_tokens=IDS,
    ignore_eos=st.booleans(),
    stop_token_ids=ID_LISTS,
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
)
CONSTRAINTS = st.builds(
    ConstraintSpec,
    grammar=st.text(st.characters(codec="utf-8"), max_size=9),
    fit=st.booleans(),
    reasoning_start=ID_LISTS,
    reasoning_end=ID_LISTS,
    max_reasoning_tokens=st.none() | IDS,
    bad_sequences=st.lists(ID_LISTS, max_size=3).map(tuple),
)
REQUESTS = st.builds(
    Request,
    id=st.text(st.characters(codec="utf-8"), max_size=9),
    prompt=ID_LISTS,
    sampling=SAMPLING,
    choice=IDS,
    priority=INT32,
    tenant=st.text(st.characters(codec="utf-8"), max_size=9),
    tenant_slots=INT32,
    cache_salt=st.text(st.characters(codec="utf-8"), max_size=9),
    constraint=st.none() | CONSTRAINTS,
)
LOGPROBS = st.builds(
    TokenLogprobs,
    token_id=IDS,
    logprob=FLOAT32,
    rank=IDS,
    top=st.lists(st.tuples(IDS, FLOAT32), max_size=3).map(tuple),
)
UPDATES = st.builds(
    SequenceUpdate,
    request_id=st.text("abc", max_size=3),
    tokens=ID_LISTS,
    finish=st.none() | st.sampled_from(FinishReason),
    logprobs=st.none() | st.lists(LOGPROBS, min_size=1, max_size=3).map(tuple),
    prompt_logprobs=st.none() | st.lists(st.none() | LOGPROBS, max_size=3).map(tuple),
    queue_s=st.none() | st.floats(0, 1e9),
    error=st.none() | st.text("xyz", min_size=1, max_size=5),
    cached_tokens=IDS,
)


@given(request=REQUESTS)
def test_request_survives(request):
    wire = request_to_proto(request).SerializeToString()
    assert request_from_proto(engine_pb2.EngineRequest.FromString(wire)) == request


def test_every_sampling_field_has_a_place_on_the_wire():
    names = {field.name for field in fields(SamplingParams)}
    assert names == set(types_pb2.SamplingParams.DESCRIPTOR.fields_by_name)


def test_every_sampling_field_survives_with_a_value_of_its_own():
    sampling = unusual_sampling()
    wire = sampling_to_proto(sampling).SerializeToString()
    assert sampling_from_proto(types_pb2.SamplingParams.FromString(wire)) == sampling


def test_every_statistic_has_a_place_on_the_wire():
    names = {field.name for field in fields(EngineStats)}
    assert names == set(engine_pb2.EngineStats.DESCRIPTOR.fields_by_name)


def test_floats_become_what_the_device_sees():
    request = Request(id="a", prompt=(1,), sampling=SamplingParams(temperature=0.7))
    got = request_from_proto(request_to_proto(request)).sampling.temperature
    assert got == struct.unpack("f", struct.pack("f", 0.7))[0] != 0.7


@given(updates=st.lists(UPDATES, max_size=4, unique_by=lambda update: update.request_id))
def test_updates_survive(updates):
    response = engine_pb2.SessionResponse()
    updates_to_proto({update.request_id: update for update in updates}, response)
    received = engine_pb2.SessionResponse.FromString(response.SerializeToString())
    assert [update_from_proto(message) for message in received.updates] == updates


@given(first=UPDATES, second=UPDATES)
def test_merged_updates_say_what_both_said(first, second):
    both = first.then(second)
    assert both.tokens == first.tokens + second.tokens
    assert both.finish == second.finish
    assert (both.logprobs or ()) == (first.logprobs or ()) + (second.logprobs or ())
    assert both.queue_s == (second.queue_s if first.queue_s is None else first.queue_s)


def test_info_and_stats_survive():
    info = EngineInfo("m", 10, 20, 3, 4, 16, 7, (1, 2), "n", "w", "float32")
    assert info_from_proto(info_to_proto(info)) == info
    stats = EngineStats(**{field.name: i for i, field in enumerate(fields(EngineStats), 1)})
    assert stats_from_proto(stats_to_proto(stats)) == stats


@pytest.mark.parametrize(
    "error",
    [
        RequestError("wrong"),
        PromptTooLong("long"),
        Overloaded("full", retry_after_s=2.5),
        Unavailable("draining", retry_after_s=0.5),
        EngineError("broken"),
    ],
)
def test_refusals_keep_type_message_and_delay(error):
    message = rejection_to_proto("id", error)
    again = error_from_rejection(engine_pb2.Rejection.FromString(message.SerializeToString()))
    assert message.request_id == "id"
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert getattr(again, "retry_after_s", None) == getattr(error, "retry_after_s", None)


def test_choices_share_their_sampling_on_both_sides():
    shared = SamplingParams(allowed_token_ids=tuple(range(1000)), logit_bias=((3, 1.5), (9, -2.0)))
    other = SamplingParams(seed=7)
    samplings = (shared, shared, other, shared)
    sent = [Request(id=str(i), prompt=(1,), sampling=it) for i, it in enumerate(samplings)]
    writer, reader = RequestWriter(), RequestReader()
    wires = [writer.write(request).SerializeToString() for request in sent]
    assert wires == [request_to_proto(request).SerializeToString() for request in sent]
    got = [reader.read(engine_pb2.EngineRequest.FromString(wire)) for wire in wires]
    assert got == sent
    assert got[0].sampling is got[1].sampling


def test_the_logprobs_of_a_long_prompt_are_read_without_an_object_for_each():
    top = tuple((token, -float(token)) for token in range(20))
    position = TokenLogprobs(7, -0.5, 1, top)
    update = SequenceUpdate("a", (1,), prompt_logprobs=(None, *[position] * 3_999))
    response = engine_pb2.SessionResponse()
    updates_to_proto({"a": update}, response)
    wire = response.SerializeToString()
    seconds: list[float] = []
    for _ in range(5):
        begun_s = time.thread_time()
        (message,) = engine_pb2.SessionResponse.FromString(wire).updates
        received = update_from_proto(message)
        seconds.append(time.thread_time() - begun_s)
    assert received == update
    assert min(seconds) < 0.01  # it was 0.1 with a message for each


def test_logprobs_whose_arrays_do_not_fit_are_refused():
    packed = engine_pb2.PackedLogprobs(ids=bytes(8), values=bytes(4), ranks=bytes(4), ends=bytes(8))
    message = engine_pb2.SequenceUpdate(request_id="a", logprobs=packed)
    with pytest.raises(ValueError, match="do not fit"):
        update_from_proto(message)
