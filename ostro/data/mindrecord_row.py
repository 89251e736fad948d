"""The bytes of one MindRecord row: arrays of narrow integers in the blob, single values in MessagePack.

The layout is MindSpore's (mindspore/ccsrc/minddata/mindrecord), found from the files that 2.10 writes.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

NUMBERS = {"int32": np.dtype("<i4"), "int64": np.dtype("<i8"), "float32": np.dtype("<f4"), "float64": np.dtype("<f8")}
TYPES = (*NUMBERS, "string", "bytes")

# A number of code c has 2^c bytes. Four codes share a byte, the first in its top bits: here they are, by that byte.
_SHIFTS = np.array([6, 4, 2, 0], np.uint8)
_CODES = np.arange(256, dtype=np.uint8)[:, None] >> _SHIFTS & 3


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """A column of a schema: `shape` is an array's, with one -1 where its length is free, and None for one value."""

    name: str
    type: str
    shape: tuple[int, ...] | None = None

    @property
    def is_blob(self) -> bool:
        """Whether its values lie in the blob pages."""
        return self.shape is not None or self.type == "bytes"


def pack_row(columns: Sequence[Column], arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the blob of a row of number arrays; the columns are sorted by name, the arrays of their types."""
    packed = [_pack(arrays[column.name]) for column in columns]
    if len(packed) == 1:
        return packed[0]
    return b"".join(part for data in packed for part in (len(data).to_bytes(8, "big"), data))


def unpack_row(columns: Sequence[Column], blob: np.ndarray, raw: bytes) -> dict[str, np.ndarray]:
    """Return a row's columns, each in memory of its own; single values have no dims, bytes are uint8 [n].

    `blob` is uint8 [n]. Raises ValueError with what is wrong where the bytes are no such row.
    """
    parts = _split(blob, sum(column.is_blob for column in columns))
    values = _unpack_values(raw) if not all(column.is_blob for column in columns) else {}
    row = {}
    for column in columns:
        try:
            row[column.name] = _array(column, next(parts)) if column.is_blob else _value(column, values)
        except ValueError as error:
            raise ValueError(f"column {column.name!r}: {error}") from None
    return row


def _split(blob: np.ndarray, num_parts: int) -> Iterator[np.ndarray]:
    """Yield each column's bytes: all of them for one, else each behind its length."""
    if num_parts == 1:
        yield blob
        return
    at = 0
    for last in (i == num_parts - 1 for i in range(num_parts)):
        size = int.from_bytes(blob[at : at + 8].tobytes(), "big")
        if blob.size - at < 8 or size > blob.size - at - 8 or (last and size != blob.size - at - 8):
            raise ValueError(f"{size} bytes from byte {at} do not fit its {blob.size} bytes")
        yield blob[at + 8 : at + 8 + size]
        at += 8 + size


def _array(column: Column, data: np.ndarray) -> np.ndarray:
    if column.type == "bytes":
        return data.copy()
    dtype = NUMBERS[column.type]
    if dtype.kind == "i":
        found = _unpack_integers(data, dtype)
    elif data.size % dtype.itemsize:
        raise ValueError(f"{data.size} bytes are no whole number of {column.type}")
    else:
        found = np.frombuffer(data.tobytes(), dtype).copy()
    return found.reshape(column.shape or ())


def _pack(array: np.ndarray) -> bytes:
    """Return an array's bytes: floats as they are; integers as their count, widths of 2 bits, and narrowest forms."""
    flat = array.reshape(-1)
    if flat.dtype.kind == "f":
        return flat.tobytes()
    size = flat ^ (flat >> 63 if flat.itemsize == 8 else flat >> 31)  # x or, below zero, -1 - x: both need as much
    codes = (size > 0x7F).astype(np.uint8)
    codes += size > 0x7FFF
    codes += size > 0x7FFF_FFFF
    padded = np.zeros(-(-flat.size // 4) * 4, np.uint8)
    padded[: flat.size] = codes
    ends = np.cumsum(np.left_shift(1, codes, dtype=np.int64))
    values = np.empty(ends[-1] if flat.size else 0, np.uint8)
    for code in range(int(codes.max(initial=0)) + 1):
        chosen, width = np.flatnonzero(codes == code), 1 << code
        if chosen.size:
            _at_any_byte(values, width)[ends[chosen] - width] = flat[chosen]
    packed = np.bitwise_or.reduce(padded.reshape(-1, 4) << _SHIFTS, axis=1).astype(np.uint8)
    return b"".join((flat.size.to_bytes(4, "big"), packed.tobytes(), values.tobytes()))


def _unpack_integers(data: np.ndarray, dtype: np.dtype) -> np.ndarray:
    count = int.from_bytes(data[:4].tobytes(), "big")
    start = 4 + -(-count // 4)
    if data.size < start + count:  # before anything of that size is made
        raise ValueError(f"{count} numbers do not fit its {data.size} bytes")
    codes = _CODES[data[4:start]].reshape(-1)[:count]
    ends = np.cumsum(np.left_shift(1, codes, dtype=np.int64))
    values = data[start:]
    if values.size != (ends[-1] if count else 0):
        raise ValueError(f"{count} numbers should take {ends[-1] if count else 0} bytes, and it has {values.size}")
    found = np.empty(count, dtype)
    for code in range(int(codes.max(initial=0)) + 1):
        chosen, width = np.flatnonzero(codes == code), 1 << code
        if width > dtype.itemsize:
            raise ValueError(f"a number of {width} bytes is no {dtype.name}")
        if chosen.size:
            found[chosen] = _at_any_byte(values, width)[ends[chosen] - width]
    return found


def _at_any_byte(data: np.ndarray, width: int) -> np.ndarray:
    """View bytes as overlapping integers, one that starts at each byte."""
    return np.ndarray((data.size - width + 1,), f"<i{width}", buffer=data, strides=(1,))


# MessagePack, as much of it as a row's single values need: how a number behind its first byte is unpacked.
_PACKED = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_STRINGS = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
_MAPS = {0xDE: ">H", 0xDF: ">I"}


def _unpack_values(data: bytes) -> dict[str, int | float | str]:
    """Return the map of names to numbers and strings that `data` is, no byte more."""
    try:
        num_pairs, at = _length(data, 0, _MAPS, 0x80, 0x0F)
        found: dict[str, int | float | str] = {}
        for _ in range(num_pairs):
            name, at = _unpack_value(data, at)
            found[str(name)], at = _unpack_value(data, at)
    except (struct.error, IndexError):
        raise ValueError(f"its values are cut off after {len(data)} bytes") from None
    if at != len(data):
        raise ValueError(f"its values end at byte {at} of {len(data)}")
    return found


def _unpack_value(data: bytes, at: int) -> tuple[int | float | str, int]:
    first = data[at]
    if first < 0x80 or first >= 0xE0:
        return first - 256 * (first >= 0xE0), at + 1
    if form := _PACKED.get(first):
        return struct.unpack_from(form, data, at + 1)[0], at + 1 + struct.calcsize(form)
    size, at = _length(data, at, _STRINGS, 0xA0, 0x1F)
    if at + size > len(data):
        raise IndexError
    return str(data[at : at + size], "utf-8"), at + size  # no UTF-8 is a ValueError too


def _length(data: bytes, at: int, forms: Mapping[int, str], short: int, mask: int) -> tuple[int, int]:
    """Return how long the map or string at `at` is, and where its contents start."""
    first = data[at]
    if first & ~mask == short:
        return first & mask, at + 1
    if first not in forms:
        raise ValueError(f"byte 0x{first:02x} at {at} is no value")
    return struct.unpack_from(forms[first], data, at + 1)[0], at + 1 + struct.calcsize(forms[first])


def _value(column: Column, values: Mapping[str, int | float | str]) -> np.ndarray:
    if column.name not in values:
        raise ValueError("it is missing")
    value = values[column.name]
    if column.type == "string":
        is_right = isinstance(value, str)
    elif column.type.startswith("int"):
        is_right = isinstance(value, int) and -(1 << (bits := int(column.type[3:]) - 1)) <= value < 1 << bits
    else:
        is_right = isinstance(value, int | float)
    if not is_right:
        raise ValueError(f"{str(value)[:40]!r} is no {column.type}")
    with np.errstate(over="ignore"):  # what no float32 holds is infinite
        return np.array(value, dtype=NUMBERS.get(column.type))
