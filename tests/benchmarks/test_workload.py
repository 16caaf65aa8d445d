import argparse

import pytest

from benchmarks.serving import options
from benchmarks.serving.failures import BenchmarkError
from benchmarks.serving.traces import TraceRow
from benchmarks.serving.workload import Job, check_fits, clip, of_trace, open_loop


def parsed(*flags):
    parser = argparse.ArgumentParser()
    options.add_load_flags(parser)
    return parser.parse_args(flags)


def test_prompts_follow_their_seed():
    job, same, other = (Job(0, 40, 1, seed) for seed in ((1, 2), (1, 2), (1, 3)))
    assert job.token_ids(10, 20) == same.token_ids(10, 20) != other.token_ids(10, 20)
    assert set(job.token_ids(10, 20)) <= set(range(10, 21))
    assert len(job.token_ids(10, 20)) == 40
    assert job.text() == same.text() != other.text()
    assert len(job.text().split(" ")) == 40


def test_a_run_never_repeats_a_prompt():
    jobs = open_loop(2.0, 1, 30, 8, 4, (0, 0)) + open_loop(2.0, 1, 30, 8, 4, (0, 1))
    assert len({tuple(job.token_ids(0, 10**6)) for job in jobs}) == 60
    assert open_loop(2.0, 1, 30, 8, 4, (0, 0)) == jobs[:30]


def test_prompts_share_what_is_asked_for_and_no_more():
    jobs = [Job(0, 40, 1, (1, i), shared_tokens=30) for i in range(2)]
    first, second = (job.token_ids(0, 10**6) for job in jobs)
    assert first[:30] == second[:30]
    assert first[30:] != second[30:]
    assert [len(ids) for ids in (first, second)] == [40, 40]
    other_run = Job(0, 40, 1, (2, 0), shared_tokens=30).token_ids(0, 10**6)
    assert other_run[:30] != first[:30]
    assert len({Job(0, 4, 1, (1, i), shared_tokens=9).text() for i in range(20)}) > 1


def test_clip():
    jobs = of_trace([TraceRow(0, 100, 10), TraceRow(1, 5, 200), TraceRow(2, 3, 4)], (0,))
    lengths = [(job.prompt_tokens, job.output_tokens) for job in clip(jobs, 50)]
    assert lengths == [(40, 10), (1, 49), (3, 4)]
    assert clip(jobs, None) == jobs


def test_what_does_not_fit_is_said_before():
    jobs = [Job(0, 10, 10, (0,)), Job(0, 60, 41, (1,))]
    check_fits(jobs, 101)
    check_fits(jobs, None)
    with pytest.raises(BenchmarkError, match=r"60 \+ 41 tokens exceeds .* 100.*--clip_tokens 100"):
        check_fits(jobs, 100)


def test_points():
    def labels(*flags):
        return [point.label for point in options.points_of(parsed(*flags))]

    assert labels() == ["1 stream", "8 streams", "32 streams"]
    assert labels("--streams", "4") == ["4 streams"]
    assert labels("--rate", "2", "inf") == ["2/s", "all at once"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--streams", "1", "--rate", "2"], "choose one"),
        (["--streams", "0"], "--streams is 0"),
        (["--max_tokens", "0"], "--max_tokens is 0"),
        (["--rate", "1", "--requests", "-3"], "--requests is -3"),
        (["--rate", "nan"], "--rate is nan"),
        (["--shared_tokens", "-1"], "--shared_tokens is -1; it must be at least 0"),
        (["--trace", "x.txt"], "x.txt: a trace is"),
    ],
)
def test_flags_that_make_no_load(flags, message):
    with pytest.raises(BenchmarkError, match=message):
        options.points_of(parsed(*flags))


def test_the_reported_config_has_no_secret():
    config = options.config_of(parsed("--api_key", "secret", "--rate", "inf", "2"))
    assert "secret" not in str(config)
    assert config["rate"] == ["inf", 2.0]
