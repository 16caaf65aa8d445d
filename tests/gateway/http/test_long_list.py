"""Long JSON arrays leave the interpreter to others while they are built, and are the same JSON."""

import orjson

from jserve.core.request import TokenLogprobs
from jserve.gateway.http import long_list
from jserve.gateway.http.long_list import LARGE, LongList
from jserve.gateway.http.openai_response import CompletionLogprobs, prompt_logprobs_json
from tests.gateway.http.http_serving import byte_tokenizer

TOKENS = byte_tokenizer()
POSITION = TokenLogprobs(65, -0.5, 2, tuple((66 + i, -0.6 - i) for i in range(20)))


def test_a_short_array_stays_as_it_is():
    numbers = LongList()
    for number in range(LARGE):
        numbers.append(number)
    assert numbers.json() == list(range(LARGE))


def test_an_empty_array_is_empty():
    assert LongList().json() == []


def test_a_long_array_rests_between_its_pieces(monkeypatch):
    rests: list[float] = []
    monkeypatch.setattr(long_list.time, "sleep", rests.append)
    written = orjson.dumps(prompt_logprobs_json([None, *[POSITION] * 999], TOKENS))
    assert len(rests) >= 999 * 21 // LARGE
    assert all(rest_s > 0 for rest_s in rests)
    one = orjson.loads(orjson.dumps(prompt_logprobs_json([POSITION], TOKENS)))
    assert orjson.loads(written) == [None, *one * 999]


def test_the_logprobs_of_a_long_completion_are_those_of_its_parts():
    ids, entries = [65] * 500, [POSITION] * 500
    whole = orjson.loads(orjson.dumps(CompletionLogprobs(TOKENS, 20).add(ids, entries)))
    builder = CompletionLogprobs(TOKENS, 20)
    parts = [builder.add(ids[i : i + 5], entries[i : i + 5]) for i in range(0, 500, 5)]
    for name, values in whole.items():
        assert values == [value for part in parts for value in part[name]]
