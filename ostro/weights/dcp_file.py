"""The files of torch.distributed.checkpoint: read by the slice and written piece by piece, by one process alone.

`.metadata` is a pickle and every tensor in a `.distcp` file is a small archive of torch.save's. Both are read without
executing anything: by unpicklers that know a dozen harmless classes and refuse all others. The values are views
of the mapped files.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ostro.errors import WeightsError
from ostro.weights.mapped import MappedFile, Write, writing
from ostro.weights.reshard import Box, GatheredFile, Shard, shared, whole
from ostro.weights.store import TensorInfo, Where, as_bytes, printable

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

METADATA = ".metadata"
DAMAGED = "the checkpoint is damaged; take an earlier one"


def open_tensors(folder: Path, prefix: str, *, is_partial: bool = False) -> GatheredFile:
    """Return the tensors whose names start with `prefix`, without it; WeightsError if the folder is not sound.

    `is_partial` lets a tensor lack parts, or be missing as a whole.
    """
    metadata = read_metadata(folder, is_partial=is_partial)
    infos = {name: info for name, info in infos_of(metadata).items() if name.startswith(prefix)}
    mapped = functools.cache(lambda file: MappedFile(folder / file))  # when first read: a rank needs few of them
    shards: dict[str, list[Shard]] = {name: [] for name in infos}
    for index, info in metadata.storage_data.items():
        if index.fqn in shards:
            box = _box(metadata, index)
            item = _Item(
                functools.partial(mapped, info.relative_path), info.offset, info.length, box, infos[index.fqn].dtype
            )
            shards[index.fqn].append(Shard(box, item.read))
    short = {name.removeprefix(prefix): name for name in infos}
    return GatheredFile(
        folder, {s: infos[name] for s, name in short.items()}, {s: shards[name] for s, name in short.items()}
    )


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a box of a tensor was written: the file's name in its folder, and the item's bytes in it."""

    name: str
    box: Box
    file: str
    offset: int
    num_bytes: int


def write_boxes(path: Path, boxes: Iterable[tuple[str, Box, Tensor]]) -> list[Stored]:
    """Write boxes of tensors into a new file, one in memory at a time, and return where they are."""
    stored = []
    with writing(path) as write:
        out = _Counting(write)
        for name, box, value in boxes:
            offset = out.num_bytes
            out.save(_alone(value.reshape(box.sizes)))
            stored.append(Stored(name, box, path.name, offset, out.num_bytes - offset))
    return stored


def write_metadata(folder: Path, infos: Mapping[str, TensorInfo], stored: Iterable[Stored]) -> None:
    """Write what DCP wants to know of a folder: its tensors, and where the boxes that make them up are."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    entries: dict[str, Any] = {
        name: TensorStorageMetadata(TensorProperties(info.dtype), torch.Size(info.shape), [])
        for name, info in infos.items()
    }
    storage: dict[Any, Any] = {}
    for item in stored:
        chunks, offsets = entries[item.name].chunks, torch.Size(item.box.offsets)
        storage[MetadataIndex(item.name, offsets, len(chunks))] = _StorageInfo(item.file, item.offset, item.num_bytes)
        chunks.append(ChunkStorageMetadata(offsets, torch.Size(item.box.sizes)))
    with writing(folder / METADATA) as write:
        write(pickle.dumps(Metadata(entries, None, storage)))


def write_tensors(folder: Path, tensors: Iterable[tuple[str, TensorInfo, Iterable[tuple[Box, Tensor]]]]) -> None:
    """Write tensors as the boxes that make them up, one box in memory at a time, and the metadata last."""
    infos: dict[str, TensorInfo] = {}

    def every() -> Iterator[tuple[str, Box, Tensor]]:
        for name, info, boxes in tensors:
            infos[name] = info
            yield from ((name, box, value) for box, value in boxes)

    stored = write_boxes(folder / "__0_0.distcp", every())
    write_metadata(folder, infos, stored)


def _alone(value: Tensor) -> Tensor:
    """Return the tensor over memory that is no more than its own: a view would be saved with all it is a view of."""
    held = value.contiguous()
    if not held.numel():
        return held.clone()
    return torch.frombuffer(as_bytes(held), dtype=held.dtype).view(held.shape)


class _Counting:
    """A file to torch.save, which asks for little."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._failure: BaseException | None = None
        self.num_bytes = 0

    def save(self, tensor: Tensor) -> None:
        """Append a tensor, in torch.save's format."""
        try:
            torch.save(tensor, cast(IO[bytes], self))
        except RuntimeError:
            # Its zip writer loses the system's error on the way, and an interrupt; what it reports is that bytes are
            # missing.
            if self._failure is not None:
                raise self._failure from None
            raise

    def write(self, data: Any) -> int:
        """Append, and count."""
        view = memoryview(data).cast("B")
        try:
            self._write(view)
        except BaseException as error:
            self._failure = error
            raise
        self.num_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""


class _Item:
    """One box of a tensor in a file; where its values lie is found out when it is first read."""

    def __init__(
        self, mapped: Callable[[], MappedFile], offset: int, length: int, box: Box, dtype: torch.dtype
    ) -> None:
        self._mapped = mapped
        self._span = offset, length
        self._info = TensorInfo(box.sizes, dtype)
        self._values: Tensor | None = None

    def read(self, where: Where = ()) -> Tensor:
        """Return a slice, a view of the file; WeightsError if the item is not the plain tensor it should be."""
        if self._values is None:
            offset, length = self._span
            file = self._mapped()
            try:
                start = offset + _values_start(_Window(file.data, offset, length), self._info)
            except WeightsError:
                raise
            except Exception as error:  # zipfile and pickle check little of what they parse
                raise WeightsError(f"{file.path} cannot be read ({brief(error)}): {DAMAGED}.") from error
            self._values = file.tensor(start, self._info.shape, self._info.dtype)
        return self._values[where]


class _Window:
    """A part of a mapped file, as zipfile wants it."""

    def __init__(self, data: Any, start: int, length: int) -> None:
        self._data, self._start, self._length, self._at = data, start, length, 0

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move, as files do."""
        self._at = max(0, (0, self._at, self._length)[whence] + offset)
        return self._at

    def tell(self) -> int:
        """Where it is."""
        return self._at

    def read(self, count: int = -1) -> bytes:
        """Return the next bytes."""
        stop = self._length if count is None or count < 0 else min(self._length, self._at + count)
        start, self._at = self._at, max(self._at, stop)
        return self._data[self._start + start : self._start + stop]


def _values_start(window: _Window, info: TensorInfo) -> int:
    """Return where in an archive of torch.save's the values of its one tensor, which must be `info`, start."""
    with zipfile.ZipFile(window) as archive:  # pyright: ignore[reportArgumentType]
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        order = archive.read(entries["byteorder"]) if "byteorder" in entries else b"little"
        pickled = entries["data.pkl"]
        if pickled.file_size > 1 << 16:
            raise ValueError("its description is too long for a tensor's")
        found = _TensorUnpickler(_sane(archive.read(pickled))).load()
        values = entries[f"data/{found.key}"]
    stored = (found.dtype, found.shape, found.offset, order, values.compress_type, values.file_size)
    if stored != (info.dtype, info.shape, 0, b"little", zipfile.ZIP_STORED, info.num_bytes) or not found.is_contiguous:
        raise ValueError("it is not the tensor that the metadata describe")
    window.seek(values.header_offset)
    signature, name_bytes, extra_bytes = struct.unpack("<4s22xHH", window.read(30))
    start = values.header_offset + 30 + name_bytes + extra_bytes
    if signature != b"PK\3\4" or start + info.num_bytes > window.seek(0, 2):
        raise ValueError("its values lie outside of it")
    return start


def _sane(data: bytes) -> io.BytesIO:
    """Return a pickle to be loaded, unless it numbers its memo beyond its size: Python would allocate for that."""
    for opcode, argument, _ in pickletools.genops(data):
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(data):
            raise ValueError(f"memo {argument} in {len(data)} bytes")
    return io.BytesIO(data)


class _Described:
    """A tensor as its pickle describes it."""

    def __init__(self, storage: tuple[Any, ...], offset: int, shape: Any, stride: Any, *rest: Any) -> None:
        _, self.dtype, self.key, _, _ = storage
        self.offset = offset
        self.shape = tuple(shape)
        strides = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        self.is_contiguous = all(n == 1 or s == t for n, s, t in zip(self.shape, stride, strides, strict=True))


class _TensorUnpickler(pickle.Unpickler):
    """Knows what torch.save writes for one plain tensor; `pickle` asks for a subclass here."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for an allowed name, or raise WeightsError."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Described
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise refused(module, name)

    def persistent_load(self, pid: Any) -> Any:
        """Return the description of a storage as it is."""
        return pid


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _box(metadata: Metadata, index: Any) -> Box:
    """Return the box of a stored item: the one of its tensor's that starts where it says, or the only one."""
    offset = tuple(index.offset) if index.offset is not None else None
    chunks = getattr(metadata.state_dict_metadata[index.fqn], "chunks", ())
    hint = index.index
    hinted = chunks[hint : hint + 1] if isinstance(hint, int) and hint >= 0 else ()
    for chunk in (*hinted, *chunks):  # the hint first: with a thousand ranks a search for each would take minutes
        if tuple(chunk.offsets) == offset or (offset is None and len(chunks) == 1):
            return Box(tuple(chunk.offsets), tuple(chunk.sizes))
    raise WeightsError(f"the metadata has no box of {index.fqn} at {offset}: {DAMAGED}.")


def brief(error: BaseException) -> str:
    """Return an error's type and the start of its message, on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {printable(lines[0][:200])}" if lines else type(error).__name__


def refused(module: str, name: str) -> WeightsError:
    """Return the error for a class that no checkpoint needs."""
    asked = printable(f"{module}.{name}"[:200])
    return WeightsError(
        f"the checkpoint asks for {asked}, which no checkpoint needs: it may be an attack; do not use the file."
    )


def infos_of(metadata: Metadata) -> dict[str, TensorInfo]:
    """Return shape and dtype of every tensor."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    infos = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)  # read_metadata saw to it
        infos[name] = TensorInfo(tuple(entry.size), entry.properties.dtype)
    return infos


def read_metadata(folder: Path, *, is_partial: bool = False) -> Metadata:
    """Return DCP's metadata; WeightsError if it asks for any class but its own or does not fit the files."""
    path = folder / METADATA
    try:
        metadata = _MetadataUnpickler(_sane(path.read_bytes())).load()
        _check_metadata(metadata, folder, is_partial)
    except WeightsError:
        raise
    except Exception as error:  # a pickle can raise anything
        raise WeightsError(f"{path} cannot be read ({brief(error)}): {DAMAGED}.") from error
    return metadata


def _check_metadata(metadata: Any, folder: Path, is_partial: bool) -> None:
    """Hold the metadata against the files; a wrong type in it raises any exception."""
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

    if not isinstance(metadata, Metadata):
        raise TypeError("it is not DCP's Metadata")
    for name, entry in metadata.state_dict_metadata.items():
        if not name.isprintable():
            raise TypeError(f"{name!r} is no name")
        if not isinstance(entry, TensorStorageMetadata):  # DCP would unpickle it
            raise WeightsError(f"{folder} holds {name}, which is not a tensor: Ostro did not write it; take another.")
        if not isinstance(entry.properties.dtype, torch.dtype):
            raise TypeError(f"{name} has no dtype")
        boxes = [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
        inside = whole(tuple(entry.size))
        if any(box.num_elements and box.overlap(inside) != box for box in boxes):
            raise WeightsError(f"{folder} holds parts of {name} that lie outside of it: {DAMAGED}.")
        # DCP would leave what no chunk covers as it is, without a word.
        if not is_partial and sum(box.num_elements for box in boxes) != math.prod(entry.size):
            raise WeightsError(f"{folder} holds only a part of {name}: {DAMAGED}.")
        if shared(boxes):
            raise WeightsError(f"{folder} holds parts of {name} that overlap: {DAMAGED}.")
    _check_storage(metadata, folder)
    metadata.storage_meta = StorageMeta()


def _check_storage(metadata: Metadata, folder: Path) -> None:
    """Hold what the metadata say of the files against their sizes."""
    stored: dict[str, int] = {}
    infos = infos_of(metadata)
    sizes: dict[str, int] = {}
    for index, info in (metadata.storage_data or {}).items():
        box = _box(metadata, index)
        file = info.relative_path
        if Path(file).name != file or info.transform_descriptors:
            raise WeightsError(f"{folder} keeps {index.fqn} in {file!r}: Ostro did not write it; take another.")
        if file not in sizes:
            sizes[file] = (folder / file).stat().st_size if (folder / file).is_file() else -1
        if sizes[file] < 0:
            raise WeightsError(f"{folder} lacks {file}, which holds {index.fqn}: {DAMAGED}.")
        if info.offset + info.length > sizes[file]:
            raise WeightsError(
                f"{folder / file} is truncated: {index.fqn} ends at byte {info.offset + info.length}, the "
                f"file has {sizes[file]}; {DAMAGED}."
            )
        num_bytes = box.num_elements * infos[index.fqn].dtype.itemsize
        if info.offset < 0:
            raise WeightsError(f"{folder / file} cannot hold {index.fqn} from byte {info.offset} on: {DAMAGED}.")
        if info.length < num_bytes:
            raise WeightsError(f"{folder / file} has {info.length} bytes for {num_bytes} of {index.fqn}: {DAMAGED}.")
        stored[index.fqn] = stored.get(index.fqn, 0) + 1
    for name, entry in metadata.state_dict_metadata.items():
        if stored.get(name, 0) != len(getattr(entry, "chunks", ())):
            raise WeightsError(f"{folder} does not say where all parts of {name} are kept: {DAMAGED}.")


_DCP_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    (_DCP_METADATA, "Metadata"),
    (_DCP_METADATA, "MetadataIndex"),
    (_DCP_METADATA, "StorageMeta"),
    (_DCP_METADATA, "TensorStorageMetadata"),
    (_DCP_METADATA, "BytesStorageMetadata"),
    (_DCP_METADATA, "ChunkStorageMetadata"),
    (_DCP_METADATA, "TensorProperties"),
    (_DCP_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of DCP's metadata and nothing that acts; `pickle` asks for a subclass here."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class, or raise WeightsError."""
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layouts().__getitem__
        if module.startswith("pathlib") and name == "PosixPath":
            return PurePosixPath  # where it was once written; it opens nothing
        if (module, name) == ("builtins", "getattr"):
            return _memory_format  # how Python 3.11.0 to 3.11.3 pickled an enum
        raise refused(module, name)


@functools.cache
def _layouts() -> dict[str, torch.layout]:
    return {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}


def _memory_format(kind: Any, name: str) -> Any:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    return _MEM_FORMAT_ENCODING[name]
