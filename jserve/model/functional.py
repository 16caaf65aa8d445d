"""A decoder as pure functions: modules are built once, abstractly, and merged while tracing."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from jserve.checkpoints.config import Quantization
from jserve.core.errors import ConfigError
from jserve.core.model_spec import ModelSpec
from jserve.model.context import KV, StepContext
from jserve.model.decoder import CausalLM
from jserve.model.numerics import Numerics
from jserve.model.params import ParamSpec, init_params, param_specs
from jserve.model.registry import FAMILIES
from jserve.model.sharding import AnyMesh, axis_rules
from jserve.model.weights import unaccelerated_weights
from jserve.pallas_kernels.backend import Backend


class Model:
    """A decoder as pure functions of its parameters; immutable, shared by all programs.

    Parameters are plain arrays in a flat dict by Hugging Face's names. The methods that take
    parameters are called while tracing.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: DTypeLike,
        backend: Backend = Backend.CPU,
        quantization: Quantization = Quantization.NONE,
        mesh: AnyMesh | None = None,
    ) -> None:
        """Raises ConfigError for a family or quantization that is not supported.

        `mesh` has the devices that parameters are spread over; it splits experts and the matmuls
        of quantized weights. None: one device.
        """
        if spec.family not in FAMILIES:
            raise ConfigError(
                f"model family {spec.family!r} is not supported; known: {sorted(FAMILIES)}"
            )
        self.spec = spec
        self.dtype = jnp.dtype(dtype)
        self.backend = backend
        self.quantization = quantization
        self.mesh = mesh
        rules = axis_rules(spec, mesh) if mesh else {}
        kinds = quantization.layers, quantization.head
        self._numerics = Numerics(self.dtype, backend, *kinds, mesh, rules)
        try:
            module = CausalLM(spec, FAMILIES[spec.family], self._numerics)
        except ValueError as error:
            raise ConfigError(f"model.quantization is {quantization.value!r}: {error}") from error
        self._specs = param_specs(module)
        self._graph, state = nnx.split(module)
        self._paths = [path for path, _ in nnx.to_flat_state(state)]

    def param_specs(self) -> dict[str, ParamSpec]:
        """The declaration of every parameter, by name."""
        return dict(self._specs)

    def unaccelerated_weights(self) -> dict[str, tuple[int, int]]:
        """Quantized weights that no kernel reads, and their shapes on a device.

        XLA converts them to floats in every step.
        """
        return unaccelerated_weights(self._specs, self._numerics)

    def init(
        self, seed: int, shardings: Mapping[str, Sharding] | None = None
    ) -> dict[str, jax.Array]:
        """Random weights for tests and benchmarks; the same for any sharding."""
        return init_params(self._specs, seed, shardings)

    def hidden(
        self,
        params: Mapping[str, jax.Array],
        tokens: Int[Array, " tokens"],
        positions: Int[Array, " tokens"],
        kv: tuple[KV, ...],
        step: StepContext,
    ) -> tuple[Float[Array, "tokens model_dim"], tuple[KV, ...]]:
        """The hidden states after the final norm, and each layer's pages with the new tokens.

        Rows from `step.num_tokens` on hold anything: a backend may skip them.
        """
        return self._merge(params).model(tokens, positions, kv, step)

    def logits(
        self,
        params: Mapping[str, jax.Array],
        hidden: Float[Array, "rows model_dim"],
        num_rows: jax.Array | None = None,
    ) -> Float32[Array, "rows vocab"]:
        """The logits of the next token for each row, or for the first `num_rows` of them."""
        return self._merge(params).logits(hidden, num_rows)

    def _merge(self, params: Mapping[str, jax.Array]) -> CausalLM:
        leaves = zip(self._paths, (params[name] for name in self._specs), strict=True)
        return nnx.merge(self._graph, nnx.from_flat_state(list(leaves)))
