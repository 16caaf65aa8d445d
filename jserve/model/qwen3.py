"""Qwen 3: the Llama block with per-head norms of queries and keys, without biases."""

from functools import partial

from jserve.model.decoder import Family
from jserve.model.llama import PreNormLayer

QWEN3 = Family(layer=partial(PreNormLayer, qk_norm=True))
