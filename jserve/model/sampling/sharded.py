"""The sampler over the devices of a mesh: logits stay where the head made them.

device 0: logits, counts of ids 0 … n-1 ─┐            ┌─ one device's best tokens, sums and
device 1: logits, counts of ids n … 2n-1 ├─ sample ───┤  counts of each row are exchanged;
…                                        ─┘            └─ every device has every result
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float32, Int32

from jserve.model.sampling.history import restore
from jserve.model.sampling.logprobs import Logprobs, prompt_logprobs
from jserve.model.sampling.sample import Sampled, SamplerConfig, sample
from jserve.model.sampling.sharded_vocab import Axes
from jserve.model.sampling.state import SamplerState, count_chunk, observe, reset
from jserve.model.sharding import AnyMesh, vocab_axes

_WHOLE = PartitionSpec()


@dataclass(frozen=True)
class ShardedSampler:
    """The sampler's functions over a mesh; on one device the plain functions."""

    mesh: AnyMesh
    vocab: int
    config: SamplerConfig = field(default_factory=SamplerConfig)

    @property
    def axes(self) -> Axes:
        """Mesh axes that the vocabulary is split over."""
        return vocab_axes(self.vocab, self.mesh)

    def sample(
        self,
        logits: Float32[Array, "rows vocab"],
        state: SamplerState,
        slots: Int32[Array, " rows"],
        positions: Int32[Array, " rows"],
        live: Bool[Array, " rows"],
    ) -> Sampled:
        choose = partial(sample, config=self.config, axes=self.axes)
        takes = (self._wide(), self.state_specs(state), _WHOLE, _WHOLE, _WHOLE)
        return self._split(choose, takes, _WHOLE)(logits, state, slots, positions, live)

    def prompt_logprobs(
        self, logits: Float32[Array, "rows vocab"], targets: Int32[Array, " rows"]
    ) -> Logprobs:
        look_up = partial(prompt_logprobs, axes=self.axes)
        return self._split(look_up, (self._wide(), _WHOLE), _WHOLE)(logits, targets)

    def reset(self, state: SamplerState, keep: Bool[Array, " slots"]) -> SamplerState:
        specs = self.state_specs(state)
        return self._split(reset, (specs, _WHOLE), specs)(state, keep)

    def observe(
        self,
        state: SamplerState,
        slots: Int32[Array, " rows"],
        tokens: Int32[Array, " rows"],
        live: Bool[Array, " rows"],
    ) -> SamplerState:
        specs = self.state_specs(state)
        note = partial(observe, axes=self.axes)
        return self._split(note, (specs, _WHOLE, _WHOLE, _WHOLE), specs)(state, slots, tokens, live)

    def count_chunk(
        self,
        state: SamplerState,
        token_slots: Int32[Array, " tokens"],
        tokens: Int32[Array, " tokens"],
        is_prompt: Bool[Array, " tokens"],
        live: Bool[Array, " tokens"],
    ) -> SamplerState:
        specs = self.state_specs(state)
        note = partial(count_chunk, axes=self.axes)
        takes = (specs, _WHOLE, _WHOLE, _WHOLE, _WHOLE)
        return self._split(note, takes, specs)(state, token_slots, tokens, is_prompt, live)

    def restore(
        self, state: SamplerState, slots: Int32[Array, " rows"], words: Int32[Array, "rows words"]
    ) -> SamplerState:
        """`history.restore` on each device's share of the counts."""
        specs = self.state_specs(state)
        add = partial(restore, axes=self.axes)
        return self._split(add, (specs, _WHOLE, _WHOLE), specs)(state, slots, words)

    def state_specs(self, state: SamplerState) -> SamplerState:
        """The layout of the state on the mesh: counts of token ids are split."""
        whole: SamplerState = jax.tree.map(lambda _: _WHOLE, state)
        return whole._replace(prompt_seen=self._wide(), output_counts=self._wide())

    def _wide(self) -> PartitionSpec:
        return PartitionSpec(None, self.axes or None)

    def _split(self, function: Callable[..., Any], takes: Any, gives: Any) -> Callable[..., Any]:
        if self.mesh.size == 1:
            return function
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=takes, out_specs=gives, check_vma=False
        )
