"""Every case of every kernel on the GPU itself, against float64 NumPy: one line each.

python3 -m tests.gpu_check.correctness
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.ragged_paged_attention.cases import CASES, Case
from jserve.pallas_kernels.ragged_paged_attention.dispatch import ragged_paged_attention
from tests.kernels.attention_problem import Problem

# Of ‖out − expected‖ / ‖expected‖: bfloat16 keeps 8 bits, and weights and outputs are rounded.
_BOUND = 2**-7
_HEAD_DIMS = (64, 128, 256)


def attention_cases() -> Iterator[Case]:
    """Those whose sizes the kernel takes, and some as large as a model's."""
    for case in CASES:
        if case.head_dim in _HEAD_DIMS and case.page_size in (64, 128):
            yield case
    for head_dim in _HEAD_DIMS:
        for page_size in (64, 128):
            decode = (0, 1, 63, 64, 127, 128, 1000, 4095)
            prompts = ((0, 700), (129, 64), (1000, 1))
            large = Case("large", 32, 8, head_dim, page_size, decode, prompts, padding=5)
            yield large
            yield dataclasses.replace(large, name="large_window", window=300, idle_rows=3)


def check_attention(case: Case, kv_dtype: jnp.dtype) -> tuple[float, str]:
    """The relative error, and what is wrong with the pages if anything is."""
    problem = Problem(case, seed=1, kv_dtype=kv_dtype)
    problem.q = [q.astype(jnp.bfloat16).astype(np.float32) for q in problem.q]
    q, k, v, pages, batch = problem.arrays()
    attend = jax.jit(
        functools.partial(
            ragged_paged_attention,
            window=case.window,
            prompts=bool(case.prompts),
            backend=Backend.GPU,
        ),
        donate_argnums=3,
    )
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    out, pages = attend(q, k, v, jnp.asarray(pages, kv_dtype), batch)
    expected = problem.expected()
    mine = np.asarray(out, np.float64)[: len(expected)]
    try:
        problem.check_pages(np.asarray(pages, np.float32))
        fault = "" if np.isfinite(np.asarray(out, np.float32)).all() else "not finite"
    except AssertionError:
        fault = "wrong pages"
    return float(np.linalg.norm(mine - expected) / np.linalg.norm(expected)), fault


def main() -> int:
    """The number of cases that failed."""
    failed = 0
    for case in attention_cases():
        for kv_dtype in (jnp.bfloat16, jnp.float8_e4m3fn):
            error, fault = check_attention(case, kv_dtype)
            ok = error < _BOUND and not fault  # NaN is not below
            failed += not ok
            name = f"attention {case.name} {case.head_dim} {case.page_size} {jnp.dtype(kv_dtype)}"
            print(f"{'ok  ' if ok else 'FAIL'} {name:55} {error:.2e} {fault}", flush=True)
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
