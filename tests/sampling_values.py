"""Sampling parameters that differ from the defaults in every field, for tests of their trips."""

from dataclasses import Field, fields
from typing import Any

from jserve.core.request import SamplingParams


def unusual_sampling() -> SamplingParams:
    """Every field has a value that no default has, that a gateway takes and float32 holds."""
    values = {it.name: _unusual(index, it) for index, it in enumerate(fields(SamplingParams))}
    sampling = SamplingParams(**values)
    for field in fields(SamplingParams):
        assert getattr(sampling, field.name) != field.default, field.name
    return sampling


def _unusual(index: int, field: Field[Any]) -> Any:
    ids = (10 * index + 3, 10 * index + 4)  # other ones in every list
    if field.name == "logit_bias":
        return tuple((token_id, 0.5) for token_id in ids)
    match field.default:
        case bool():
            return not field.default
        case float():
            bounds = field.metadata["bounds"]
            return bounds.low + 0.75 * (bounds.high - bounds.low)
        case int():
            return field.default + 3
        case ():
            return ids
        case None:
            return 3
    raise AssertionError(f"{field.name}: teach this test a value of its type")
