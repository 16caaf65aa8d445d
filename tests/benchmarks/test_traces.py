import pytest

from benchmarks.serving.failures import BenchmarkError
from benchmarks.serving.traces import TraceRow, read_trace, reshape

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
AZURE = HEADER + (
    "2023-11-16 18:15:46.6805900,374,44\n"
    "2023-11-16 18:15:50.9951690,396,109\n"
    "2023-11-16 19:15:50.9951690,9,1\n"
)
MOONCAKE = (
    '{"timestamp": 1000, "input_length": 6758, "output_length": 500, "hash_ids": [0]}\n'
    '{"timestamp": 3500, "input_length": 3, "output_length": 2}\n'
)


def written(tmp_path, text, name="trace.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_azure(tmp_path):
    rows = read_trace(written(tmp_path, AZURE))
    assert [(r.prompt_tokens, r.output_tokens) for r in rows] == [(374, 44), (396, 109), (9, 1)]
    assert [r.at_s for r in rows] == pytest.approx([0, 4.314579, 3604.314579], abs=1e-5)
    windows = read_trace(written(tmp_path, AZURE.replace("\n", "\r\n")))
    assert windows == rows


def test_limit_does_not_look_further(tmp_path):
    assert len(read_trace(written(tmp_path, AZURE + "rubbish\n"), limit=2)) == 2


def test_mooncake(tmp_path):
    rows = read_trace(written(tmp_path, MOONCAKE, "trace.jsonl"))
    assert rows == [TraceRow(0, 6758, 500), TraceRow(2.5, 3, 2)]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a,b,c\n1,2,3\n", 1, "the header must be TIMESTAMP,ContextTokens,GeneratedTokens"),
        (HEADER + "2023-11-16 18:15:46,374\n", 2, "2 columns, not 3"),
        (HEADER + "yesterday,374,44\n", 2, "TIMESTAMP is 'yesterday'"),
        (HEADER + "2023-11-16 18:15:46.x,374,44\n", 2, "TIMESTAMP is"),
        (AZURE + "2023-11-16 20:00:00,3.5,44\n", 5, "ContextTokens is '3.5'"),
        (AZURE + "2023-11-16 20:00:00,3,-4\n", 5, "GeneratedTokens is '-4'"),
        (AZURE + "2023-11-16 20:00:00,3,0\n", 5, "GeneratedTokens is '0'"),
        (AZURE + "\n2023-11-16 20:00:00,,1\n", 6, "ContextTokens is ''"),
        (AZURE + "2023-11-16 18:00:00,3,4\n", 5, "TIMESTAMP is earlier"),
    ],
)
def test_a_bad_row_is_named(tmp_path, text, line, what):
    path = written(tmp_path, text)
    with pytest.raises(BenchmarkError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("nonsense", "not JSON"),
        ("[1, 2]", "no timestamp"),
        ('{"timestamp": 4000, "input_length": 3}', "no output_length"),
        ('{"timestamp": "x", "input_length": 3, "output_length": 2}', "timestamp is 'x'"),
        ('{"timestamp": NaN, "input_length": 3, "output_length": 2}', "timestamp is nan"),
        ('{"timestamp": 4000, "input_length": true, "output_length": 2}', "input_length is True"),
        ('{"timestamp": 4000, "input_length": 3.0, "output_length": 2}', "input_length is 3.0"),
        ('{"timestamp": 1, "input_length": 3, "output_length": 2}', "timestamp is earlier"),
    ],
)
def test_a_bad_json_row_is_named(tmp_path, row, what):
    path = written(tmp_path, MOONCAKE + row + "\n", "trace.jsonl")
    with pytest.raises(BenchmarkError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}:3: {what}")


def test_no_trace(tmp_path):
    for path, what in (
        (str(tmp_path / "none.csv"), "No such file"),
        (written(tmp_path, HEADER), "no requests in it"),
        (written(tmp_path, "", "empty.jsonl"), "no requests in it"),
        (written(tmp_path, "", "trace.txt"), "a trace is a .csv"),
    ):
        with pytest.raises(BenchmarkError, match=what):
            read_trace(path)


def test_reshape():
    rows = [TraceRow(0, 800, 9), TraceRow(4, 12, 80), TraceRow(10, 4, 1)]
    assert reshape(rows, length_divisor=8, time_stretch=2) == [
        TraceRow(0, 100, 1),
        TraceRow(8, 2, 10),
        TraceRow(20, 1, 1),
    ]
    assert [row.at_s for row in reshape(rows, rate=4)] == pytest.approx([0, 0.2, 0.5])
    assert [row.at_s for row in reshape(rows, rate=float("inf"))] == [0, 0, 0]
    assert reshape([TraceRow(0, 1, 1)], rate=3) == [TraceRow(0, 1, 1)]
    for wrong in ({"rate": 0}, {"length_divisor": 0}, {"time_stretch": -1}):
        with pytest.raises(BenchmarkError):
            reshape(rows, **wrong)
