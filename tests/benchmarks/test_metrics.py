import json

import pytest

from benchmarks.serving.driver import Load
from benchmarks.serving.metrics import Slo, distribution, is_good, itls_ms, summarize, tpot_ms
from benchmarks.serving.record import Record


def record(sent, *chunks, tokens=None, told=None, end=None, **fields):
    """Makes a record of chunks (seconds, text); `told` has the tokens of each."""
    made = Record(sent_s=sent, output_tokens=tokens, **fields)
    for i, (at_s, text) in enumerate(chunks):
        made.arrive(at_s, text, 0 if told is None else told[i])
    made.end_s = chunks[-1][0] if end is None else end
    return made


ONE_EACH = record(10.0, (10.5, "a"), (10.7, "b"), (11.1, "c"), tokens=3, prompt_tokens=5)


def test_latencies_of_one_token_a_chunk():
    assert itls_ms(ONE_EACH) == pytest.approx([200, 400])
    assert tpot_ms(ONE_EACH) == pytest.approx(300)


def test_a_gap_is_divided_over_the_tokens_of_its_chunk():
    windows = record(0.0, (1.0, "a"), (1.8, "bcde"), (2.0, "f"), tokens=6, told=[1, 4, 1])
    assert itls_ms(windows) == pytest.approx([200, 200, 200, 200, 200])
    assert tpot_ms(windows) == pytest.approx(200)


def test_untold_tokens_are_shared_out_by_length_of_text():
    guessed = record(0.0, (1.0, "a"), (1.8, "bbbbbbbb"), (2.0, "c"), tokens=7)
    assert guessed.tokens_by_chunk() == [1, 5, 1]
    assert sum(guessed.tokens_by_chunk()) == 7
    assert record(0.0, (1.0, "a"), (2.0, "b"), tokens=2).tokens_by_chunk() == [1, 1]
    assert record(0.0, (1.0, "a"), (2.0, "b"), tokens=1).tokens_by_chunk() == [1, 1]


def test_tokens_without_text_belong_to_the_next_text():
    held = Record(sent_s=0.0, output_tokens=4)
    for at_s, text, count in ((1, "", 1), (2, "ä", 1), (3, "b", 1), (4, "", 1)):
        held.arrive(at_s, text, count)
    assert held.chunk_s == [2, 3]
    assert held.tokens_by_chunk() == [2, 1]


def test_an_answer_without_any_text_came_when_it_ended():
    silent = Record(sent_s=0.0, output_tokens=2)
    silent.arrive(1.0, "", 1)
    silent.finish(2.0)
    assert silent.chunk_s == [2.0]
    assert tpot_ms(silent) is None


def test_without_usage_a_chunk_is_a_token():
    untold = record(0.0, (1.0, "a"), (2.0, "b"))
    assert untold.tokens == 2
    assert tpot_ms(untold) == pytest.approx(1000)
    summary = summarize(Load([untold], 1.0, 0.0), Slo())
    assert summary["tokens_counted_by"] == "chunks"


def test_percentiles_by_hand():
    found = distribution([4.0, 1.0, 3.0, 2.0, 5.0])
    assert found == {"mean": 3.0, "p50": 3.0, "p90": 4.6, "p95": 4.8, "p99": 4.96, "max": 5.0}
    assert distribution([]) is None


def test_goodput_by_hand():
    slow_start = record(0.0, (2.0, "a"), (2.1, "b"), tokens=2)
    slow_tokens = record(0.0, (0.1, "a"), (1.1, "b"), tokens=2)
    good = record(0.0, (0.1, "a"), (0.2, "b"), tokens=2)
    failed = Record(sent_s=0.0, end_s=0.1, error="HTTP 500: no")
    slo = Slo(ttft_ms=1000, tpot_ms=500)
    assert [is_good(it, slo) for it in (slow_start, slow_tokens, good, failed)] == [
        *(False, False, True, False)
    ]
    summary = summarize(Load([slow_start, slow_tokens, good, failed], 2.0, 0.5), slo)
    assert summary["goodput"] == {
        "slo": {"ttft_ms": 1000, "tpot_ms": 500},
        "share": 0.25,
        "requests_per_s": 0.5,
    }
    assert summary["requests"] == 4
    assert summary["errors"] == 1
    assert summary["error_kinds"] == {"HTTP 500: no": 1}
    assert is_good(slow_tokens, Slo(itl_ms=1001))
    assert not is_good(slow_tokens, Slo(itl_ms=999))


def test_throughput_by_hand():
    late = record(10.0, (10.4, "a"), (10.6, "b"), tokens=2, prompt_tokens=7, planned_s=9.9)
    summary = summarize(Load([ONE_EACH, late], 2.0, 0.25), Slo())
    assert summary["output_tokens_per_s"] == 2.5
    assert summary["total_tokens_per_s"] == 8.5
    assert summary["requests_per_s"] == 1.0
    assert summary["ttft_ms"]["p50"] == pytest.approx(450)
    assert summary["e2e_ms"]["max"] == pytest.approx(1100)
    assert summary["send_lag_ms"]["max"] == pytest.approx(100)
    assert summary["chunk_gap_ms"]["p50"] == pytest.approx(200)
    assert summary["client_cpu_s"] == 0.25
    assert summary["goodput"] is None
    json.dumps(summary, allow_nan=False)


def test_nothing_came():
    summary = summarize(Load([Record(error="x")], 1.0, 0.0), Slo(ttft_ms=1))
    assert summary["ttft_ms"] is None
    assert summary["goodput"]["share"] == 0
    assert summarize(Load([], 1.0, 0.0), Slo())["requests"] == 0
