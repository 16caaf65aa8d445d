"""The key of compiled programs: whatever they are made from changes it."""

import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jserve
from jserve.core.step import ProgramKind
from jserve.engine.build.shape import abstract_params, abstract_state, least_shape
from jserve.engine.program.executable_cache import code_digest, machine_key, traced_sources
from jserve.engine.program.kv_scales import lower_kv_scales
from jserve.engine.program.programs import lower_step
from jserve.model.functional import Model
from jserve.model.sharding import device_mesh
from jserve.pallas_kernels.backend import Backend
from tests.engine.engine_harness import CONFIG, TINY

pytestmark = pytest.mark.optimized

PACKAGE = Path(jserve.__file__).parent


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the rooms that are traced."""
    for room in traced_sources(PACKAGE):
        shutil.copytree(room, tmp_path / "jserve" / room.relative_to(PACKAGE))
    return tmp_path / "jserve"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("engine/program/programs.py", "donate_argnums=1", "donate_argnums=()"),
        ("engine/program/step.py", "import", "import "),
        ("model/layers.py", "import", "import "),
        ("pallas_kernels/native/matmul.cc", "static", "static "),
    ],
)
def test_a_changed_source_is_another_key(copy: Path, file: str, old: str, new: str) -> None:
    before = code_digest(traced_sources(copy))
    assert before == code_digest(traced_sources(PACKAGE))
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new, 1))
    assert code_digest(traced_sources(copy)) != before


def test_a_new_file_is_another_key(copy: Path) -> None:
    before = code_digest(traced_sources(copy))
    (copy / "engine" / "program" / "lora.py").write_text("")
    assert code_digest(traced_sources(copy)) != before


def test_all_that_is_traced_is_digested() -> None:
    """Every line of jserve that left an operation in a program is in a room with a digest."""
    mesh = device_mesh(jax.devices()[:1], model=1, expert=1)
    model = Model(TINY, jnp.float32, Backend.CPU, mesh=mesh)
    params, shape = abstract_params(model, mesh), least_shape(model, mesh, CONFIG)
    state = abstract_state(model, mesh, shape)
    programs = {program.kind: program for program in CONFIG.programs()}
    assert programs.keys() == set(ProgramKind)
    lowered = [
        lower_step(model, mesh, program, shape.batch, params, state)
        for program in programs.values()
    ]
    lowered.append(lower_kv_scales(model, mesh, params))
    rooms = traced_sources(PACKAGE)
    for part in lowered:
        text = part.as_text(debug_info=True)
        files = {Path(name) for name in re.findall(r'"(/[^"]+\.py)"', text)}
        own = {file for file in files if file.is_relative_to(PACKAGE)}
        assert len(own) > 5
        assert [file for file in own if not any(map(file.is_relative_to, rooms))] == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_the_key_counts_usable_cores() -> None:
    usable = os.sched_getaffinity(0)
    if len(usable) < 2:
        pytest.skip("one core cannot be made fewer")
    before = machine_key()
    try:
        os.sched_setaffinity(0, {min(usable)})
        assert machine_key() != before
    finally:
        os.sched_setaffinity(0, usable)
