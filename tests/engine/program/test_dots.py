"""XLA's code on CPU multiplies float32 only in whole programs, as its ops do alone."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jserve.checkpoints.config import Quantization
from jserve.core.model_spec import ModelSpec
from jserve.engine.build.shape import abstract_params
from jserve.engine.build.sizing import shape_engine
from jserve.engine.config import KVDtype
from jserve.engine.program.kv_scales import lower_kv_scales
from jserve.engine.program.programs import lower_step
from jserve.engine.program.state import abstract_state
from jserve.model.functional import Model
from jserve.model.sharding import device_mesh
from jserve.pallas_kernels.backend import Backend
from tests.compiled_hlo import narrow_dots
from tests.engine.engine_harness import CONFIG, TINY

SPARSE = dataclasses.replace(
    TINY, family="mixtral", experts=4, experts_per_token=2, expert_ffn_dim=64
)


@pytest.mark.parametrize(
    ("spec", "quantization", "kv_dtype"),
    [
        (TINY, Quantization.NONE, KVDtype.BFLOAT16),
        (TINY, Quantization.FP8, KVDtype.FLOAT8),
        (SPARSE, Quantization.NONE, KVDtype.BFLOAT16),
        pytest.param(SPARSE, Quantization.INT8_CHANNEL, KVDtype.BFLOAT16, marks=pytest.mark.sweep),
    ],
)
def test_programs_multiply_float32(
    spec: ModelSpec, quantization: Quantization, kv_dtype: KVDtype
) -> None:
    for lowered in _lowered(spec, quantization, kv_dtype).values():
        assert not narrow_dots(lowered, compile=False)


@pytest.mark.sweep
def test_the_program_with_every_op_multiplies_float32_once_it_is_compiled() -> None:
    """Ops are compiled one by one in `test_cpu_dots`."""
    programs = _lowered(SPARSE, Quantization.NONE, KVDtype.BFLOAT16)
    assert not narrow_dots(programs["mixed[32]"])


def _lowered(
    spec: ModelSpec, quantization: Quantization, kv_dtype: KVDtype
) -> dict[str, jax.stages.Lowered]:
    """The programs of an engine by name."""
    mesh = device_mesh(jax.devices()[:1], model=1)
    model = Model(spec, jnp.dtype(jnp.bfloat16), Backend.CPU, quantization, mesh)
    config = dataclasses.replace(CONFIG, kv_dtype=kv_dtype, mixed_tokens=(32,))
    shape = shape_engine(model, mesh, config, None)
    params, state = abstract_params(model, mesh), abstract_state(model, mesh, shape.state)
    programs = {
        program.name: lower_step(model, mesh, program, shape.batch, params, state)
        for program in config.programs()
    }
    if kv_dtype is KVDtype.FLOAT8:
        programs["kv_scales"] = lower_kv_scales(model, mesh, params)
    return programs
