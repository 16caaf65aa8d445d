"""The arguments of a step that reach every layer beside its input and its pages.

An argument that layers need later, such as the adapter of each row, is a field of `StepContext`:
no signature of a layer changes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import jax
from jaxtyping import Array, Int

from jserve.model.rope import RopeTables

KV = TypeVar("KV")  # one layer's pages; the attention op knows their type
# attend(q, k, v, pages, window) → (out [tokens, q_heads, head_dim], pages)
#   q [tokens, q_heads, head_dim] is rotated and scaled; k, v [tokens, kv_heads, head_dim],
#   k rotated; `window` is static, in tokens, 0 for full attention.
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any, int], tuple[jax.Array, Any]]


@dataclass(frozen=True, slots=True)
class StepContext:
    """Arguments of one step of a decoder that are the same for all layers."""

    attend: Attend
    num_tokens: Int[Array, ""] | None = None  # int32; later rows are padding; None: no row is

    def for_layer(self, rope: RopeTables, window: int) -> "LayerContext":
        """The context of a layer with these rotary tables and this attention window."""
        step = {part.name: getattr(self, part.name) for part in fields(StepContext)}
        return LayerContext(**step, rope=rope, window=window)


@dataclass(frozen=True, slots=True)
class LayerContext(StepContext):
    """Arguments of one layer of a step."""

    rope: RopeTables = field(kw_only=True)
    window: int = field(kw_only=True)  # tokens that attention sees; 0: all
