"""MindRecord 3.0, MindSpore's file of rows: read with or without its .db, written as MindSpore itself writes it.

A file is a header area (u64 length, JSON, zeros), then pages of one size each: blob pages hold the rows' arrays, raw
pages their single values, as many rows for each "row group" as its blob page has. Beside it an SQLite file says where
each row lies. Several partitions name each other in their headers. The rules are MindSpore 2.10's
(mindspore/ccsrc/minddata/mindrecord/io), found by having it write; there are no checksums anywhere.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
import json
import mmap
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ostro.data.mindrecord_row import NUMBERS, TYPES, Column, unpack_row
from ostro.data.mindrecord_writer import MindRecordWriter, index_path
from ostro.data.records import Tokens
from ostro.errors import DataError

__all__ = ["MindRecordFile", "MindRecordWriter", "is_mindrecord", "partition_files", "read_mindrecord"]

_IGNORED = -100  # a label that is not learned
_LARGEST_HEADER = 1 << 27
_LENGTH = struct.Struct("<Q")
_ROWS_OF_INDEX = (
    "SELECT ROW_ID, PAGE_ID_RAW, PAGE_OFFSET_RAW, PAGE_OFFSET_RAW_END, ROW_GROUP_ID, PAGE_ID_BLOB, PAGE_OFFSET_BLOB, "
    "PAGE_OFFSET_BLOB_END FROM INDEXES WHERE ROW_ID >= ? AND ROW_ID < ? ORDER BY ROW_ID"
)


class MindRecordFile:
    """The rows of a MindRecord file and of the partitions beside it, in order; `alone` leaves those out.

    `columns` are the names of the columns, sorted; `files` the partitions. Nothing but the headers is read before a
    row is asked for; a row is then all that is held, and where the rows of its page start. Raises DataError for
    files that are missing, cut off, damaged or disagree with each other or with their .db.
    """

    def __init__(self, path: str | Path, *, alone: bool = False) -> None:
        given = _read_header(Path(path))
        self._headers = [given] if alone or len(given.names) == 1 else _all_partitions(given)
        self.files = tuple(header.path for header in self._headers)
        self.columns = tuple(column.name for column in given.columns)
        self._ends = list(itertools.accumulate(header.num_rows for header in self._headers))
        self._open: _Partition | None = None

    def __len__(self) -> int:
        return self._ends[-1]

    def row(self, index: int) -> dict[str, np.ndarray]:
        """Return row `index` by column; single values are arrays without dims, bytes are uint8 [n]."""
        assert 0 <= index < len(self), (index, len(self))
        at = bisect.bisect_right(self._ends, index)
        header = self._headers[at]
        if self._open is None or self._open.header is not header:
            self._open = _Partition(header)
        return self._open.row(index - self._ends[at] + header.num_rows)

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """Yield rows [start, stop), as `row` gives them."""
        for index in range(start, len(self) if stop is None else stop):
            yield self.row(index)

    def where(self, index: int) -> str:
        """Return how an error names row `index`: the file it lies in, and its number there, from 1."""
        at = bisect.bisect_right(self._ends, index)
        header = self._headers[at]
        return _record(header.path, index - self._ends[at] + header.num_rows)


def is_mindrecord(path: str | Path) -> bool:
    """Whether the file starts as a MindRecord does: a length, and a JSON object with its keys."""
    try:
        with Path(path).open("rb") as file:
            start = file.read(8 + 64)
    except (OSError, ValueError):
        return False
    return start[8:].startswith(b'{"header_size":') and _LENGTH.unpack(start[:8])[0] <= _LARGEST_HEADER


def partition_files(path: str | Path) -> list[Path]:
    """Return the files that MindRecordFile(path) reads: all partitions of the set that `path` is of, in order."""
    return list(MindRecordFile(path).files)


def read_mindrecord(path: str | Path, *, alone: bool = False) -> Iterator[Tokens]:
    """Yield the rows of MindFormers' training data: `input_ids`, learned where `labels`, if there, are not -100.

    A row has seq_length + 1 ids, and a model trains on each but the first. Rows without any id are left out. Raises
    DataError where a row is not that: labels that differ from the ids are no such data.
    """
    file = MindRecordFile(path, alone=alone)
    if "input_ids" not in file.columns:
        raise DataError(
            f"{path} has the columns {', '.join(file.columns)}, and training data needs input_ids: name another file."
        )
    for index, row in enumerate(file.rows()):
        where = file.where(index)
        ids = row["input_ids"]
        if ids.ndim != 1 or ids.dtype.kind != "i" or (ids.size and ids.min() < 0):
            raise DataError(f"{where}: input_ids must be a list of numbers that are not below 0: write the row again.")
        trained = _trained(ids, row["labels"], where) if "labels" in row else None
        if ids.size:
            yield Tokens(ids, where, trained)


def _trained(ids: np.ndarray, labels: np.ndarray, where: str) -> np.ndarray:
    trained = labels != _IGNORED
    if labels.shape != ids.shape or labels.dtype.kind != "i":
        raise DataError(
            f"{where}: labels must be as many numbers as input_ids, which are {ids.size}: write them again."
        )
    wrong = np.flatnonzero(trained & (labels != ids))
    if wrong.size:
        at = int(wrong[0])
        raise DataError(
            f"{where}: labels[{at}] is {labels[at]} and input_ids[{at}] is {ids[at]}: a label must be its token's id, "
            f"or {_IGNORED} where it is not learned."
        )
    return trained


@dataclasses.dataclass(frozen=True, slots=True)
class _Group:
    """A row group: its rows [first_row, end_row), and where the bytes of its blob and raw rows lie in the file."""

    first_row: int
    end_row: int
    blob_page: int
    blob: tuple[int, int]
    raw_page: int
    raw: tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class _Header:
    path: Path
    columns: tuple[Column, ...]
    names: tuple[str, ...]
    shard_id: int
    groups: tuple[_Group, ...]
    area: tuple[int, int]  # bytes before the first page, and from page to page

    @property
    def num_rows(self) -> int:
        return self.groups[-1].end_row if self.groups else 0


class _Partition:
    """One file, mapped; it remembers where the rows of the group it read last start."""

    def __init__(self, header: _Header) -> None:
        self.header = header
        try:
            with header.path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"{header.path} cannot be read: {error}.") from None
        if header.groups and len(self._data) < max(max(group.blob[1], group.raw[1]) for group in header.groups):
            raise _damaged(header.path, "it has shrunk since it was opened")
        self._has_index = bool(header.num_rows) and index_path(header.path).exists()
        if self._has_index:
            _check_index_of(header)
        self._at = -1
        self._blob_starts = self._raw_starts = np.empty(0, np.int64)

    def row(self, index: int) -> dict[str, np.ndarray]:
        groups = self.header.groups
        at = bisect.bisect_right(groups, index, key=lambda group: group.first_row) - 1
        if at != self._at:
            self._find_rows(at)
        i = index - groups[at].first_row
        start, stop = self._blob_starts[i : i + 2]
        blob = np.frombuffer(self._data[start + 8 : stop], np.uint8)
        raw = self._data[self._raw_starts[i] + 8 : self._raw_starts[i + 1]]
        try:
            return unpack_row(self.header.columns, blob, raw)
        except ValueError as error:
            raise DataError(
                f"{_record(self.header.path, index)} is damaged: {error}: fetch or write the file again."
            ) from None

    def _find_rows(self, at: int) -> None:
        group = self.header.groups[at]
        self._at = -1  # until all of it is found good
        self._blob_starts = self._starts(group, *group.blob)
        self._raw_starts = self._starts(group, *group.raw)
        if self._has_index:
            _check_rows_of_index(self.header, at, self._blob_starts, self._raw_starts)
        self._at = at

    def _starts(self, group: _Group, start: int, stop: int) -> np.ndarray:
        """Return where each row of the group starts in the file, and where the last ends, by walking the lengths."""
        starts = np.empty(group.end_row - group.first_row + 1, np.int64)
        for i in range(len(starts) - 1):
            starts[i] = start
            size = _LENGTH.unpack_from(self._data, start)[0] if stop - start >= 8 else stop
            start += 8 + size
            if start > stop:
                where = _record(self.header.path, group.first_row + i)
                raise DataError(f"{where} is damaged, it runs past its page: fetch or write the file again.")
        if start != stop:
            where = _record(self.header.path, group.end_row - 1)
            raise DataError(f"{where} is damaged, {stop - start} bytes follow it: fetch or write the file again.")
        starts[-1] = start
        return starts


def _record(path: Path, index: int) -> str:
    return f"{path} record {index + 1}"


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is damaged, {reason}: fetch or write it again.")


# The header


def _read_header(path: Path) -> _Header:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(8)
            num_bytes = _LENGTH.unpack(start)[0] if len(start) == 8 else 0
            text = file.read(num_bytes) if 2 <= num_bytes <= min(size - 8, _LARGEST_HEADER) else b""
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:  # a null character in the name
        raise DataError(f"{str(path)!r} cannot be read: {error}.") from None
    if not text.startswith(b"{"):
        raise DataError(f"{path} is no MindRecord file, or only its start is left: fetch it again, or name another.")
    try:
        return _parse(path, json.loads(text.decode("utf-8")), size)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else error
        raise _damaged(path, f"its header cannot be followed ({reason})") from None


def _parse(path: Path, header: dict[str, Any], size: int) -> _Header:
    """Return what a header says; raises KeyError, TypeError or ValueError where it says it wrongly."""
    if header["version"] != "3.0":
        raise ValueError(f"version {str(header['version'])[:20]} instead of 3.0")
    area = (_count(header, "header_size"), _count(header, "page_size"))
    names = tuple(str(name).rsplit("/", 1)[-1] for name in header["shard_addresses"])
    shard_id = _count(header, "shard_id")
    if shard_id >= len(names) or not all(0 < len(name.encode("utf-8")) < 256 and "\0" not in name for name in names):
        raise ValueError("the partitions are not named")
    if not {".", ".."}.isdisjoint(names):
        raise ValueError("a partition is called like a folder")
    pages = header["page"] or []  # null where a partition has no rows
    spans = {_count(page, "page_id"): _span(page, area, size) for page in pages}
    if len(spans) != len(pages):
        raise ValueError("two pages have the same id")
    blobs = sorted((page for page in pages if page["page_type"] == "BLOB_DATA"), key=lambda page: page["page_type_id"])
    raws = _raw_groups([page for page in pages if page["page_type"] == "RAW_DATA"], spans)
    if [page["page_type_id"] for page in blobs] != list(range(len(blobs))) or raws.keys() != set(range(len(blobs))):
        raise ValueError("the pages are not those of its row groups")
    groups: list[_Group] = []
    for i, page in enumerate(blobs):
        first, end, page_id = _count(page, "start_row_id"), _count(page, "end_row_id"), page["page_id"]
        raw_page, raw = raws[i]
        least = min(spans[page_id][1] - spans[page_id][0], raw[1] - raw[0])
        if first != (groups[-1].end_row if groups else 0) or end <= first or (end - first) * 8 > least:
            raise ValueError(f"page {page_id} cannot hold rows {first} to {end}")
        groups.append(_Group(first, end, page_id, spans[page_id], raw_page, raw))
    return _Header(path, _columns(header["schema"]), names, shard_id, tuple(groups), area)


def _count(entry: dict[str, Any], key: str) -> int:
    value = entry[key]
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{key} is {str(value)[:40]}")
    return value


def _span(page: dict[str, Any], area: tuple[int, int], size: int) -> tuple[int, int]:
    start = area[0] + page["page_id"] * area[1]
    used = _count(page, "page_size")
    if used > area[1]:
        raise ValueError(f"page {page['page_id']} is larger than a page")
    if start + used > size:
        raise ValueError(f"page {page['page_id']} ends at byte {start + used}, the file at {size}")
    return start, start + used


def _raw_groups(
    pages: list[dict[str, Any]], spans: dict[int, tuple[int, int]]
) -> dict[int, tuple[int, tuple[int, int]]]:
    """Return, by row group, the raw page it lies in and where."""
    found = {}
    for page in pages:
        start, stop = spans[page["page_id"]]
        offsets = [_count(entry, "offset") for entry in page["row_group_ids"]]
        ends = [*offsets[1:], stop - start]
        for entry, offset, end in zip(page["row_group_ids"], offsets, ends, strict=True):
            group = _count(entry, "id")
            if not offset <= end <= stop - start or group in found:
                raise ValueError(f"row group {group} is not where it should be")
            found[group] = (page["page_id"], (start + offset, start + end))
    return found


def _columns(schemas: Any) -> tuple[Column, ...]:
    if not isinstance(schemas, list) or len(schemas) != 1:
        raise ValueError("it must have one schema")
    columns = []
    for name, field in sorted(schemas[0]["schema"].items()) if isinstance(schemas[0]["schema"], dict) else ():
        shape = field.get("shape") if isinstance(field, dict) else None
        if not isinstance(field, dict) or field["type"] not in TYPES:
            raise ValueError(f"column {name[:40]!r} is of no known type")
        if shape is not None and not (
            isinstance(shape, list) and all(map(_is_dim, shape)) and field["type"] in NUMBERS
        ):
            raise ValueError(f"column {name[:40]!r} has the shape {str(shape)[:40]}")
        columns.append(Column(name, field["type"], None if shape is None else tuple(shape)))
    if not columns or schemas[0]["blob_fields"] != [column.name for column in columns if column.is_blob]:
        raise ValueError("blob_fields are not the columns with arrays")
    return tuple(columns)


def _is_dim(dim: Any) -> bool:
    return type(dim) is int and -1 <= dim < 1 << 31


def _all_partitions(given: _Header) -> list[_Header]:
    """Return the headers of the whole set that a partition is of."""
    path = given.path
    if given.names[given.shard_id] != path.name:
        raise DataError(
            f"{path} is partition {given.shard_id} of {len(given.names)} and was called {given.names[given.shard_id]}: "
            "give the partitions their old names, by which they know each other."
        )
    headers = []
    for shard_id, name in enumerate(given.names):
        beside = path.with_name(name)
        if not beside.exists():
            raise DataError(
                f"{path} is one of {len(given.names)} partitions, and {name} is not beside it: put it there."
            )
        header = _read_header(beside)
        if (header.names, header.shard_id, header.columns) != (given.names, shard_id, given.columns):
            raise DataError(f"{beside} is no partition of the data that {path.name} is of: put the right one there.")
        headers.append(header)
    return headers


# The .db beside a file


def _check_index_of(header: _Header) -> None:
    """Raise DataError where the .db is of another file."""
    with _opened_index(header.path) as index:
        names = index.execute("SELECT NAME FROM SHARD_NAME LIMIT 2").fetchall()
        num_rows, first, last = index.execute("SELECT COUNT(*), MIN(ROW_ID), MAX(ROW_ID) FROM INDEXES").fetchone()
    if names != [(header.names[header.shard_id],)] or (num_rows, first, last) != (
        header.num_rows,
        0,
        header.num_rows - 1,
    ):
        raise _disagrees(header.path, f"is of another file, or of this one with {num_rows} rows, not {header.num_rows}")


def _check_rows_of_index(header: _Header, at: int, blob_starts: np.ndarray, raw_starts: np.ndarray) -> None:
    """Raise DataError where the .db does not have the rows of group `at` where they are."""
    group = header.groups[at]
    blob, raw = (
        starts - header.area[0] - page * header.area[1]
        for starts, page in ((blob_starts, group.blob_page), (raw_starts, group.raw_page))
    )
    with _opened_index(header.path) as index:
        rows = index.execute(_ROWS_OF_INDEX, (group.first_row, group.end_row))
        for i in range(0, len(blob) - 1, 4096):
            n = len(blob[i : i + 4097]) - 1
            true = zip(
                range(group.first_row + i, group.first_row + i + n),
                itertools.repeat(group.raw_page),
                *(part.tolist() for part in (raw[i : i + n], raw[i + 1 : i + n + 1])),
                itertools.repeat(at),
                itertools.repeat(group.blob_page),
                *(part.tolist() for part in (blob[i : i + n], blob[i + 1 : i + n + 1])),
            )
            if rows.fetchmany(n) != list(true):
                raise _disagrees(header.path, f"does not have rows {group.first_row + i} and on where they are")


@contextlib.contextmanager
def _opened_index(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the .db beside `path` as it is, writing nothing; what goes wrong with it becomes a sentence."""
    try:
        uri = index_path(path).absolute().as_uri() + "?mode=ro&immutable=1"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as index:
            yield index
    except (sqlite3.Error, sqlite3.Warning, OSError, ValueError, OverflowError) as error:
        raise _disagrees(path, f"cannot be read ({error})") from None


def _disagrees(path: Path, how: str) -> DataError:
    return DataError(
        f"{path}: the .db beside it {how}: remove {index_path(path).name}, which is not needed for reading, or fetch "
        "both again."
    )
