"""Times of arrival: seconds from the start of the load, ascending, the first at 0."""

import numpy as np

from benchmarks.serving.failures import BenchmarkError


def arrivals(rate: float, cv: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` arrivals with exactly `rate` a second on average; inf: all at once. [count] float64.

    The gaps are Gamma distributed with coefficient of variation `cv`: 1 is a Poisson process, more
    comes in bursts, less is more even, 0 is a metronome. The shape is 1/cv², which others call
    burstiness.
    """
    if not rate > 0:
        raise BenchmarkError(f"--rate is {rate:g}; it must be above 0 (requests a second, or inf)")
    if not 0 <= cv < np.inf:
        raise BenchmarkError(f"--cv is {cv:g}; it must be 0 or more (1 is Poisson)")
    gaps = np.zeros(count)
    if rate < np.inf and count > 1:
        mean_s = 1 / rate
        gaps[1:] = 1 if cv == 0 else rng.gamma(1 / cv**2, cv**2, count - 1)
        total = gaps.sum()
        # A few gaps that vary much miss the rate by far; it is what was asked for.
        gaps *= mean_s * (count - 1) / total if total > 0 else 0
    return np.cumsum(gaps)
