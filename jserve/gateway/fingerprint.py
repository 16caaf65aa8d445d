"""OpenAI's `system_fingerprint`: equal ones give equal answers to equal requests with a seed."""

import functools
import hashlib
import importlib.metadata
from dataclasses import fields

from jserve.core.request import EngineInfo
from jserve.gateway.defaults import SamplingDefaults

_DIGITS = 16
_CAPACITIES = frozenset({"num_slots", "num_pages", "max_queue"})  # no answer depends on them


@functools.lru_cache(maxsize=8)
def fingerprint(info: EngineInfo, defaults: SamplingDefaults) -> str:
    """A digest of the version, of defaults, and of what the engine says of itself.

    Its `numerics` digest weights, code, backend and all of the config that tokens depend on.
    """
    described = {it.name: getattr(info, it.name) for it in fields(info)}
    engine = [(name, it) for name, it in described.items() if name not in _CAPACITIES]
    parts = (importlib.metadata.version("jserve"), engine, defaults)
    return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:_DIGITS]
