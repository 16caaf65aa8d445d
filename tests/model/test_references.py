"""Every family against transformers: logits, and what the checkpoint must hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jserve.model.context import StepContext
from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.ragged_paged_attention.batch import make_ragged_batch
from jserve.pallas_kernels.ragged_paged_attention.dispatch import (
    kv_pages_shape,
    ragged_paged_attention,
)
from tests.backends import SERVED_BACKENDS
from tests.model.model_harness import CASE_NAMES, Case, dense_logits

TOLERANCE = 1e-4
PAGE_SIZE = 8
TABLE_PAGES = 16  # pages of one row; the CPU path reads blocks of 128 tokens
SAME_MODEL = ("llama_sharded", "qwen3_bf16")  # the same model as another case, in other files
CHUNK = 16  # tokens of one step; a shorter chunk is padded


@pytest.mark.parametrize("name", CASE_NAMES)
def test_whole_prefill_without_pages(name: str) -> None:
    """One backend is enough; the others run the layers below, and rows do not depend on chunks."""
    case = Case.load(name, Backend.CPU)
    found = dense_logits(case.model)(case.params, jnp.asarray(case.token_ids))
    np.testing.assert_allclose(found, case.logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("backend", SERVED_BACKENDS)
@pytest.mark.parametrize("name", [name for name in CASE_NAMES if name not in SAME_MODEL])
def test_chunks_and_decode_through_pages(name: str, backend: Backend) -> None:
    """A prompt in uneven chunks, then one token at a time, as one row of a padded batch."""
    case = Case.load(name, backend)
    assert {n: p.shape for n, p in case.model.param_specs().items()} == {
        n: array.shape for n, array in case.params.items()
    }
    num_tokens = len(case.token_ids)
    chunks = [5, 16, 1, 10] + [1] * (num_tokens - 32)
    num_pages = -(-num_tokens // PAGE_SIZE)
    step = _paged_step(case, num_pages)
    spec = case.model.spec
    shape = kv_pages_shape(num_pages, PAGE_SIZE, spec.kv_heads, spec.head_dim)
    # Unused places hold NaN, which would show if they were read; the null page is padding's.
    pages = tuple(jnp.full(shape, jnp.nan).at[0].set(0.0) for _ in range(spec.layers))
    start, rows = 0, []
    for length in chunks:
        tokens = np.zeros(CHUNK, np.int32)
        tokens[:length] = case.token_ids[start : start + length]
        logits, pages = step(case.params, pages, tokens, np.int32(start), np.int32(length))
        rows.append(np.asarray(logits)[:length])
        start += length
    np.testing.assert_allclose(np.concatenate(rows), case.logits, rtol=0, atol=TOLERANCE)


def _paged_step(case: Case, num_pages: int):
    table = np.zeros((1, TABLE_PAGES), np.int32)
    table[0, :num_pages] = 1 + np.arange(num_pages)

    @jax.jit
    def step(params, pages, tokens, start, length):
        token = jnp.arange(CHUNK, dtype=jnp.int32)
        live = token < length
        positions = jnp.where(live, start + token, 0)
        one_row = jnp.zeros((1,), jnp.int32)
        batch = make_ragged_batch(
            jnp.asarray(table),
            one_row + start + length,
            one_row,
            one_row + length,
            (length == 1).astype(jnp.int32),
            jnp.int32(1),
            jnp.zeros(CHUNK, jnp.int32),
            positions,
            live,
            page_size=PAGE_SIZE,
        )

        def attend(q, k, v, layer_pages, window):
            return ragged_paged_attention(
                q,
                k,
                v,
                layer_pages,
                batch,
                window=window,
                prompts=True,
                backend=case.model.backend,
            )

        hidden, pages = case.model.hidden(params, tokens, positions, pages, StepContext(attend))
        return case.model.logits(params, hidden), pages

    return step
