"""Who may reach the gateway: keys from the environment, and refusing to be open by accident."""

import dataclasses
import logging
from collections.abc import MutableMapping, Sequence

from jserve.config import ServeConfig
from jserve.core.addresses import is_loopback
from jserve.core.errors import ConfigError
from jserve.core.secret import Secret
from jserve.gateway.api_keys import ApiKeys
from jserve.gateway.config import GatewayConfig, check_key
from jserve.gateway.tls import TlsFiles

KEYS_VARIABLE = "JSERVE_API_KEYS"

_log = logging.getLogger(__name__)


def with_keys_of(environment: MutableMapping[str, str], config: ServeConfig) -> ServeConfig:
    """Adds the keys of `JSERVE_API_KEYS`, separated by commas, to those of the config.

    The variable is removed, so that no child process inherits it.

    Raises:
        ConfigError: the variable is set, but a key in it is empty.
    """
    value = environment.pop(KEYS_VARIABLE, None)
    if value is None:
        return config
    keys = [key.strip() for key in value.split(",")]
    for key in keys:
        check_key(KEYS_VARIABLE, key)
    gateway = config.gateway
    keys = (*gateway.api_keys, *map(Secret, keys))
    return dataclasses.replace(config, gateway=dataclasses.replace(gateway, api_keys=keys))


def check_exposure(config: GatewayConfig) -> None:
    """Raises ConfigError for files that cannot be read, and for an address open to everybody."""
    ApiKeys.from_config(config)
    TlsFiles.from_config(config)
    if not (config.has_keys or config.open or is_loopback(config.host)):
        raise ConfigError(
            f"gateway.host is {config.host!r}, which other machines can reach, and no key is asked "
            f"for: give keys by gateway.api_keys_file or {KEYS_VARIABLE}, or let everybody in with "
            "--set gateway.open=true"
        )


def warn_of_keys_in(overrides: Sequence[str]) -> None:
    """Warns of keys on the command line, which every user of the machine can list."""
    if any(text.partition("=")[0].strip() == "gateway.api_keys" for text in overrides):
        _log.warning(
            "gateway.api_keys is on the command line, where every user of this machine can read "
            "it; use gateway.api_keys_file or %s",
            KEYS_VARIABLE,
        )
