"""One .gguf file: mapped into memory for reading, streamed for writing.

The format is a header (magic, version, counts), typed key-value pairs, one description a tensor, and the tensors'
bytes, each padded to the file's alignment (ggml's docs/gguf.md). Shapes stand there in reverse: the dim that is
contiguous comes first. Quantised tensors are blocks of 32 values of a row with one fp16 scale.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ostro.errors import WeightsError
from ostro.weights.mapped import MappedFile, write_parts, writing
from ostro.weights.store import Shape, TensorInfo, Where, cast, require_finite

if TYPE_CHECKING:
    from gguf import GGUFWriter

MAGIC = b"GGUF"
ALIGNMENT = 32
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_MAX_KEY_BYTES = 1 << 16  # the format's own limit
_MAX_TEXT_BYTES = 1 << 24  # a chat template has some thousand
_TEXT, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_DAMAGED = "the file is damaged or is not a GGUF file; fetch or write it again"

Value = int | float | bool | str


@dataclasses.dataclass(frozen=True)
class Kind:
    """One of ggml's tensor types: its number, the dtype it is read as, and the size of its blocks."""

    word: str
    number: int
    dtype: torch.dtype
    block_values: int = 1
    block_bytes: int = 0  # 0 means one item of the dtype, and is replaced by it

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_bytes", self.block_bytes or self.dtype.itemsize)

    @property
    def is_quantized(self) -> bool:
        return self.block_values > 1

    def fits(self, shape: Shape) -> bool:
        """Whether the rows of a tensor are whole blocks."""
        return not self.is_quantized or (bool(shape) and shape[-1] % self.block_values == 0)

    def num_bytes(self, shape: Shape) -> int:
        """Return the bytes that a tensor takes, padding not counted."""
        return math.prod(shape) // self.block_values * self.block_bytes


F32, F16, BF16 = Kind("F32", 0, torch.float32), Kind("F16", 1, torch.float16), Kind("BF16", 30, torch.bfloat16)
Q4_0, Q8_0 = Kind("Q4_0", 2, torch.float32, 32, 18), Kind("Q8_0", 8, torch.float32, 32, 34)
KINDS = {kind.word: kind for kind in (F32, BF16, F16, Q8_0, Q4_0)}
_BY_NUMBER = {kind.number: kind for kind in KINDS.values()}
_LARGEST = {"Q4_0": 8 * 65504.0, "Q8_0": 127 * 65504.0}  # what a block's fp16 scale can still express
# Names for an error only.
_OTHERS = {
    **{3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"},
    **{15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S"},
    **{23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0"},
    **{39: "MXFP4", 40: "NVFP4"},
}


class Stored(NamedTuple):
    """Shape and type of a tensor in a file."""

    shape: Shape
    kind: Kind


class GgufFile:
    """An open file: `infos` and views of its tensors, its metadata, and its lists where they are asked for.

    A quantised tensor is presented as float32, and only the rows asked for are dequantised. A metadata number of
    32 bits is given as the shortest decimal that rounds to it. Raises WeightsError for a file that is missing,
    truncated, of another version or byte order, whose header contradicts itself or the file, and for tensors of
    a type that Ostro does not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped = MappedFile(path)
        cursor = _Cursor(self._mapped)
        num_tensors, num_pairs = _read_counts(cursor)
        self.metadata: dict[str, Value] = {}
        self._lists: dict[str, _List] = {}
        for _ in range(num_pairs):
            self._read_pair(cursor)
        self.stored: dict[str, Stored] = {}
        offsets: dict[str, int] = {}
        for _ in range(num_tensors):
            name, self.stored[name], offsets[name] = _read_tensor(cursor, self.stored)
        self._offsets = _placed(cursor, self.stored, offsets, self._alignment())
        self.infos = {name: TensorInfo(held.shape, held.kind.dtype) for name, held in self.stored.items()}

    def tensor(self, name: str, where: Where = ()) -> Tensor:
        """Return a tensor or a slice of it: a view of the mapped file, or dequantised rows."""
        shape, kind = self.stored[name]
        if not kind.is_quantized:
            return self._mapped.tensor(self._offsets[name], shape, kind.dtype)[where]
        row_bytes = kind.num_bytes(shape[-1:])
        raw = self._mapped.tensor(self._offsets[name], (*shape[:-1], row_bytes), torch.uint8)
        lead = len(shape) - 1
        rows = dequantize(raw[where[:lead]], kind)
        return rows[(..., *where[lead:])] if where[lead:] else rows

    def lists(self) -> dict[str, int]:
        """Return the lists of the metadata by name, and how many values each has."""
        return {key: held.num_values for key, held in self._lists.items()}

    def values(self, key: str) -> list[Value]:
        """Return the values of a list of the metadata."""
        held = self._lists[key]
        cursor = _Cursor(self._mapped, held.at)
        return [cursor.value(held.type, key) for _ in range(held.num_values)]

    def _read_pair(self, cursor: _Cursor) -> None:
        key = cursor.text("a key", _MAX_KEY_BYTES)
        if not key or not key.isprintable() or key in self.metadata or key in self._lists:
            fault = f"the key {key} twice" if key.isprintable() else f"a key named {key!r}"
            raise WeightsError(f"{self.path} has {fault if key else 'an empty key'}: {_DAMAGED}.")
        type = cursor.number("I", key)
        if type != _ARRAY:
            self.metadata[key] = cursor.value(type, key)
            return
        type, count = cursor.number("I", key), cursor.number("Q", key)
        self._lists[key] = _List(type, count, cursor.at)
        cursor.skip(type, count, key)

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise WeightsError(f"{self.path} has general.alignment={alignment!r}, no power of two: {_DAMAGED}.")
        return alignment


def dequantize(raw: Tensor, kind: Kind) -> Tensor:
    """Return the float32 values of rows of blocks, uint8 [..., bytes]; exact, as the scale is fp16.

    The layouts are block_q8_0 and block_q4_0 of ggml-common.h: in the latter, low halves of the bytes come first.
    """
    blocks = raw.reshape(-1, kind.block_bytes)
    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    if kind is Q8_0:
        values = blocks[:, 2:].contiguous().view(torch.int8).float()
    else:
        halves = blocks[:, 2:]
        values = torch.cat((halves & 0x0F, halves >> 4), dim=1).to(torch.int8).sub_(8).float()
    return values.mul_(scale).view(*raw.shape[:-1], raw.shape[-1] // kind.block_bytes * kind.block_values)


def encode(tensor: Tensor, kind: Kind, what: str) -> Tensor:
    """Return a tensor as a type stores it; the bytes of a quantised one as uint8, by gguf's own arithmetic.

    Raises WeightsError, naming `what`, for values that the type cannot hold.
    """
    if not kind.is_quantized:
        return cast(tensor, kind.dtype, what)
    require_finite(tensor, what)
    largest = tensor.abs().max().item() if tensor.numel() else 0.0
    if largest > _LARGEST[kind.word]:
        raise WeightsError(
            f"{what} has values up to {largest:.3g} and {kind.word} holds {_LARGEST[kind.word]:.3g}: "
            "write it unquantised."
        )
    gguf = package()
    # A scale too small for fp16 becomes 0 and takes its block with it; its inverse may overflow on the way.
    with np.errstate(over="ignore", invalid="ignore"):
        number = gguf.GGMLQuantizationType(kind.number)
        return torch.from_numpy(gguf.quants.quantize(tensor.float().contiguous().numpy(), number))


def write_file(
    path: Path,
    architecture: str,
    describe: Callable[[GGUFWriter], None],
    tensors: Mapping[str, Stored],
    parts: Callable[[str], Iterable[Tensor]],
) -> None:
    """Write a file: `describe` adds the metadata, `parts` gives each tensor's encoded parts, in this order.

    OSError is the caller's, who knows what to clean up.
    """
    gguf = package()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_custom_alignment(ALIGNMENT)
    describe(writer)
    for name, (shape, kind) in tensors.items():
        number = gguf.GGMLQuantizationType(kind.number)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), kind.num_bytes(shape), number)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    # The package writes tensors only whole; its header goes first into our own stream, and their parts follow.
    header = path.read_bytes()
    with writing(path) as write:
        write(header + bytes(-len(header) % ALIGNMENT))
        for name, (shape, kind) in tensors.items():
            info = TensorInfo(shape, kind.dtype)
            num_bytes = kind.num_bytes(shape)
            if kind.is_quantized:
                info = TensorInfo((num_bytes,), torch.uint8)
            write_parts(write, name, info, parts)
            write(bytes(-num_bytes % ALIGNMENT))


def package() -> Any:
    """Return the package `gguf`; WeightsError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise WeightsError(
            "GGUF files are written with the package gguf, which is not installed: pip install 'ostro[gguf]'."
        ) from None
    return gguf


class _List(NamedTuple):
    """The type of a list's values, how many there are, and where they begin."""

    type: int
    num_values: int
    at: int


class _Cursor:
    """Reads a header from front to back; WeightsError at the end of the file."""

    def __init__(self, mapped: MappedFile, at: int = 0) -> None:
        self.mapped = mapped
        self.path = mapped.path
        self.at = at

    @property
    def left(self) -> int:
        return self.mapped.num_bytes - self.at

    def take(self, num_bytes: int, what: str) -> bytes:
        """Return the next bytes."""
        self.move(num_bytes, what)
        return self.mapped.data[self.at - num_bytes : self.at]

    def move(self, num_bytes: int, what: str) -> None:
        """Go past the next bytes."""
        if num_bytes > self.left:
            raise WeightsError(
                f"{self.path} has {self.left} bytes left where {what} takes {num_bytes}: "
                f"it is truncated, or {_DAMAGED}."
            )
        self.at += num_bytes

    def number(self, code: str, what: str) -> Any:
        """Return the next number; `code` is struct's."""
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))
        return value

    def text(self, what: str, limit: int = _MAX_TEXT_BYTES) -> str:
        """Return the next string; bytes that are no UTF-8 raise WeightsError."""
        num_bytes = self.number("Q", what)
        if num_bytes > limit:
            raise WeightsError(f"{self.path} announces {num_bytes} bytes of text for {what}: {_DAMAGED}.")
        try:
            return self.take(num_bytes, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise WeightsError(f"{self.path} has text that is no UTF-8 in {what} ({error}): {_DAMAGED}.") from error

    def value(self, type: int, what: str) -> Value:
        """Return the next value of a type."""
        if type == _TEXT:
            return self.text(what)
        code = self._code(type, what)
        value = self.number(code, what)
        # float32's shortest decimal: 1e-05, and not 9.999999747378752e-06.
        return float(str(np.float32(value))) if code == "f" else value

    def skip(self, type: int, count: int, what: str) -> None:
        """Go past the items of a list, looking at no more of them than their lengths."""
        if type != _TEXT:
            self.move(struct.calcsize("<" + self._code(type, what)) * count, what)
            return
        if count > self.left // 8:
            raise WeightsError(
                f"{self.path} announces {count} texts for {what}, more than it has room for: {_DAMAGED}."
            )
        for _ in range(count):
            self.move(self.number("Q", what), what)

    def _code(self, type: int, what: str) -> str:
        if type not in _SCALARS:
            raise WeightsError(f"{self.path} has a value of the unknown type {type} in {what}: {_DAMAGED}.")
        return _SCALARS[type]


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """Return how many tensors and key-value pairs follow."""
    path = cursor.path
    if cursor.left < 24 or cursor.take(len(MAGIC), "the magic") != MAGIC:
        raise WeightsError(f"{path} does not begin with a GGUF header: {_DAMAGED}.")
    version = cursor.number("I", "the version")
    if version and not version & 0xFFFF:
        raise WeightsError(f"{path} is a GGUF file of a big-endian machine: convert it with gguf-convert-endian first.")
    if version not in _VERSIONS:
        raise WeightsError(f"{path} is a GGUF file of version {version}; Ostro reads 2 and 3: write it again.")
    return cursor.number("Q", "the number of tensors"), cursor.number("Q", "the number of keys")


def _read_tensor(cursor: _Cursor, before: Mapping[str, Stored]) -> tuple[str, Stored, int]:
    """Return name, description and offset of the next tensor."""
    path = cursor.path
    name = cursor.text("a tensor's name", _MAX_KEY_BYTES)
    if not name.isprintable():
        raise WeightsError(f"{path} has a tensor named {name!r}: {_DAMAGED}.")
    if name in before:
        raise WeightsError(f"{path} has the tensor {name} twice: {_DAMAGED}.")
    num_dims = cursor.number("I", name)
    if num_dims > _MAX_DIMS:
        raise WeightsError(f"{path} gives {name} {num_dims} dims, a GGUF tensor has up to {_MAX_DIMS}: {_DAMAGED}.")
    shape = tuple(cursor.number("Q", name) for _ in range(num_dims))[::-1]
    number, offset = cursor.number("I", name), cursor.number("Q", name)
    if 0 in shape:
        raise WeightsError(f"{path} holds {name} without a single value: {_DAMAGED}.")
    kind = _BY_NUMBER.get(number)
    if kind is None:
        word = _OTHERS.get(number, f"type {number}")
        raise WeightsError(
            f"{path} holds {name} as {word}; Ostro reads {', '.join(KINDS)}: take the file in one of these, "
            "or the unquantised checkpoint."
        )
    if not kind.fits(shape):
        row = shape[-1] if shape else 1
        raise WeightsError(f"{path} holds {name} as {kind.word} with rows of {row}, no multiple of 32: {_DAMAGED}.")
    return name, Stored(shape, kind), offset


def _placed(
    cursor: _Cursor, stored: Mapping[str, Stored], offsets: Mapping[str, int], alignment: int
) -> dict[str, int]:
    """Return where each tensor's bytes start in the file; like llama.cpp, allow nothing between them but padding."""
    path = cursor.path
    start = -(-cursor.at // alignment) * alignment
    at = end = 0
    for name, (shape, kind) in stored.items():
        if offsets[name] != at:
            raise WeightsError(f"{path} puts {name} at byte {offsets[name]}, {at} is its place: {_DAMAGED}.")
        end = at + kind.num_bytes(shape)
        at = -(-end // alignment) * alignment
    held = max(0, cursor.mapped.num_bytes - start)
    if end > held:
        raise WeightsError(
            f"{path} is truncated: its header describes {end} bytes of tensors, {held} are there; "
            "the download or copy is probably incomplete."
        )
    if held > at:
        raise WeightsError(f"{path} has {held - at} bytes that no tensor of its header covers: {_DAMAGED}.")
    return {name: start + offset for name, offset in offsets.items()}
