"""Bytes and operations of steps, counted from shapes. Pure; no JAX.

Counted is what a step cannot do without: every weight that is used is read once per step, K and V
of the tokens in view once per row, a multiplication and an addition are two operations. Left out
are activations, norms, sampling, and what is written.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jserve.core.model_spec import ModelSpec
from jserve.core.step import Chunk, ProgramKind, StepPlan

_EMBEDDING, _HEAD = "model.embed_tokens.", "lm_head."


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of the parameters as they lie in memory."""

    layers_bytes: int  # read by every step
    head_bytes: int  # read by a step that samples; tied: the embedding
    embedding_bytes: int  # a step reads single rows of it; tied: 0, it is in the head

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters."""
        return self.layers_bytes + self.head_bytes + self.embedding_bytes


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes and operations that one or more steps need."""

    bytes: int = 0
    operations: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.operations + other.operations)


@dataclass(frozen=True, slots=True)
class Counter:
    """Counts the work of one model's steps."""

    spec: ModelSpec
    weights: Weights
    kv_bytes: float  # K and V of one token in one layer

    def step(self, spans: list[tuple[int, int]], num_sampled: int) -> Work:
        """One step over tokens [start, end) of each row; `num_sampled` rows go through the head."""
        tokens = sum(end - start for start, end in spans)
        multiplied = layer_parameters(self.spec) * tokens + head_parameters(self.spec) * num_sampled
        attention = sum(attention_operations(self.spec, *span) for span in spans)
        in_view = sum(tokens_in_view(self.spec, *span) for span in spans)
        head_bytes = self.weights.head_bytes if num_sampled else 0
        return Work(
            bytes=self.weights.layers_bytes + head_bytes + round(in_view * self.kv_bytes),
            operations=2 * multiplied + attention,
        )

    def plan(self, plan: StepPlan) -> Work:
        """All steps of a plan; a decode program makes one of every decode step."""
        if plan.program.kind is ProgramKind.MIXED:
            sampled = sum(chunk.max_new for chunk in plan.chunks)
            return self.step([_span(chunk) for chunk in plan.chunks], sampled)
        work = Work()
        for n in range(plan.num_steps):
            spans = [(chunk.start + n, chunk.start + n + 1) for chunk in plan.chunks]
            work += self.step(spans, len(spans))
        return work


def weights_of(nbytes: Mapping[str, int], *, tied: bool) -> Weights:
    """Sorts the bytes of parameters by name; a quantized one has several names alike."""
    embedding = sum(n for name, n in nbytes.items() if name.startswith(_EMBEDDING))
    head = sum(n for name, n in nbytes.items() if name.startswith(_HEAD))
    layers = sum(nbytes.values()) - embedding - head
    return Weights(layers, embedding, 0) if tied else Weights(layers, head, embedding)


def layer_parameters(spec: ModelSpec) -> int:
    """Weights of all layers that a token is multiplied with."""
    q_dim, kv_dim = spec.q_heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention = 2 * spec.model_dim * (q_dim + kv_dim)  # q, o; k, v
    return spec.layers * (attention + 3 * spec.model_dim * spec.ffn_dim)  # gate, up, down


def head_parameters(spec: ModelSpec) -> int:
    """Weights of the head, tied or not."""
    return spec.vocab * spec.model_dim


def attention_operations(spec: ModelSpec, start: int, end: int) -> int:
    """Operations of q·k and of the sum of v, for tokens [start, end) of a row, in all layers."""
    seen = sum(_seen(spec.window_of(layer), start, end) for layer in range(spec.layers))
    return 4 * spec.q_heads * spec.head_dim * seen


def tokens_in_view(spec: ModelSpec, start: int, end: int) -> int:
    """Tokens, summed over the layers, that at least one of the tokens [start, end) sees."""
    windows = [spec.window_of(layer) for layer in range(spec.layers)]
    return sum(end - (max(0, start - window + 1) if window else 0) for window in windows)


def _seen(window: int, start: int, end: int) -> int:
    """Sum over positions p in [start, end) of the tokens ≤ p that p sees in one layer."""
    if not window:
        return (end * (end + 1) - start * (start + 1)) // 2
    grows = min(max(window, start), end)  # positions before it see all that came before
    return _seen(0, start, grows) + (end - grows) * window


def _span(chunk: Chunk) -> tuple[int, int]:
    return chunk.start, chunk.start + chunk.num_tokens
