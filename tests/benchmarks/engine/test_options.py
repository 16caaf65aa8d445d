"""Flags of the engine benchmarks, and the configs that they name."""

import pytest

from benchmarks.engine import options
from jserve.checkpoints.config import Dtype
from jserve.core.errors import ConfigError


def parse(*flags):
    return options.parser_of("").parse_args(flags)


def test_a_named_model_takes_settings():
    arguments = parse(
        "--model", "llama-3.1-8b", "--dtype", "bfloat16", "--set", "engine.kv_bytes=9"
    )
    serve = options.serve_config(arguments)
    assert (serve.model.dtype, serve.engine.kv_bytes, serve.engine.num_slots) == (
        Dtype.BFLOAT16,
        9,
        128,
    )
    line = options.config_of(arguments, serve)
    assert line["engine.kv_bytes"] == 9
    assert not any(name.startswith("model.source") for name in line)


def test_a_config_file():
    serve = options.serve_config(parse("--config", "configs/tiny_random.py"))
    assert serve.model.name == "tiny-random"


def test_an_unknown_model_lists_the_known():
    with pytest.raises(ConfigError, match="smollm2-135m"):
        options.serve_config(parse("--model", "gpt"))
