"""Counts of `jserve plan` beside numbers that are published of the models."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from jserve.checkpoints.hf_config import spec_from_hf
from jserve.checkpoints.json_file import read_json
from jserve.config import load
from jserve.core.errors import ConfigError
from jserve.engine.build.chips import find_chip
from jserve.engine.build.fit import MemoryFit, fit_memory
from jserve.engine.build.kv_budget import budget_without_programs
from jserve.engine.build.shape import least_shape
from jserve.engine.config import EngineConfig
from jserve.model.functional import Model
from jserve.model.sharding import abstract_mesh
from jserve.pallas_kernels.backend import Backend

ROOT = Path(__file__).parents[3]
ARCHITECTURES = ROOT / "tests" / "fixtures" / "architectures"

# Number of parameters, as the publishers' safetensors indexes give it (Gemma: text model).
PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.3-70b": 70_553_706_496,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-3-4b": 3_880_099_328,
}
CONFIGS = {  # config → its model, and layers · KV heads · head size, by which a token's KV goes
    "llama31_8b.py:h200": ("llama-3.1-8b", 32 * 8 * 128),
    "llama31_8b.py:v5e-8": ("llama-3.1-8b", 32 * 8 * 128),
    "llama33_70b.py": ("llama-3.3-70b", 80 * 8 * 128),
    "qwen3_30b_a3b.py": ("qwen3-30b-a3b", 48 * 8 * 128),  # four heads on eight chips: copies
}


def _plan(config_name: str, architecture: str, *changes: str) -> MemoryFit:
    config = load(str(ROOT / "configs" / config_name), changes)
    mesh = abstract_mesh(**config.engine.mesh_axes)
    chip = find_chip(config.platform.chip)
    return fit_memory(_model(architecture), mesh, config.engine, chip)


def _model(architecture: str) -> Model:
    spec = spec_from_hf(read_json(ARCHITECTURES / f"{architecture}.json"))
    return Model(spec, jnp.dtype(jnp.bfloat16), Backend.TPU)


@pytest.mark.parametrize("architecture", PARAMETERS)
def test_a_model_has_the_published_number_of_parameters(architecture: str) -> None:
    model = _model(architecture)
    mesh, config = abstract_mesh(model=1), EngineConfig()
    need = budget_without_programs(model, mesh, config, least_shape(model, mesh, config))
    assert need.params == 2 * PARAMETERS[architecture]


@pytest.mark.parametrize("config_name", CONFIGS)
def test_every_config_for_accelerators_fits_its_chips(config_name: str) -> None:
    architecture, kv_width = CONFIGS[config_name]
    plan = _plan(config_name, architecture)
    chips = load(str(ROOT / "configs" / config_name)).engine.tensor_parallel
    # On every chip: norms, and of Qwen3 the routers and the weights of K and V. The rest is split.
    whole = 48 * 2048 * (128 + 2 * 4 * 128) if architecture == "qwen3-30b-a3b" else 0
    expected = 2 * (whole + (PARAMETERS[architecture] - whole) / chips)
    assert plan.budget.params == pytest.approx(expected, rel=1e-3)
    assert plan.budget.page == 2 * 2 * kv_width * plan.shape.batch.page_size / chips
    assert plan.used_bytes <= plan.chip.usable_bytes
    # The memory is used: less than a coarse step of pages is left.
    assert plan.chip.usable_bytes - plan.used_bytes < 65 * plan.budget.page
    assert plan.kv_tokens >= plan.shape.batch.num_slots * 1024
    assert plan.full_sequences * plan.shape.max_model_len <= plan.kv_tokens


def test_what_does_not_fit_is_refused_with_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"GiB too much for a v5e .*weights 131\.4"):
        _plan("llama31_8b.py:v5e-8", "llama-3.3-70b", "engine.tensor_parallel=1")
    # 16 GiB of pages by themselves are more than one chip of eight has left.
    with pytest.raises(ConfigError, match=r"pages 15\.6"):
        _plan("llama31_8b.py:v5e-8", "llama-3.1-8b", "engine.num_pages=8000")


def test_moves_in_flight_are_counted() -> None:
    plain = _plan("llama31_8b.py:h200", "llama-3.1-8b")
    moving = _plan("llama31_8b.py:h200", "llama-3.1-8b", "engine.host_pages=1000")
    assert moving.budget.fixed == plain.budget.fixed + 64 * plain.budget.page
    assert moving.shape.num_pages <= plain.shape.num_pages - 64
    assert moving.used_bytes <= moving.chip.usable_bytes
    with pytest.raises(ConfigError, match=r"page moves 0\.\d\d"):
        _plan("llama31_8b.py:v5e-8", "llama-3.1-8b", "engine.num_pages=8000", "engine.host_pages=1")


def test_the_command_prints_the_plan_without_weights() -> None:
    arguments = [
        "--config=configs/llama33_70b.py",
        f"--architecture={ARCHITECTURES / 'llama-3.3-70b.json'}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "jserve", "plan", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert "llama-3.3-70b-instruct on 4 x v5p" in done.stdout
    assert "32.86  in bfloat16" in done.stdout  # 70.55 billion, two bytes each, over four chips
