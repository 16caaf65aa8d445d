"""Qwen 3: the Llama block with per-head norms of queries and keys; Qwen 3 MoE has experts in it.

Layers of Qwen 3 MoE without experts are those of Qwen 3.
"""

from functools import partial

from jserve.model.decoder import Family
from jserve.model.llama import PreNormLayer

QWEN3 = Family(layer=partial(PreNormLayer, qk_norm=True))
QWEN3_MOE = Family(layer=QWEN3.layer, sparse_layer=partial(PreNormLayer, qk_norm=True, sparse=True))
