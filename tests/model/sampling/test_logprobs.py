"""The normalizer of log-probabilities against float64."""

import jax
import numpy as np

from jserve.model.sampling.logprobs import raw_logprobs

ROWS, VOCAB = 64, 49152


def test_the_normalizer_is_exact_and_leans_to_no_side() -> None:
    """Of a peaked and of a flat distribution: many tiny weights must not add up to a bias."""
    rng = np.random.default_rng(5)
    spread = np.linspace(0.01, 6, ROWS)[:, None]
    logits = (rng.normal(size=(ROWS, VOCAB)) * spread).astype(np.float32)
    wide = logits.astype(np.float64)
    best = np.argmax(logits, axis=-1).astype(np.int32)
    found = np.asarray(jax.jit(raw_logprobs)(logits, best).token, np.float64)
    # The best token's: its logit is subtracted from itself, so the normalizer is all there is.
    exact = wide.max(-1) - np.logaddexp.reduce(wide, axis=-1)
    errors = found - exact
    assert np.abs(errors).max() <= 1e-6  # a float32 near 11 is as coarse
    assert abs(errors.mean()) <= 1e-7
