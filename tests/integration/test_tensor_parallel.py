"""An engine over several devices: the tokens of one device, for every family and kind of split."""

import dataclasses

import numpy as np
import pytest

from jserve.core.errors import ConfigError
from jserve.core.request import Request, SamplingParams
from jserve.engine.assembly import Engine
from jserve.engine.start import start_engine
from jserve.model.config import ModelConfig, RandomWeights
from jserve.model.spec import ModelSpec
from jserve.pallas_kernels.backend import Backend
from jserve.scheduler.config import SchedulerConfig
from tests.integration.engine_harness import CONFIG, TINY, Harness

# As many KV heads as devices, fewer (copies on neighbours), and one for all.
WIDE = dataclasses.replace(
    TINY, vocab=128, model_dim=64, ffn_dim=96, q_heads=8, kv_heads=8, head_dim=16, eos_token_ids=()
)
SMALL = dataclasses.replace(CONFIG, mixed_tokens=(32,))
FAMILIES = {
    "llama": WIDE,
    "llama, 2 kv heads": dataclasses.replace(WIDE, kv_heads=2, qkv_bias=True),
    "qwen3": dataclasses.replace(WIDE, family="qwen3", kv_heads=4, tied_embeddings=False),
    "gemma3, 1 kv head": dataclasses.replace(
        WIDE,
        family="gemma3",
        kv_heads=1,
        sliding_window=8,
        local_layers=(True, False),
        local_rope_theta=1e3,
    ),
}


def _requests(spec: ModelSpec) -> list[Request]:
    rng = np.random.default_rng(2)
    return [
        Request(
            id=str(i),
            prompt=tuple(map(int, rng.integers(2, spec.vocab, 3 + 11 * i))),
            sampling=SamplingParams(
                max_tokens=8, temperature=0.8 * (i % 2), top_p=0.9, seed=i, logprobs=2
            ),
        )
        for i in range(4)
    ]


@pytest.mark.parametrize(("name", "devices"), list(zip(FAMILIES, (8, 8, 4, 2), strict=True)))
def test_the_tokens_of_one_device(name: str, devices: int) -> None:
    spec = FAMILIES[name]
    one = Harness(spec, SMALL, backend=Backend.CPU)
    several = Harness(spec, SMALL, backend=Backend.CPU, devices=devices)
    expected, found = one.run(_requests(spec)), several.run(_requests(spec))
    for request_id, outcome in expected.items():
        assert found[request_id].tokens == outcome.tokens
        np.testing.assert_allclose(
            [entry.logprob for entry in found[request_id].logprobs],
            [entry.logprob for entry in outcome.logprobs],
            atol=1e-4,
        )
    _check_shares(several.engine, one.engine, spec.layers, devices)


def _check_shares(engine: Engine, one: Engine, layers: int, devices: int) -> None:
    """Each device holds as many heads of every page, in buffers that steps update in place."""
    all_pages = engine.executor._state.kv["full"]
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
        # One device copies no pages (see test_engine_generation), so several do not either.
        assert memory.temp_size_in_bytes < memory_of_one.temp_size_in_bytes + share


def test_more_devices_than_there_are_is_refused() -> None:
    config = dataclasses.replace(CONFIG, tensor_parallel=9)
    with pytest.raises(ConfigError, match="tensor_parallel is 9, but JAX finds 8 devices"):
        start_engine(
            ModelConfig(name="wide", source=RandomWeights(spec=WIDE)),
            config,
            SchedulerConfig(),
            on_files=lambda done, total: None,
        )


def test_heads_that_do_not_divide_are_refused() -> None:
    config = dataclasses.replace(CONFIG, tensor_parallel=8)
    odd = dataclasses.replace(WIDE, q_heads=12, kv_heads=12, head_dim=8)
    with pytest.raises(ConfigError, match="q_heads"):
        start_engine(
            ModelConfig(name="odd", source=RandomWeights(spec=odd)),
            config,
            SchedulerConfig(),
            on_files=lambda done, total: None,
        )
