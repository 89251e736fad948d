"""What the system is asked for: memory that is kept."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from ostro.machine import memory_limit_bytes, usable_cores

FAULTS = """
import resource, sys, torch
from ostro.machine import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(48 << 20, dtype=torch.uint8) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults_of_a_step() for _ in range(6)][-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep what is freed")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    found = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], stdout=-1, text=True, check=True).stdout)
        for how in ("kept", "given back")
    }
    assert found["kept"] < 1000
    assert found["given back"] > 4 * 12_000  # pages of 4 KiB


def test_cores_and_memory_are_of_this_process() -> None:
    assert usable_cores() >= 1
    assert memory_limit_bytes() > 1 << 28
