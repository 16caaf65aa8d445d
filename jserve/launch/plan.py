"""The command `plan`: whether a config fits its chips, told without having any."""

from pathlib import Path

import jax.numpy as jnp

from jserve.checkpoints.config import check_platform
from jserve.checkpoints.hf_config import spec_from_hf
from jserve.checkpoints.json_file import read_json
from jserve.checkpoints.progress import FileProgress
from jserve.config import ServeConfig
from jserve.core.errors import ConfigError
from jserve.core.model_spec import ModelSpec
from jserve.engine.build.chips import CHIPS, find_chip
from jserve.engine.build.fit import MemoryFit, fit_memory
from jserve.launch.console import Console
from jserve.model.functional import Model
from jserve.model.loading.load import architecture
from jserve.model.sharding import abstract_mesh
from jserve.pallas_kernels.backend import backend_for

_GIB = 1 << 30


def plan(config: ServeConfig, architecture_file: str | None) -> int:
    """Prints what each chip holds; returns the exit code. Raises ConfigError if it does not fit.

    `architecture_file` is a `config.json` to plan for where the model's own files are not here.
    """
    if not config.platform.chip:
        raise ConfigError(
            f"platform.chip is not set: name what the engine runs on, one of {', '.join(CHIPS)}"
        )
    chip = find_chip(config.platform.chip)
    if chip.platform != config.platform.backend:
        raise ConfigError(
            f"platform.chip is {chip.name!r}, a {chip.platform.value}, but platform.backend is "
            f"{config.platform.backend.value!r}"
        )
    console = Console()
    spec = _spec(config, architecture_file, console)
    mesh = abstract_mesh(**config.engine.mesh_axes)
    dtype = jnp.dtype(config.model.dtype.value)
    backend = backend_for(
        chip.platform.value,
        dtype,
        mesh.size,
        device_kind=chip.device_kind,
        head_dim=spec.head_dim,
        page_size=config.engine.page_size,
    )
    check_platform(config.model.quantization, chip.platform.value)
    model = Model(spec, dtype, backend, config.model.quantization, mesh)
    _show(console, config, fit_memory(model, mesh, config.engine, chip))
    return 0


def _spec(config: ServeConfig, architecture_file: str | None, console: Console) -> ModelSpec:
    if architecture_file is not None:
        if not Path(architecture_file).is_file():
            raise ConfigError(f"--architecture: there is no file {architecture_file}")
        return spec_from_hf(read_json(Path(architecture_file)))
    try:
        return architecture(config.model, FileProgress("model files", console.say))
    except ConfigError as error:
        raise ConfigError(f"{error}; --architecture=config.json plans without") from error


def _show(console: Console, config: ServeConfig, fit: MemoryFit) -> None:
    shape, need, chip = fit.shape, fit.budget, fit.chip
    assert need.largest is not None
    slots, longest = shape.batch.num_slots, shape.max_model_len
    free = chip.usable_bytes - fit.used_bytes
    rows = {
        "weights": f"{_gib(need.params)}  in {config.model.weights}",
        "slots": f"{_gib(need.slots)}  the state of {slots}",
        "temporaries": f"{_gib(need.temporaries)}  of {need.largest.name}, estimated",
        "programs": f"{_gib(need.code)}  their code, estimated",
        **({"page moves": f"{_gib(need.moves)}  in flight"} if need.moves else {}),
        "KV pages": f"{_gib(shape.num_pages * need.page)}  {shape.num_pages} of "
        f"{shape.batch.page_size} tokens in {shape.kv_dtype}, {need.page / 2**20:.2f} MiB each",
        "left": f"{_gib(free)}  of {chip.usable_bytes / _GIB:.2f} GiB",
    }
    chips = config.engine.tensor_parallel
    console.table(f"{config.model.name} on {chips} x {chip.name}, GiB a chip", rows)
    console.table(
        "What fits",
        {
            "tokens in KV memory": f"{fit.kv_tokens:,}",
            "a slot's share": f"{fit.kv_tokens // slots:,} tokens ({slots} slots)",
            "longest contexts": f"{fit.full_sequences} of {longest:,} tokens at once",
        },
    )


def _gib(count: int) -> str:
    return f"{count / _GIB:8.2f}"
