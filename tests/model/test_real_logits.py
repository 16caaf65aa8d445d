"""Both real models against float64: whole prompts, and chunks and decode steps through pages.

The yardstick is transformers' own float32 error on the same rows; see tests/references.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jserve.checkpoints.config import Dtype
from jserve.config import load
from jserve.model.context import StepContext
from jserve.model.functional import Model
from jserve.model.loading.load import load_params, prepare
from jserve.model.sharding import device_mesh, param_shardings
from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.ragged_paged_attention.batch import make_ragged_batch
from jserve.pallas_kernels.ragged_paged_attention.dispatch import (
    kv_pages_shape,
    ragged_paged_attention,
)
from tests.backends import SERVED_BACKENDS

pytestmark = pytest.mark.network

ROOT = Path(__file__).parents[2]
PROMPTS = ("short", "code", "mixed", "long")  # each is a row of every batch
MOST_ERROR = 3.0  # times transformers'
PAGE_SIZE = 16
ROW_PAGES = 64  # 1024 tokens
TABLE_PAGES = 128  # like a server's, wider than a prompt needs
WHOLE_TOKENS = 1024  # tokens of the program that takes all prompts at once
CHUNK_TOKENS = 160  # tokens of the program that takes CHUNKS of each prompt in turn
CHUNKS = ((7, 33, 59, 61), (1, 30, 21, 108), (2, 1, 37, 120))
DECODED = 48  # the last tokens of a prompt come one at a time; of a short prompt, half of them


class Runner:
    """One model and the pages of its prompts."""

    def __init__(self, config: str, backend: Backend) -> None:
        model_config = load(str(ROOT / "configs" / f"{config}.py")).model
        assert model_config.dtype is Dtype.FLOAT32
        prepared = prepare(model_config, lambda done, total: None)
        model = Model(prepared.spec, jnp.float32, backend)
        mesh = device_mesh(jax.devices()[:1], model=1)
        shardings = param_shardings(model.param_specs(), prepared.spec, mesh)
        self.params = load_params(prepared, model, shardings)
        self.spec = prepared.spec
        self._step = jax.jit(
            functools.partial(_hidden, model), static_argnames="prompts", donate_argnums=1
        )
        self._logits = jax.jit(model.logits)

    def run(
        self, prompts: Sequence[np.ndarray], steps: Iterator[tuple[int, Sequence[int]]]
    ) -> list[np.ndarray]:
        """Hidden states of every prompt, [tokens, model_dim], from steps of (program, lengths)."""
        shape = kv_pages_shape(
            len(prompts) * ROW_PAGES, PAGE_SIZE, self.spec.kv_heads, self.spec.head_dim
        )
        # Unused places hold NaN, which would show if they were read; page 0 is padding's.
        pages = tuple(jnp.full(shape, jnp.nan).at[0].set(0.0) for _ in range(self.spec.layers))
        done = np.zeros(len(prompts), np.int32)
        found: list[list[np.ndarray]] = [[] for _ in prompts]
        for size, wanted in steps:
            is_decode = size == len(prompts)
            lengths = np.array(wanted, np.int32)
            firsts = np.arange(size) if is_decode else np.cumsum(lengths) - lengths
            tokens, rows, positions = np.zeros((3, size), np.int32)
            live = np.zeros(size, np.bool_)
            for row, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
                place = slice(first, first + length)
                tokens[place] = prompts[row][done[row] : done[row] + length]
                rows[place], live[place] = row, True
                positions[place] = done[row] + np.arange(length)
            hidden, pages = self._step(
                self.params,
                pages,
                tokens,
                positions,
                rows,
                live,
                np.where(lengths > 0, done + lengths, 0).astype(np.int32),
                firsts.astype(np.int32),
                lengths,
                prompts=not is_decode,
            )
            for row, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
                found[row].append(np.asarray(hidden)[first : first + length])
            done += lengths
        assert list(done) == [len(prompt) for prompt in prompts]
        return [np.concatenate(parts) for parts in found]

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Logits of up to 16 rows: [rows, vocab]."""
        padded = np.zeros((16, hidden.shape[1]), np.float32)
        padded[: len(hidden)] = hidden
        return np.asarray(self._logits(self.params, padded))[: len(hidden)]


def _hidden(
    model: Model, params, pages, tokens, positions, rows, live, kv_lens, firsts, lengths, *, prompts
):
    num_rows = len(PROMPTS)
    used = 1 + np.arange(num_rows * ROW_PAGES, dtype=np.int32).reshape(num_rows, ROW_PAGES)
    table = np.pad(used, ((0, 0), (0, TABLE_PAGES - ROW_PAGES)))
    batch = make_ragged_batch(
        jnp.asarray(table),
        kv_lens,
        firsts,
        lengths,
        jnp.int32(0 if prompts else num_rows),
        jnp.int32(num_rows),
        rows,
        positions,
        live,
        page_size=PAGE_SIZE,
    )

    def attend(q, k, v, layer_pages, window):
        return ragged_paged_attention(
            q, k, v, layer_pages, batch, window=window, prompts=prompts, backend=model.backend
        )

    return model.hidden(params, tokens, positions, pages, StepContext(attend))


def _whole(lengths: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
    yield WHOLE_TOKENS, lengths


def _pieces(lengths: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
    """Uneven chunks, many prompts to a step, then decode steps."""
    last = [min(DECODED, length // 2) for length in lengths]
    left = [length - tail for length, tail in zip(lengths, last, strict=True)]
    for turn in range(max(lengths)):
        if not any(left):
            break
        taken = [min(pair) for pair in zip(left, CHUNKS[turn % len(CHUNKS)], strict=True)]
        left = [have - gone for have, gone in zip(left, taken, strict=True)]
        yield CHUNK_TOKENS, taken
    for step in range(max(last)):
        yield len(lengths), [int(step < tail) for tail in last]


@dataclass(frozen=True)
class Measured:
    """One model's logits by prompt, [positions, vocab], and the logits of transformers."""

    name: str
    logits: dict[str, np.ndarray]
    exact: dict[str, np.ndarray]

    def error(self, prompt: str) -> np.ndarray:
        """Errors of the sampled columns, [positions, ids]."""
        sampled = self.logits[prompt][:, self.exact["vocab_ids"]]
        return sampled - self.exact[f"{prompt}_logits_float64"]


@pytest.fixture(scope="module", params=SERVED_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


# SmolLM2's greedy texts are those of transformers in `tests/e2e/test_real_model.py`, too.
@pytest.fixture(
    scope="module",
    params=[pytest.param("smollm2_135m", marks=pytest.mark.sweep), "gemma3_270m"],
)
def runner(request: pytest.FixtureRequest, backend: Backend) -> tuple[str, Runner]:
    return request.param, Runner(request.param, backend)


# A row's bits do not depend on how prompts are cut, as tests of kernels and engines show.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param(_whole, marks=pytest.mark.sweep, id="whole"),
        pytest.param(_pieces, id="pieces"),
    ],
)
def measured(request: pytest.FixtureRequest, runner: tuple[str, Runner]) -> Measured:
    name, model = runner
    exact = dict(np.load(ROOT / "tests" / "fixtures" / "weights" / f"{name}.npz"))
    prompts = [exact[f"{prompt}_token_ids"] for prompt in PROMPTS]
    if window := model.spec.sliding_window:
        assert len(prompts[-1]) > window + DECODED + max(map(max, CHUNKS))
    hidden = model.run(prompts, request.param([len(prompt) for prompt in prompts]))
    rows = [exact[f"{prompt}_positions"] for prompt in PROMPTS]
    logits = [model.logits(states[at]) for states, at in zip(hidden, rows, strict=True)]
    return Measured(name, dict(zip(PROMPTS, logits, strict=True)), exact)


def test_same_best_token_and_mass(measured: Measured) -> None:
    for prompt, logits in measured.logits.items():
        best = measured.exact[f"{prompt}_argmax"]
        np.testing.assert_array_equal(logits.argmax(-1), best, err_msg=prompt)
        mass = np.logaddexp.reduce(logits.astype(np.float64), axis=-1)
        np.testing.assert_allclose(
            mass, measured.exact[f"{prompt}_logsumexp_float64"], rtol=0, atol=3e-4, err_msg=prompt
        )


def test_error_over_all_prompts(measured: Measured) -> None:
    errors = [measured.error(prompt) for prompt in PROMPTS]
    sizes = [error.size for error in errors]
    worst, rms = (
        np.array([measured.exact[f"{prompt}_float32_{kind}_error"] for prompt in PROMPTS])
        for kind in ("max_abs", "rms")
    )
    flat = np.concatenate([error.ravel() for error in errors])
    assert np.abs(flat).max() <= MOST_ERROR * worst.max()
    assert np.mean(flat**2) <= MOST_ERROR**2 * np.average(rms**2, weights=sizes)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_error_of_a_prompt(measured: Measured, prompt: str, record_property) -> None:
    error = measured.error(prompt)
    found = {"max_abs": np.abs(error).max(), "rms": np.sqrt(np.mean(error**2))}
    ratios = {k: v / measured.exact[f"{prompt}_float32_{k}_error"] for k, v in found.items()}
    record_property("ratios", {kind: float(ratio) for kind, ratio in ratios.items()})
    assert max(ratios.values()) <= MOST_ERROR, ratios
