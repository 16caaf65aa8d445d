"""Compiles products with quantized weights for TPUs that are not here: one JSON line each.

    python -m tests.tpu_compile.matmuls [--quick]

Needs libtpu, no TPU. Exits with 1 where a weight is copied, or made floats outside of a kernel.
"""

import argparse
import functools
import json
import sys
import time

import tests.tpu_compile.environment  # noqa: F401 - before JAX, which reads it

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.quantized_matmul.cases import MODEL_CASES, Case
from jserve.pallas_kernels.quantized_matmul.channels import CODES, ChannelMatrix
from jserve.pallas_kernels.quantized_matmul.dispatch import quantized_matmul
from tests.tpu_compile.programs import TOPOLOGIES

_QUICK = ("llama_8b gate_up, 1 rows", "llama_8b down, 256 rows", "llama_8b qkv, 64 rows")


def compile_for(generation: str, case: Case, codes: jnp.dtype) -> dict[str, object]:
    """What the compiler says of one op on a generation of TPU."""
    topology = topologies.get_topology_desc(topology_name=TOPOLOGIES[generation], platform="tpu")
    mesh = Mesh(np.array(topology.devices[:1]), ("model",))
    whole = NamedSharding(mesh, PartitionSpec())

    def argument(dtype: jnp.dtype, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=whole)

    weights = [
        ChannelMatrix(argument(codes, out, case.in_dim), argument(jnp.dtype(jnp.float32), out))
        for out in case.out_dims
    ]
    x = argument(jnp.dtype(jnp.bfloat16), case.rows, case.in_dim)
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        multiply = functools.partial(quantized_matmul, backend=Backend.TPU)
        compiled = jax.jit(multiply).lower(x, weights).compile()
    return {
        "generation": generation,
        "name": case.name,
        "codes": codes.name,
        "launches": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
        "weights": len(weights),
        "weight_bytes": sum(case.out_dims) * case.in_dim,
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> int:
    """Compiles every case for every generation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the few that `make test` compiles")
    quick = parser.parse_args().quick
    copied = 0
    for generation in TOPOLOGIES:
        for case in MODEL_CASES:
            if not quick or case.name in _QUICK:
                for codes in CODES:
                    found = compile_for(generation, case, codes)
                    print(json.dumps(found), flush=True)
                    in_kernels = found["launches"] == found["weights"]
                    copied += not in_kernels or 8 * found["temp_bytes"] > found["weight_bytes"]
    return 1 if copied else 0


if __name__ == "__main__":
    sys.exit(main())
