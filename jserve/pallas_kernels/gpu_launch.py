"""How Mosaic GPU kernels are launched."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def gpu_kernel(
    body: Callable[..., None],
    *,
    scratch_types: Sequence[Any],
    name: str,
    blocks: int,
    warpgroups: int = 1,
    out_type: Sequence[Any] = (),
) -> Callable[..., Any]:
    """A kernel of `blocks` thread blocks (axis "block") of `warpgroups` (axis "role").

    What `plgpu.kernel` makes, but it takes `jax.Ref`s, too, and updates them in place: the
    batching rule that `plgpu.kernel` adds does not know them.
    """
    mesh = plgpu.Mesh(
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="role",
    )

    def scoped(*refs: Any) -> None:
        pl.run_scoped(functools.partial(body, *refs), *scratch_types, collective_axes="role")

    return pl.kernel(
        scoped,
        out_type=tuple(out_type),
        mesh=mesh,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # The kernels name the layouts of their arrays; JAX 0.11 would infer them by default.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        name=name,
    )
