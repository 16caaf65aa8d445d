"""The command line: `jserve [serve | convert SRC DST | generate PROMPT | plan]` and its flags."""

import dataclasses
import ipaddress
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags

from jserve import config as config_lib
from jserve.checkpoints.config import Dtype, Quantization
from jserve.config import ServeConfig
from jserve.core import logs
from jserve.core.addresses import check_engine_address
from jserve.core.errors import ConfigError, JserveError
from jserve.engine.build import platform
from jserve.engine.config import PlatformConfig
from jserve.gateway.addresses import check_addresses
from jserve.launch.engine_link import read_token

_CONFIG = flags.DEFINE_string("config", None, "A Python file that defines get_config().")
_SET = flags.DEFINE_multi_string(
    "set", [], "Overrides one field of the config, for example engine.num_slots=8; may repeat."
)
_ROLE = flags.DEFINE_enum(
    "role",
    "all",
    ["all", "engine", "gateway", "follower"],
    "all: gateway here and engine in a child process; engine or gateway: that part alone; "
    "follower: one more process of an engine whose leader runs elsewhere.",
)
_HOST = flags.DEFINE_string("host", None, "Where the gateway listens; gateway.host of the config.")
_HTTP_PORT = flags.DEFINE_integer("http_port", None, "gateway.http_port of the config.")
_GRPC_PORT = flags.DEFINE_integer("grpc_port", None, "gateway.grpc_port of the config.")
_ENGINE_ADDRESS = flags.DEFINE_string(
    "engine_address",
    "127.0.0.1:8600",
    "Where --role=engine listens and --role=gateway connects: host:port on loopback, with a token, "
    "or unix:/folder/name in a folder of mode 0700.",
)
_ENGINE_TOKEN_FILE = flags.DEFINE_string(
    "engine_token_file",
    None,
    "A file of mode 0600 with the token, at least 32 bytes, that gateway and engine share when "
    "they talk over TCP; - reads it from standard input. Else it is read from JSERVE_ENGINE_TOKEN.",
)
_LEADER_ADDRESS = flags.DEFINE_string(
    "leader_address",
    None,
    "Where the first process of an engine listens and its followers connect, host:port; without "
    "it all engine.num_processes run on this machine.",
)
_PROCESS = flags.DEFINE_integer(
    "process", None, "Which process of the engine a follower is, from 1.", lower_bound=1
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", [kind.value for kind in Dtype], "convert: type of the parameters."
)
_QUANTIZATION = flags.DEFINE_enum(
    "quantization",
    "none",
    [kind.value for kind in Quantization],
    "convert: of the weight matrices.",
)
_FORMAT = flags.DEFINE_enum(
    "format", "native", ["native", "huggingface"], "convert: what FOLDER will be."
)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 256, "generate: tokens at most.")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "generate: 0 is greedy.")
_SEED = flags.DEFINE_integer("seed", None, "generate: makes sampling repeatable.")
_CHAT = flags.DEFINE_bool(
    "chat", True, "generate: wrap the prompt in the model's chat template if it has one."
)

_ARCHITECTURE = flags.DEFINE_string(
    "architecture", None, "plan: a model's config.json, where its files are not here."
)

_MODEL_FLAGS = (_CONFIG, _SET)
_GATEWAY_FLAGS = (_HOST, _HTTP_PORT, _GRPC_PORT)
_FLAGS_OF: Mapping[str, Sequence[flags.FlagHolder[Any]]] = {
    "serve --role=all": (*_MODEL_FLAGS, _ROLE, *_GATEWAY_FLAGS, _LEADER_ADDRESS),
    "serve --role=gateway": (
        *(*_MODEL_FLAGS, _ROLE, *_GATEWAY_FLAGS),
        *(_ENGINE_ADDRESS, _ENGINE_TOKEN_FILE),
    ),
    "serve --role=engine": (
        *(*_MODEL_FLAGS, _ROLE),
        *(_ENGINE_ADDRESS, _ENGINE_TOKEN_FILE, _LEADER_ADDRESS),
    ),
    "serve --role=follower": (*_MODEL_FLAGS, _ROLE, _LEADER_ADDRESS, _PROCESS),
    "convert": (_FORMAT, _DTYPE, _QUANTIZATION),
    "generate": (*_MODEL_FLAGS, _MAX_TOKENS, _TEMPERATURE, _SEED, _CHAT),
    "plan": (*_MODEL_FLAGS, _ARCHITECTURE),
}

_USAGE = """LLM serving on JAX.

  jserve --config=FILE [--set section.field=value …]   serve over HTTP and gRPC
  jserve convert SOURCE FOLDER [--format=…]             weights to the native or another format
  jserve generate PROMPT --config=FILE                  one prompt, streamed to the terminal
  jserve plan --config=FILE                             whether it fits its chips; needs none
"""


def run() -> None:
    """The entry point of the process."""
    sys.modules["__main__"].__doc__ = _USAGE
    for flag in flags.FLAGS.flags_by_module_dict()[__name__]:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # so that --help lists it
    app.run(_main, flags_parser=_parse_flags)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Reads the flags; an error is one line, where absl would print several."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _end_with_usage(str(error))


def _end_with_usage(message: str) -> NoReturn:
    """Ends the process with one line; absl's own way prints every flag before it."""
    line = " ".join(message.split())
    print(f"error: {line}; jserve --help lists commands and flags", file=sys.stderr)
    sys.exit(1)


def _main(argv: Sequence[str]) -> None:
    command, *arguments = argv[1:] or ["serve"]
    commands = {"serve": _serve, "convert": _convert, "generate": _generate, "plan": _plan}
    try:
        if command not in commands:
            raise app.UsageError(f"unknown command {command!r}; one of {', '.join(commands)}")
        _refuse_strange_flags(f"serve --role={_ROLE.value}" if command == "serve" else command)
        sys.exit(commands[command](arguments))
    except app.UsageError as error:
        _end_with_usage(str(error))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except JserveError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _refuse_strange_flags(command: str) -> None:
    """Raises UsageError for a flag that was given and would do nothing."""
    known = {holder.name for holder in _FLAGS_OF[command]}
    for holder in {holder.name: holder for row in _FLAGS_OF.values() for holder in row}.values():
        if holder.present and holder.name not in known:
            raise app.UsageError(f"--{holder.name} has no meaning for {command}")


def _load_config() -> ServeConfig:
    if _CONFIG.value is None:
        raise ConfigError("--config is missing; for example --config=configs/smollm2_135m.py")
    config = config_lib.load(_CONFIG.value, _SET.value)
    given = {
        name: flag.value
        for name, flag in (("host", _HOST), ("http_port", _HTTP_PORT), ("grpc_port", _GRPC_PORT))
        if flag.value is not None
    }
    gateway = dataclasses.replace(config.gateway, **given)
    # `[::1]`, as a URL has it, is the address ::1.
    gateway = dataclasses.replace(gateway, host=gateway.host.strip("[]"))
    return dataclasses.replace(config, gateway=gateway)


def _serve(arguments: Sequence[str]) -> int:
    if arguments:
        raise app.UsageError(f"serve takes no arguments, got {' '.join(arguments)}")
    config = _load_config()
    _check_processes(config)
    logs.configure(config.log)
    if _ROLE.value in ("all", "gateway"):
        from jserve.launch.exposure import check_exposure, warn_of_keys_in, with_keys_of

        check_addresses(config.gateway)
        config = with_keys_of(os.environ, config)
        check_exposure(config.gateway)
        warn_of_keys_in(_SET.value)
    platform.raise_file_limit()
    token = None
    if _ROLE.value in ("engine", "gateway"):
        token = read_token(_ENGINE_TOKEN_FILE.value, os.environ)
        check_engine_address(_ENGINE_ADDRESS.value, has_token=token is not None)
    if _ROLE.value == "engine":
        platform.pin(config.platform)
        from jserve.launch.engine_role import serve_engine  # JAX starts here

        return serve_engine(config, _ENGINE_ADDRESS.value, token, _LEADER_ADDRESS.value)
    from jserve.launch.serve import serve_all, serve_follower, serve_gateway

    if _ROLE.value == "gateway":
        return serve_gateway(config, _ENGINE_ADDRESS.value, token)
    if _ROLE.value == "follower":
        assert _PROCESS.value is not None
        assert _LEADER_ADDRESS.value is not None
        return serve_follower(config, _PROCESS.value, _LEADER_ADDRESS.value)
    return serve_all(config, _LEADER_ADDRESS.value)


def _check_processes(config: ServeConfig) -> None:
    """Raises ConfigError for flags that do not fit the engine's number of processes."""
    others = config.engine.num_processes - 1
    if _LEADER_ADDRESS.present and not others:
        raise ConfigError("--leader_address: engine.num_processes is 1; there is nobody to lead")
    if _LEADER_ADDRESS.value is not None:
        _check_leader_address(_LEADER_ADDRESS.value)
    if _ROLE.value == "follower":
        if _LEADER_ADDRESS.value is None or _PROCESS.value is None:
            raise ConfigError("--role=follower needs --leader_address=HOST:PORT and --process=N")
        if _PROCESS.value > others:
            raise ConfigError(
                f"--process is {_PROCESS.value}; engine.num_processes is {others + 1}, so the "
                f"followers are 1 to {others}"
            )


def _check_leader_address(address: str) -> None:
    """Raises ConfigError unless it is a host that followers can dial, and a port."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        is_wildcard = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        is_wildcard = not host
    if is_wildcard or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(
            f"--leader_address is {address!r}: followers dial it, so give the name or address by "
            "which they reach the leader's host, and a port, for example host0:8610; the leader "
            "listens on all its interfaces"
        )


def _convert(arguments: Sequence[str]) -> int:
    if len(arguments) != 2:
        raise app.UsageError("convert takes SOURCE and FOLDER")
    if Path(arguments[1]).exists():
        raise ConfigError(f"{arguments[1]} exists already; name a new folder")
    logs.configure(logs.LogConfig())
    platform.pin(PlatformConfig())
    from jserve.launch.convert import convert

    return convert(
        *arguments,
        to=_FORMAT.value,
        dtype=_DTYPE.value,
        quantization=_QUANTIZATION.value,
    )


def _generate(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        raise app.UsageError("generate takes one prompt; quote it")
    config = _load_config()
    logs.configure(dataclasses.replace(config.log, level="warning"))  # the answer is the output
    platform.pin(config.platform)
    from jserve.launch.generate import generate

    return generate(
        config,
        arguments[0],
        max_tokens=_MAX_TOKENS.value,
        temperature=_TEMPERATURE.value,
        seed=_SEED.value,
        chat=_CHAT.value,
    )


def _plan(arguments: Sequence[str]) -> int:
    if arguments:
        raise app.UsageError(f"plan takes no arguments, got {' '.join(arguments)}")
    config = _load_config()
    logs.configure(dataclasses.replace(config.log, level="warning"))
    platform.pin(PlatformConfig())  # plans need no accelerator
    from jserve.launch.plan import plan

    return plan(config, _ARCHITECTURE.value)
