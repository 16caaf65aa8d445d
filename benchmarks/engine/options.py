"""Flags that the engine benchmarks have in common. No JAX, so that a start can be timed."""

import argparse
import enum
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.engine import specs
from jserve import config
from jserve.checkpoints.config import Dtype
from jserve.config import ServeConfig
from jserve.core.errors import ConfigError


def parser_of(description: str | None, *, model: str = "smollm2-135m") -> argparse.ArgumentParser:
    """A parser with the flags that say which engine is measured."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default=model, help=f"random weights: {', '.join(specs.MODELS)}")
    which.add_argument("--config", metavar="FILE", help="a config with its weights instead")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=[kind.value for kind in Dtype],
        help="of random weights",
    )
    parser.add_argument("--backend", help="of the ops, for random weights; default: the best")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="changes the config: --set engine.num_slots=128 --set scheduler.decode_steps=1",
    )
    parser.add_argument("--note", help="goes into the JSON line")
    return parser


def serve_config(arguments: argparse.Namespace) -> ServeConfig:
    """Config of the engine that is measured. Raises ConfigError."""
    if arguments.config:
        return config.load(arguments.config, arguments.set)
    return config.override(specs.serve_config(arguments.model, arguments.dtype), arguments.set)


def config_of(arguments: argparse.Namespace, serve: ServeConfig) -> dict[str, Any]:
    """Flags, and the parts of the config that a step depends on, for the JSON line."""
    parts = {
        name: value.value if isinstance(value, enum.Enum) else value
        for name, value in config.flatten(serve).items()
        if name.startswith(("model.", "engine.", "scheduler."))
        and not name.startswith("model.source")
    }
    return {**vars(arguments), **parts}


def run(main: Callable[[], None]) -> None:
    """Calls `main`; a wrong config is one line, not a traceback."""
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
