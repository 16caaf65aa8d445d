"""Compiles whole step programs for TPUs that are not here, and prints what they take.

    python -m tests.tpu_compile.engines [--only WORD] [--layers N]

One mixed and one decode program of each engine, every layer and the sampler in it, with as many
KV pages as `jserve plan` finds room for. One JSON line each; exits with 1 where a program does
not fit its chip, copies a KV page or a weight, or needs more than the plan says. Needs libtpu.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import tests.tpu_compile.environment  # noqa: F401 - before JAX, which reads it

# isort: split
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from jserve.checkpoints.config import Quantization
from jserve.checkpoints.hf_config import spec_from_hf
from jserve.checkpoints.json_file import read_json
from jserve.core.step import Program
from jserve.engine.build.chips import Chip, find_chip
from jserve.engine.build.fit import fit_memory
from jserve.engine.build.kv_budget import estimated_temporary_bytes
from jserve.engine.build.shape import EngineShape, abstract_params
from jserve.engine.config import EngineConfig, KVDtype
from jserve.engine.program.kv_scales import lower_kv_scales
from jserve.engine.program.programs import lower_step
from jserve.engine.program.state import abstract_state
from jserve.model.functional import Model
from jserve.model.sharding import device_mesh
from jserve.pallas_kernels.backend import Backend
from tests.compiled_hlo import copies_of

ARCHITECTURES = Path(__file__).parents[1] / "fixtures" / "architectures"
# Slices by their number of chips.
_TOPOLOGIES = {
    "v5e": {1: "v5e:2x2", 4: "v5e:2x2", 8: "v5e:2x4"},
    "v5p": {1: "v5p:2x2x1", 4: "v5p:2x2x1", 8: "v5p:2x2x2"},
    "v6e": {1: "v6e:2x2", 4: "v6e:2x2", 8: "v6e:2x4"},
}
_LEAST_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class Engine:
    """A model over some chips; `layers` 0 is all of them."""

    architecture: str
    chips: int
    expert_parallel: int = 1
    generations: tuple[str, ...] = ("v5e", "v5p", "v6e")
    quantization: Quantization = Quantization.NONE
    kv_dtype: KVDtype = KVDtype.BFLOAT16
    layers: int = 0

    def config(self) -> EngineConfig:
        """Sizes of its programs."""
        return EngineConfig(
            num_slots=64,
            max_model_len=8192,
            page_size=128,
            kv_bytes=None,
            mixed_tokens=(640,),  # like no side of a weight, so that copies are told apart
            decode_rows=(64,),
            tensor_parallel=self.chips,
            expert_parallel=self.expert_parallel,
            kv_dtype=self.kv_dtype,
        )

    def model(self, mesh: Mesh) -> Model:
        """Model in bfloat16, without weights."""
        spec = spec_from_hf(read_json(ARCHITECTURES / f"{self.architecture}.json"))
        if self.layers:
            spec = dataclasses.replace(
                spec,
                layers=self.layers,
                local_layers=spec.local_layers[: self.layers],
                sparse_layers=spec.sparse_layers[: self.layers],
            )
        return Model(spec, jnp.dtype(jnp.bfloat16), Backend.TPU, self.quantization, mesh)


ENGINES = (
    Engine("llama-3.1-8b", 4),
    Engine("llama-3.1-8b", 8),
    Engine(
        "llama-3.1-8b",
        1,
        generations=("v6e",),
        quantization=Quantization.FP8,
        kv_dtype=KVDtype.FLOAT8,
    ),
    Engine("llama-3.1-8b", 4, generations=("v5e",), kv_dtype=KVDtype.FLOAT8),
    Engine("qwen3-30b-a3b", 8, expert_parallel=8),
    Engine("gemma-3-4b", 1),
    Engine("llama-3.3-70b", 4, generations=("v5p",)),
)


def compile_program(
    model: Model, mesh: Mesh, shape: EngineShape, program: Program
) -> dict[str, Any]:
    """The compiler's report on one program. Sizes are of one device."""
    params, state = abstract_params(model, mesh), abstract_state(model, mesh, shape.state)
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = lower_step(model, mesh, program, shape.batch, params, state).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    large = [*params.values(), *jax.tree.leaves(state.kv)]
    copies = copies_of(text, large, _LEAST_BYTES)
    return {
        "program": program.name,
        "pages": shape.num_pages,
        "argument_bytes": memory.argument_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "planned_temp_bytes": estimated_temporary_bytes(model, mesh, program),
        "code_bytes": memory.generated_code_size_in_bytes,
        "copies": [f"{op.kind} {op.dtype}{list(op.shape)}" for op in copies],
        "seconds": round(time.perf_counter() - started, 1),
    }


def compile_engine(generation: str, engine: Engine) -> list[dict[str, Any]]:
    """Compiles both programs of an engine for a generation of TPU, and lists their faults."""
    name = _TOPOLOGIES[generation][engine.chips]
    topology = topologies.get_topology_desc(topology_name=name, platform="tpu")
    config = engine.config()
    mesh = device_mesh(list(topology.devices)[: engine.chips], **config.mesh_axes)
    chip = find_chip(generation)
    model = engine.model(mesh)
    fit = fit_memory(model, mesh, config, chip)
    kept = fit.budget.slots + fit.budget.page * (fit.shape.num_pages + 1)
    rows: list[dict[str, Any]] = []
    for program in config.programs():
        found = compile_program(model, mesh, fit.shape, program)
        used = found["argument_bytes"] + found["temp_bytes"] + found["code_bytes"]
        faults = {
            "state is not updated in place": found["alias_bytes"] < kept,
            "copies": bool(found["copies"]),
            "needs more than planned": found["temp_bytes"] > found["planned_temp_bytes"],
            "does not fit": used > chip.usable_bytes,
        }
        wrong = [fault for fault, is_so in faults.items() if is_so]
        rows.append({**found, "wrong": wrong})
    if fit.shape.kv_dtype.itemsize == 1:
        rows.append(compile_scaling(model, mesh, chip))
    return [{"generation": generation, **dataclasses.asdict(engine), **row} for row in rows]


def compile_scaling(model: Model, mesh: Mesh, chip: Chip) -> dict[str, Any]:
    """Compiles the program that measures the scales of 8-bit pages."""
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = lower_kv_scales(model, mesh, abstract_params(model, mesh)).compile()
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    used += memory.generated_code_size_in_bytes
    return {
        "program": "kv_scales",
        "temp_bytes": memory.temp_size_in_bytes,
        "seconds": round(time.perf_counter() - started, 1),
        "wrong": ["does not fit"] if used > chip.usable_bytes else [],
    }


def main() -> int:
    """Compiles every engine for every generation it is meant for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="engines whose architecture has this word")
    parser.add_argument("--layers", type=int, default=0, help="fewer than all, for a quick look")
    parser.add_argument("--generation", help="this one alone")
    options = parser.parse_args()
    wrong = 0
    for engine in ENGINES:
        if options.only not in engine.architecture:
            continue
        engine = dataclasses.replace(engine, layers=options.layers)
        for generation in engine.generations:
            if options.generation not in (None, generation):
                continue
            for found in compile_engine(generation, engine):
                print(json.dumps(found, default=str), flush=True)
                wrong += bool(found["wrong"])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
