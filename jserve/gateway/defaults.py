"""Defaults for sampling fields that a request leaves out: the model's generation config."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from jserve.core.errors import ConfigError
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


def sampling_defaults(
    generation_config: Mapping[str, Any], config: GatewayConfig
) -> SamplingDefaults:
    """Reads Hugging Face's generation_config.json; `config.default_*` come first.

    `do_sample: false` makes greedy the default. Raises ConfigError for a value of a wrong type.
    """
    given = {it.name: getattr(config, f"default_{it.name}") for it in fields(SamplingDefaults)}
    greedy = generation_config.get("do_sample") is False
    values: dict[str, Any] = {}
    for name, ours in given.items():
        theirs = "max_new_tokens" if name == "max_tokens" else name
        value = generation_config.get(theirs) if ours is None else ours
        if ours is None and greedy and name == "temperature":
            value = 0.0
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ConfigError(f"generation config: {theirs} must be a number ≥ 0, not {value!r}")
        values[name] = int(value) if name in ("top_k", "max_tokens") else float(value)
    return SamplingDefaults(**values)
