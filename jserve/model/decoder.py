"""A decoder of any family: embedding, layers, final norm, head, as Flax NNX modules."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from jserve.core.errors import ConfigError
from jserve.core.model_spec import ModelSpec
from jserve.model.context import KV, LayerContext, StepContext
from jserve.model.layers import Embedding, Linear, RMSNorm
from jserve.model.numerics import Numerics
from jserve.model.rope import rope_for_layer
from jserve.model.weights import matmul_weights


@runtime_checkable
class Layer(Protocol):
    """One block of a decoder: an NNX module of the family."""

    def __call__(
        self, x: Float[Array, "tokens model_dim"], kv: KV, context: LayerContext
    ) -> tuple[Float[Array, "tokens model_dim"], KV]:
        """The residual stream after the block, and the layer's pages with the new tokens."""
        ...


@runtime_checkable
class LayerFactory(Protocol):
    """Declares one block; a layer class or a `partial` of one."""

    def __call__(self, spec: ModelSpec, numerics: Numerics) -> Layer:
        """A block whose parameters are declared, not yet arrays."""
        ...


@dataclass(frozen=True, slots=True)
class Family:
    """The differences between decoder families that are not in a spec."""

    layer: LayerFactory
    sparse_layer: LayerFactory | None = None  # a layer with experts, if the family has them
    norm_offset: float = 0.0  # added to the final norm's stored weight
    scaled_embeddings: bool = False  # times sqrt(model_dim), rounded to the compute dtype


class Decoder(nnx.Module):
    """Embedding, layers, final norm; an attribute path is the parameter's Hugging Face name."""

    def __init__(self, spec: ModelSpec, family: Family, numerics: Numerics) -> None:
        self.spec = spec
        self.embedding_scale = spec.model_dim**0.5 if family.scaled_embeddings else None
        self.embed_tokens = Embedding(spec.vocab, spec.model_dim, numerics)
        self.layers = nnx.List(
            [_factory(spec, family, i)(spec, numerics) for i in range(spec.layers)]
        )
        self.norm = RMSNorm(spec.model_dim, spec.norm_eps, numerics, offset=family.norm_offset)

    def __call__(
        self,
        tokens: Int[Array, " tokens"],
        positions: Int[Array, " tokens"],
        kv: tuple[KV, ...],
        step: StepContext,
    ) -> tuple[Float[Array, "tokens model_dim"], tuple[KV, ...]]:
        """Hidden states after the final norm, and the pages of every layer."""
        x = self.embed_tokens(tokens)
        if self.embedding_scale is not None:
            x = x * jnp.asarray(self.embedding_scale, x.dtype)
        kinds = [rope_for_layer(self.spec, i) for i in range(self.spec.layers)]
        ropes = {kind: kind.tables(positions) for kind in dict.fromkeys(kinds)}
        pages = list(kv)
        for i, layer in enumerate(self.layers):
            context = step.for_layer(ropes[kinds[i]], self.spec.window_of(i))
            x, pages[i] = layer(x, pages[i], context)
        return self.norm(x), tuple(pages)


class CausalLM(nnx.Module):
    """A decoder and its head; a tied head is the embedding and declares nothing."""

    def __init__(self, spec: ModelSpec, family: Family, numerics: Numerics) -> None:
        self.numerics = numerics
        self.model = Decoder(spec, family, numerics)
        self.lm_head = None if spec.tied_embeddings else _head(spec, numerics)

    def logits(
        self, hidden: Float[Array, "rows model_dim"], num_rows: jax.Array | None
    ) -> Float32[Array, "rows vocab"]:
        """Logits of the next token, in float32."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return matmul_weights(hidden, [head.weight], self.numerics, num_rows)[0]


def _factory(spec: ModelSpec, family: Family, layer: int) -> LayerFactory:
    if not spec.is_sparse(layer):
        return family.layer
    if family.sparse_layer is None:
        raise ConfigError(f"model spec: family {spec.family} has no layers with experts")
    return family.sparse_layer


def _head(spec: ModelSpec, numerics: Numerics) -> Linear:
    return Linear(spec.model_dim, spec.vocab, ("vocab", None), numerics, kind=numerics.head)
