"""Whether what was written is what was meant: both sides read once more and compared bit for bit."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ostro.errors import WeightsError
from ostro.model import layout
from ostro.weights.store import Reader, as_bytes, label, pieces, same_bits


def evict(path: Path) -> None:
    """Drop what the page cache holds of a file or a folder's files, so that the next read is from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def certify(meant: Reader, written: Reader) -> str:
    """Return the sha256 of the tensors' bytes, in the table's order, after comparing every one of them.

    Raises WeightsError for a tensor that differs in shape, dtype
    or any bit.
    """
    total = hashlib.sha256()
    expected, found = meant.names(), written.names()
    with ThreadPoolExecutor(1) as other:
        for parameter in layout.parameters(meant.model):
            name = parameter.name
            if expected[name] != found.get(name):
                raise WeightsError(
                    f"{name} was to be {expected[name]} and is {found.get(name)}: remove what was written."
                )
            for stack in pieces(parameter):
                # One core reads and compares while the other hashes the piece before.
                value = written.read(name, stack)
                hashing = other.submit(total.update, as_bytes(value))
                is_same = same_bits(meant.read(name, stack), value)
                hashing.result()
                if not is_same:
                    raise WeightsError(
                        f"{label(name, stack)} was read back with other values than were written: the disk may be "
                        "failing; remove what was written and write it elsewhere."
                    )
    return total.hexdigest()
