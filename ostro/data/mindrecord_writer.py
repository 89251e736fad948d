"""Writes MindRecord files page for page as MindSpore's FileWriter does when it is given one row at a time."""

from __future__ import annotations

import array
import contextlib
import errno
import json
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from ostro.data.beside import Beside, disk_errors
from ostro.data.mindrecord_row import NUMBERS, Column, pack_row
from ostro.errors import DataError

# What a raw page has of a row without single values: MessagePack's {"id": 0} behind its length.
_RAW_ROW = b"\x05\0\0\0\0\0\0\0\x81\xa2id\0"
_TABLES = (
    "CREATE TABLE SHARD_NAME(NAME TEXT NOT NULL); "
    "CREATE TABLE INDEXES(ROW_ID INT NOT NULL, PAGE_ID_RAW INT NOT NULL, PAGE_OFFSET_RAW INT NOT NULL, "
    "PAGE_OFFSET_RAW_END INT NOT NULL, ROW_GROUP_ID INT NOT NULL, PAGE_ID_BLOB INT NOT NULL, "
    "PAGE_OFFSET_BLOB INT NOT NULL, PAGE_OFFSET_BLOB_END INT NOT NULL, PRIMARY KEY(ROW_ID))"
)


class MindRecordWriter:
    """Writes rows of number arrays to `path` and its .db, or to `partitions` files path0, path1, … and theirs.

    `columns` are names, for int32 arrays of any length as MindFormers has them, or names with their types (int32,
    int64, float32, float64). `desc` is the schema's description. The partitions get equal runs of rows, which are
    spooled to disk until their number is known. Used in a `with`: all files are there at its end, or, where an error
    leaves it, none. Raises DataError for names, rows or sizes that MindSpore would refuse, OutOfMemory where the disk
    is full.
    """

    def __init__(
        self,
        path: str | Path,
        columns: Sequence[str] | Mapping[str, str],
        desc: str,
        *,
        partitions: int = 1,
        header_size: int = 1 << 24,
        page_size: int = 1 << 25,
    ) -> None:
        self.path = Path(path)
        self.num_rows = 0
        names = [columns] if isinstance(columns, str) else columns
        types = names if isinstance(names, Mapping) else dict.fromkeys(names, "int32")
        self._columns = [Column(name, types[name], (-1,)) for name in sorted(types)]
        self._desc, self._sizes = desc, (header_size, page_size)
        self._saved_bytes = 0
        _check_settings(self.path, self._columns, partitions, self._sizes)
        width = len(str(partitions - 1))
        ends = [""] if partitions == 1 else [f"{i:0{width}d}" for i in range(partitions)]
        self._targets = [self.path.with_name(self.path.name + end) for end in ends]

    def __enter__(self) -> MindRecordWriter:
        self._beside = Beside([*map(index_path, self._targets), *self._targets])  # a file comes after its .db
        try:
            with disk_errors(self.path):
                self._first = self._partition(0) if len(self._targets) == 1 else None
                self._spool = (self._beside.folder / "spool").open("w+b") if self._first is None else None
        except BaseException:
            self._beside.drop()
            raise
        return self

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row: for each column an array or list of numbers that its type holds."""
        where = f"{self.path} record {self.num_rows + 1}"
        if row.keys() != {column.name for column in self._columns}:
            given, needed = (", ".join(map(str, names)) for names in (row, (column.name for column in self._columns)))
            raise DataError(f"{where}: the columns are {needed}, and the row has {given}: give each of them.")
        arrays = {column.name: _checked(row[column.name], column, where) for column in self._columns}
        if not any(one.size for one in arrays.values()) and len(arrays) == 1:
            raise DataError(f"{where}: its only array is empty, which MindSpore refuses: leave the row out.")
        packed = pack_row(self._columns, arrays)
        if len(packed) + 8 > self._sizes[1]:
            raise DataError(
                f"{where}: the row takes {len(packed) + 8} bytes, and a page holds {self._sizes[1]}: cut it."
            )
        # MindSpore counts what narrow numbers save, and what they cost beside wide ones as well.
        inner = 8 * len(arrays) if len(arrays) > 1 else 0
        self._saved_bytes += sum(one.nbytes for one in arrays.values()) - (len(packed) - inner)
        data = len(packed).to_bytes(8, "little") + packed
        with disk_errors(self.path):
            if self._first is not None:
                self._first.append(data)
            elif self._spool is not None:
                self._spool.write(data)
        self.num_rows += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                with disk_errors(self.path):
                    self._finish()
                    self._beside.keep()
        finally:
            for file in (self._first, self._spool):
                if file is not None:
                    with contextlib.suppress(OSError):  # the disk may be full: the first error tells
                        file.close()
            self._beside.drop()

    def _finish(self) -> None:
        num_files = len(self._targets)
        if self.num_rows < num_files:
            raise DataError(
                f"{self.path}: there are {self.num_rows} rows for {num_files} files: each needs one at least."
            )
        if self._first is not None:
            self._first.finish([self.path.name], max(0, self._saved_bytes))
        if self._spool is not None:
            self._spool.seek(0)
            for i in range(num_files):
                with self._partition(i) as partition:
                    for _ in range(self.num_rows // num_files + (i < self.num_rows % num_files)):
                        size = self._spool.read(8)
                        partition.append(size + self._spool.read(int.from_bytes(size, "little")))
                    partition.finish([target.name for target in self._targets], max(0, self._saved_bytes))

    def _partition(self, i: int) -> _Partition:
        return _Partition(self._beside.path(self._targets[i]), i, self._columns, self._desc, self._sizes)


class _Partition:
    """One file on its way: its blob rows are on disk, of its raw rows it is known how many lie where."""

    def __init__(self, path: Path, shard_id: int, columns: Sequence[Column], desc: str, sizes: tuple[int, int]) -> None:
        self._file: IO[bytes] = path.open("xb")
        self._path, self._shard_id, self._columns, self._desc = path, shard_id, columns, desc
        self._header_size, self._page_size = sizes
        self._pages: list[dict[str, Any]] = []
        self._blob: dict[str, Any] | None = None
        self._raw: dict[str, Any] | None = None
        self._ends = array.array("q")  # of the blob rows of the group at work
        with _index_errors():
            self._index = sqlite3.connect(index_path(path), isolation_level=None)
            self._index.executescript(f"PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; {_TABLES}; BEGIN")

    def append(self, data: bytes) -> None:
        """Write a blob row, its length in front; where pages start is ShardWriter's rule (shard_writer.cc)."""
        blob, raw, size = self._blob, self._raw, self._page_size
        group_offset = raw["row_group_ids"][-1]["offset"] if raw else 0
        if (
            blob is None
            or raw is None
            or blob["page_size"] + len(data) > size
            or raw["page_size"] - group_offset + len(_RAW_ROW) > size
        ):
            blob, raw = self._start_group()
        elif raw["page_size"] + len(_RAW_ROW) > size:
            # A row group lies in one raw page: what the last has of this one moves to the next.
            moved = raw["page_size"] - group_offset
            raw["page_size"] = group_offset
            raw["row_group_ids"].pop()
            raw = self._start_raw(blob["page_type_id"], moved)
        self._file.write(data)
        blob["page_size"] += len(data)
        blob["end_row_id"] += 1
        raw["page_size"] += len(_RAW_ROW)
        self._ends.append(blob["page_size"])

    def finish(self, names: Sequence[str], saved_bytes: int) -> None:
        """Write what is known only now: the raw pages, the header, the end of the .db."""
        self._index_group()
        for page in self._pages:
            if page["page_type"] == "RAW_DATA":
                self._file.seek(self._position(page))
                for start in range(0, page["page_size"], len(_RAW_ROW) << 16):
                    num_rows = min(page["page_size"] - start, len(_RAW_ROW) << 16) // len(_RAW_ROW)
                    self._file.write(_RAW_ROW * num_rows)
        fields = {column.name: {"shape": [-1], "type": column.type} for column in self._columns}
        header = {
            "header_size": self._header_size,
            "index_fields": None,
            "page": self._pages,
            "page_size": self._page_size,
            "compression_size": saved_bytes,
            "schema": [{"blob_fields": list(fields), "desc": self._desc, "schema": fields}],
            "shard_addresses": list(names),
            "shard_id": self._shard_id,
            "statistics": None,
            "version": "3.0",
        }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        if len(text) + 8 > self._header_size:
            raise DataError(
                f"{names[self._shard_id]}: a header has no room for {len(self._pages)} pages: partition it."
            )
        self._file.seek(0)
        self._file.write(len(text).to_bytes(8, "little") + text)
        with _index_errors():
            self._index.execute("INSERT INTO SHARD_NAME VALUES (?)", (names[self._shard_id],))
            self._index.execute("COMMIT")
        self.close()

    def close(self) -> None:
        self._index.close()
        self._file.close()

    def __enter__(self) -> _Partition:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            self.close()

    def _start_group(self) -> tuple[dict[str, Any], dict[str, Any]]:
        self._index_group()
        last = self._blob
        group = last["page_type_id"] + 1 if last else 0
        first_row = last["end_row_id"] if last else 0
        blob = self._blob = self._page("BLOB_DATA", group, [{"id": 0, "offset": 0}], first_row)
        self._file.seek(self._position(blob))
        raw = self._raw
        if raw is None or raw["page_size"] + len(_RAW_ROW) > self._page_size:
            raw = self._start_raw(group, 0)
        else:
            raw["row_group_ids"].append({"id": group, "offset": raw["page_size"]})
        return blob, raw

    def _start_raw(self, group: int, num_bytes: int) -> dict[str, Any]:
        # MindSpore takes the last raw page's id for its ordinal among the raw ones, and adds one.
        ordinal = self._raw["page_id"] + 1 if self._raw else 0
        self._raw = self._page("RAW_DATA", ordinal, [{"id": group, "offset": 0}], 0)
        self._raw["page_size"] = num_bytes
        return self._raw

    def _page(self, kind: str, ordinal: int, groups: list[dict[str, int]], first_row: int) -> dict[str, Any]:
        page = {
            "end_row_id": first_row,
            "page_id": len(self._pages),
            "page_size": 0,
            "page_type": kind,
            "page_type_id": ordinal,
            "row_group_ids": groups,
            "shard_id": self._shard_id,
            "start_row_id": first_row,
        }
        self._pages.append(page)
        return page

    def _position(self, page: dict[str, Any]) -> int:
        return self._header_size + page["page_id"] * self._page_size

    def _index_group(self) -> None:
        """Write where the rows of the group at work lie, now that it grows and moves no more."""
        if self._blob is None or self._raw is None:
            return
        with _index_errors():
            self._index.executemany("INSERT INTO INDEXES VALUES (?,?,?,?,?,?,?,?)", self._index_rows())
        self._ends = array.array("q")

    def _index_rows(self) -> Iterator[tuple[int, ...]]:
        blob, raw = self._blob, self._raw
        assert blob is not None
        assert raw is not None
        start, at = 0, raw["row_group_ids"][-1]["offset"]
        for row, end in enumerate(self._ends, blob["start_row_id"]):
            yield row, raw["page_id"], at, at + len(_RAW_ROW), blob["page_type_id"], blob["page_id"], start, end
            start, at = end, at + len(_RAW_ROW)


def index_path(path: Path) -> Path:
    """Return where the .db of a file lies."""
    return path.with_name(path.name + ".db")


@contextlib.contextmanager
def _index_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise OSError(errno.ENOSPC if "full" in str(error) else errno.EIO, str(error)) from None


def _check_settings(path: Path, columns: Sequence[Column], partitions: int, sizes: tuple[int, int]) -> None:
    if not path.name or "\0" in str(path):
        raise DataError(f"{str(path)!r} names no file: name the one to write.")
    wrong = [column for column in columns if not re.fullmatch(r"[0-9A-Za-z_]+", column.name)]
    if wrong or not columns:
        name = wrong[0].name if wrong else ""
        raise DataError(f"{path}: {name!r} is no name for a column: use letters, digits and _.")
    for column in columns:
        if column.type not in NUMBERS:
            raise DataError(f"{path}: column {column.name} cannot be {column.type}: use one of {', '.join(NUMBERS)}.")
    if partitions < 1:
        raise DataError(f"{path}: it cannot have {partitions} partitions: say 1 or more.")
    for what, size, least, most in (("header", sizes[0], 1 << 14, 1 << 27), ("page", sizes[1], 1 << 15, 1 << 28)):
        if not least <= size <= most or size % 4:
            raise DataError(f"{path}: a {what} of {size} bytes is not {least} to {most} in steps of 4: change it.")


def _checked(values: Any, column: Column, where: str) -> np.ndarray:
    """Return a row's values in its column's type; raises DataError where that does not hold them."""
    dtype = NUMBERS[column.type]
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError):
        array = np.empty((0, 0))
    kinds = "iu" if dtype.kind == "i" else "iuf"
    if array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
        raise DataError(f"{where}: {column.name} must be a list of {column.type} numbers: change it.")
    if array.size and dtype.kind == "i" and array.dtype != dtype:
        bounds = np.iinfo(dtype)
        least, most = int(array.min()), int(array.max())
        if least < bounds.min or most > bounds.max:
            raise DataError(f"{where}: {column.name} goes from {least} to {most}, which {column.type} does not hold.")
    return np.ascontiguousarray(array, dtype)
