"""One .bin, .pt or .pth file of PyTorch's: the tensors of a state dict, mapped into memory.

The file is a zip archive (torch/serialization.py, since PyTorch 1.6): the bytes of every storage in a record of
its own, uncompressed, and a pickle that says which part of which storage is which tensor. The pickle is never
run: its opcodes are read, one after another, as a description of tensors in plain containers, and one that asks
for anything else is refused. `torch.load` with `weights_only=True` refuses the same, but believes what a damaged
pickle says about sizes and reads a tensor past the end of its record.
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
import struct
import sys
import types
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ostro.errors import WeightsError
from ostro.weights.mapped import MappedFile
from ostro.weights.store import TensorInfo, Where

SUFFIXES = (".bin", ".pt", ".pth")

_WRAPPINGS = ("state_dict", "model", "module")  # what trainers put around a state dict
_MAX_PICKLE_BYTES = 100_000_000  # Mixtral-8x22B's has 0.3 MB
_MAX_DIMS = 8
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, …, lengths of the name and of the extra field
_SAVE_AGAIN = "save its state dict as safetensors"


class PickleFile:
    """An open file: `infos` by name, and views of its tensors.

    Raises WeightsError for a file that is missing, truncated, older than PyTorch 1.6, or holds more than tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped = MappedFile(path)
        records = _records(self._mapped)
        self._values = {
            name: (_start(path, name, records, described), described)
            for name, described in _state_dict(path, _content(self._mapped, records)).items()
        }
        self.infos = {name: TensorInfo(values.shape, values.dtype) for name, (_, values) in self._values.items()}

    def tensor(self, name: str, where: Where = ()) -> Tensor:
        """Return a tensor or a slice of it, a view of the mapped file."""
        start, values = self._values[name]
        if not math.prod(values.shape):
            return torch.empty(values.shape, dtype=values.dtype)[where]
        flat = self._mapped.tensor(start, (values.extent,), values.dtype)
        # The stride along a dim of one item can be anything and says nothing, but stands in the way of views.
        stride = tuple(step if size > 1 else 1 for size, step in zip(values.shape, values.stride, strict=True))
        return flat.as_strided(values.shape, stride)[where]


# The archive


@dataclasses.dataclass(frozen=True)
class _Record:
    """Where the bytes of a record lie in the file."""

    start: int
    num_bytes: int
    crc: int


def _records(mapped: MappedFile) -> dict[str, _Record]:
    """Return the records by name without the folder that all of them stand in; none is compressed."""
    path = mapped.path
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
            raise WeightsError(
                f"{path} is a compressed or encrypted archive, which PyTorch does not write: fetch or save it again."
            )
        records = {entry.filename.partition("/")[2]: _record(mapped.data, entry) for entry in entries}
        if len(records) != len(entries):
            raise ValueError("two of its records have one name")
    except WeightsError:
        raise
    except Exception as error:  # zipfile checks little of what it parses
        raise WeightsError(
            f"{path} is not an archive as PyTorch writes it since 1.6 ({_brief(error)}): it is truncated, "
            "damaged or older; fetch it again, or load and save it with a current PyTorch."
        ) from error
    return records


def _record(data: Any, entry: zipfile.ZipInfo) -> _Record:
    """Return where an entry's bytes lie; ValueError unless its own header agrees and another one follows it."""
    at, num_bytes = entry.header_offset, entry.file_size
    signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(data[at : at + _LOCAL_HEADER.size])
    start = at + _LOCAL_HEADER.size + name_bytes + extra_bytes
    # Whatever follows a record (its checksum, the next one, the directory) starts with these two bytes: they
    # prove both its length and those of the fields in front of it.
    is_followed = data[start + num_bytes : start + num_bytes + 2] == b"PK"
    if at < 0 or signature != b"PK\3\4" or entry.compress_size != num_bytes or not is_followed:
        raise ValueError(f"its record {entry.filename} is not where its directory says")
    return _Record(start, num_bytes, entry.CRC)


def _start(path: Path, name: str, records: Mapping[str, _Record], values: _Values) -> int:
    """Return at which byte of the file a tensor starts; WeightsError if it is not inside of its storage's record."""
    record = records.get(f"data/{values.key}")
    if record is None or record.num_bytes != values.storage_bytes:
        held = "none" if record is None else f"{record.num_bytes} bytes"
        raise WeightsError(
            f"{path} puts {name} into a storage of {values.storage_bytes} bytes, its archive has {held} of it: "
            "the file is damaged; fetch it again."
        )
    if not math.prod(values.shape):
        return 0  # PyTorch lets an empty tensor stand anywhere
    end = (values.offset + values.extent) * values.dtype.itemsize
    if end > record.num_bytes or math.prod(values.shape) * values.dtype.itemsize > record.num_bytes:
        raise WeightsError(
            f"{path} gives {name} the shape {'×'.join(map(str, values.shape))}, which reaches beyond its storage of "
            f"{record.num_bytes} bytes: the file is damaged; fetch it again, or {_SAVE_AGAIN}."
        )
    return record.start + values.offset * values.dtype.itemsize


# The pickle


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A storage as a pickle names it."""

    key: str
    dtype: torch.dtype
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class _Values:
    """A tensor as a pickle describes it: offset and stride count items."""

    key: str
    storage_bytes: int
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def extent(self) -> int:
        """The number of items from the first to the last, where there is one."""
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))


def _content(mapped: MappedFile, records: Mapping[str, _Record]) -> Any:
    """Return what the archive's pickle describes."""
    path = mapped.path
    try:
        order = records.get("byteorder")
        if order is not None and mapped.data[order.start : order.start + order.num_bytes] != sys.byteorder.encode():
            raise ValueError(f"its values are not in this machine's byte order, {sys.byteorder}-endian")
        record = records.get("data.pkl")
        if record is None or "constants.pkl" in records:
            raise ValueError("it is a TorchScript program" if record else "it has no data.pkl")
        if record.num_bytes > _MAX_PICKLE_BYTES:
            raise ValueError(f"its data.pkl has {record.num_bytes} bytes")
        data = mapped.data[record.start : record.start + record.num_bytes]
        if zlib.crc32(data) != record.crc:
            raise ValueError("the checksum of its data.pkl is wrong")
        return _described(data)
    except Exception as error:  # bytes that are no pickle fail in every way
        raise WeightsError(
            f"{path} cannot be read as tensors alone ({_brief(error)}): it is damaged, or holds objects that "
            f"Ostro does not load; {_SAVE_AGAIN}."
        ) from error


def _state_dict(path: Path, content: Any) -> dict[str, _Values]:
    """Return the tensors of a state dict, bare or wrapped once or more; WeightsError for anything else."""
    for key in _WRAPPINGS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise WeightsError(
            f"{path} holds {'an empty' if content == {} else 'no'} state dict where one is expected: give another file."
        )
    for name, values in content.items():
        if not isinstance(name, str) or not name.isprintable() or not isinstance(values, _Values):
            raise WeightsError(f"{path} holds {name!r}, which is not a dense tensor: save the state dict alone.")
    return content


class _Stack:
    """What a pickle has piled up: plain values, `_Storage`, `_Values`, and what stands for the names it asks for."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.values.append(value)

    def take(self, count: int) -> list[Any]:
        """Remove and return the topmost values; they may not reach below the last mark."""
        floor = self.marks[-1] if self.marks else 0
        if len(self.values) - count < floor:
            raise ValueError("it takes a value that is not there")
        return [self.values.pop() for _ in range(count)][::-1]

    def take_marked(self) -> list[Any]:
        """Remove and return everything above the last mark."""
        taken = self.take(len(self.values) - self.marks[-1])
        self.marks.pop()
        return taken

    def append(self, values: list[Any]) -> None:
        """Append to the list on top."""
        if not isinstance(self.values[-1], list):
            raise ValueError("it appends to what is no list")
        self.values[-1].extend(values)

    def set(self, values: list[Any]) -> None:
        """Set keys of the dict on top."""
        if not isinstance(self.values[-1], dict):
            raise ValueError("it sets keys of what is no dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | int):
                raise ValueError("a dict in it has keys that are neither text nor numbers")
            self.values[-1][key] = value

    def name(self, dotted: str) -> None:
        """Push what stands for a name; ValueError for one that tensors do not need."""
        if dotted not in _NAMES:
            raise ValueError(f"it asks for {dotted[:100]!r}")
        self.push(_NAMES[dotted])

    def call(self) -> None:
        """Push what the call of a name would give."""
        function, arguments = self.take(2)
        if not isinstance(function, types.FunctionType):
            raise ValueError("it calls what is no function")
        self.push(function(*arguments))

    def build(self) -> None:
        """Drop the attributes of a dict (a state dict has its modules' versions there)."""
        self.take(1)
        if not isinstance(self.values[-1], dict):
            raise ValueError("it sets attributes of what is no dict")

    def storage(self) -> None:
        """Push the storage that a tuple names."""
        ((kind, dtype, key, _, count),) = self.take(1)
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str) or not _is_size(count):
            raise ValueError("it names a storage that is none")
        self.push(_Storage(key, dtype, count * dtype.itemsize))


def _described(data: bytes) -> Any:
    """Return the containers and tensors that a pickle describes; ValueError and its like if it is not of that kind."""
    stack = _Stack()
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "STOP":
            return stack.take(1)[0]
        if opcode.name not in _OPERATIONS:
            raise ValueError(f"it has the opcode {opcode.name}")
        _OPERATIONS[opcode.name](stack, argument)
    raise ValueError("it has no end")


def _tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
    *,
    dtype: Any = None,
) -> _Values:
    """Describe what torch._utils._rebuild_tensor_v2 would build: `metadata` would have it negated or conjugated."""
    dtype = dtype or getattr(storage, "dtype", None)
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype) or metadata:
        raise ValueError("a tensor in it is not a plain one")
    for sizes in (shape, stride):
        if not isinstance(sizes, tuple) or len(sizes) > _MAX_DIMS or not all(map(_is_size, sizes)):
            raise ValueError("a tensor in it has no sound shape")
    if len(shape) != len(stride) or not _is_size(offset) or not _is_size(math.prod(max(1, size) for size in shape)):
        raise ValueError("a tensor in it has no sound shape")
    return _Values(storage.key, storage.num_bytes, dtype, offset, shape, stride)


def _tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> _Values:
    return _tensor(storage, offset, shape, stride, metadata=metadata, dtype=dtype)


def _same(value: Any, *rest: Any) -> Any:
    return value


def _empty() -> dict[Any, Any]:
    return {}


def _nothing(*arguments: Any) -> None:
    return None


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
_NAMES: dict[str, Any] = {
    "collections.OrderedDict": _empty,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_parameter_with_state": _same,
    "torch.Size": _same,
    "torch.device": _nothing,
    "torch.storage.UntypedStorage": torch.uint8,
    **{f"torch.{word}Storage": dtype for word, dtype in _DTYPES.items()},
    **{str(dtype): dtype for dtype in (*_DTYPES.values(), torch.float8_e4m3fn, torch.float8_e5m2)},
    # What a trainer's own entries beside the state dict are made of.
    "builtins.set": _nothing,
    "__builtin__.set": _nothing,
    "_codecs.encode": _nothing,
}
_PLAIN = "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES"
_OPERATIONS: dict[str, Callable[[_Stack, Any], None]] = {
    "PROTO": lambda stack, _: None,
    "FRAME": lambda stack, _: None,
    "NONE": lambda stack, _: stack.push(None),
    "NEWTRUE": lambda stack, _: stack.push(True),
    "NEWFALSE": lambda stack, _: stack.push(False),
    **dict.fromkeys(_PLAIN.split(), _Stack.push),
    "MARK": lambda stack, _: stack.marks.append(len(stack.values)),
    "EMPTY_TUPLE": lambda stack, _: stack.push(()),
    "TUPLE1": lambda stack, _: stack.push(tuple(stack.take(1))),
    "TUPLE2": lambda stack, _: stack.push(tuple(stack.take(2))),
    "TUPLE3": lambda stack, _: stack.push(tuple(stack.take(3))),
    "TUPLE": lambda stack, _: stack.push(tuple(stack.take_marked())),
    "EMPTY_LIST": lambda stack, _: stack.push([]),
    "APPEND": lambda stack, _: stack.append(stack.take(1)),
    "APPENDS": lambda stack, _: stack.append(stack.take_marked()),
    "EMPTY_DICT": lambda stack, _: stack.push({}),
    "SETITEM": lambda stack, _: stack.set(stack.take(2)),
    "SETITEMS": lambda stack, _: stack.set(stack.take_marked()),
    "BINPUT": lambda stack, key: stack.memo.__setitem__(key, stack.values[-1]),
    "LONG_BINPUT": lambda stack, key: stack.memo.__setitem__(key, stack.values[-1]),
    "MEMOIZE": lambda stack, _: stack.memo.__setitem__(len(stack.memo), stack.values[-1]),
    "BINGET": lambda stack, key: stack.push(stack.memo[key]),
    "LONG_BINGET": lambda stack, key: stack.push(stack.memo[key]),
    "GLOBAL": lambda stack, words: stack.name(words.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda stack, _: stack.name(".".join(stack.take(2))),
    "BINPERSID": lambda stack, _: stack.storage(),
    "REDUCE": lambda stack, _: stack.call(),
    "BUILD": lambda stack, _: stack.build(),
}


def _brief(error: BaseException) -> str:
    """Return what an error says, on one line; its type too unless it is ours."""
    line = (str(error).strip().splitlines() or [""])[0][:160]
    return line if type(error) is ValueError and line else f"{type(error).__name__}: {line}".removesuffix(": ")
