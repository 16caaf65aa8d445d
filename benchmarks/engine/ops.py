"""Where a step's time goes: the layers without attention, attention, and the head, each by itself.

    python -m benchmarks.engine.ops
    python -m benchmarks.engine.ops --set model.quantization=int4 --set engine.kv_dtype=bfloat16
    python -m benchmarks.engine.ops --backend cpu --rows 1 8 32 128 --contexts 200 1000

Random weights, all layers of the model as one program, so that caches are as cold as in a step.
Rows are tokens: for attention they decode, each in a sequence of its own, or are one prompt's.
Prints a table of milliseconds, medians of the turns, and one JSON line.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.engine import options
from benchmarks.serving import report
from jserve.core.errors import ConfigError
from jserve.model.config import RandomWeights
from jserve.model.functional import Model
from jserve.model.spec import ModelSpec
from jserve.pallas_kernels.backend import Backend, backend_for
from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch, make_ragged_batch
from jserve.pallas_kernels.ragged_paged_attention.dispatch import (
    kv_pages_shape,
    ragged_paged_attention,
)


def parse() -> argparse.Namespace:
    """The flags."""
    parser = options.parser_of(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--contexts", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--turns", type=int, default=11)
    return parser.parse_args()


def median_ms(run: Callable[[], Any], turns: int) -> float:
    """Of some runs after one that compiles."""
    jax.block_until_ready(run())
    seconds: list[float] = []
    for _ in range(turns):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return round(float(np.median(seconds)) * 1e3, 2)


def time_products(model: Model, params: dict[str, jax.Array], rows: int, turns: int) -> list[float]:
    """Milliseconds of all layers without attention, and of the head."""
    layers = model.spec.layers

    @jax.jit
    def hidden(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        pages = (None,) * layers
        return model.hidden(params, tokens, tokens, pages, lambda q, k, v, kv, w: (q, kv))[0]

    tokens = jnp.arange(rows, dtype=jnp.int32)
    logits = jax.jit(model.logits)
    states = hidden(params, tokens)
    return [
        median_ms(lambda: hidden(params, tokens), turns),
        median_ms(lambda: logits(params, states), turns),
    ]


def _batch(lengths: list[tuple[int, int]], page_size: int) -> tuple[RaggedBatch, int]:
    """Rows of (context, new tokens), their pages shuffled, and how many pages there are."""
    totals = np.array([context + new for context, new in lengths])
    new = np.array([new for _, new in lengths])
    counts = -(-totals // page_size)
    pages = 1 + np.random.default_rng(0).permutation(counts.sum())
    table = np.zeros((len(lengths), counts.max()), np.int32)
    table[np.arange(counts.max()) < counts[:, None]] = pages
    starts = np.cumsum(new) - new
    rows = np.repeat(np.arange(len(lengths)), new)
    positions = np.arange(new.sum()) - starts[rows] + (totals - new)[rows]
    batch = make_ragged_batch(
        jnp.asarray(table, jnp.int32),
        jnp.asarray(totals, jnp.int32),
        jnp.asarray(starts, jnp.int32),
        jnp.asarray(new, jnp.int32),
        jnp.int32(np.count_nonzero(new == 1)),
        jnp.int32(len(lengths)),
        jnp.asarray(rows, jnp.int32),
        jnp.asarray(positions, jnp.int32),
        jnp.ones(len(rows), bool),
        page_size=page_size,
    )
    return batch, int(counts.sum())


def time_attention(
    spec: ModelSpec,
    lengths: list[tuple[int, int]],
    *,
    page_size: int,
    kv_dtype: jnp.dtype,
    backend: Backend,
    turns: int,
) -> float:
    """Milliseconds of attention in all layers, over pages of their own."""
    batch, num_pages = _batch(lengths, page_size)
    shape = kv_pages_shape(num_pages, page_size, spec.kv_heads, spec.head_dim)
    pages = [jnp.zeros(shape, kv_dtype) for _ in range(spec.layers)]
    tokens = len(batch.write_pages)
    rng = np.random.default_rng(1)
    q, k, v = (
        jnp.asarray(rng.normal(size=(tokens, heads, spec.head_dim)), jnp.float32)
        for heads in (spec.q_heads, spec.kv_heads, spec.kv_heads)
    )
    prompts = any(new > 1 for _, new in lengths)

    def attend(q: jax.Array, pages: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        done: list[jax.Array] = []
        for i, layer in enumerate(pages):
            window = spec.window_of(i)
            out, layer = ragged_paged_attention(
                q, k, v, layer, batch, window=window, prompts=prompts, backend=backend
            )
            q = q + 1e-3 * out  # one layer after the other
            done.append(layer)
        return q, done

    step = jax.jit(attend, donate_argnums=1)

    def run() -> jax.Array:
        nonlocal pages
        out, pages = step(q, pages)
        return out

    return median_ms(run, turns)


def main() -> None:
    """Measures and prints."""
    arguments = parse()
    serve = options.serve_config(arguments)
    if not isinstance(serve.model.source, RandomWeights):
        raise ConfigError("ops are measured with random weights: name a --model")
    spec = serve.model.source.spec
    dtype = jnp.dtype(serve.model.dtype)
    chosen = Backend(arguments.backend) if arguments.backend else None
    backend = chosen or backend_for(jax.devices()[0].platform, dtype)
    model = Model(spec, dtype, backend, serve.model.quantization)
    params = model.init(0)
    kv_dtype = jnp.dtype(serve.engine.kv_dtype or dtype)

    def attention(lengths: list[tuple[int, int]]) -> float:
        page_size = serve.engine.page_size
        return time_attention(
            spec,
            lengths,
            page_size=page_size,
            kv_dtype=kv_dtype,
            backend=backend,
            turns=arguments.turns,
        )

    found: list[dict[str, Any]] = []
    for rows in arguments.rows:
        layers, head = time_products(model, params, rows, arguments.turns)
        entry: dict[str, Any] = {"rows": rows, "layers_ms": layers, "head_ms": head}
        for context in arguments.contexts:
            entry[f"decode_{context}_ms"] = attention([(context, 1)] * rows)
            entry[f"prompt_{context}_ms"] = attention([(context, rows)])
        found.append(entry)
    titles = ["rows", "layers but attention", "head"]
    for context in arguments.contexts:
        titles += [f"attention at {context}", f"a prompt after {context}"]
    kind = serve.model.quantization
    kind = dtype.name if kind == "none" else kind
    print(f"{serve.model.name}, {backend.value} ops, weights {kind}, KV {kv_dtype}; ms a step\n")
    print(report.grid(titles, [[f"{value:,}" for value in entry.values()] for entry in found]))
    line = options.config_of(arguments, serve)
    print(report.json_line("engine_ops", line, backend=backend.value, ops=found))


if __name__ == "__main__":
    options.run(main)
