"""Whole step programs of engines to compile for GPUs: every layer, the head and the sampler."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jserve.checkpoints.config import Quantization
from jserve.checkpoints.hf_config import spec_from_hf
from jserve.checkpoints.json_file import read_json
from jserve.core.step import Program as StepProgram
from jserve.core.step import ProgramKind
from jserve.engine.build.kv_budget import estimated_temporary_bytes
from jserve.engine.build.shape import abstract_params
from jserve.engine.build.sizing import shape_engine
from jserve.engine.config import EngineConfig, KVDtype
from jserve.engine.program.kv_scales import lower_kv_scales
from jserve.engine.program.programs import lower_step
from jserve.engine.program.state import abstract_state
from jserve.model.functional import Model
from jserve.model.sharding import AnyMesh, abstract_mesh
from jserve.pallas_kernels.backend import Backend
from tests.gpu_compile.h200 import Program

_ARCHITECTURES = Path(__file__).parents[1] / "fixtures" / "architectures"
_LARGE_BYTES = 2 << 20  # the weights of K and V have more; norms may be copied


@dataclasses.dataclass(frozen=True)
class Engine:
    """A model on one H200 with the sizes of `configs/llama31_8b.py:h200`."""

    architecture: str
    quantization: Quantization = Quantization.NONE
    kv_dtype: KVDtype = KVDtype.BFLOAT16
    config: EngineConfig = dataclasses.field(
        default_factory=lambda: EngineConfig(
            num_slots=256,
            max_model_len=16384,
            page_size=64,
            num_pages=4096,
            mixed_tokens=(2048,),
            decode_rows=(256,),
        )
    )

    def programs(self) -> tuple[Program, ...]:
        """A program to compile for each step program of the engine."""
        return tuple(self._program(program) for program in self.config.programs())

    def _program(self, program: StepProgram) -> Program:
        config = dataclasses.replace(self.config, kv_dtype=self.kv_dtype)

        def lower(mesh: Mesh) -> jax.stages.Lowered:
            model = self._model(mesh)
            shape = shape_engine(model, mesh, config, None)
            params, state = abstract_params(model, mesh), abstract_state(model, mesh, shape.state)
            return lower_step(model, mesh, program, shape.batch, params, state)

        one = abstract_mesh(model=1)
        model = self._model(one)
        spec = model.spec
        pages = abstract_state(model, one, shape_engine(model, one, config, None).state).kv
        page_bytes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pages)]
        sizes = [leaf.size * leaf.dtype.itemsize for leaf in abstract_params(model, one).values()]
        watched = {size for size in (*page_bytes, *sizes) if size >= _LARGE_BYTES}
        name = f"{self.architecture} {program.name}, weights {self.quantization.value}"
        launches = 2 * spec.layers  # attention and the combination of its splits
        if self.quantization is not Quantization.NONE:
            # The head, twice where prompts have logprobs; q, k and v, o, gate and up, down.
            heads = 2 if program.kind is ProgramKind.MIXED else 1
            launches += 4 * spec.layers + heads
        kept = sum(page_bytes)
        return Program(
            f"{name}, KV {self.kv_dtype.value}",
            lower,
            launches,
            kept,
            frozenset(watched),
            most_temp_bytes=estimated_temporary_bytes(model, one, program),
        )

    def scaling(self) -> Program:
        """The program that measures the scales of 8-bit pages."""
        model = self._model(abstract_mesh(model=1))

        def lower(mesh: Mesh) -> jax.stages.Lowered:
            model = self._model(mesh)
            return lower_kv_scales(model, mesh, abstract_params(model, mesh))

        # Nothing reads what the last layer gives: only its q, k and v are multiplied.
        launches = 4 * model.spec.layers - 3 if self.quantization is not Quantization.NONE else 0
        name = f"{self.architecture} KV scales, weights {self.quantization.value}"
        return Program(name, lower, launches)

    def _model(self, mesh: AnyMesh) -> Model:
        spec = spec_from_hf(read_json(_ARCHITECTURES / f"{self.architecture}.json"))
        return Model(spec, jnp.dtype(jnp.bfloat16), Backend.GPU, self.quantization, mesh)


_8_BITS = Engine("llama-3.1-8b", Quantization.FP8, KVDtype.FLOAT8)
PROGRAMS = (
    *Engine("llama-3.1-8b").programs(),
    *_8_BITS.programs(),
    _8_BITS.scaling(),
)
