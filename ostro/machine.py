"""What the operating system says of this machine; no torch."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path


def usable_cores() -> int:
    """Return the number of cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_limit_bytes(cgroup: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Return the machine's memory, or the limit of the container (cgroup v2) where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = cgroup.read_text("ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for the next allocation instead of giving it back to the system.

    A training step allocates and frees the same gigabytes every time, and each page that comes back from the system is
    zeroed first: that was a tenth of a step on two cores. Only glibc is told; elsewhere nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    never_mmap, never_trim = (-4, 0), (-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    mallopt(*never_mmap)
    mallopt(*never_trim)
