"""Defaults for sampling fields that a request leaves out: the model's generation config."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from jserve.core.errors import ConfigError
from jserve.core.request import SamplingParams
from jserve.gateway.config import GatewayConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """Defaults of the fields that a generation config may set; neutral where it does not."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None  # None: the rest of the context


_BOUNDS = {it.name: it.metadata["bounds"] for it in fields(SamplingParams) if it.metadata}
_NO_LIMIT = -1  # of max_tokens, in the configs of other servers


def sampling_defaults(
    generation_config: Mapping[str, Any], config: GatewayConfig
) -> SamplingDefaults:
    """Reads Hugging Face's generation_config.json; `config.default_*` come first.

    `do_sample: false` makes greedy the default. Values that switch a rule off are taken as in
    Hugging Face and vLLM: null, top_k 0 or -1, max_new_tokens -1. Raises ConfigError for a value
    that a request could not have either.
    """
    values: dict[str, Any] = {}
    for item in fields(SamplingDefaults):
        theirs = "max_new_tokens" if item.name == "max_tokens" else item.name
        value, source = getattr(config, f"default_{item.name}"), f"gateway.default_{item.name}"
        if value is None:
            value, source = generation_config.get(theirs), f"generation config: {theirs}"
            if item.name == "temperature" and generation_config.get("do_sample") is False:
                value = 0.0
        if value is not None:
            values[item.name] = _checked(source, item.name, value)
    return SamplingDefaults(**values)


def _checked(source: str, name: str, value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{source} must be a number, not {value!r}")
    if name == "max_tokens":
        low, high, above_low = 1, 2**31 - 1, False
        if value == _NO_LIMIT:
            return None
    else:
        bounds = _BOUNDS[name]
        low, high, above_low = bounds.low, bounds.high, bounds.above_low
    if not low <= value <= high or (above_low and value == low):  # NaN fails as well
        least = f"above {low:g}" if above_low else f"at least {low:g}"
        raise ConfigError(f"{source} must be {least} and at most {high:g}, not {value!r}")
    if name not in ("top_k", "max_tokens"):
        return float(value)
    if value != int(value):
        raise ConfigError(f"{source} must be a whole number, not {value!r}")
    return max(int(value), 0)
