"""One .safetensors file: mapped into memory for reading, streamed for writing.

The format is an 8-byte little-endian header length, a JSON header padded with spaces, and the tensors' bytes
without gaps (the safetensors README). Reading copies nothing: tensors are views of the mapping, and a slice
touches only its own pages.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ostro.errors import WeightsError
from ostro.weights.mapped import MappedFile, Parts, write_parts, writing
from ostro.weights.store import TensorInfo, Where, printable

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
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_DAMAGED = "the file is damaged or is not a safetensors file; fetch or write it again"


class SafetensorsFile:
    """An open file: `infos` by name, views of its tensors, and the strings of its `__metadata__`.

    Raises WeightsError for a file that is missing, truncated, or whose header contradicts itself or the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped = MappedFile(path)
        header, self._start = _read_header(self._mapped)
        found = header.pop("__metadata__", None)
        self.metadata: dict[str, Any] = found if isinstance(found, dict) else {}
        self.infos, self._offsets = _entries(header, self._mapped.num_bytes - self._start, path)

    def tensor(self, name: str, where: Where = ()) -> Tensor:
        """Return a tensor or a slice of it, a view of the mapped file."""
        info = self.infos[name]
        return self._mapped.tensor(self._start + self._offsets[name], info.shape, info.dtype)[where]


def write_file(
    path: Path, infos: Mapping[str, TensorInfo], parts: Parts, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the tensors in the order of `infos`, one part after another; `metadata` is {"format": "pt"} unless given.

    OSError is the caller's, who knows what to clean up.
    """
    words = {dtype: word for word, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for name, info in infos.items():
        begin, end = end, end + info.num_bytes
        header[name] = {"dtype": words[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with writing(path) as write:
        write(struct.pack("<Q", len(text)) + text)
        for name, info in infos.items():
            write_parts(write, name, info, parts)


def _read_header(mapped: MappedFile) -> tuple[dict[str, Any], int]:
    """Return the parsed header and where the tensors' bytes start."""
    path, num_bytes = mapped.path, mapped.num_bytes
    if num_bytes < 8:
        raise WeightsError(f"{path} has {num_bytes} bytes, too few for a safetensors file: {_DAMAGED}.")
    (length,) = struct.unpack("<Q", mapped.data[:8])
    if length > min(num_bytes - 8, _MAX_HEADER_BYTES):
        raise WeightsError(
            f"{path} announces a header of {length} bytes, the file has {num_bytes - 8} after it: {_DAMAGED}."
        )
    try:
        header = json.loads(mapped.data[8 : 8 + length], object_pairs_hook=_refuse_duplicates)
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
        raise ValueError(f"{printable(twice)} stands there twice")
    return result


def _entries(header: dict[str, Any], data_bytes: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """Return shape and dtype, and the offset behind the header, of every tensor; gaps are an error."""
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
    if not name.isprintable():
        raise WeightsError(f"{path} has a tensor named {name!r}: {_DAMAGED}.")
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
