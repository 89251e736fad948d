"""Megatron-LM's IndexedDataset: tokens in a .bin, and an .idx that says where sequences and documents lie.

The .idx, little-endian: the nine bytes MMIDIDX\\0\\0, u64 version 1, u8 code of the tokens' type, u64 sequences S, u64
document bounds B, int32 [S] lengths, int64 [S] byte offsets, int64 [B] sequences at which documents start and the
last ends, and with images int8 [S] modes (megatron/core/datasets/indexed_dataset.py of Megatron-Core 0.16).
"""

from __future__ import annotations

import contextlib
import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from ostro.data.beside import Beside, disk_errors
from ostro.data.records import Tokens
from ostro.errors import DataError

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
# 6 and 7 are float64 and float32, which are no tokens.
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_CHUNK = 1 << 20


class MegatronFile:
    """The documents of a data set, mapped; named by its prefix, its .bin or its .idx.

    `dtype` is the tokens', `num_sequences` counts what the documents are made of, `modes` int8 [num_sequences] is
    there where the data set has images. Everything the .idx says is checked once, in pieces. Raises DataError for
    files that are missing, cut off or disagree.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self._index_path = _pair(Path(path))
        index, self._data = _mapped(self._index_path), _mapped(self.path)
        if len(index) < _HEADER.size or bytes(index[: len(_MAGIC)]) != _MAGIC:
            raise DataError(f"{self._index_path} is no index of Megatron's, or only its start: fetch both files again.")
        _, version, code, num_sequences, num_bounds = _HEADER.unpack(bytes(index[: _HEADER.size]))
        if version != 1:
            raise DataError(
                f"{self._index_path} is of version {version}, and 1 is known: write it again with Megatron."
            )
        if code not in DTYPES:
            raise DataError(
                f"{self._index_path}: its tokens are of type {code}, which is none of integers: encode again."
            )
        sizes = (4 * num_sequences, 8 * num_sequences, 8 * num_bounds)
        surplus = len(index) - _HEADER.size - sum(sizes)
        if surplus not in (0, num_sequences):
            raise self._damaged(
                f"{num_sequences} sequences in {num_bounds - 1} documents do not take {len(index)} bytes"
            )
        ends = np.cumsum([_HEADER.size, *sizes]).tolist()
        self._lengths, self._offsets, self._bounds = (
            index[start:end].view(dtype)
            for start, end, dtype in zip(ends, ends[1:], ("<i4", "<i8", "<i8"), strict=False)
        )
        self.modes = index[ends[-1] :].view(np.int8) if surplus else None
        self.dtype, self.num_sequences = np.dtype(DTYPES[code]), num_sequences
        self._check()

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def document(self, i: int) -> np.ndarray:
        """Return the tokens of document `i`, its sequences joined; a view of the file where they lie in a row."""
        assert 0 <= i < len(self), (i, len(self))
        first, end = self._bounds[i : i + 2].tolist()
        if end - first == 1:
            return self.sequence(first)
        offsets, lengths = self._offsets[first:end], self._lengths[first:end].astype(np.int64)
        if not lengths.size:
            return np.empty(0, self.dtype)
        if np.array_equal(offsets[1:], offsets[:-1] + lengths[:-1] * self.dtype.itemsize):
            return self._tokens(int(offsets[0]), int(lengths.sum()))
        return np.concatenate([self._tokens(*part) for part in zip(offsets.tolist(), lengths.tolist(), strict=True)])

    def sequence(self, i: int) -> np.ndarray:
        """Return the tokens of sequence `i`, a view of the file."""
        assert 0 <= i < self.num_sequences, (i, self.num_sequences)
        return self._tokens(int(self._offsets[i]), int(self._lengths[i]))

    def sequences_of(self, i: int) -> range:
        """Return which sequences document `i` is made of."""
        return range(*self._bounds[i : i + 2].tolist())

    def _tokens(self, offset: int, count: int) -> np.ndarray:
        return self._data[offset : offset + count * self.dtype.itemsize].view(self.dtype)

    def _check(self) -> None:
        bounds, count = self._bounds, self.num_sequences
        if not len(bounds) or bounds[0] != 0 or bounds[-1] != count:
            raise self._damaged(f"its documents do not hold its {count} sequences")
        for start in range(0, len(bounds) - 1, _CHUNK):
            part = bounds[start : start + _CHUNK + 1]
            if np.any(part[1:] < part[:-1]):
                i = start + int(np.flatnonzero(part[1:] < part[:-1])[0])
                raise self._damaged(f"document {i + 1} ends before it starts")
        end = 0
        for start in range(0, count, _CHUNK):
            lengths = self._lengths[start : start + _CHUNK].astype(np.int64) * self.dtype.itemsize
            offsets = self._offsets[start : start + _CHUNK]
            # An offset is compared with the room that its length leaves: a sum could run over.
            wrong = (lengths < 0) | (offsets < 0) | (offsets > len(self._data) - lengths)
            if wrong.any():
                i = start + int(np.flatnonzero(wrong)[0])
                raise self._damaged(
                    f"sequence {i + 1} does not lie within the {len(self._data)} bytes of {self.path.name}"
                )
            end = max(end, int((offsets + lengths).max()))
        if end != len(self._data):
            raise self._damaged(
                f"its {self.dtype} tokens end at byte {end} of the {len(self._data)} of {self.path.name}"
            )

    def _damaged(self, reason: str) -> DataError:
        return DataError(f"{self._index_path} is damaged, or of another {self.path.name}: {reason}: fetch both again.")


def is_megatron(path: str | Path) -> bool:
    """Whether `path` is a prefix, .bin or .idx of a pair whose index starts as Megatron's does."""
    try:
        with _pair(Path(path))[1].open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except (OSError, ValueError, DataError):
        return False


def read_megatron(path: str | Path) -> Iterator[Tokens]:
    """Yield each document's tokens; empty ones are left out.

    Raises DataError for a document with tokens below 0 or with sequences that are not text.
    """
    file = MegatronFile(path)
    for i in range(len(file)):
        where = f"{file.path} record {i + 1}"
        if file.modes is not None and np.any(file.modes[list(file.sequences_of(i))]):
            raise DataError(f"{where}: it holds sequences that are not text: leave this data set out.")
        ids = file.document(i)
        if ids.size and ids.dtype.kind == "i" and ids.min() < 0:
            raise DataError(f"{where}: token {ids.min()} is below 0: encode the document again.")
        if ids.size:
            yield Tokens(ids, where)


class MegatronWriter:
    """Writes prefix.bin and prefix.idx, byte for byte as Megatron's IndexedDatasetBuilder does.

    `dtype` is the tokens', one of DTYPES; Megatron takes uint16 for vocabularies below 65,500 and int32 else. Used in
    a `with`: both files are there at its end, or, where an error leaves it, neither; what memory it needs does not
    grow. Raises DataError for tokens that the type does not hold, OutOfMemory where the disk is full.
    """

    def __init__(self, prefix: str | Path, dtype: Any = "int32") -> None:
        self.prefix = Path(prefix)
        try:
            name = np.dtype(dtype).name
        except TypeError:
            name = None
        if name not in DTYPES.values():
            raise DataError(f"{prefix}: tokens cannot be {dtype}: use one of {', '.join(DTYPES.values())}.")
        self.dtype: np.dtype = np.dtype(name).newbyteorder("<")
        if not self.prefix.name:
            raise DataError(f"{str(prefix)!r} is no prefix of files: name one, like data/wiki.")
        self.num_documents = self.num_sequences = 0

    def __enter__(self) -> MegatronWriter:
        data, index = (self.prefix.with_name(self.prefix.name + suffix) for suffix in (".bin", ".idx"))
        self._beside = Beside([data, index])
        self._index = self._beside.path(index)
        try:
            with disk_errors(self.prefix):
                self._data = self._beside.path(data).open("xb")
                self._lengths = (self._beside.folder / "lengths").open("w+b")
                self._bounds = (self._beside.folder / "bounds").open("w+b")
                self._bounds.write(bytes(8))
        except BaseException:
            self._beside.drop()
            raise
        return self

    def append(self, ids: Any, lengths: Sequence[int] | None = None) -> None:
        """Write a document: its tokens, and the lengths of its sequences where it has not just one."""
        where = f"{self.prefix} record {self.num_documents + 1}"
        tokens = self._checked(ids, where)
        parts = np.array([tokens.size] if lengths is None else lengths, np.int64)
        if parts.ndim != 1 or (parts.size and parts.min() < 0) or parts.sum() != tokens.size:
            raise DataError(
                f"{where}: its sequences must be as long together as its {tokens.size} tokens: change them."
            )
        if parts.size and parts.max() > np.iinfo(np.int32).max:
            raise DataError(f"{where}: a sequence of {parts.max()} tokens is longer than an index can say: cut it.")
        self.num_documents += 1
        self.num_sequences += parts.size
        with disk_errors(self.prefix):
            self._data.write(tokens.data)
            self._lengths.write(parts.astype("<i4").tobytes())
            self._bounds.write(self.num_sequences.to_bytes(8, "little"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                with disk_errors(self.prefix):
                    self._data.close()
                    self._write_index()
                    self._beside.keep()
        finally:
            for file in (self._data, self._lengths, self._bounds):
                with contextlib.suppress(OSError):  # the disk may be full: the first error tells
                    file.close()
            self._beside.drop()

    def _write_index(self) -> None:
        code = next(code for code, name in DTYPES.items() if name == self.dtype.name)
        with self._index.open("xb") as index:
            index.write(_HEADER.pack(_MAGIC, 1, code, self.num_sequences, self.num_documents + 1))
            _copy(self._lengths, index)
            offset = 0
            self._lengths.seek(0)
            while part := self._lengths.read(4 * _CHUNK):
                ends = offset + np.cumsum(np.frombuffer(part, "<i4"), dtype=np.int64) * self.dtype.itemsize
                index.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
                offset = int(ends[-1])
            _copy(self._bounds, index)

    def _checked(self, ids: Any, where: str) -> np.ndarray:
        """Return a document's tokens in the data set's type; raises DataError where that does not hold them."""
        try:
            array = np.asarray(ids)
        except (ValueError, TypeError, OverflowError):
            array = np.empty((0, 0))
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise DataError(f"{where}: a document must be a list of token ids: change it.")
        if array.size and array.dtype != self.dtype:
            bounds, least, most = np.iinfo(self.dtype), int(array.min()), int(array.max())
            if least < bounds.min or most > bounds.max:
                raise DataError(f"{where}: its tokens go from {least} to {most}, which {self.dtype} does not hold.")
        return np.ascontiguousarray(array, self.dtype)


def _pair(path: Path) -> tuple[Path, Path]:
    """Return the .bin and the .idx that a prefix, or either of them, names."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if not prefix.name:
        raise DataError(f"{str(path)!r} names no data set of Megatron's: give its prefix, its .bin or its .idx.")
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def _mapped(path: Path) -> np.ndarray:
    """Return a file's bytes, mapped."""
    try:
        if path.stat().st_size == 0:  # nothing cannot be mapped
            return np.empty(0, np.uint8)
        return np.memmap(path, np.uint8, "r").view(np.ndarray)  # slices of a memmap proper cost ten times more
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{str(path)!r} cannot be read: {reason}: a data set is a .bin and an .idx beside it."
        ) from None


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    source.seek(0)
    shutil.copyfileobj(source, target, _CHUNK)
