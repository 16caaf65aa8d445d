"""Bounds of the number of connections, and of the time that one keeps the server waiting."""

import resource
from dataclasses import dataclass
from typing import Self

from jserve.gateway.config import GatewayConfig

# Descriptors that are not clients': listeners, the engine, logs, model files, event loops.
_OWN_DESCRIPTORS = 64
RESERVE = 16  # HTTP connections above the limit, for probes


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Bounds of one front end's connections."""

    max_connections: int
    head_timeout_s: float  # from the first wait to the last byte of a request's head
    body_timeout_s: float  # the same of its body, beside the time of its bytes at the lowest rate
    write_timeout_s: float  # while a client takes nothing of what waits for it
    lowered: bool = False  # descriptors allow fewer connections than the config

    @classmethod
    def from_config(cls, config: GatewayConfig) -> Self:
        """The config's bounds; HTTP and gRPC get half each of the descriptors there are."""
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = config.max_connections
        if descriptors != resource.RLIM_INFINITY:
            most = max(1, min(most, (descriptors - _OWN_DESCRIPTORS - RESERVE) // 2))
        return cls(
            max_connections=most,
            head_timeout_s=config.head_timeout_s,
            body_timeout_s=config.body_timeout_s,
            write_timeout_s=config.write_timeout_s,
            lowered=most < config.max_connections,
        )
