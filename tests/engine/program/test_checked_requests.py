"""Whatever passes the engine's border can be packed: no request ends the loop."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jserve.core.errors import RequestError
from jserve.core.request import EngineInfo, Request, SamplingParams
from jserve.core.request_check import check_request
from jserve.core.step import Admission, Program, ProgramKind
from jserve.engine.program.admissions import pack_admissions
from jserve.engine.program.batch import BatchShape, layout
from jserve.proto import engine_pb2
from jserve.proto.convert import request_from_proto, request_to_proto

VOCAB = 96
INFO = EngineInfo("tiny", VOCAB, 128, 4, 100, 16, 8, (1, 2))
SHAPE = BatchShape(num_slots=4, vocab=VOCAB, page_size=16, processor_rows=2, pages_per_slot=8)
PARTS = layout(Program(ProgramKind.MIXED, 32, 4), SHAPE)

IDS = st.integers(-1, VOCAB) | st.integers(-(2**31), 2**31 - 1)
NUMBERS = st.sampled_from((0.0, 0.5, 1.0, 2.0, -1.0, 1e9)) | st.floats(width=32)
INTEGERS = st.sampled_from((0, 1, 16, 127, 128)) | st.integers(-(2**31), 2**31 - 1)
LISTS = st.lists(st.integers(0, VOCAB - 1), max_size=3) | st.lists(IDS, max_size=3)
LONG = st.integers(0, 40).map(lambda length: list(range(3, 3 + length)))
BIASES = st.dictionaries(st.integers(0, VOCAB - 1) | IDS, NUMBERS, max_size=3)
SAMPLING = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(
            (
                *("temperature", "top_p", "min_p"),
                *("repetition_penalty", "presence_penalty", "frequency_penalty"),
            ),
            NUMBERS,
        ),
        **dict.fromkeys(
            ("top_k", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"), INTEGERS
        ),
        **dict.fromkeys(("allowed_token_ids", "bad_token_ids", "stop_token_ids"), LISTS | LONG),
        "ignore_eos": st.booleans(),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "logit_bias": BIASES,
    },
)
GOOD = request_to_proto(Request(id="a", prompt=(7, 8), sampling=SamplingParams()))


@given(
    sampling=SAMPLING,
    prompt=LISTS | st.just([7, 8]),
    output=st.just([]) | LISTS,
    choice=st.just(0) | INTEGERS,
    priority=INTEGERS,
)
def test_it_is_refused_or_packed(
    sampling: dict, prompt: list[int], output: list[int], choice: int, priority: int
) -> None:
    message = engine_pb2.EngineRequest.FromString(GOOD.SerializeToString())
    for name, value in sampling.items():
        if isinstance(value, list):
            getattr(message.sampling, name).extend(value)
        elif isinstance(value, dict):
            message.sampling.logit_bias.update(value)
        else:
            setattr(message.sampling, name, value)
    message.prompt[:] = prompt
    message.output.extend(output)
    message.choice, message.priority = choice, priority
    request = request_from_proto(message)
    try:
        check_request(request, INFO)
    except RequestError:
        return
    room = INFO.max_model_len - len(request.prompt)
    limited = replace(request.sampling, max_tokens=min(request.sampling.max_tokens, room))
    admission = Admission(0, replace(request, sampling=limited), request.output)
    views = PARTS.views(np.zeros(PARTS.size, np.int32))
    pack_admissions(views, (admission,), num_slots=4, vocab=VOCAB, eos_token_ids=INFO.eos_token_ids)
    assert views["admit_prompt"][0] == len(prompt)


def test_an_empty_message_is_refused() -> None:
    request = request_from_proto(engine_pb2.EngineRequest())
    try:
        check_request(request, INFO)
    except RequestError:
        return
    raise AssertionError
