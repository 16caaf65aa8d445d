"""A whole engine on every backend and kind of weight: the same tokens alone and in company."""

import dataclasses

import numpy as np
import pytest

from jserve.checkpoints.config import Quantization
from jserve.core.request import Request, SamplingParams
from jserve.engine.config import KVDtype
from jserve.pallas_kernels.backend import Backend
from tests.backends import INVARIANT_BACKENDS
from tests.engine.engine_harness import CONFIG, TINY, Harness

# An engine takes half a minute to compile; `test_generation` has a dense one on the native kernels.
pytestmark = [pytest.mark.optimized, pytest.mark.sweep]

SPEC = dataclasses.replace(TINY, model_dim=64, ffn_dim=96, head_dim=16, eos_token_ids=())
# A dense layer and one of experts.
SPARSE = dataclasses.replace(
    SPEC,
    family="qwen3_moe",
    experts=4,
    experts_per_token=2,
    expert_ffn_dim=40,
    sparse_layers=(False, True),
)
KINDS = {
    "experts, bfloat16 cache": (SPARSE, Quantization.NONE, KVDtype.BFLOAT16),
    "int4, 8-bit cache": (SPEC, Quantization.INT4, KVDtype.FLOAT8),
}


@pytest.mark.parametrize("backend", INVARIANT_BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_company_changes_nothing(kind: str, backend: Backend) -> None:
    spec, quantization, kv_dtype = KINDS[kind]
    rng = np.random.default_rng(1)
    # One mixed program: `test_generation` and the tests of kernels have rows in several sizes.
    config = dataclasses.replace(CONFIG, kv_dtype=kv_dtype, mixed_tokens=(32,))
    harness = Harness(spec, config, backend=backend, quantization=quantization)
    requests = [
        Request(
            id=str(i),
            prompt=tuple(map(int, rng.integers(2, spec.vocab, 3 + 17 * i))),
            sampling=SamplingParams(
                max_tokens=9, temperature=float(i % 2), seed=i, logprobs=i, prompt_logprobs=1
            ),
        )
        for i in range(5)
    ]
    # Slots are taken again, chunks are cut anew, and rows past the live ones hold what was there.
    together = harness.run(requests, arrivals=[0, 1, 1, 4, 6])
    for request in requests:
        (alone,) = harness.run([request]).values()
        assert alone == together[request.id]
        assert len(alone.tokens) == 9
        assert alone.logprobs is not None
        assert np.isfinite([entry.logprob for entry in alone.logprobs]).all()
