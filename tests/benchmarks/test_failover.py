"""What a reader sees of an engine's death, and the requests that are asked meanwhile."""

from benchmarks.serving.failover import _KINDS, gaps_s, make_asks


def test_the_outage_is_the_longest_pause_after_a_death() -> None:
    came_s = [1.0, 1.1, 1.2, 1.25, 6.0, 6.1, 6.2, 9.2, 9.3]
    # Tokens at 1.25 were on their way at the first death; nothing came after the last.
    assert [round(gap, 2) for gap in gaps_s(came_s, [0.5, 1.21, 6.15, 20.0])] == [4.75, 3.0]
    assert gaps_s([], [1.0]) == []
    assert gaps_s([1.0, 2.0], []) == []


def test_every_kind_is_asked_streamed_and_whole() -> None:
    asks = make_asks(48, 400, seed=0)
    assert {(ask.kind, ask.stream) for ask in asks} == {
        (kind, stream) for kind in _KINDS for stream in (True, False)
    }
    assert asks == make_asks(48, 400, seed=0)
    assert all("seed" in ask.body for ask in asks)
