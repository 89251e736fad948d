"""One .safetensors file: mapped into memory for reading, streamed for writing.

The format is an 8-byte little-endian header length, a JSON header padded with spaces, and the tensors' bytes
without gaps (the safetensors README). Reading copies nothing: tensors are views of the mapping, and a slice
touches only its own pages.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ostro.errors import WeightsError
from ostro.weights.store import TensorInfo, as_bytes

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
BLOCK_BYTES = 1 << 20  # 1 MiB buffers copy six times faster than 128 MB ones
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_DAMAGED = "the file is damaged or is not a safetensors file; fetch or write it again"

# Private, so that a write into a tensor by mistake changes this process alone; not reserved, so that a file
# larger than the memory can be mapped. Python < 3.13 does not name the second flag.
_MAP_FLAGS = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class SafetensorsFile:
    """An open file: `infos` by name, and views of its tensors.

    Raises WeightsError for a file that is missing, truncated, or whose header contradicts itself or the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                num_bytes = file.seek(0, 2)
                file.seek(0)
                header, start = _read_header(file.read, num_bytes, path)
                self.infos, self._offsets = _entries(header, num_bytes - start, path)
                self._start = start
                self._bytes = _map(file.fileno(), num_bytes)
        except OSError as error:
            raise WeightsError(f"{path} cannot be read ({error.strerror or error}): check the path.") from error

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, a view of the mapped file: index it to read only a part."""
        info, offset = self.infos[name], self._start + self._offsets[name]
        raw = self._bytes[offset : offset + info.num_bytes]
        if offset % info.dtype.itemsize:
            raw = raw.clone()  # a view must start at a multiple of the item; not every writer pads its header
        return raw.view(info.dtype).view(info.shape)


def write_file(path: Path, infos: Mapping[str, TensorInfo], tensor: Callable[[str], Tensor]) -> None:
    """Write the tensors in the order of `infos`, asking `tensor(name)` for one after another.

    Only one tensor is held at a time. OSError is the caller's, who knows what to clean up.
    """
    words = {dtype: word for word, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in infos.items():
        begin, end = end, end + info.num_bytes
        header[name] = {"dtype": words[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        _write_all(file.write, memoryview(struct.pack("<Q", len(text)) + text))
        for name, info in infos.items():
            value = tensor(name)
            assert (tuple(value.shape), value.dtype) == (info.shape, info.dtype), name
            _write_all(file.write, as_bytes(value))


def _write_all(write: Callable[[memoryview], int | None], data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += write(data[done : done + BLOCK_BYTES]) or 0


def _map(descriptor: int, num_bytes: int) -> Tensor:
    mapped = mmap.mmap(descriptor, num_bytes, flags=_MAP_FLAGS, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.frombuffer(mapped, dtype=torch.uint8)


def _read_header(read: Callable[[int], bytes], num_bytes: int, path: Path) -> tuple[dict[str, Any], int]:
    """Return the parsed header and where the tensors' bytes start."""
    if num_bytes < 8:
        raise WeightsError(f"{path} has {num_bytes} bytes, too few for a safetensors file: {_DAMAGED}.")
    (length,) = struct.unpack("<Q", read(8))
    if length > min(num_bytes - 8, _MAX_HEADER_BYTES):
        raise WeightsError(
            f"{path} announces a header of {length} bytes, the file has {num_bytes - 8} after it: {_DAMAGED}."
        )
    try:
        header = json.loads(read(length), object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} has a header that is not sound JSON ({error}): {_DAMAGED}.") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path} has a header that is not a JSON object: {_DAMAGED}.")
    return header, 8 + length


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} stands there twice")
    return result


def _entries(header: dict[str, Any], data_bytes: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """Return shape and dtype, and the offset behind the header, of every tensor; gaps are an error."""
    header.pop("__metadata__", None)
    infos: dict[str, TensorInfo] = {}
    spans: dict[str, tuple[int, int]] = {}
    for name, entry in header.items():
        infos[name], spans[name] = _entry(name, entry, path)
    end = 0
    for name, (begin, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != end:
            raise WeightsError(f"{path} puts {name} at byte {begin}, the one before it ends at {end}: {_DAMAGED}.")
        end = stop
    if end > data_bytes:
        raise WeightsError(
            f"{path} is truncated: its header describes {end} bytes of tensors, {data_bytes} are there; "
            "the download or copy is probably incomplete."
        )
    if end < data_bytes:
        raise WeightsError(f"{path} has {data_bytes - end} bytes that no tensor of its header covers: {_DAMAGED}.")
    return infos, {name: begin for name, (begin, _) in spans.items()}


def _entry(name: str, entry: Any, path: Path) -> tuple[TensorInfo, tuple[int, int]]:
    fields = entry if isinstance(entry, dict) else {}
    word, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise WeightsError(f"{path} describes {name} without a sound shape and data_offsets: {_DAMAGED}.")
    if not isinstance(word, str) or word not in DTYPES:
        raise WeightsError(f"{path} holds {name} as {word!r}; Ostro reads {', '.join(DTYPES)}: convert it first.")
    begin, stop = offsets
    expected = math.prod(shape) * DTYPES[word].itemsize
    if stop - begin != expected:
        raise WeightsError(
            f"{path} gives {name} {stop - begin} bytes, its shape {shape} as {word} takes {expected}: {_DAMAGED}."
        )
    return TensorInfo(tuple(shape), DTYPES[word]), (begin, stop)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in value
    )
