"""Compiles quantized and grouped matmuls for TPUs that are not here.

    python -m tests.tpu_compile.matmuls [--quick]

Prints one JSON line each. Needs libtpu, no TPU. Exits with 1 where a weight is copied, or made
floats outside of a kernel, or where XLA takes all experts instead of launching its ragged dot.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import tests.tpu_compile.environment  # noqa: F401 - before JAX, which reads it

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.grouped_matmul.cases import MODEL_CASES as GROUPED_CASES
from jserve.pallas_kernels.grouped_matmul.cases import Case as GroupedCase
from jserve.pallas_kernels.grouped_matmul.dispatch import grouped_matmul
from jserve.pallas_kernels.quantized_matmul.cases import MODEL_CASES, Case
from jserve.pallas_kernels.quantized_matmul.channels import CODES, ChannelMatrix, ChannelStack
from jserve.pallas_kernels.quantized_matmul.dispatch import quantized_matmul
from tests.compiled_hlo import writes_of
from tests.tpu_compile.programs import LAUNCH, TOPOLOGIES, with_generations

_QUICK = (
    "llama_8b gate_up, 1 rows",
    "qwen3_30b gate_up, 64 tokens",
)


def compile_for(generation: str, case: Case, codes: jnp.dtype) -> dict[str, object]:
    """Compiles quantized matmuls for a generation of TPU and reports on them."""
    argument, mesh = _arguments(generation)
    weights = [
        ChannelMatrix(argument(codes, out, case.in_dim), argument(jnp.dtype(jnp.float32), out))
        for out in case.out_dims
    ]
    x = argument(jnp.dtype(jnp.bfloat16), case.rows, case.in_dim)
    multiply = partial(quantized_matmul, backend=Backend.TPU)
    shapes = [weight.codes.shape for weight in weights]
    found = {"generation": generation, "name": case.name, "codes": codes.name}
    return found | _compiled(mesh, multiply, (x, weights), shapes, case.rows, len(weights))


def compile_grouped(generation: str, case: GroupedCase, dtype: jnp.dtype) -> dict[str, object]:
    """Compiles grouped matmuls of bfloat16 or int8 codes and reports on them.

    Two launches each: a list and a walk.
    """
    argument, mesh = _arguments(generation)
    experts = len(case.group_sizes)
    stacks = [argument(dtype, experts, case.in_dim, out) for out in case.out_dims]
    scales = [argument(jnp.dtype(jnp.float32), experts, out) for out in case.out_dims]
    x = argument(jnp.dtype(jnp.bfloat16), case.rows, case.in_dim)
    sizes = argument(jnp.dtype(jnp.int32), experts)

    def multiply(
        x: jax.Array, stacks: list[jax.Array], scales: list[jax.Array], sizes: jax.Array
    ) -> Any:
        weights: Any = [stack.swapaxes(1, 2) for stack in stacks]  # the order that `matrices` keeps
        if dtype == jnp.int8:
            weights = list(map(ChannelStack, weights, scales))
        return grouped_matmul(x, weights, sizes, backend=Backend.TPU)

    shapes = [stack.shape for stack in stacks]
    launches = 1 + len(stacks)  # the list is the same for all stacks
    found = {"generation": generation, "name": case.name, "codes": dtype.name}
    arguments = (x, stacks, scales, sizes)
    return found | _compiled(mesh, multiply, arguments, shapes, case.rows, launches)


def _arguments(generation: str) -> tuple[Callable[..., jax.ShapeDtypeStruct], Mesh]:
    topology = topologies.get_topology_desc(topology_name=TOPOLOGIES[generation], platform="tpu")
    mesh = Mesh(np.array(topology.devices[:1]), ("model",))
    whole = NamedSharding(mesh, PartitionSpec())

    def argument(dtype: jnp.dtype, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=whole)

    return argument, mesh


def _compiled(
    mesh: Mesh,
    function: Callable[..., Any],
    arguments: Any,
    weights: Sequence[tuple[int, ...]],
    rows: int,
    launches: int,
) -> dict[str, object]:
    """Reports faults of a program. Results of experts may be held twice: they are scaled last."""
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*arguments).compile()
    text, temp_bytes = compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes
    found = text.count(LAUNCH)
    results = 4 * rows * sum(shape[-2] if len(shape) == 2 else shape[-1] for shape in weights)
    most = sum(map(math.prod, weights)) // 8 + results
    faults = {
        f"{found} launches, not {launches}": found != launches,
        "a weight is written": bool(writes_of(text, weights)),
        f"more than {most} bytes of temporaries": temp_bytes > most,
    }
    return {
        "launches": found,
        "temp_bytes": temp_bytes,
        "seconds": round(time.perf_counter() - started, 1),
        "wrong": [fault for fault, is_so in faults.items() if is_so],
    }


def main() -> int:
    """Compiles every case for every generation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the few that `make test` compiles")
    quick = parser.parse_args().quick
    cases = [case for case in MODEL_CASES if not quick or case.name in _QUICK]
    grouped = [case for case in GROUPED_CASES if not quick or case.name in _QUICK]
    kinds = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int8))
    jobs: list[Callable[[str], dict[str, object]]] = [
        *(partial(compile_for, case=case, codes=codes) for case in cases for codes in CODES),
        *(partial(compile_grouped, case=case, dtype=kind) for case in grouped for kind in kinds),
    ]
    wrong = 0
    for generation, compile_job in with_generations(jobs, quick=quick):
        found = compile_job(generation)
        print(json.dumps(found), flush=True)
        wrong += bool(found["wrong"])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
