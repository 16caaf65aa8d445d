"""Measures the best rates of the device with JAX in the same process as the engine."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

_REPEATS = 7


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Best rates of several runs; a kernel that beats XLA's own can come out above 100 %."""

    triad_bytes_per_s: float  # a = a/2 + b in place: two arrays read, one written
    read_bytes_per_s: float  # the sum of an array
    operations_per_s: float  # a matmul of square matrices in the model's dtype

    @property
    def bytes_per_s(self) -> float:
        """Rate of the faster stream."""
        return max(self.triad_bytes_per_s, self.read_bytes_per_s)


def measure(dtype: jnp.dtype, *, stream_mib: int, product_dim: int) -> Ceilings:
    """Measures with arrays of `stream_mib`, which should be far larger than every cache."""
    triad, read = _stream_bytes_per_s(stream_mib << 18)
    return Ceilings(triad, read, _operations_per_s(dtype, product_dim))


def default_product_dim() -> int:
    """A matrix size that keeps the device busy for milliseconds."""
    return 2048 if jax.default_backend() == "cpu" else 8192


def _stream_bytes_per_s(num_floats: int) -> tuple[float, float]:
    # In place, because fresh memory costs a CPU more than the stream itself.
    triad = jax.jit(lambda a, b: a * 0.5 + b, donate_argnums=0)
    a, b = jnp.ones(num_floats), jnp.ones(num_floats)
    triad_s: list[float] = []
    for _ in range(_REPEATS):
        a, seconds = _timed(lambda a=a: triad(a, b))
        triad_s.append(seconds)
    read = jax.jit(jnp.sum)
    read_s = [_timed(lambda: read(b))[1] for _ in range(_REPEATS)]
    return 12 * num_floats / _best(triad_s), 4 * num_floats / _best(read_s)


def _operations_per_s(dtype: jnp.dtype, dim: int) -> float:
    # The model's matmuls are alike: float32 means float32, sums are float32.
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None

    @jax.jit
    def product(x: jax.Array, weight: jax.Array) -> jax.Array:
        dims = (((1,), (1,)), ((), ()))
        return lax.dot_general(
            x, weight, dims, precision=precision, preferred_element_type=jnp.float32
        )

    keys = jax.random.split(jax.random.key(0))
    x, weight = (jax.random.normal(key, (dim, dim), jnp.float32).astype(dtype) for key in keys)
    seconds = [_timed(lambda: product(x, weight))[1] for _ in range(_REPEATS)]
    return 2 * dim**3 / _best(seconds)


def _timed(call: Callable[[], jax.Array]) -> tuple[jax.Array, float]:
    started = time.perf_counter()
    done = jax.block_until_ready(call())
    return done, time.perf_counter() - started


def _best(seconds: list[float]) -> float:
    """Shortest time but for the first run, which compiles."""
    return min(seconds[1:])
