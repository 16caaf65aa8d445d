"""A token's logits are bitwise independent of what else is in the program, and of its size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jserve.core.model_spec import ModelSpec, RopeScaling, RopeScalingKind
from jserve.model.context import StepContext
from jserve.model.functional import Model
from jserve.pallas_kernels.backend import Backend
from tests.backends import INVARIANT_BACKENDS, NATIVE_MARKS

pytestmark = pytest.mark.optimized

SMOLLM2 = ModelSpec(
    family="llama",
    vocab=49152,
    layers=2,
    model_dim=576,
    ffn_dim=1536,
    q_heads=9,
    kv_heads=3,
    head_dim=64,
    max_position=8192,
    norm_eps=1e-5,
    rope_theta=1e5,
    tied_embeddings=True,
)
GEMMA3_270M = ModelSpec(
    family="gemma3",
    vocab=4096,
    layers=2,
    model_dim=640,
    ffn_dim=2048,
    q_heads=4,
    kv_heads=1,
    head_dim=256,
    max_position=32768,
    norm_eps=1e-6,
    rope_theta=1e6,
    local_rope_theta=1e4,
    tied_embeddings=True,
    sliding_window=512,
    local_layers=(True, False),
)
# Sizes that no vector width divides.
ODD = dataclasses.replace(
    SMOLLM2, layers=1, vocab=1003, model_dim=90, ffn_dim=211, q_heads=6, kv_heads=2, head_dim=22
)
# Some of the experts have no rows and others several, with sizes that nothing divides.
MIXTRAL = dataclasses.replace(
    ODD,
    family="mixtral",
    experts=7,
    experts_per_token=2,
    expert_ffn_dim=77,
    weights_sum_to_one=True,
)
SPECS = {
    "smollm2": SMOLLM2,
    "gemma3": GEMMA3_270M,
    "mixtral": MIXTRAL,
    # Its dense layer is that of qwen3.
    "qwen3_moe": dataclasses.replace(
        MIXTRAL,
        family="qwen3_moe",
        tied_embeddings=False,
        layers=2,
        experts=60,
        experts_per_token=5,
        expert_ffn_dim=1100,  # longer than what XLA sums in one run
        weights_sum_to_one=False,
        sparse_layers=(False, True),
    ),
    "dynamic": dataclasses.replace(
        ODD,
        qkv_bias=True,
        max_position=64,
        rope_scaling=RopeScaling(RopeScalingKind.DYNAMIC, 4.0, original_max_position=64),
    ),
}
SIZES = (1, 2, 8, 16, 32, 128)
MOST = 256  # rows of the program that the others are compared with
MAX_POSITION = 1024


def rowwise_attend(
    q: jax.Array, k: jax.Array, v: jax.Array, kv: None, window: int
) -> tuple[jax.Array, None]:
    """Depends on q, k and v of the row itself only, without a reduction."""
    group = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
    return jnp.tanh(q * k) + v, kv


@pytest.mark.parametrize(
    ("name", "backend", "sizes"),
    [
        # One row takes other routines than several. Layers of experts are those of qwen3_moe, too.
        ("smollm2", Backend.CPU, (1, 16)),
        ("dynamic", Backend.CPU, (1,)),
        *(
            pytest.param(name, Backend.NATIVE, (1, 16), marks=NATIVE_MARKS)
            for name in ("smollm2", "gemma3", "qwen3_moe", "dynamic")
        ),
        *(
            pytest.param(name, backend, SIZES, marks=(*marks, pytest.mark.sweep))
            for name in SPECS
            for backend, marks in ((Backend.CPU, ()), (Backend.NATIVE, NATIVE_MARKS))
        ),
    ],
)
def test_rows_do_not_depend_on_the_batch(
    name: str, backend: Backend, sizes: tuple[int, ...]
) -> None:
    model = Model(SPECS[name], jnp.float32, backend)
    params = model.init(0)
    rng = np.random.default_rng(0)
    rows = _random_rows(rng, MOST, model)
    forward = _forward(model)
    expected = [np.asarray(part) for part in forward(params, *rows)]
    for size in sizes:
        some = rng.permutation(MOST)[:size]
        for part, want in zip(forward(params, *rows[:, some]), expected, strict=True):
            np.testing.assert_array_equal(part, want[some], err_msg=f"{size} rows")


@pytest.mark.parametrize("backend", INVARIANT_BACKENDS)
def test_a_decode_loop_computes_what_a_single_step_does(backend: Backend) -> None:
    """Decode programs run the layers in the body of a loop, which XLA compiles on its own."""
    model = Model(SMOLLM2, jnp.float32, backend)
    params = model.init(0)
    tokens, positions = _random_rows(np.random.default_rng(1), 16, model)
    step = _forward(model)

    @jax.jit
    def loop(params: dict[str, jax.Array], tokens: jax.Array, steps: jax.Array) -> jax.Array:
        def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            n, _ = carry
            return n + 1, step(params, tokens, positions)[1]

        start = jnp.zeros((16, model.spec.vocab), jnp.float32)
        return lax.while_loop(lambda carry: carry[0] < steps, body, (jnp.int32(0), start))[1]

    np.testing.assert_array_equal(
        loop(params, tokens, np.int32(2)), step(params, tokens, positions)[1]
    )


def _random_rows(rng: np.random.Generator, size: int, model: Model) -> np.ndarray:
    """Token ids and positions, [2, size] int32."""
    tokens = rng.integers(0, model.spec.vocab, size)
    return np.stack([tokens, rng.integers(0, MAX_POSITION, size)]).astype(np.int32)


def _forward(model: Model):
    @jax.jit
    def forward(
        params: dict[str, jax.Array], tokens: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        kv = (None,) * model.spec.layers
        hidden, _ = model.hidden(params, tokens, positions, kv, StepContext(rowwise_attend))
        return hidden, model.logits(params, hidden)

    return forward
