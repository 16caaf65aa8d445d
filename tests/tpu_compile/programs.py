"""Compiles attention for TPUs that are not here, and prints what it takes: one JSON line each.

    python -m tests.tpu_compile.programs [--quick]

Needs libtpu, no TPU. Exits with 1 where a layer is not one launch, or pages are copied
instead of updated in place.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import tests.tpu_compile.environment  # noqa: F401 - before JAX, which reads it

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch
from jserve.pallas_kernels.ragged_paged_attention.sharded import sharded_attention

T = TypeVar("T")
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
LAUNCH = 'custom_call_target="tpu_custom_call"'
_NUM_PAGES = 1024
_SLOTS = 64


@dataclasses.dataclass(frozen=True)
class Program:
    """One attention layer of a step: `tokens` is 0 in a decode step, which decodes every slot."""

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    tokens: int
    window: int = 0
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    devices: int = 1


# Each size of head, kind of pages and kind of step; prompts take the compiler longest.
_QUICK = (
    Program("llama_1b", 32, 8, 64, 128, 512),
    Program("llama_8b", 32, 8, 128, 128, 512, kv_dtype="float8_e4m3fn"),
    Program("gemma_4b", 8, 4, 256, 128, 0, window=1024),
)
PROGRAMS = (
    *_QUICK,
    Program("llama_8b", 32, 8, 128, 128, 0),
    Program("llama_8b", 32, 8, 128, 128, 512),
    Program("gemma_4b", 8, 4, 256, 128, 512, window=1024),
    Program("llama_8b, 4 devices", 32, 8, 128, 128, 512, devices=4),
    Program("llama_8b", 32, 8, 128, 64, 512),
    Program("llama_8b", 32, 8, 128, 64, 0),
    Program("llama_8b", 32, 8, 128, 128, 512, dtype="float32", kv_dtype="float32"),
    Program("llama_8b", 32, 8, 128, 128, 0, kv_dtype="float8_e4m3fn"),
    Program("llama_1b", 32, 8, 64, 128, 0),
    Program("llama_1b", 32, 8, 64, 128, 512, kv_dtype="float8_e4m3fn"),
    Program("llama_1b", 32, 8, 64, 128, 512, dtype="float32", kv_dtype="float32"),
    Program("smollm2_135m", 9, 3, 64, 128, 512),
    Program("gemma_4b", 8, 4, 256, 64, 512, dtype="float32", kv_dtype="float32"),
    Program("qwen_4b", 32, 8, 128, 128, 2048),
    Program("llama_2_7b", 32, 32, 128, 128, 512),
)


def with_generations(jobs: Iterable[T], *, quick: bool) -> Iterator[tuple[str, T]]:
    """Every job for every generation of TPU, or for one of them, in turn, where `quick`."""
    return zip(itertools.cycle(TOPOLOGIES), jobs) if quick else itertools.product(TOPOLOGIES, jobs)


def compile_for(generation: str, program: Program) -> dict[str, object]:
    """The compiler's report on a program for a generation of TPU. Sizes are of one device."""
    topology = topologies.get_topology_desc(topology_name=TOPOLOGIES[generation], platform="tpu")
    mesh = Mesh(np.array(topology.devices[: program.devices]), ("model",))

    def argument(dtype: str, *shape: int, split: int | None = None) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec(*("model" if axis == split else None for axis in range(len(shape))))
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, spec))

    tokens = program.tokens or _SLOTS
    whole = functools.partial(argument, "int32")
    batch = RaggedBatch(
        page_table=whole(_SLOTS, 64),
        kv_lens=whole(_SLOTS),
        q_starts=whole(_SLOTS),
        q_lens=whole(_SLOTS),
        num_decode=whole(),
        num_rows=whole(),
        write_pages=whole(tokens),
        write_offsets=whole(tokens),
    )
    pages = (_NUM_PAGES, 2, program.kv_heads, program.page_size, program.head_dim)
    q = argument(program.dtype, tokens, program.q_heads, program.head_dim, split=1)
    k = v = argument(program.dtype, tokens, program.kv_heads, program.head_dim, split=1)
    attend = functools.partial(
        sharded_attention,
        window=program.window,
        prompts=program.tokens > 0,
        backend=Backend.TPU,
        mesh=mesh,
    )
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = jax.jit(attend, donate_argnums=3).lower(
            q, k, v, argument(program.kv_dtype, *pages, split=2), batch
        )
        compiled = lowered.compile()
    memory, launches = compiled.memory_analysis(), compiled.as_text().count(LAUNCH)
    page_bytes = int(np.prod(pages)) * jnp.dtype(program.kv_dtype).itemsize // program.devices
    faults = {
        f"{launches} launches": launches != 1,
        "pages are not updated in place": memory.alias_size_in_bytes < page_bytes,
        # Room for the step's own queries, keys and values, not for a copy of the pages.
        "too many temporaries": 8 * memory.temp_size_in_bytes > page_bytes,
    }
    return {
        "generation": generation,
        **dataclasses.asdict(program),
        "page_bytes": page_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "seconds": round(time.perf_counter() - started, 1),
        "wrong": [fault for fault, is_so in faults.items() if is_so],
    }


def main() -> int:
    """Compiles every program for every generation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the few that `make test` compiles")
    quick = parser.parse_args().quick
    wrong = 0
    for generation, program in with_generations(_QUICK if quick else PROGRAMS, quick=quick):
        found = compile_for(generation, program)
        print(json.dumps(found), flush=True)
        wrong += bool(found["wrong"])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
