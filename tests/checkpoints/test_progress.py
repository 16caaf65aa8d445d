"""Progress of files: the first bytes, now and then, and the end; never silence or a flood."""

from jserve.checkpoints.progress import FileProgress


def test_progress_is_said_at_the_start_and_at_the_end() -> None:
    said: list[str] = []
    progress = FileProgress("fetching", said.append)
    progress(0, 0)
    for done_bytes in range(1_000_000, 100_000_001, 1_000_000):
        progress(done_bytes, 100_000_000)
    assert said == ["fetching: 1 of 100 MB", "fetching: 100 of 100 MB"]


def test_unknown_total_is_left_out() -> None:
    said: list[str] = []
    FileProgress("fetching", said.append)(2_500_000, 0)
    assert said == ["fetching: 2 MB"]
