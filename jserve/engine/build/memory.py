"""How many KV pages fit: counted from measured bytes, never guessed as a fraction."""

import os
from pathlib import Path

from jserve.core.errors import ConfigError

GRID = 64  # pages; a small change of free memory must not change a compiled shape
_HEADROOM = 0.9  # of what a host has left; the rest is for Python, buffers and the page cache


def host_available_bytes(
    cgroup: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo")
) -> int | None:
    """Bytes this process may still take: the tighter of cgroup and machine; None if unknown.

    What the page cache holds of files counts as free: the kernel gives it back.
    """
    found: list[int] = []
    limit, usage = cgroup / "memory.max", cgroup / "memory.current"
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        found.append(int(text) - int(usage.read_text()) + int(stat["inactive_file"]))
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    elif hasattr(os, "sysconf"):
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def device_pages(
    *, limit_bytes: int, params_bytes: int, program_bytes: int, page_bytes: int
) -> int:
    """Pages that fit a device beside parameters, programs and what programs need to run."""
    left = limit_bytes - params_bytes - program_bytes
    pages = left // page_bytes // GRID * GRID
    if pages <= 0:
        raise ConfigError(
            f"no KV page fits: the device has {limit_bytes} bytes, parameters and slots take "
            f"{params_bytes}, the programs {program_bytes}; use more devices or a smaller model"
        )
    return int(pages)


def host_pages(
    *, kv_bytes: int, page_bytes: int, other_bytes: int, available_bytes: int | None
) -> int:
    """Pages of `kv_bytes` of host memory, bounded by what the host leaves beside `other_bytes`."""
    if available_bytes is not None:
        kv_bytes = min(kv_bytes, int(available_bytes * _HEADROOM) - other_bytes)
    pages = kv_bytes // page_bytes
    pages = pages // GRID * GRID or pages
    if pages <= 0:
        raise ConfigError(
            f"no KV page of {page_bytes} bytes fits in {kv_bytes} bytes; raise engine.kv_bytes "
            "or free memory"
        )
    return int(pages)
