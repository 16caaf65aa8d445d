"""Packed log-probabilities are the positions they were made of."""

from hypothesis import given
from hypothesis import strategies as st

from jserve.core.logprobs import PackedLogprobs
from jserve.core.request import TokenLogprobs

IDS = st.integers(0, 2**31 - 1)
FLOAT32 = st.floats(width=32, allow_nan=False)
POSITION = st.builds(
    TokenLogprobs, IDS, FLOAT32, IDS, st.lists(st.tuples(IDS, FLOAT32), max_size=3).map(tuple)
)
POSITIONS = st.lists(st.none() | POSITION, max_size=6)


@given(first=POSITIONS, second=POSITIONS, third=POSITIONS)
def test_it_is_a_sequence_of_the_same_positions(first, second, third):
    packed = PackedLogprobs(first)
    packed.extend(PackedLogprobs(second))
    packed.extend(third)
    every = [*first, *second, *third]
    assert list(packed) == every
    assert packed == every
    assert packed == PackedLogprobs(every)
    assert packed != [*every, None]
    assert len(packed) == len(every)
    assert [packed[i] for i in range(-len(every), len(every))] == every * 2
    assert packed[1:-1] == tuple(every[1:-1])
    assert packed.num_entries == sum(1 + len(it.top) for it in every if it is not None)


def test_its_memory_is_that_of_numbers():
    position = TokenLogprobs(5, -0.5, 1, tuple((i, -1.0) for i in range(20)))
    assert PackedLogprobs([position] * 1000).nbytes == 1000 * (21 * 8 + 12)
