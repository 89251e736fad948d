"""Files of named tensors: mapped into memory for reading, streamed for writing.

Reading copies nothing: a tensor is a view of the mapping, and only the pages that are used are read. Writing
takes the bytes of one tensor after another, as they come.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ostro.errors import WeightsError
from ostro.weights.store import Shape, TensorInfo, Where, as_bytes

BLOCK_BYTES = 1 << 20  # 1 MiB writes are as fast as any, and large buffers are slower
_SYNC_BYTES = 1 << 28  # sent to the disk while more is written: a third of the time saved where the disk is slow

# Private, so that a write into a tensor by mistake changes this process alone; not reserved, so that a file
# larger than the memory can be mapped. Python < 3.13 does not name the second flag.
_MAP_FLAGS = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

Write = Callable[[memoryview | bytes], None]
"""Appends bytes to a file, all of them."""

Parts = Callable[[str], Iterable[Tensor]]
"""Gives the tensors whose bytes, one after another, are those of the named one."""


class TensorFile(Protocol):
    """A file of named tensors.

    Opening one reads its index, not its values, and raises WeightsError for whatever is unsound: after that
    every tensor of `infos` can be read.
    """

    @property
    def path(self) -> Path: ...

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor, in the file's order."""
        ...

    def tensor(self, name: str, where: Where = ()) -> Tensor:
        """Return `tensor[where]`, a view of the file where its bytes lie there in one piece. Never write into it."""
        ...


class MappedFile:
    """The bytes of a file; `data` slices to bytes. Raises WeightsError for a file that cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: mmap.mmap | bytes = b""
        try:
            with path.open("rb") as file:
                self.num_bytes = os.fstat(file.fileno()).st_size
                if self.num_bytes:
                    protection = mmap.PROT_READ | mmap.PROT_WRITE
                    self.data = mmap.mmap(file.fileno(), self.num_bytes, flags=_MAP_FLAGS, prot=protection)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise WeightsError(f"{path} cannot be read ({reason}): check the path.") from error

    def tensor(self, offset: int, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Return the tensor whose bytes start at `offset`, which need not be a multiple of its items' size."""
        count = TensorInfo(shape, dtype).num_bytes // dtype.itemsize
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.data, dtype=dtype, count=count, offset=offset).view(shape)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Write]:
    """Give the `write` of a new file, and send what it wrote to the disk while the caller prepares more.

    When the block ends, all of it is on the disk. OSError is the caller's, who knows what to clean up.
    """
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as background:
        unsynced_bytes = 0
        syncing: Future[None] | None = None

        def write(data: memoryview | bytes) -> None:
            nonlocal unsynced_bytes, syncing
            view = memoryview(data)
            done = 0
            while done < len(view):
                done += file.write(view[done : done + BLOCK_BYTES])
                unsynced_bytes += BLOCK_BYTES
                if unsynced_bytes >= _SYNC_BYTES and (syncing is None or syncing.done()):
                    if syncing is not None:
                        syncing.result()
                    unsynced_bytes = 0
                    syncing = background.submit(os.fsync, file.fileno())

        yield write
        if syncing is not None:
            syncing.result()
        os.fsync(file.fileno())


def write_parts(write: Write, name: str, info: TensorInfo, parts: Parts) -> None:
    """Write the bytes of one tensor as its parts give them."""
    num_bytes = 0
    for part in parts(name):
        assert part.dtype == info.dtype, name
        num_bytes += part.nbytes
        write(as_bytes(part))
    assert num_bytes == info.num_bytes, name
