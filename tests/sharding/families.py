"""Every model family over every mesh of eight devices: the tokens of one device, nothing gathered.

python -m tests.sharding.families [NAME …]    (make sharding ARGS=…)

Without names, all of CASES_BY_NAME. `make test` checks a selection.
"""

import dataclasses
import functools
import json
import os
import re
import sys
import time
from math import prod

import numpy as np

if __name__ == "__main__":  # before JAX is imported; pytest's conftest does the same
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }

from jserve.checkpoints.config import Quantization
from jserve.checkpoints.hf_config import spec_from_hf
from jserve.core.model_spec import ModelSpec
from jserve.core.request import Request, SamplingParams
from jserve.engine.build.assembly import Engine
from jserve.model.functional import Model
from jserve.pallas_kernels.backend import Backend
from tests.engine.engine_harness import CONFIG, Harness, greedy_tokens
from tests.model.model_harness import CASES

SMALL = dataclasses.replace(CONFIG, mixed_tokens=(32,))
VOCAB = 16384  # wider than all else that devices may exchange
NUM_TOKENS = 6


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of model; `quantization` as in `ModelConfig`."""

    spec: ModelSpec
    quantization: Quantization = Quantization.NONE


def _spec(fixture: str, **changes: object) -> ModelSpec:
    """A checkpoint's family and features in sizes that eight devices can share."""
    spec = spec_from_hf(json.loads((CASES / fixture / "config.json").read_text()))
    sizes = {
        "vocab": VOCAB,
        "layers": 2,
        "model_dim": 64,
        "ffn_dim": 128,
        "q_heads": 8,
        "head_dim": 16,
        "eos_token_ids": (),
        "local_layers": (True, False) if any(spec.local_layers) else (),
        "sparse_layers": (False, True) if spec.sparse_layers else (),
        "experts": 8 if spec.experts else 0,
        "expert_ffn_dim": 32 if spec.experts else 0,
    }
    return dataclasses.replace(spec, **(sizes | changes))


# KV heads: as many as devices, fewer (copies on neighbours), and one for all.
CASES_BY_NAME = {
    "llama": Case(_spec("llama_llama3", kv_heads=8)),
    "mistral": Case(_spec("mistral")),
    "qwen2": Case(_spec("qwen2_window", kv_heads=4)),
    "qwen3": Case(_spec("qwen3", kv_heads=8)),
    "gemma3": Case(_spec("gemma3")),
    "smollm2, odd vocabulary": Case(_spec("smollm2", vocab=1001)),
    "mixtral": Case(_spec("mixtral", kv_heads=8)),
    "qwen3_moe": Case(_spec("qwen3_moe")),
    "qwen3_moe, dense layers": Case(_spec("qwen3_moe_dense_layers", kv_heads=4)),
    "llama int8": Case(_spec("llama", model_dim=256, ffn_dim=256, head_dim=32), Quantization.INT8),
    "llama int4": Case(_spec("llama", model_dim=256, ffn_dim=256, head_dim=32), Quantization.INT4),
    "llama fp8": Case(_spec("llama"), Quantization.FP8),
}
MESHES = ((2, 1), (4, 1), (8, 1))  # model × expert
EXPERT_MESHES = (*MESHES, (1, 2), (1, 8), (2, 4))


def check(name: str, mesh_shape: tuple[int, int]) -> None:
    """Raises AssertionError if an engine over a mesh does not do what one device does."""
    case = CASES_BY_NAME[name]
    harness = Harness(
        case.spec,
        SMALL,
        backend=Backend.CPU,
        quantization=case.quantization,
        mesh_shape=mesh_shape,
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, logprobs=2)
    requests = [Request(id=str(i), prompt=p, sampling=greedy) for i, p in enumerate(_prompts(name))]
    found = harness.run(requests)
    for request, expected in zip(requests, _alone(name), strict=True):
        assert found[request.id].tokens == expected, (name, mesh_shape)
        # Bit for bit without the neighbour, also where its tokens went to the same experts.
        assert harness.run([request])[request.id] == found[request.id], (name, mesh_shape)
    if case.spec.vocab == VOCAB:
        assert_nothing_gathered(harness.engine)


def _prompts(name: str) -> list[tuple[int, ...]]:
    """Two prompts, one shorter and one longer than a sliding window and a chunk."""
    rng = np.random.default_rng(2)
    vocab = CASES_BY_NAME[name].spec.vocab
    return [tuple(map(int, rng.integers(2, vocab, n))) for n in (5, 39)]


@functools.cache
def _alone(name: str) -> list[list[int]]:
    """The tokens of one device: a dense forward over everything at each step."""
    case = CASES_BY_NAME[name]
    model = Model(case.spec, np.dtype(np.float32), Backend.CPU, case.quantization)
    return greedy_tokens(model, model.init(0), _prompts(name), NUM_TOKENS)


def assert_nothing_gathered(engine: Engine) -> None:
    """No exchange between devices is as large as one row of logits."""
    for made in engine.programs:
        assert largest_exchange(made.call.as_text() or "") < VOCAB, made.program.name


_EXCHANGE = re.compile(
    r"= (.*) (?:all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|"
    r"reduce-scatter)(?:-start)?\("
)


def largest_exchange(hlo: str) -> int:
    """Elements of the largest array that a compiled program's devices send each other."""
    shapes = [
        shape for found in _EXCHANGE.findall(hlo) for shape in re.findall(r"\[(.*?)\]", found)
    ]
    assert shapes, "a program over devices exchanges something"
    return max(prod(map(int, filter(None, shape.split(",")))) for shape in shapes)


def main(names: list[str]) -> int:
    """Checks all meshes for some families; the number of failures."""
    failures = 0
    for name in names or CASES_BY_NAME:
        case = CASES_BY_NAME[name]
        for mesh_shape in EXPERT_MESHES if case.spec.experts else MESHES:
            started, verdict = time.perf_counter(), "ok"
            try:
                check(name, mesh_shape)
            except AssertionError as error:
                failures += 1
                verdict = f"FAILED {error}"
            seconds = time.perf_counter() - started
            model, expert = mesh_shape
            print(f"{name:<26} model {model} × expert {expert}  {seconds:5.1f} s  {verdict}")
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
