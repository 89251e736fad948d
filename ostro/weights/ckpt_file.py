"""One MindSpore .ckpt file: mapped into memory for reading, streamed for writing.

The file is one protobuf message, `Checkpoint`, in as many records as it has values: a tag, and a tensor of dims, a type
word and little-endian bytes (mindspore/train/checkpoint.proto). A tensor over 512 MiB comes in several values that
follow each other, each with its tag and all of its dims. A file saved with `crc_check` ends in `crc_num` and a CRC-32.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ostro.errors import WeightsError
from ostro.weights import wire
from ostro.weights.mapped import BLOCK_BYTES, MappedFile, Parts, Write, write_parts, writing
from ostro.weights.store import Shape, TensorInfo, Where

DTYPES = {
    "Int8": torch.int8,
    "UInt8": torch.uint8,
    "Int16": torch.int16,
    "UInt16": torch.uint16,
    "Int32": torch.int32,
    "UInt32": torch.uint32,
    "Int64": torch.int64,
    "UInt64": torch.uint64,
    "Float16": torch.float16,
    "Float32": torch.float32,
    "Float64": torch.float64,
    "BFloat16": torch.bfloat16,
    "Bool": torch.bool,
}
RECORD_BYTES = 512 << 20  # MindSpore's SLICE_SIZE: no value holds more
_WORDS = {dtype: word for word, dtype in DTYPES.items()}
_STRING = "str"
_MAP = "maptensor"
_CRC_MARK = b"crc_num"
_CRC_BYTES = len(_CRC_MARK) + 10
# Before each encrypted block, little-endian: 0x7F3A5ED8 for AES-GCM, …D9 for AES-CBC, …DA for SM4-CBC (crypto.h).
_ENCRYPTED = {bytes((low, 0x5E, 0x3A, 0x7F)) for low in (0xD8, 0xD9, 0xDA)}
_MAX_DIMS = 32
_DAMAGED = "the file is damaged or is not a MindSpore checkpoint; copy or save it again"

Scalar = int | float | bool | str


@dataclasses.dataclass
class _Entry:
    """A value of the file: MindSpore's type word, dims, and where its bytes lie, piece after piece."""

    word: str
    dims: Shape
    pieces: list[tuple[int, int]]

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size in self.pieces)


class CkptFile:
    """An open file: `infos` by name, its tensors, its `strings`, and what it holds beyond these in `unsupported`.

    `unsupported` gives MindSpore's type word of entries that torch has no type for (Int4, Complex64, map tensors);
    they may be there, only not be asked for. Of a name that comes again later the last one counts, as in MindSpore;
    values of one name that follow each other are pieces of one tensor, and must make it up exactly. (MindSpore would
    drop what is too much: from here a doubled entry and a damaged one look the same.)

    Raises WeightsError for a file that is missing, encrypted, truncated, or that contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped = MappedFile(path)
        data, num_bytes = self._mapped.data, self._mapped.num_bytes
        if data[:4] in _ENCRYPTED:
            raise WeightsError(
                f"{path} is encrypted (enc_key): load it in MindSpore with dec_key and save it again without a key."
            )
        # Stripped whenever it looks like one, for MindSpore does so too.
        trailer = data[max(0, num_bytes - _CRC_BYTES) : num_bytes]
        has_crc = len(trailer) == _CRC_BYTES and trailer.startswith(_CRC_MARK)
        self._crc = int.from_bytes(trailer[len(_CRC_MARK) :], "big") if has_crc else None
        self._end = num_bytes - _CRC_BYTES if has_crc else num_bytes
        entries = _scan(self._mapped, self._end)
        self.infos: dict[str, TensorInfo] = {}
        self.strings: dict[str, str] = {}
        self.unsupported: dict[str, str] = {}
        self._pieces = {name: entry.pieces for name, entry in entries.items()}
        for name, entry in entries.items():
            if entry.word == _STRING:
                self.strings[name] = self._string(name, entry)
            elif entry.word in DTYPES:
                self.infos[name] = _info(name, entry, path)
            else:
                self.unsupported[name] = entry.word

    def tensor(self, name: str, where: Where = ()) -> Tensor:
        """Return a tensor or a slice of it.

        It is a view of the mapped file, unless it reaches over a boundary of the pieces that a tensor over 512 MiB
        comes in: then it is a copy of as much as leading indexes and one slice after them name. Raises WeightsError
        for an entry of `unsupported`.
        """
        if name in self.unsupported:
            raise WeightsError(
                f"{self.path} holds {name} as {self.unsupported[name]}, which Ostro cannot read: "
                "leave it out, or convert it in MindSpore first."
            )
        info, pieces = self.infos[name], self._pieces[name]
        if len(pieces) == 1:
            return self._mapped.tensor(pieces[0][0], info.shape, info.dtype)[where]
        start, shape, rest = _narrow(info.shape, where)
        return self._span(pieces, start * info.dtype.itemsize, TensorInfo(shape, info.dtype))[rest]

    def check_crc(self) -> bool:
        """Read the whole file and compare its checksum: True if it agrees, False if the file has none.

        Raises WeightsError if it differs.
        """
        if self._crc is None:
            return False
        crc = 0
        with memoryview(self._mapped.data) as view:
            for start in range(0, self._end, BLOCK_BYTES):
                crc = zlib.crc32(view[start : min(start + BLOCK_BYTES, self._end)], crc)
        if crc != self._crc:
            raise WeightsError(
                f"{self.path} has the checksum {crc:08x} where its last bytes say {self._crc:08x}: "
                "the file is damaged; copy or save it again."
            )
        return True

    def _span(self, pieces: list[tuple[int, int]], start: int, info: TensorInfo) -> Tensor:
        """Return the tensor `info` that starts `start` bytes into the pieces."""
        stop = start + info.num_bytes
        out = None
        for offset, size in pieces:
            begin, end = max(start, 0), min(stop, size)
            if begin < end:
                if end - begin == info.num_bytes:
                    return self._mapped.tensor(offset + begin, info.shape, info.dtype)
                out = torch.empty(info.num_bytes, dtype=torch.uint8) if out is None else out
                target = out[begin - start : end - start]
                target.copy_(self._mapped.tensor(offset + begin, (end - begin,), torch.uint8))
            start, stop = start - size, stop - size
        return torch.empty(info.shape, dtype=info.dtype) if out is None else out.view(info.dtype).view(info.shape)

    def _string(self, name: str, entry: _Entry) -> str:
        found = b"".join(self._mapped.data[offset : offset + size] for offset, size in entry.pieces)
        try:
            return found.decode("utf-32-le").rstrip("\0")  # numpy pads with zeros, and cannot hold them at the end
        except UnicodeDecodeError:
            raise WeightsError(
                f"{self.path} holds the string {name} in bytes that are no UTF-32: {_DAMAGED}."
            ) from None


def write_ckpt(
    path: Path,
    infos: Mapping[str, TensorInfo],
    parts: Parts,
    *,
    scalars: Mapping[str, Scalar] | None = None,
    crc: bool = False,
) -> None:
    """Write the tensors in the order of `infos`, then the scalars, in the bytes of `mindspore.save_checkpoint`.

    `scalars` are what it takes as `append_dict`: whole numbers become Int64, others Float32. Tensors without elements
    are left out, as MindSpore does. OSError is the caller's, who knows what to clean up.
    """
    scalars = scalars or {}
    assert not infos.keys() & scalars.keys()
    with writing(path) as append:
        total = 0

        def write(data: memoryview | bytes) -> None:
            nonlocal total
            if crc:
                total = zlib.crc32(data, total)
            append(data)

        for name, info in infos.items():
            write_parts(_in_records(write, name, info), name, info, parts)
        for name, value in scalars.items():
            _write_scalar(write, name, value)
        if crc:
            append(_CRC_MARK + total.to_bytes(_CRC_BYTES - len(_CRC_MARK), "big"))


def _scan(mapped: MappedFile, end: int) -> dict[str, _Entry]:
    """Return every entry of the file; only the pages with a record's head are read."""
    entries: dict[str, _Entry] = {}
    last_name, last = None, None
    try:
        for record in wire.fields(mapped.data, 0, end):
            if (record.number, record.wire) != (1, wire.BYTES):
                continue
            name, entry = _read_value(mapped.data, record)
            if last is not None and name == last_name:
                if (entry.word, entry.dims) != (last.word, last.dims):
                    raise ValueError(f"the pieces of {name} differ in shape or type")
                last.pieces += entry.pieces
            else:
                entries[name] = last = entry
                last_name = name
    except ValueError as error:
        raise WeightsError(f"{mapped.path} cannot be read as a MindSpore checkpoint ({error}): {_DAMAGED}.") from None
    if not entries:
        raise WeightsError(f"{mapped.path} holds no entry: it is empty or is not a MindSpore checkpoint.")
    return entries


def _read_value(data: wire.Buffer, record: wire.Field) -> tuple[str, _Entry]:
    """Parse one `Value`: its tag, and a tensor or a map tensor."""
    found = _single(wire.fields(data, record.start, record.stop), {1: "tag", 2: "tensor", 3: _MAP})
    if "tag" not in found or ("tensor" in found) == (_MAP in found):
        raise ValueError(f"byte {record.start} starts an entry without a name or a tensor")
    name = wire.text(data, found["tag"])
    if not name.isprintable():
        raise ValueError(f"byte {record.start} starts an entry named {name!r}")
    if _MAP in found:
        return name, _Entry(_MAP, (), [])
    inner = list(wire.fields(data, found["tensor"].start, found["tensor"].stop))
    if sum(f.stop - f.start for f in inner if f.number == 1 and f.wire == 2) > _MAX_DIMS * 10:  # bytes of a varint
        raise ValueError(f"{name} has too many dims")
    dims = [wire.signed(d, 64) for f in inner if f.number == 1 and f.wire in (0, 2) for d in wire.varints(data, f)]
    found = _single(inner, {2: "type", 3: "content"})
    if len(found) != 2:
        raise ValueError(f"{name} has no type or no content")
    word = wire.text(data, found["type"])
    if not word.isprintable():
        raise ValueError(f"{name} is of type {word!r}")
    start, stop = found["content"].start, found["content"].stop
    return name, _Entry(word, tuple(dims), [(start, stop - start)])


def _single(found: Iterable[wire.Field], wanted: Mapping[int, str]) -> dict[str, wire.Field]:
    """Return the fields of bytes with these numbers by their names; ValueError if one is there twice."""
    result: dict[str, wire.Field] = {}
    for field in found:
        name = wanted.get(field.number)
        if name is None or field.wire != wire.BYTES:
            continue
        if name in result:
            raise ValueError(f"byte {field.start} gives an entry its {name} a second time")
        result[name] = field
    return result


def _info(name: str, entry: _Entry, path: Path) -> TensorInfo:
    """Return shape and dtype of an entry, whose bytes must be as many as they need."""
    dtype, shape, num_bytes = DTYPES[entry.word], entry.dims, entry.num_bytes
    if shape == (0,) and num_bytes == dtype.itemsize:
        shape = ()  # how old versions wrote scalars
    # torch counts elements, strides of empty tensors included, in 63 bits.
    if min(shape, default=0) < 0 or len(shape) > _MAX_DIMS or math.prod(max(dim, 1) for dim in shape) >> 59:
        raise WeightsError(f"{path} gives {name} the dims {_shown(shape)}, which no tensor has: {_DAMAGED}.")
    info = TensorInfo(shape, dtype)
    if num_bytes != info.num_bytes:
        count = f" in {len(entry.pieces)} pieces" if len(entry.pieces) > 1 else ""
        raise WeightsError(
            f"{path} gives {name} {num_bytes} bytes{count}, its shape {_shown(shape)} as {entry.word} takes "
            f"{info.num_bytes}: {_DAMAGED}."
        )
    return info


def _shown(shape: Shape) -> str:
    return str(list(shape[:8])).replace("]", ", …]" if len(shape) > 8 else "]")


def _narrow(shape: Shape, where: Where) -> tuple[int, Shape, Where]:
    """Return a run of elements that holds `tensor[where]`: its start, its shape, and what is left to index in it.

    Leading indexes and one slice of step 1 after them are resolved; what follows is left.
    """
    start = 0
    for dim, index in enumerate(where):
        picked, stride = range(shape[dim])[index], math.prod(shape[dim + 1 :])
        if isinstance(picked, int):
            start += picked * stride
        elif picked.step == 1:
            rest = (slice(None), *where[dim + 1 :])
            return start + picked.start * stride, (len(picked), *shape[dim + 1 :]), rest
        else:
            return start, shape[dim:], where[dim:]
    return start, shape[len(where) :], ()


def _in_records(write: Write, name: str, info: TensorInfo) -> Write:
    """Return a `write` of the bytes of one tensor that puts a record's head before every 512 MiB of them."""
    left, room = info.num_bytes, 0

    def write_bytes(data: memoryview | bytes) -> None:
        nonlocal left, room
        view = memoryview(data)
        while view:
            if not room:
                room = min(left, RECORD_BYTES)
                left -= room
                write(_head(name, info.shape, _WORDS[info.dtype], room))
            cut, view = view[:room], view[room:]
            room -= len(cut)
            write(cut)

    return write_bytes


def _write_scalar(write: Write, name: str, value: Scalar) -> None:
    if isinstance(value, str):
        data = value.encode("utf-32-le") or b"\0" * 4  # numpy has no string of no bytes
        write(_head(name, (0,), _STRING, len(data)) + data)
        return
    dtype = {bool: torch.bool, int: torch.int64, float: torch.float32}[type(value)]
    tensor = torch.tensor(value, dtype=dtype)
    info = TensorInfo((), dtype)
    write_parts(_in_records(write, name, info), name, info, lambda _: [tensor])


def _head(name: str, dims: Shape, word: str, num_bytes: int) -> bytes:
    """Return a record up to the `num_bytes` of its content."""
    tensor = wire.numbers(1, dims) + wire.content(2, word.encode()) + wire.head(3, num_bytes)
    value = wire.content(1, name.encode()) + wire.head(2, len(tensor) + num_bytes) + tensor
    return wire.head(1, len(value) + num_bytes) + value
