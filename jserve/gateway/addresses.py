"""Checks of the addresses that a gateway listens on, before any work is done."""

from jserve.core.errors import ConfigError
from jserve.gateway.config import GatewayConfig

_MAX_PORT = 65535


def check_addresses(config: GatewayConfig) -> None:
    """Raises ConfigError for a port that does not exist, and for one that is given twice.

    Port 0 takes a free one.
    """
    if not config.host.strip("[] "):
        raise ConfigError("gateway.host is empty; write 0.0.0.0 or :: for every interface")
    for name, port in (("http_port", config.http_port), ("grpc_port", config.grpc_port)):
        if not 0 <= port <= _MAX_PORT:
            raise ConfigError(
                f"gateway.{name} is {port}; ports are from 1 to {_MAX_PORT}, and 0 takes a free one"
            )
    if config.http_port == config.grpc_port != 0:
        raise ConfigError(
            f"gateway.http_port and gateway.grpc_port are both {config.http_port}; each needs a "
            "port of its own: set --http_port or --grpc_port"
        )
