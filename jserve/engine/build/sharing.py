"""The choice of pages that sequences of an engine share, by its backend and types of numbers."""

import jax.numpy as jnp

from jserve.cache.config import CacheConfig, ReuseGenerated
from jserve.cache.kv_cache import PrefixSharing
from jserve.checkpoints.config import Quantization
from jserve.model.functional import Model
from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.ragged_paged_attention.dispatch import backend_for_pages


def prefix_sharing(
    config: CacheConfig, model: Model, kv_dtype: jnp.dtype, weights: str
) -> PrefixSharing | None:
    """Makes the names of the pages of `model`, and chooses those to share; None if none are.

    `weights` is the digest of the model's weights.
    """
    if not config.prefix:
        return None
    return PrefixSharing(
        weights=weights,
        kv_dtype=str(kv_dtype),
        generated=_reuses_generated(config.reuse_generated, model, kv_dtype),
        compare_tokens=config.compare_tokens,
    )


def _reuses_generated(reuse: ReuseGenerated, model: Model, kv_dtype: jnp.dtype) -> bool:
    if reuse is not ReuseGenerated.AUTO:
        return reuse is ReuseGenerated.ALWAYS
    # The native kernels compute a token alike in a prompt and in a decode step, bit for bit.
    is_equal = backend_for_pages(model.backend, kv_dtype) is Backend.NATIVE
    is_exact = (model.dtype, kv_dtype) == (jnp.float32, jnp.float32)
    return is_equal or not is_exact or model.quantization is not Quantization.NONE
