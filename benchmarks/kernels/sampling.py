"""Milliseconds of the sampler by setting, for language-model-like and flat logits.

python -m benchmarks.kernels.sampling [--rows 32] [--vocab 49152 --vocab 128256] [--tile_rows 8]

`all` samples every row with the setting; `one` has a single such row in a greedy batch.
"""

import argparse
import functools
import json
import os
import platform
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np

from jserve.core.request import SamplingParams
from jserve.model.sampling.host import host_row
from jserve.model.sampling.sample import SamplerConfig, sample
from jserve.model.sampling.state import (
    SamplerState,
    admit,
    admit_processors,
    init_sampler_state,
)

SETTINGS = {
    "greedy": {"temperature": 0.0},
    "greedy, logprobs": {"temperature": 0.0, "logprobs": 5},
    "greedy, penalties": {"temperature": 0.0, "repetition_penalty": 1.1},
    "greedy, bias and mask": {"temperature": 0.0, "logit_bias": ((5, 1.0),), "bad_token_ids": (7,)},
    "plain": {},
    "top_k 40": {"top_k": 40},
    "top_k 64, top_p 0.95": {"top_k": 64, "top_p": 0.95},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
    "top_k 1000": {"top_k": 1000},
    "top_k 1000, top_p 0.9": {"top_k": 1000, "top_p": 0.9},
    "penalties, top_k 20, top_p 0.8": {"repetition_penalty": 1.1, "top_k": 20, "top_p": 0.8},
}


def make_state(params: list[SamplingParams], vocab: int) -> SamplerState:
    """Makes a state whose slot i samples with `params[i]`."""
    rows = [host_row(p, choice=0, eos_token_ids=(2,), prompt_len=8, vocab=vocab) for p in params]
    state = init_sampler_state(len(params), vocab)
    words = np.stack([row.slot for row in rows]).view(np.int32).reshape(len(rows), -1)
    state = jax.jit(admit)(state, jnp.arange(len(rows), dtype=jnp.int32), words)
    special = [(i, row.processors) for i, row in enumerate(rows) if row.processors is not None]
    if special:
        words = np.stack([row for _, row in special]).view(np.int32).reshape(len(special), -1)
        slots = np.asarray([i for i, _ in special], np.int32)
        state = jax.jit(admit_processors)(state, slots, words)
    return state


def make_logits(rows: int, vocab: int) -> dict[str, jax.Array]:
    """Makes `peaked` logits, some 40 likely tokens a row, and `flat`, a nucleus of thousands."""
    rng = np.random.default_rng(0)
    normal = np.float32(rng.normal(size=(rows, vocab)))
    likely = np.where(rng.random((rows, vocab)) < 40 / vocab, 9, 0)
    return {"peaked": jnp.asarray(np.float32(2 * normal + likely)), "flat": jnp.asarray(3 * normal)}


def measure_ms(
    rows: int, vocab: int, config: SamplerConfig, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds by setting: all peaked, one peaked, all flat, one flat; best of `repeats`."""
    step = jax.jit(functools.partial(sample, config=config))
    slots, live = jnp.arange(rows, dtype=jnp.int32), jnp.ones(rows, bool)
    positions = jnp.full(rows, 9, jnp.int32)
    logits = make_logits(rows, vocab)
    results: dict[str, list[float]] = {}
    for name, kind in SETTINGS.items():
        every = [SamplingParams(**{"seed": i, **kind}) for i in range(rows)]
        greedy = SamplingParams(temperature=0.0)
        one = [p if i == rows // 2 else greedy for i, p in enumerate(every)]
        results[name] = []
        for x in logits.values():
            for params in (every, one):
                state = make_state(params, vocab)
                call = functools.partial(step, x, state, slots, positions, live)
                results[name].append(min(_ms(call) for _ in range(repeats + 1)))
    return results


def _ms(call: functools.partial) -> float:
    start_s = time.perf_counter()
    jax.block_until_ready(call())
    return (time.perf_counter() - start_s) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocab", type=int, action="append")
    parser.add_argument("--num_candidates", type=int, default=SamplerConfig().num_candidates)
    parser.add_argument("--tile_rows", type=int, default=SamplerConfig().tile_rows)
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    config = SamplerConfig(arguments.num_candidates, arguments.tile_rows)
    report = {}
    for vocab in arguments.vocab or [49152, 128256]:
        results = measure_ms(arguments.rows, vocab, config, arguments.repeats)
        report[vocab] = results
        title = f"{arguments.rows} x {vocab}, ms"
        print(f"{title:<32} {'peaked: all':>11} {'one':>7} {'flat: all':>11} {'one':>7}")
        for name, (peaked, peaked_one, flat, flat_one) in results.items():
            print(f"{name:<32} {peaked:11.2f} {peaked_one:7.2f} {flat:11.2f} {flat_one:7.2f}")
    print(
        json.dumps(
            {
                "benchmark": "sampling",
                "commit": _commit(),
                "device": f"{jax.devices()[0].device_kind} x{os.cpu_count()} {platform.machine()}",
                "config": vars(arguments),
                "ms": report,
            }
        )
    )


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
