"""The processes of one engine: `jax.distributed`, their devices, values they agree on."""

import socket
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jserve.core.addresses import is_loopback
from jserve.core.errors import ConfigError

# Only a safety net: a process that dies or freezes breaks its stream to the leader first.
_HEARTBEAT_TIMEOUT_S = 30
_SHUTDOWN_TIMEOUT_S = 5


def join_processes(
    coordinator_address: str,
    *,
    index: int,
    num_processes: int,
    num_cpu_devices: int,
    timeout_s: float,
) -> None:
    """Makes this process one of several, before JAX looks for devices.

    Process 0 coordinates at `coordinator_address`, host:port. The host's cores pass for
    `num_cpu_devices` devices.
    """
    jax.config.update("jax_num_cpu_devices", num_cpu_devices)
    # jax.distributed's preemption service would replace our SIGTERM handler.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator_address,
        num_processes,
        index,
        initialization_timeout=int(timeout_s),
        heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_S,
        shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT_S,
        coordinator_bind_address=bind_address(coordinator_address),
        cluster_detection_method="deactivate",
    )


def leave_processes() -> None:
    """Ends what `join_processes` began; all processes must call it at about the same time."""
    jax.distributed.shutdown()


def bind_address(address: str) -> str:
    """The address to listen on so that others reach it at `address`, host:port.

    All interfaces, except for a loopback address: a host may resolve its own name differently
    than others do (Debian's /etc/hosts says 127.0.1.1).
    """
    host, _, port = address.rpartition(":")
    return address if is_loopback(host) else f"[::]:{port}"


def free_port(host: str) -> int:
    """A port that is free at this moment where one listens for `host`."""
    host = host.strip("[]") if is_loopback(host) else ""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def engine_devices(wanted: int, num_processes: int) -> Sequence[Any]:
    """`wanted` JAX devices, as many of each process. Raises ConfigError if there are not."""
    devices = jax.devices()
    kind = devices[0].device_kind
    if num_processes == 1:
        if wanted > len(devices):
            raise ConfigError(
                f"engine.tensor_parallel is {wanted}, but JAX finds {len(devices)} devices ({kind})"
            )
        return devices[:wanted]
    share = wanted // num_processes
    chosen: list[Any] = []
    for index in range(num_processes):
        found = [device for device in devices if device.process_index == index]
        if len(found) < share:
            raise ConfigError(
                f"engine.tensor_parallel is {wanted} over {num_processes} processes, but process "
                f"{index} has {len(found)} devices ({kind})"
            )
        chosen += found[:share]
    return chosen


def least_of_all(value: int) -> int:
    """The smallest `value` of all processes, which must call it in the same place."""
    if jax.process_count() == 1:
        return value
    return int(np.min(multihost_utils.process_allgather(np.int32(value))))
