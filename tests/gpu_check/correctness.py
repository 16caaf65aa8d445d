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
from tests.pallas_kernels.attention_problem import Problem

# Bound on ‖out − expected‖ / ‖expected‖ of a head: weights and outputs are rounded to 8 bits.
_BOUND = 2**-6
_HEAD_DIMS = (64, 128, 256)


def attention_cases() -> Iterator[Case]:
    """Cases whose sizes the kernel takes, and some as large as a model's."""
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


def run(problem: Problem, kv_dtype: jnp.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and pages of a problem; with 8 bits every head has scales of its own."""
    case = problem.case
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
    head = jnp.arange(case.kv_heads, dtype=jnp.float32)
    of_k, of_v = jnp.exp2(jnp.round(head / 2)), jnp.exp2(jnp.round(-head / 3))
    of_k, of_v = (x if kv_dtype.itemsize == 1 else jnp.ones_like(x) for x in (of_k, of_v))
    group = case.q_heads // case.kv_heads
    # Powers of two, so that nothing but the scales' own places can go wrong.
    out, pages = attend(
        q / jnp.repeat(of_k, group)[None, :, None].astype(q.dtype),
        k * of_k[None, :, None].astype(k.dtype),
        v * of_v[None, :, None].astype(v.dtype),
        jnp.asarray(pages, kv_dtype),
        batch,
        kv_scales=jnp.stack([of_k, of_v]),
    )
    out = np.asarray(out, np.float64) / np.repeat(of_v, group)[None, :, None]
    return out, np.asarray(pages, np.float32)


def check_attention(case: Case, kv_dtype: jnp.dtype) -> tuple[float, str]:
    """The largest relative error of a head of a token, and what else is wrong if anything is."""
    problem = Problem(case, seed=1, kv_dtype=kv_dtype)
    problem.q = [q.astype(jnp.bfloat16).astype(np.float32) for q in problem.q]
    out, pages = run(problem, kv_dtype)
    expected = problem.expected()
    wrong = np.linalg.norm(out[: len(expected)] - expected, axis=2)
    try:
        problem.check_pages(pages)
        fault = "" if np.isfinite(out).all() else "not finite"
    except AssertionError:
        fault = "wrong pages"
    return float(np.max(wrong / np.linalg.norm(expected, axis=2))), fault


def check_bits(kv_dtype: jnp.dtype) -> tuple[float, str]:
    """A row alone, cut in two beside neighbours, and decoding among prompts or not: equal bits."""
    whole = Problem(Case("whole", 32, 8, 128, 64, (), ((0, 150),)), seed=3, kv_dtype=kv_dtype)
    expected, _ = run(whole, kv_dtype)
    done, parts = 0, []
    for size in (61, 89):
        case = Case("part", 32, 8, 128, 64, (7, 40), ((11, 30), (done, size)))
        part = Problem(case, seed=4, kv_dtype=kv_dtype)
        _put(part, 3, whole.kv[0][:, : done + size], whole.q[0][done : done + size])
        parts.append(run(part, kv_dtype)[0][32 : 32 + size])
        done += size
    if not np.array_equal(np.concatenate(parts), expected):
        return 0.0, "a cut prompt has other bits"
    alone = Problem(Case("alone", 32, 8, 128, 64, (1700, 90)), seed=5, kv_dtype=kv_dtype)
    case = Case("mixed", 32, 8, 128, 64, (17, 90, 1700, 3), ((5, 60),), padding=4)
    mixed = Problem(case, seed=6, kv_dtype=kv_dtype)
    for mine, theirs in ((0, 2), (1, 1)):
        _put(mixed, theirs, alone.kv[mine], alone.q[mine])
    first, second = run(alone, kv_dtype)[0], run(mixed, kv_dtype)[0]
    same = np.array_equal(first[0], second[2]) and np.array_equal(first[1], second[1])
    return 0.0, "" if same else "a decode row has other bits among prompts"


def _put(problem: Problem, row: int, kv: np.ndarray, q: np.ndarray) -> None:
    """Gives a row of a problem the contents of another one's."""
    problem.kv[row], problem.q[row] = kv, q
    size = problem.case.page_size
    for p in range(problem.rows[row][0]):
        problem.pages[problem.tables[row, p // size], :, :, p % size] = kv[:, p]


def main() -> int:
    """The number of cases that failed."""
    failed = 0
    for kv_dtype in (jnp.bfloat16, jnp.float8_e4m3fn):
        checks = {
            f"{case.name} {case.head_dim} {case.page_size}": functools.partial(
                check_attention, case
            )
            for case in attention_cases()
        }
        for name, check in {**checks, "bits": check_bits}.items():
            error, fault = check(jnp.dtype(kv_dtype))
            ok = error < _BOUND and not fault  # NaN is not below
            failed += not ok
            name = f"attention {name} {jnp.dtype(kv_dtype)}"
            print(f"{'ok  ' if ok else 'FAIL'} {name:55} {error:.2e} {fault}", flush=True)
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
