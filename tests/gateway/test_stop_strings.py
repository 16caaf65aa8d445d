"""Incremental matching against str.find on the whole text."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jserve.gateway.stop_strings import StopMatcher

# A small alphabet makes overlaps, prefixes and nested stop strings common.
TEXT = st.text("abc", max_size=40)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """The naive reference: earliest start, then shortest."""
    hits = [(text.find(stop), len(stop), stop) for stop in stops if stop in text]
    return (min(hits)[0], min(hits)[2]) if hits else None


@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 40), max_size=10))
def test_any_cut_gives_what_the_whole_text_gives(text, stops, cuts):
    borders = sorted({0, len(text), *(min(c, len(text)) for c in cuts)})
    matcher = StopMatcher(stops)
    released = "".join(matcher.feed(text[a:b]) for a, b in itertools.pairwise(borders))
    released += matcher.flush()
    expected = first_stop(text, stops)
    if expected is None:
        assert (released, matcher.match) == (text, None)
    else:
        start, stop = expected
        assert released == text[:start]
        assert matcher.match is not None
        assert (matcher.match.start, matcher.match.stop) == (start, stop)
        assert text[matcher.match.start : matcher.match.end] == stop


@given(text=TEXT, stops=STOPS)
def test_holds_back_only_what_may_become_a_stop_string(text, stops):
    matcher = StopMatcher(stops)
    released = ""
    for i, char in enumerate(text):
        released += matcher.feed(char)
        if matcher.match is not None:
            break
        held = text[len(released) : i + 1]
        assert len(held) < max(map(len, stops)) + (0 if matcher.settled else 5)
        if held and matcher.settled:
            assert any(stop.startswith(held) for stop in stops)


def test_waits_for_an_earlier_match_that_is_still_open():
    matcher = StopMatcher(["abcd", "bc"])
    assert matcher.feed("xabc") == "x"
    assert not matcher.settled
    assert matcher.feed("e") == "a"
    assert matcher.settled
    assert matcher.match is not None
    assert matcher.match.stop == "bc"


def test_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])
