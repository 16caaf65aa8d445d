"""Shared by the model tests: a dense attention, and the checkpoints with known logits."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from jserve.checkpoints.config import Quantization
from jserve.checkpoints.hf_config import spec_from_hf
from jserve.core.model_spec import ModelSpec
from jserve.model.context import StepContext
from jserve.model.functional import Model
from jserve.model.params import ParamSpec
from jserve.model.sharding import AnyMesh
from jserve.pallas_kernels.backend import Backend

CASES = Path("tests/fixtures/models")
CASE_NAMES = sorted(folder.name for folder in CASES.iterdir() if folder.is_dir())


def dense_attend(
    q: jax.Array, k: jax.Array, v: jax.Array, kv: None, window: int
) -> tuple[jax.Array, None]:
    """Causal attention over exactly the tokens given, which are one sequence from position 0."""
    group = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
    scores = jnp.einsum("qhd,khd->hqk", q, k)
    age = jnp.arange(q.shape[0])[:, None] - jnp.arange(q.shape[0])[None, :]
    seen = (age >= 0) & (age < window) if window else age >= 0
    weights = jax.nn.softmax(jnp.where(seen[None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("hqk,khd->qhd", weights, v), kv


def dense_logits(model: Model) -> Callable[[Mapping[str, jax.Array], jax.Array], jax.Array]:
    """The logits [tokens, vocab] of one sequence as a jitted function of `(params, tokens)`.

    Models of one configuration share it, so that it compiles once.
    """
    return _dense_logits(model.spec, model.dtype, model.backend, model.quantization, model.mesh)


@functools.cache
def _dense_logits(
    spec: ModelSpec,
    dtype: jnp.dtype,
    backend: Backend,
    quantization: Quantization,
    mesh: AnyMesh | None,
) -> Callable[[Mapping[str, jax.Array], jax.Array], jax.Array]:
    model = Model(spec, dtype, backend, quantization, mesh)

    @jax.jit
    def logits(params: Mapping[str, jax.Array], tokens: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        kv = (None,) * spec.layers
        hidden, _ = model.hidden(params, tokens, positions, kv, StepContext(dense_attend))
        return model.logits(params, hidden)

    return logits


@dataclass(frozen=True)
class Case:
    """A random checkpoint and what transformers computes with it; see tests/references."""

    model: Model
    params: dict[str, jax.Array]
    token_ids: np.ndarray  # [tokens] int32
    logits: np.ndarray  # [tokens, vocab] float32

    @classmethod
    def load(cls, name: str, backend: Backend = Backend.CPU) -> "Case":
        folder = CASES / name
        spec = spec_from_hf(json.loads((folder / "config.json").read_text()))
        model = Model(spec, jnp.float32, backend)
        stored: dict[str, np.ndarray] = {}
        for file in folder.glob("*.safetensors"):
            stored |= load_file(file)
        expected = np.load(folder / "logits.npz")
        specs = model.param_specs()
        params = from_checkpoint(specs, stored)
        return cls(
            model,
            {n: jnp.asarray(specs[n].from_stored(a), jnp.float32) for n, a in params.items()},
            expected["token_ids"],
            expected["logits"],
        )


def from_checkpoint(
    specs: Mapping[str, ParamSpec], stored: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A checkpoint's tensors as a native folder would hold them: those of experts in one."""
    wanted = [name for spec in specs.values() for name in spec.source]
    assert sorted(wanted) == sorted(stored)
    return {
        name: np.stack([stored[part] for part in spec.source])
        if spec.stacked
        else stored[spec.source[0]]
        for name, spec in specs.items()
    }
