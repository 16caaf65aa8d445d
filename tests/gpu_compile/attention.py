"""Attention layers to compile for GPUs: shapes of models, decode and mixed steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch
from jserve.pallas_kernels.ragged_paged_attention.sharded import sharded_attention
from tests.gpu_compile.h200 import Program, argument

_PAGES = 2048


@dataclasses.dataclass(frozen=True)
class Layer:
    """One attention layer of a step: `tokens` is 0 in a decode step, which decodes every slot."""

    model: str
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    slots: int
    tokens: int = 0
    window: int = 0
    context: int = 8192
    kv_dtype: str = "bfloat16"
    devices: int = 1

    @property
    def name(self) -> str:
        """Name of the layer in the table."""
        step = f"mixed {self.tokens}" if self.tokens else "decode"
        return f"attention {self.model}, {step}, {self.slots} slots, pages {self.kv_dtype}"

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        """The op as a model calls it, its pages donated."""
        tokens = self.tokens or self.slots
        whole = functools.partial(argument, mesh, "int32")
        batch = RaggedBatch(
            page_table=whole(self.slots, self.context // self.page_size),
            kv_lens=whole(self.slots),
            q_starts=whole(self.slots),
            q_lens=whole(self.slots),
            num_decode=whole(),
            num_rows=whole(),
            write_pages=whole(tokens),
            write_offsets=whole(tokens),
        )
        attend = functools.partial(
            sharded_attention,
            window=self.window,
            prompts=self.tokens > 0,
            backend=Backend.GPU,
            mesh=mesh,
        )
        q = argument(mesh, "bfloat16", tokens, self.q_heads, self.head_dim, split=1)
        k = argument(mesh, "bfloat16", tokens, self.kv_heads, self.head_dim, split=1)
        pages = argument(mesh, self.kv_dtype, *self._pages(), split=2)
        return jax.jit(attend, donate_argnums=3).lower(q, k, k, pages, batch)

    def _pages(self) -> tuple[int, ...]:
        return (_PAGES, 2, self.kv_heads, self.page_size, self.head_dim)

    @property
    def page_bytes(self) -> int:
        """Bytes of the pages of one device."""
        return int(np.prod(self._pages())) * jnp.dtype(self.kv_dtype).itemsize // self.devices


_LAYERS = (
    Layer("llama_8b", 32, 8, 128, 64, 64),
    Layer("llama_8b", 32, 8, 128, 128, 256),
    Layer("llama_8b", 32, 8, 128, 64, 64, 2048),
    Layer("llama_8b", 32, 8, 128, 128, 256, 2048),
    Layer("llama_70b, 8 devices", 64, 8, 128, 64, 64, 2048, devices=8),
    Layer("llama_1b", 32, 8, 64, 64, 64),
    Layer("llama_1b", 32, 8, 64, 64, 64, 2048),
    Layer("smollm2_135m", 9, 3, 64, 64, 64, 512),
    Layer("gemma_4b", 8, 4, 256, 64, 64, window=1024),
    Layer("gemma_4b", 8, 4, 256, 64, 64, 2048),
    Layer("gemma_4b, sliding", 8, 4, 256, 64, 64, 2048, window=1024),
    Layer("llama_2_7b", 32, 32, 128, 64, 64, 2048, context=4096),
    Layer("llama_8b", 32, 8, 128, 64, 64, kv_dtype="float8_e4m3fn"),
    Layer("llama_8b", 32, 8, 128, 64, 256, 2048, kv_dtype="float8_e4m3fn"),
    Layer("llama_1b", 32, 8, 64, 128, 64, 2048, kv_dtype="float8_e4m3fn"),
    Layer("gemma_4b, sliding", 8, 4, 256, 64, 64, 2048, window=1024, kv_dtype="float8_e4m3fn"),
)

# Attention, and the combination of splits.
PROGRAMS = tuple(
    Program(
        layer.name,
        layer.lower,
        2,
        layer.page_bytes,
        frozenset({layer.page_bytes, layer.page_bytes // 2}),  # K and V, or one of them
        devices=layer.devices,
    )
    for layer in _LAYERS
)
