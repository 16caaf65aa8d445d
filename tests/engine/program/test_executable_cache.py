"""The key of compiled programs: whatever they are made from changes it."""

import dataclasses
import importlib
import inspect
import os
import pkgutil
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jserve
import jserve.engine.program
from jserve.checkpoints.config import Quantization
from jserve.core.step import MoveKind, ProgramKind
from jserve.engine.build.shape import abstract_params, least_shape
from jserve.engine.program.executable_cache import (
    ExecutableCache,
    code_digest,
    load_or_compile,
    machine_key,
    open_cache,
    traced_sources,
)
from jserve.engine.program.kv_scales import lower_kv_scales
from jserve.engine.program.page_moves import MoveProgram, lower_move
from jserve.engine.program.programs import lower_step
from jserve.engine.program.state import abstract_state, lower_state
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
    state = abstract_state(model, mesh, shape.state)
    programs = {program.kind: program for program in CONFIG.programs()}
    assert programs.keys() == set(ProgramKind)
    lowered = {
        lower_step: [
            lower_step(model, mesh, program, shape.batch, params, state)
            for program in programs.values()
        ],
        lower_state: [lower_state(model, mesh, shape.state)],
        lower_kv_scales: [lower_kv_scales(model, mesh, params)],
        lower_move: [lower_move(MoveProgram(kind, 0, 8), state.kv[0]) for kind in MoveKind],
    }
    assert set(lowered) == _functions_that_lower()
    rooms = traced_sources(PACKAGE)
    for part in (part for parts in lowered.values() for part in parts):
        text = part.as_text(debug_info=True)
        files = {Path(name) for name in re.findall(r'"(/[^"]+\.py)"', text)}
        own = {file for file in files if file.is_relative_to(PACKAGE)}
        assert own
        assert [file for file in own if not any(map(file.is_relative_to, rooms))] == []


def _functions_that_lower() -> set[object]:
    """The function of each kind of program: `lower_*` in the room that is digested."""
    room = jserve.engine.program
    return {
        value
        for module in pkgutil.iter_modules(room.__path__, f"{room.__name__}.")
        for name, value in vars(importlib.import_module(module.name)).items()
        if name.startswith("lower_")
    }


def test_an_engine_traces_nothing_elsewhere() -> None:
    room = PACKAGE / "engine" / "program"
    files = [file for file in (PACKAGE / "engine").rglob("*.py") if room not in file.parents]
    assert [file for file in files if re.search(r"\bjit\b", file.read_text())] == []


ONE = device_mesh(jax.devices()[:1], model=1, expert=1)
MODEL = {
    "spec": TINY,
    "dtype": jnp.float32,
    "backend": Backend.CPU,
    "quantization": Quantization.INT8,
    "mesh": ONE,
}


@pytest.mark.parametrize(
    ("argument", "other"),
    [
        ("spec", dataclasses.replace(TINY, rope_theta=5e5)),
        ("dtype", jnp.bfloat16),
        ("backend", Backend.NATIVE),  # its int8 weights have the shapes of the other
        ("quantization", Quantization.NONE),
        ("mesh", None),
    ],
)
def test_a_program_is_not_loaded_for_another_model(
    tmp_path: Path, argument: str, other: object
) -> None:
    assert MODEL.keys() == inspect.signature(Model).parameters.keys()
    mine, same = (open_cache(tmp_path, Model(**MODEL), ONE) for _ in range(2))
    others = open_cache(tmp_path, Model(**MODEL | {argument: other}), ONE)
    assert not load_or_compile(mine, "kv_scales", _lowered).cached
    assert load_or_compile(same, "kv_scales", _lowered).cached
    assert others.load("kv_scales") is None


def _lowered() -> jax.stages.Lowered:
    return jax.jit(lambda x: x + 1).lower(jnp.int32(1))


def _with_an_entry(folder: Path) -> tuple[ExecutableCache, Path]:
    """A cache in `folder`, and the file of its one program."""
    cache = open_cache(folder, Model(**MODEL), ONE)
    load_or_compile(cache, "program", _lowered)
    (entry,) = folder.iterdir()
    return cache, entry


def test_an_entry_with_a_changed_bit_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """XLA may crash on a program that is not what it wrote."""
    cache, entry = _with_an_entry(tmp_path)
    whole = entry.read_bytes()
    for place in (0, len(whole) // 2, len(whole) - 1):
        entry.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        assert cache.load("program") is None
        assert "is unreadable and is made again" in caplog.text
        caplog.clear()
    assert not load_or_compile(cache, "program", _lowered).cached
    assert load_or_compile(cache, "program", _lowered).cached


def test_what_cannot_be_stored_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, entry = _with_an_entry(tmp_path)
    entry.unlink()
    entry.mkdir()  # in the way of the rename, as a full disk is in that of the bytes
    assert not load_or_compile(cache, "program", _lowered).cached
    assert list(tmp_path.iterdir()) == [entry]
    assert "was not kept" in caplog.text


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
