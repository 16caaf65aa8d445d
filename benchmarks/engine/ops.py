"""Times the parts of a step: the layers without attention, attention, and the head.

    python -m benchmarks.engine.ops
    python -m benchmarks.engine.ops --set model.quantization=int4 --set engine.kv_dtype=bfloat16
    python -m benchmarks.engine.ops --backend cpu --rows 1 8 32 128 --contexts 200 1000

Random weights, all layers of the model as one program, so that caches are as cold as in a step.
Rows are tokens: for attention they decode, each in a sequence of its own, or are one prompt's.
Prints a table of milliseconds, medians of the turns, and one JSON line.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.engine import options
from benchmarks.kernels.chained_attention import Heads, Turns, time_attention
from benchmarks.serving import report
from jserve.checkpoints.config import RandomWeights
from jserve.core.errors import ConfigError
from jserve.engine.build.shape import stored_kv_dtype
from jserve.model.context import StepContext
from jserve.model.functional import Model
from jserve.pallas_kernels.backend import Backend, backend_for


def parse() -> argparse.Namespace:
    parser = options.parser_of(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--contexts", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--turns", type=int, default=11)
    return parser.parse_args()


def time_matmuls(
    model: Model, params: dict[str, jax.Array], rows: int, turns: Turns
) -> list[float]:
    """Milliseconds of all layers without attention, and of the head."""
    layers = model.spec.layers

    @jax.jit
    def hidden(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        pages = (None,) * layers
        return model.hidden(
            params, tokens, tokens, pages, StepContext(lambda q, k, v, kv, w: (q, kv))
        )[0]

    tokens = jnp.arange(rows, dtype=jnp.int32)
    logits = jax.jit(model.logits)
    states = hidden(params, tokens)
    return [
        round(turns.median_ms(lambda: hidden(params, tokens)), 2),
        round(turns.median_ms(lambda: logits(params, states)), 2),
    ]


def main() -> None:
    arguments = parse()
    serve = options.serve_config(arguments)
    if not isinstance(serve.model.source, RandomWeights):
        raise ConfigError("ops are measured with random weights: name a --model")
    spec = serve.model.source.spec
    dtype = jnp.dtype(serve.model.dtype.value)
    chosen = Backend(arguments.backend) if arguments.backend else None
    device = jax.devices()[0]
    backend = chosen or backend_for(
        device.platform,
        dtype,
        device_kind=device.device_kind,
        head_dim=spec.head_dim,
        page_size=serve.engine.page_size,
    )
    model = Model(spec, dtype, backend, serve.model.quantization)
    params = model.init(0)
    kv_dtype = stored_kv_dtype(serve.engine, dtype)

    heads = Heads(
        spec.q_heads,
        spec.kv_heads,
        spec.head_dim,
        serve.engine.page_size,
        dtype,
        kv_dtype,
        tuple(spec.window_of(i) for i in range(spec.layers)),
    )

    turns = Turns(arguments.turns)

    def attention(lengths: list[tuple[int, int]]) -> float:
        return round(time_attention(heads, lengths, backend, turns), 2)

    found: list[dict[str, Any]] = []
    for rows in arguments.rows:
        layers, head = time_matmuls(model, params, rows, turns)
        entry: dict[str, Any] = {"rows": rows, "layers_ms": layers, "head_ms": head}
        for context in arguments.contexts:
            entry[f"decode_{context}_ms"] = attention([(context, 1)] * rows)
            entry[f"prompt_{context}_ms"] = attention([(context, rows)])
        found.append(entry)
    titles = ["rows", "layers but attention", "head"]
    for context in arguments.contexts:
        titles += [f"attention at {context}", f"a prompt after {context}"]
    print(
        f"{serve.model.name}, {backend.value} ops, weights {serve.model.weights}, KV {kv_dtype}; "
        "ms a step\n"
    )
    print(report.grid(titles, [[f"{value:,}" for value in entry.values()] for entry in found]))
    line = options.config_of(arguments, serve)
    print(report.json_line("engine_ops", line, backend=backend.value, ops=found))


if __name__ == "__main__":
    options.run(main)
