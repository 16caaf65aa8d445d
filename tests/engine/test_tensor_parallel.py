"""An engine over several devices: the tokens of one device, for every family and kind of split."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from jserve.cache.config import CacheConfig
from jserve.checkpoints.config import ModelConfig, Quantization, RandomWeights
from jserve.core.errors import ConfigError
from jserve.core.request import Request, SamplingParams
from jserve.engine.build.assembly import Engine
from jserve.engine.build.start import start_engine
from jserve.pallas_kernels.backend import Backend
from jserve.scheduler.config import SchedulerConfig
from tests.engine.engine_harness import CONFIG, TINY, Harness
from tests.sharding.families import SMALL, VOCAB, assert_nothing_gathered, check

WIDE = dataclasses.replace(
    TINY,
    vocab=VOCAB,
    model_dim=64,
    ffn_dim=96,
    q_heads=8,
    kv_heads=2,
    head_dim=16,
    eos_token_ids=(),
)
KINDS = (
    {"temperature": 0.0, "prompt_logprobs": 3},
    {"top_p": 0.9},
    {"temperature": 0.8, "top_k": 50, "logprobs": 2},
    {"min_p": 0.3, "logit_bias": ((9000, 4.0),), "bad_token_ids": (3, 16000)},
    {"temperature": 0.3, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
    {"temperature": 0.0, "presence_penalty": 1.0, "logprobs": 4},
    {"allowed_token_ids": (5, 4000, 8100, 16383), "logprobs": 0},
)


def _requests() -> list[Request]:
    rng = np.random.default_rng(2)
    return [
        Request(
            id=str(i),
            prompt=tuple(map(int, rng.integers(2, VOCAB, 3 + 7 * i))),
            sampling=SamplingParams(**{"max_tokens": 7, "seed": i, **kind}),
        )
        for i, kind in enumerate(KINDS)
    ]


def test_every_kind_of_sampling_as_on_one_device() -> None:
    one = Harness(WIDE, SMALL, backend=Backend.CPU)
    several = Harness(WIDE, SMALL, backend=Backend.CPU, mesh_shape=(8, 1))
    expected, found = one.run(_requests()), several.run(_requests())
    for request_id, outcome in expected.items():
        assert found[request_id].tokens == outcome.tokens
        _check_logprobs(found[request_id].logprobs, outcome.logprobs)
        prompts = found[request_id].prompt_logprobs, outcome.prompt_logprobs
        _check_logprobs(*((given or (None,))[1:] for given in prompts))
    _check_shares(several.engine, one.engine, WIDE.layers, 8)
    assert_nothing_gathered(several.engine)


def _check_logprobs(found: Sequence[Any], expected: Sequence[Any]) -> None:
    """Checks for the same tokens and ranks, and numbers that differ as their logits do."""
    assert [(e.token_id, e.rank) for e in found] == [(e.token_id, e.rank) for e in expected]
    for entry, other in zip(found, expected, strict=True):
        ids, values = zip(*entry.top, strict=True) if entry.top else ((), ())
        other_ids, other_values = zip(*other.top, strict=True) if other.top else ((), ())
        assert ids == other_ids
        np.testing.assert_allclose(values, other_values, rtol=0, atol=1e-5)
        np.testing.assert_allclose(entry.logprob, other.logprob, rtol=0, atol=1e-5)


@pytest.mark.sweep
def test_a_family_gives_the_tokens_of_one_device() -> None:
    """Experts beside dense layers, over both axes; `make sharding` takes every family and mesh."""
    check("qwen3_moe, dense layers", (2, 4))


def _check_shares(engine: Engine, one: Engine, layers: int, devices: int) -> None:
    """Each device holds as many heads of every page, in buffers that steps update in place."""
    all_pages = engine.executor._state.kv[0]
    assert len(all_pages) == layers
    for pages in all_pages:
        held = [shard.data.shape[2] for shard in pages.addressable_shards]
        assert held == [pages.shape[2] // devices] * devices
    share = all_pages[0].nbytes // devices
    for made, alone in zip(engine.programs, one.programs, strict=True):
        memory, memory_of_one = made.call.memory_analysis(), alone.call.memory_analysis()
        assert memory is not None
        assert memory_of_one is not None
        assert memory.alias_size_in_bytes >= layers * share
        # One device copies no pages (see test_generation), so several do not either.
        assert memory.temp_size_in_bytes < memory_of_one.temp_size_in_bytes + share


def test_more_devices_than_there_are_is_refused() -> None:
    config = dataclasses.replace(CONFIG, tensor_parallel=9)
    with pytest.raises(ConfigError, match="tensor_parallel is 9, but JAX finds 8 devices"):
        start_engine(
            ModelConfig(name="wide", source=RandomWeights(spec=WIDE)),
            config,
            SchedulerConfig(),
            CacheConfig(),
            on_files=lambda done, total: None,
        )


@pytest.mark.parametrize(
    ("change", "quantization", "experts", "message"),
    [
        ({"q_heads": 9, "kv_heads": 9}, Quantization.NONE, 1, r"q_heads \(9\) .* 8 devices"),
        ({}, Quantization.NONE, 2, "family llama has no experts"),
        ({"ffn_dim": 128}, Quantization.INT8, 1, r"does not divide its 4 over 8 devices"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    change: dict[str, int], quantization: Quantization, experts: int, message: str
) -> None:
    config = dataclasses.replace(CONFIG, tensor_parallel=8, expert_parallel=experts)
    source = RandomWeights(spec=dataclasses.replace(WIDE, **change))
    with pytest.raises(ConfigError, match=message):
        start_engine(
            ModelConfig(name="odd", source=source, quantization=quantization),
            config,
            SchedulerConfig(),
            CacheConfig(),
            on_files=lambda done, total: None,
        )


def test_experts_are_spread_over_devices_of_the_engine() -> None:
    with pytest.raises(ConfigError, match="expert_parallel is 3; it must divide"):
        dataclasses.replace(CONFIG, tensor_parallel=8, expert_parallel=3)
