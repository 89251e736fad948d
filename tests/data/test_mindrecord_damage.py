"""MindRecord files that are damaged, foreign or in the way, and rows that are none: each refused in a sentence."""

from __future__ import annotations

import errno
import random
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindrecord_files import SMALL, assert_same, header_of, set_header, write

from ostro.data import mindrecord_writer
from ostro.data.mindrecord import (
    MindRecordFile,
    MindRecordWriter,
    is_mindrecord,
    read_mindrecord,
)
from ostro.errors import DataError, OutOfMemory

# What cannot be read


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda header: header.pop("version"), "there is no 'version'"),
        (lambda header: header.update(version="2.0"), "version 2.0 instead of 3.0"),
        (lambda header: header.update(page_size=True), "page_size is True"),
        (lambda header: header.update(header_size=1 << 70), "header_size is 1180591620717411303424"),
        (lambda header: header["page"][0].update(page_id=9), "page 9 ends at byte"),
        (lambda header: header["page"][0].update(end_row_id=1 << 50), "cannot hold rows 0 to"),
        (lambda header: header["page"][0].update(start_row_id=1), "cannot hold rows 1 to 3"),
        (lambda header: header["page"][0].update(page_type_id=1), "are not those of its row groups"),
        (lambda header: header["page"][0].update(page_size=1 << 20), "page 0 is larger than a page"),
        (lambda header: header["page"][1].update(page_id=0), "two pages have the same id"),
        (lambda header: header["page"][1]["row_group_ids"][0].update(offset=99), "row group 0 is not where"),
        (lambda header: header["page"].pop(), "are not those of its row groups"),
        (lambda header: header.update(shard_addresses=[]), "the partitions are not named"),
        (lambda header: header.update(shard_addresses=[".."]), "a partition is called like a folder"),
        (lambda header: header["schema"][0].update(blob_fields=[]), "blob_fields are not the columns"),
        (lambda header: header["schema"][0]["schema"]["input_ids"].update(type="int7"), "of no known type"),
        (lambda header: header["schema"][0]["schema"]["input_ids"].update(shape=[-2]), "has the shape"),
        (lambda header: header.update(schema=[]), "it must have one schema"),
        (lambda header: header["page"][0].update(end_row_id=4), "cannot be followed|record 4 is damaged"),
        (lambda header: header["page"][0].update(end_row_id=2), "record 2 is damaged, 14 bytes follow it"),
    ],
)
def test_a_header_that_says_wrong_things_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    path = write(tmp_path / "x", [[1], [2], [3]])
    path.with_name("x.db").unlink()
    set_header(path, change)
    with pytest.raises(DataError, match=complaint) as caught:
        list(MindRecordFile(path).rows())
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"\0" * 8, b"hello, this is text", b"\x05" + bytes(7) + b"{", b"\xff" * 99]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    assert not is_mindrecord(path)
    with pytest.raises(DataError, match=r"x is no MindRecord file|x is damaged"):
        MindRecordFile(path)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "no", tmp_path, Path("a\0b")):
        assert not is_mindrecord(path)
        with pytest.raises(DataError, match="cannot be read"):
            MindRecordFile(path)


@pytest.mark.parametrize(
    ("statement", "complaint"),
    [
        ("UPDATE INDEXES SET PAGE_OFFSET_BLOB = PAGE_OFFSET_BLOB + 1 WHERE ROW_ID = 1", "rows 0 and on"),
        ("UPDATE INDEXES SET PAGE_OFFSET_RAW_END = 0 WHERE ROW_ID = 2", "rows 0 and on"),
        ("UPDATE INDEXES SET ROW_GROUP_ID = 1", "rows 0 and on"),
        ("UPDATE INDEXES SET PAGE_ID_BLOB = 'x'", "rows 0 and on"),
        ("DELETE FROM INDEXES WHERE ROW_ID = 1", "with 2 rows, not 3"),
        ("DROP TABLE INDEXES", "no such table: INDEXES"),
        ("UPDATE SHARD_NAME SET NAME = 'y'", "of another file"),
        ("DELETE FROM SHARD_NAME", "of another file"),
        (None, "file is not a database"),
    ],
)
def test_an_index_that_disagrees_is_refused_and_may_be_removed(
    tmp_path: Path, statement: str | None, complaint: str
) -> None:
    path = write(tmp_path / "x", [[1], [2], [3]])
    index = tmp_path / "x.db"
    if statement is None:
        index.write_bytes(b"no database at all" * 99)
    else:
        with sqlite3.connect(index) as database:
            database.execute(statement)
    with pytest.raises(DataError, match=f"the .db beside it .*{complaint}.*remove x.db"):
        list(MindRecordFile(path).rows())
    index.unlink()
    assert len(list(MindRecordFile(path).rows())) == 3


# Training data


@pytest.mark.parametrize(
    ("columns", "row", "complaint"),
    [
        (["tokens"], {"tokens": [1]}, "has the columns tokens, and training data needs input_ids"),
        (["input_ids"], {"input_ids": [1, -1]}, "record 1: input_ids must be a list of numbers that are not below 0"),
        ({"input_ids": "float32"}, {"input_ids": [1.0]}, "record 1: input_ids must be"),
        (["input_ids", "labels"], {"input_ids": [1, 2], "labels": [1]}, "labels must be as many numbers"),
        (
            ["input_ids", "labels"],
            {"input_ids": [1, 2], "labels": [-100, 3]},
            r"labels\[1\] is 3 and input_ids\[1\] is 2",
        ),
        ({"input_ids": "int32", "labels": "float32"}, {"input_ids": [1], "labels": [1]}, "labels must be as many"),
    ],
)
def test_rows_that_are_no_training_data_are_refused(tmp_path: Path, columns: Any, row: Any, complaint: str) -> None:
    path = write(tmp_path / "x", [row], columns)
    with pytest.raises(DataError, match=complaint):
        list(read_mindrecord(path))


# What cannot be written


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({}, "the columns are a, b, and the row has : give"),
        ({"a": [1], "b": [1], "c": [1]}, "the row has a, b, c"),
        ({"a": [2**31], "b": [1]}, "a goes from 2147483648 to 2147483648, which int32 does not hold"),
        ({"a": [1], "b": [2**63]}, "b goes from 9223372036854775808"),
        ({"a": [1], "b": [2**64]}, "b must be a list of int64 numbers"),
        ({"a": [1.0], "b": [1]}, "a must be a list of int32 numbers"),
        ({"a": [[1]], "b": [1]}, "a must be a list"),
        ({"a": 1, "b": [1]}, "a must be a list"),
        ({"a": [[1], [1, 2]], "b": [1]}, "a must be a list"),
        ({"a": ["1"], "b": [1]}, "a must be a list"),
        ({"a": [True], "b": [1]}, "a must be a list"),
        ({"a": None, "b": [1]}, "a must be a list"),
        ({"a": np.full(9000, 2**30), "b": [1]}, "the row takes 38284 bytes, and a page holds 32768"),
    ],
)
def test_a_wrong_row_is_refused_and_nothing_is_left(tmp_path: Path, row: dict[str, Any], complaint: str) -> None:
    rows = [{"a": [1], "b": [2]}, row]
    for partitions in (1, 2):
        with pytest.raises(DataError, match=f"x record 2: .*{complaint}"):
            write(tmp_path / "x", rows, {"b": "int64", "a": "int32"}, partitions=partitions)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"columns": []}, "'' is no name for a column"),
        ({"columns": ["a b"]}, "'a b' is no name for a column"),
        ({"columns": {"a": "int8"}}, "column a cannot be int8: use one of int32"),
        ({"partitions": 0}, "it cannot have 0 partitions"),
        ({"page_size": 1 << 10}, "a page of 1024 bytes is not 32768 to"),
        ({"header_size": (1 << 14) + 2}, "a header of 16386 bytes"),
        ({"path": Path("/")}, "names no file"),
        ({"path": Path("a\0b")}, "names no file"),
    ],
)
def test_settings_that_mindspore_has_not_are_refused(tmp_path: Path, more: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        MindRecordWriter(**{"path": tmp_path / "x", "columns": ["a"], "desc": "", **more})


def test_no_rows_an_empty_row_or_too_few_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are 0 rows for 1 files"):
        write(tmp_path / "x", [])
    with pytest.raises(DataError, match="there are 2 rows for 3 files"):
        write(tmp_path / "x", [[1], [2]], partitions=3)
    with pytest.raises(DataError, match="record 1: its only array is empty, which MindSpore refuses"):
        write(tmp_path / "x", [[]])
    assert not list(tmp_path.iterdir())


def test_more_pages_than_the_header_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="x: a header has no room for 121 pages: partition it"):
        write(tmp_path / "x", [np.full(7000, 2**30)] * 120)
    assert not list(tmp_path.iterdir())
    write(tmp_path / "x", [np.full(7000, 2**30)] * 120, partitions=2)
    assert len(MindRecordFile(tmp_path / "x0")) == 120


@pytest.mark.parametrize("taken", ["x", "x.db"])
def test_what_is_there_is_not_written_over(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("mine")
    with pytest.raises(DataError, match=f"{taken} exists already"):
        write(tmp_path / "x", [[1]])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(taken, "mine")]


@pytest.mark.parametrize("partitions", [1, 2])
def test_a_full_disk_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partitions: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(mindrecord_writer._Partition, "append", full)
    with pytest.raises(OutOfMemory, match=r"the disk is full, and nothing of .*x was kept"):
        write(tmp_path / "x", [[1], [2]], partitions=partitions)
    assert not list(tmp_path.iterdir())


def test_a_rename_that_fails_takes_the_others_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ostro.data import beside  # where the renames are

    real, done = beside.os.replace, []

    def breaks(source: Path, target: Path) -> None:
        if len(done) == 3:
            raise PermissionError(errno.EACCES, "denied")
        done.append(target)
        real(source, target)

    monkeypatch.setattr(beside.os, "replace", breaks)
    with pytest.raises(DataError, match=r"x cannot be written \(denied"):
        write(tmp_path / "x", [[1], [2]], partitions=2)
    assert len(done) == 3
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_caller_passes_through_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "x", ([1 // i] for i in (1, 0)))
    assert not list(tmp_path.iterdir())


# Damage by the thousand


def damaged(data: bytes, spots: list[tuple[int, int]], chance: random.Random) -> bytes:
    """Cut, change, repeat or retype some bytes within the spots that mean something."""
    start, stop = chance.choice(spots)
    at = chance.randrange(start, stop)
    kind = chance.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if kind == 3:
        return data[:at] + data[at + chance.randrange(1, 9) :]
    if kind == 4:
        return data[:at] + chance.choice([b"9", b"-1", b"null", b'"', b"[]", b"{}", b"1e9", b"\xff" * 8]) + data[at:]
    word = chance.choice(
        [bytes(8), b"\xff" * 8, b"\xff" * 7 + b"\x7f", struct.pack("<Q", len(data)), struct.pack(">Q", 1)]
    )
    return data[:at] + word + data[at + 8 :]


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    rows = [{"input_ids": np.array([i, 300 * i, -i]), "labels": np.array([1, 2**20 * i])} for i in range(6)]
    path = write(tmp_path / "x", rows, {"input_ids": "int32", "labels": "int32"})
    index = tmp_path / "x.db"
    data, index_data, header = path.read_bytes(), index.read_bytes(), header_of(path)
    places = [(SMALL["header_size"] + p["page_id"] * SMALL["page_size"], p["page_size"]) for p in header["page"]]
    spots = [(0, 8 + struct.unpack("<Q", data[:8])[0]), *((start, start + size) for start, size in places)]
    used = [(at, at + 512) for at in range(0, len(index_data), 512) if any(index_data[at : at + 512])]
    chance, refused = random.Random(4), []
    for turn in range(2400):
        in_index, with_index = turn % 4 == 0, turn % 4 < 2
        path.unlink()  # a file that is cut to nothing and written anew may wait for the disk
        path.write_bytes(data if in_index else damaged(data, spots, chance))
        index.unlink(missing_ok=True)
        if with_index:
            index.write_bytes(damaged(index_data, used, chance) if in_index else index_data)
        try:
            found = list(MindRecordFile(path).rows())
        except DataError as error:
            refused.append(str(error))
            continue
        if in_index:
            for one, other in zip(found, rows, strict=True):
                assert_same({name: array.astype(np.int64) for name, array in one.items()}, other)
        elif with_index:  # which knows where each of them lies
            assert len(found) == len(rows)
        assert all(array.dtype.kind in "if" and array.ndim == 1 for row in found for array in row.values())
    assert all(str(path) in message for message in refused)
    assert 1200 < len(refused) < 2350
