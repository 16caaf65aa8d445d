"""Quantized matmuls over devices: each device multiplies with its shard of a weight."""

from collections.abc import Sequence

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Float, Float32, Int

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.quantized_matmul.channels import ChannelMatrix
from jserve.pallas_kernels.quantized_matmul.dispatch import quantized_matmul

SPLIT_BY_XLA = (
    Backend.REFERENCE,
    Backend.CPU,
    Backend.NATIVE,
)  # the compiler splits by the weights' shardings
Axes = str | tuple[str, ...] | None  # axes of a mesh
Split = tuple[Axes, Axes]  # mesh axes of outputs and of inputs


def sharded_matmul(
    x: Float[jax.Array, "rows in_dim"],
    weights: Sequence[ChannelMatrix],
    splits: Sequence[Split],
    *,
    num_rows: Int[jax.Array, ""] | None,
    backend: Backend,
    mesh: Mesh | AbstractMesh,
) -> tuple[Float32[jax.Array, "rows _"], ...]:
    """Runs `quantized_matmul` on weights whose outputs or inputs are split over axes of `mesh`.

    Results of split outputs stay split. Results of split inputs are summed over the axes, in the
    order of the compiler's all-reduce.
    """
    (in_axes,) = {
        in_axes for _, in_axes in splits
    }  # there is one x, so inputs are split in one way

    def multiply(
        x: jax.Array,
        codes: Sequence[jax.Array],
        scales: Sequence[jax.Array],
        num_rows: jax.Array | None,
    ) -> tuple[jax.Array, ...]:
        parts = list(map(ChannelMatrix, codes, scales))
        ys = quantized_matmul(x, parts, num_rows=num_rows, backend=backend)
        return ys if in_axes is None else tuple(lax.psum(y, in_axes) for y in ys)

    split = jax.shard_map(
        multiply,
        mesh=mesh,
        in_specs=(
            PartitionSpec(None, in_axes),
            [PartitionSpec(*split) for split in splits],
            [PartitionSpec(split[0]) for split in splits],
            PartitionSpec(),
        ),
        out_specs=tuple(PartitionSpec(None, out_axes) for out_axes, _ in splits),
        check_vma=False,
    )
    codes, scales = zip(*weights, strict=True)
    return split(x, list(codes), list(scales), num_rows)
