import numpy as np
import pytest

from benchmarks.serving.arrivals import arrivals
from benchmarks.serving.failures import BenchmarkError


def gaps(rate, cv, count=20_000, seed=0):
    return np.diff(arrivals(rate, cv, count, np.random.default_rng(seed)))


@pytest.mark.parametrize("cv", [0.0, 0.3, 1.0, 3.0])
def test_the_rate_is_exact_and_the_variation_near(cv):
    found = gaps(4.0, cv)
    assert found.mean() == pytest.approx(0.25)
    assert found.std() / found.mean() == pytest.approx(cv, rel=0.05, abs=1e-9)
    assert (found >= 0).all()


def test_poisson_gaps_are_exponential():
    found = gaps(1.0, 1.0)
    assert (found > 1).mean() == pytest.approx(np.exp(-1), abs=0.01)
    assert (found > 3).mean() == pytest.approx(np.exp(-3), abs=0.01)


def test_the_same_seed_gives_the_same_times():
    first, again, other = (arrivals(2, 1, 50, np.random.default_rng(s)) for s in (7, 7, 8))
    assert first.tolist() == again.tolist() != other.tolist()
    assert first[0] == 0


def test_infinite_rate_is_all_at_once():
    assert arrivals(float("inf"), 1, 3, np.random.default_rng(0)).tolist() == [0, 0, 0]
    assert arrivals(5, 1, 1, np.random.default_rng(0)).tolist() == [0]


@pytest.mark.parametrize(
    ("rate", "cv", "flag"), [(0, 1, "--rate"), (-1, 1, "--rate"), (1, -1, "--cv")]
)
def test_nonsense_is_refused(rate, cv, flag):
    with pytest.raises(BenchmarkError, match=flag):
        arrivals(rate, cv, 3, np.random.default_rng(0))
