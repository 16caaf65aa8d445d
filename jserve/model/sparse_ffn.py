"""A mixture of experts: each token goes through a few of many gated feed-forward blocks.

No expert has a capacity: no token is dropped because of others, so none depends on them.
Over several devices each device has all tokens and computes its own experts, or its own columns of
them; one all-reduce adds up the results, as for a dense block.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int

from jserve.checkpoints.config import WeightKind
from jserve.core.model_spec import ModelSpec
from jserve.model.context import StepContext
from jserve.model.layers import Linear
from jserve.model.numerics import Numerics
from jserve.model.sharding import AnyMesh, named_sharding
from jserve.model.weights import matmul_expert_weights, matmul_weights, matrices
from jserve.pallas_kernels.gated_activation import Activation, gated_activation


class ExpertNames(NamedTuple):
    """Names of an expert's three weights in a family's checkpoints."""

    gate: str
    up: str
    down: str


QWEN_NAMES = ExpertNames("gate_proj", "up_proj", "down_proj")


class Groups(NamedTuple):
    """Rows (a token and one of its experts each) in the order of their experts."""

    tokens: Int[Array, " rows"]  # the token of each row
    places: Int[Array, "tokens chosen"]  # the rows of each token
    sizes: Int[Array, " experts"]  # rows of each expert; later rows belong to no live token


class SparseFfn(nnx.Module):
    """Σ weight · expert(x) over the experts that the router likes best (Shazeer et al., 2017)."""

    def __init__(
        self,
        spec: ModelSpec,
        numerics: Numerics,
        activation: Activation,
        names: ExpertNames = QWEN_NAMES,
    ) -> None:
        self.spec = spec
        self.numerics = numerics
        # The router is small and decides: it is never quantized.
        kind = WeightKind.FLOAT
        self.gate = Linear(spec.model_dim, spec.experts, (None, None), numerics, kind=kind)
        self.experts = Experts(spec, numerics, activation, names)

    def __call__(
        self, x: Float[Array, "tokens model_dim"], context: StepContext
    ) -> Float[Array, "tokens model_dim"]:
        """The block's output, to be added to the residual stream."""
        num_tokens = context.num_tokens
        weights, chosen = self._route(x, num_tokens)
        mesh = self.numerics.mesh
        if mesh is None or mesh.size == 1:
            groups = group_rows(chosen, self.spec.experts, num_tokens)
            rows = self.experts(x[groups.tokens], groups.sizes)[groups.places]
            return _mixed(weights, rows).astype(self.numerics.dtype)
        live = x.shape[0] if num_tokens is None else num_tokens
        mixed = _mixed_over(mesh, self.experts, x, weights, chosen, jnp.asarray(live, jnp.int32))
        return mixed.astype(self.numerics.dtype)

    def _route(
        self, x: Float[Array, "tokens model_dim"], num_tokens: jax.Array | None
    ) -> tuple[Float32[Array, "tokens chosen"], Int[Array, "tokens chosen"]]:
        """The best experts of each token, the best first, and their weights."""
        (logits,) = matmul_weights(x, [self.gate.weight], self.numerics, num_tokens)
        # Logits have the same order as a softmax's shares. The best logit is also the maximum that
        # a softmax subtracts: computed by a reduction and fused, the exponentials would depend on
        # the number of tokens.
        best, chosen = lax.top_k(logits, self.spec.experts_per_token)
        powers = jnp.exp(best - best[:, :1])
        among = powers if self.spec.weights_sum_to_one else jnp.exp(logits - best[:, :1])
        return powers / _sum_in_order(among), chosen


class Experts(nnx.Module):
    """The gated blocks; each of their weights is one array over all experts."""

    def __init__(
        self, spec: ModelSpec, numerics: Numerics, activation: Activation, names: ExpertNames
    ) -> None:
        self.num_experts = spec.experts
        self.numerics = numerics
        self.activation = activation
        self.names = names
        for name in names:
            setattr(self, name, ExpertWeights(spec, numerics, into=name != names.down))

    def __call__(
        self, x: Float[Array, "rows model_dim"], group_sizes: Int[Array, " experts"]
    ) -> Float32[Array, "rows model_dim"]:
        """The outputs of rows that are grouped by expert."""
        gate, up = self._matmul(x, group_sizes, self.names.gate, self.names.up)
        gated = gated_activation(
            gate.astype(self.numerics.dtype),
            up.astype(self.numerics.dtype),
            self.activation,
            num_tokens=jnp.sum(group_sizes),
            backend=self.numerics.backend,
        )
        return self._matmul(gated, group_sizes, self.names.down)[0]

    def _matmul(self, x: jax.Array, sizes: jax.Array, *names: str) -> tuple[jax.Array, ...]:
        owners: list[Any] = [getattr(self, name) for name in names]
        return matmul_expert_weights(x, [owner.weight for owner in owners], sizes, self.numerics)


class ExpertWeights(nnx.Module):
    """One weight of all experts, as a stack."""

    def __init__(self, spec: ModelSpec, numerics: Numerics, *, into: bool) -> None:
        ffn, dim = spec.expert_ffn_dim, spec.model_dim
        if into:
            self.weight = matrices(
                (spec.experts, ffn, dim), ("experts", "expert_ffn", None), numerics
            )
        else:
            self.weight = matrices(
                (spec.experts, dim, ffn), ("experts", None, "expert_ffn"), numerics
            )


def group_rows(
    chosen: Int[Array, "tokens chosen"], experts: int, num_tokens: jax.Array | None
) -> Groups:
    """Sorts rows by expert; rows of tokens from `num_tokens` on come last, in no group."""
    tokens, per_token = chosen.shape
    if num_tokens is not None:
        live = jnp.arange(tokens, dtype=jnp.int32) < num_tokens
        chosen = jnp.where(live[:, None], chosen, experts)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    places = jnp.argsort(order).reshape(tokens, per_token)
    is_chosen = chosen.reshape(-1, 1) == jnp.arange(experts, dtype=jnp.int32)[None, :]
    return Groups(order // per_token, places, jnp.sum(is_chosen, axis=0, dtype=jnp.int32))


def _mixed(
    weights: Float32[Array, "tokens chosen"], rows: Float32[Array, "tokens chosen model_dim"]
) -> Float32[Array, "tokens model_dim"]:
    """The weighted sum of the rows of each token."""
    # Added one after the other: a reduction could take another order for another number of tokens.
    terms = [weights[:, i, None] * rows[:, i] for i in range(weights.shape[1])]
    return sum(terms[1:], start=terms[0])


def _mixed_over(
    mesh: AnyMesh,
    experts: Experts,
    x: Float[Array, "tokens model_dim"],
    weights: Float32[Array, "tokens chosen"],
    chosen: Int[Array, "tokens chosen"],
    num_tokens: jax.Array,
) -> Float32[Array, "tokens model_dim"]:
    """Runs the block over devices, each with its share of `experts`."""
    graph, state = nnx.split(experts)
    flat = nnx.to_flat_state(state)
    layout = [named_sharding(mesh, part.get_metadata()["axes"]).spec for _, part in flat]
    whole = PartitionSpec()

    def mix_own(
        params: list[jax.Array],
        x: jax.Array,
        weights: jax.Array,
        chosen: jax.Array,
        num_tokens: jax.Array,
    ) -> jax.Array:
        leaves = [(path, value) for (path, _), value in zip(flat, params, strict=True)]
        held = nnx.merge(graph, nnx.from_flat_state(leaves))
        num_held = experts.num_experts // mesh.shape["expert"]
        chosen = chosen - lax.axis_index("expert") * num_held
        is_held = (chosen >= 0) & (chosen < num_held)
        groups = group_rows(jnp.where(is_held, chosen, num_held), num_held, num_tokens)
        rows = held(x[groups.tokens], groups.sizes)[groups.places]
        # Rows of no group hold garbage.
        mixed = _mixed(weights, jnp.where(is_held[:, :, None], rows, 0.0))
        return lax.psum(mixed, mesh.axis_names)

    split = jax.shard_map(
        mix_own,
        mesh=mesh,
        in_specs=(layout, whole, whole, whole, whole),
        out_specs=whole,
        check_vma=False,
    )
    params = [part.get_value() for _, part in flat]
    return split(params, x, weights, chosen, num_tokens)


def _sum_in_order(x: Float32[Array, "tokens dim"]) -> Float32[Array, "tokens 1"]:
    """The sum of each row, by halving: a reduction's order could depend on the number of rows."""
    while (dim := x.shape[1]) > 1:
        half = dim // 2
        x = jnp.concatenate((x[:, :half] + x[:, half : 2 * half], x[:, 2 * half :]), axis=1)
    return x
