"""The wire format of protobuf messages, as far as MindSpore's files need it: no schema, no dependency.

A message is a run of fields; each is a varint key (field number × 8 + wire type) and a value. Unsound bytes raise
ValueError, which the callers turn into a sentence about their file. Source: protobuf's encoding specification.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from typing import NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {FIXED64: 8, FIXED32: 4}
_VARINT_BYTES = 10
_MASK = (1 << 64) - 1

Buffer = mmap.mmap | bytes


class Field(NamedTuple):
    """One field of a message: `value` of a varint, else the bytes from `start` to `stop` of the buffer."""

    number: int
    wire: int
    value: int
    start: int
    stop: int


def fields(data: Buffer, start: int, stop: int) -> Iterator[Field]:
    """Yield the fields of the message between two offsets; lengths are checked, contents are not touched."""
    at = start
    while at < stop:
        begin = at
        key, at = _read_varint(data, at, stop)
        number, wire = key >> 3, key & 7
        value, after = 0, at
        if wire == VARINT:
            value, after = _read_varint(data, at, stop)
        elif wire == BYTES:
            size, at = _read_varint(data, at, stop)
            after = at + size
        elif wire in _FIXED_BYTES:
            after = at + _FIXED_BYTES[wire]
        else:
            raise ValueError(f"byte {begin} starts a field of the unknown wire type {wire}")
        if not number:
            raise ValueError(f"byte {begin} starts a field with the number 0")
        if after > stop:
            raise ValueError(f"byte {begin} starts a field whose {after - at} bytes end {after - stop} too late")
        yield Field(number, wire, value, at, after)
        at = after


def text(data: Buffer, field: Field) -> str:
    """Return the content of a field as a string; ValueError unless it is UTF-8."""
    return data[field.start : field.stop].decode("utf-8")


def varints(data: Buffer, field: Field) -> list[int]:
    """Return the numbers that one field adds to a repeated one: itself, or all that are packed in it."""
    if field.wire == VARINT:
        return [field.value]
    found, at = [], field.start
    while at < field.stop:
        value, at = _read_varint(data, at, field.stop)
        found.append(value)
    return found


def signed(value: int, bits: int) -> int:
    """Return a varint as protobuf's intN: the low bits, as two's complement."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def varint(value: int) -> bytes:
    """Return the bytes of a number; a negative one takes ten."""
    value &= _MASK
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field: int, value: int) -> bytes:
    """Return a field that holds a number."""
    return varint(field << 3 | VARINT) + varint(value)


def numbers(field: int, values: Iterable[int]) -> bytes:
    """Return a repeated field of numbers, one key each, as proto2 writes them."""
    return b"".join(number(field, value) for value in values)


def head(field: int, num_bytes: int) -> bytes:
    """Return what comes before the `num_bytes` of a field's content."""
    return varint(field << 3 | BYTES) + varint(num_bytes)


def content(field: int, data: bytes) -> bytes:
    """Return a field that holds bytes: a string, or a message."""
    return head(field, len(data)) + data


def _read_varint(data: Buffer, at: int, stop: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 7 * _VARINT_BYTES, 7):
        if at >= stop:
            raise ValueError(f"byte {at} is where a number goes on and its message ends")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"byte {at} is where a number goes on beyond its ten bytes")
