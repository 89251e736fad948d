"""MindRecord files: MindSpore's own read, its bytes written, and whatever is damaged refused in a sentence."""

from __future__ import annotations

import random
import shutil
import sqlite3
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindrecord_files import Row, assert_same, header_of, set_header, write

from ostro.data.mindrecord import (
    MindRecordFile,
    MindRecordWriter,
    is_mindrecord,
    partition_files,
    read_mindrecord,
)
from ostro.data.mindrecord_row import Column, pack_row, unpack_row
from ostro.errors import DataError

BOUNDS = {"int32": 2**31, "int64": 2**63}
EDGES = [sign * 2**bits + d for bits in (0, 7, 8, 15, 16, 31, 32, 62) for sign in (-1, 1) for d in (-1, 0, 1)]


# MindSpore's own files


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("name", ["wiki", "qa"])
def test_reads_what_mindspore_wrote(shared: Path, tmp_path: Path, name: str, with_index: bool) -> None:
    golden = shared / "golden" / "mindrecord"
    path = Path(shutil.copy(golden / f"{name}.mindrecord", tmp_path))
    if with_index:
        shutil.copy(golden / f"{name}.mindrecord.db", tmp_path)
    expected = np.load(golden / "expected.npz")
    columns = ("input_ids", "labels") if name == "qa" else ("input_ids",)
    file = MindRecordFile(path)
    assert is_mindrecord(path)
    assert file.columns == columns
    assert len(file) == 40
    for i, row in enumerate(file.rows()):
        assert_same(row, {column: expected[column][i] for column in columns})
    assert_same(file.row(17), {column: expected[column][17] for column in columns})
    assert [row["input_ids"][0] for row in file.rows(38)] == expected["input_ids"][38:, 0].tolist()
    assert [row["input_ids"][0] for row in file.rows(3, 5)] == expected["input_ids"][3:5, 0].tolist()


@pytest.mark.parametrize(("name", "columns"), [("wiki", ["input_ids"]), ("qa", ["labels", "input_ids"])])
def test_writes_the_bytes_that_mindspore_writes(shared: Path, tmp_path: Path, name: str, columns: list[str]) -> None:
    golden = shared / "golden" / "mindrecord" / f"{name}.mindrecord"
    ours = tmp_path / golden.name
    with MindRecordWriter(ours, columns, name, header_size=32768, page_size=65536) as writer:
        for row in MindRecordFile(golden).rows():
            writer.append(row)
    assert ours.read_bytes() == golden.read_bytes()
    for query in ("SELECT * FROM INDEXES ORDER BY ROW_ID", "SELECT * FROM SHARD_NAME"):
        mine, theirs = (
            sqlite3.connect(f"{path.as_uri()}.db?mode=ro&immutable=1", uri=True).execute(query).fetchall()
            for path in (ours, golden.resolve())
        )
        assert mine == theirs
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.mindrecord", f"{name}.mindrecord.db"]


def test_golden_rows_train_as_mindformers_trains_them(shared: Path) -> None:
    golden = shared / "golden" / "mindrecord"
    expected = np.load(golden / "expected.npz")
    for name in ("wiki", "qa"):
        path = golden / f"{name}.mindrecord"
        for i, tokens in enumerate(read_mindrecord(path)):
            assert tokens.where == f"{path} record {i + 1}"
            np.testing.assert_array_equal(tokens.ids, expected["input_ids"][i])
            if name == "wiki":
                assert tokens.trained is None
            else:
                np.testing.assert_array_equal(tokens.trained, expected["labels"][i] != -100)
        assert i == 39


# Pages: what FileWriter of MindSpore 2.10 made of the same rows, one write_raw_data each

RISING = [(0, "BLOB_DATA", 0, 2184, 32760), (1, "RAW_DATA", 0, [(0, 0)], 28392), (2, "BLOB_DATA", 1, 4368, 32760)]
RISING += [(3, "RAW_DATA", 2, [(1, 0)], 28392), (4, "BLOB_DATA", 2, 6552, 32760), (5, "RAW_DATA", 4, [(2, 0)], 28392)]
RISING += [(6, "BLOB_DATA", 3, 8736, 32760), (7, "RAW_DATA", 6, [(3, 0), (4, 28392)], 31824)]
RISING += [(8, "BLOB_DATA", 4, 9000, 3960)]
EVEN = [(0, "BLOB_DATA", 0, 1260, 32760), (1, "RAW_DATA", 0, [(0, 0), (1, 16380)], 32760)]
EVEN += [(2, "BLOB_DATA", 1, 2520, 32760), (3, "BLOB_DATA", 2, 3780, 32760)]
EVEN += [(4, "RAW_DATA", 2, [(2, 0), (3, 16380)], 19240), (5, "BLOB_DATA", 3, 4000, 5720)]


@pytest.mark.parametrize(
    ("rows", "pages", "saved", "size"),
    [
        ([np.arange(i % 3 + 1) for i in range(9000)], RISING, 9000, 282488),
        ([np.arange(11)] * 4000, EVEN, 104000, 185944),
    ],
    ids=["a raw page fills up in a row group", "and between two"],
)
def test_pages_start_where_mindspore_starts_them(
    tmp_path: Path, rows: list[np.ndarray], pages: list[Any], saved: int, size: int
) -> None:
    path = write(tmp_path / "x.mindrecord", rows)
    header = header_of(path)
    found = []
    for page in header["page"]:
        groups = [(group["id"], group["offset"]) for group in page["row_group_ids"]]
        is_raw = page["page_type"] == "RAW_DATA"
        third = groups if is_raw else page["end_row_id"]
        found.append((page["page_id"], page["page_type"], page["page_type_id"], third, page["page_size"]))
        assert is_raw or groups == [(0, 0)]
    assert found == pages
    assert (header["compression_size"], path.stat().st_size) == (saved, size)
    for i, row in enumerate(MindRecordFile(path).rows()):  # and the .db agrees, which reading checks
        np.testing.assert_array_equal(row["input_ids"], rows[i])


def test_a_default_file_takes_no_more_disk_than_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.mindrecord"
    with MindRecordWriter(path, ["input_ids"], "rows") as writer:
        writer.append({"input_ids": [1, 2, 3]})
    assert path.stat().st_size == (1 << 24) + (1 << 25) + 13
    assert path.stat().st_blocks * 512 < 1 << 16
    assert [row["input_ids"].tolist() for row in MindRecordFile(path).rows()] == [[1, 2, 3]]


# The bytes of a row


def plain_pack(values: list[int]) -> bytes:
    """The packing of integers, number for number."""
    codes = [next(c for c in range(4) if -(1 << (8 << c) - 1) <= value < 1 << (8 << c) - 1) for value in values]
    packed = bytearray(-(-len(values) // 4))
    for i, code in enumerate(codes):
        packed[i // 4] |= code << (6 - i % 4 * 2)
    numbers = b"".join(
        value.to_bytes(1 << code, "little", signed=True) for value, code in zip(values, codes, strict=True)
    )
    return struct.pack(">I", len(values)) + bytes(packed) + numbers


@settings(max_examples=300)
@given(st.lists(st.one_of(st.sampled_from(EDGES), st.integers(-(2**63), 2**63 - 1), st.integers(-200, 40000))))
def test_integers_are_packed_as_the_plain_way_packs_them(values: list[int]) -> None:
    for dtype, bound in BOUNDS.items():
        array = np.array([value for value in values if -bound <= value < bound], dtype)
        column = Column("x", dtype, (-1,))
        packed = pack_row([column], {"x": array})
        assert packed == plain_pack(array.tolist())
        assert_same(unpack_row([column], np.frombuffer(packed, np.uint8), b""), {"x": array})


@st.composite
def tables(draw: st.DrawFn) -> tuple[dict[str, str], list[Row]]:
    types = draw(
        st.dictionaries(
            st.text("ab_1Z", min_size=1, max_size=3),
            st.sampled_from(["int32", "int64", "float32", "float64"]),
            min_size=1,
        )
    )
    numbers = {
        "int32": st.integers(-(2**31), 2**31 - 1),
        "int64": st.one_of(st.sampled_from(EDGES), st.integers(-(2**63), 2**63 - 1)),
        "float32": st.floats(width=32),
        "float64": st.floats(),
    }
    least = 1 if len(types) == 1 else 0
    row = st.fixed_dictionaries(
        {
            name: st.lists(numbers[kind], min_size=least).map(lambda x, k=kind: np.array(x, k))
            for name, kind in types.items()
        }
    )
    return types, draw(st.lists(row, min_size=1, max_size=12))


@settings(max_examples=60)
@given(tables(), st.integers(1, 4), st.booleans(), st.booleans())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    table: tuple[dict[str, str], list[Row]],
    partitions: int,
    alone: bool,
    bare: bool,
) -> None:
    types, rows = table
    partitions = min(partitions, len(rows))
    folder = tmp_path_factory.mktemp("round")
    write(folder / "x", rows, types, partitions=partitions)
    paths = sorted(path for path in folder.iterdir() if path.suffix != ".db")
    if bare:
        for path in folder.glob("*.db"):
            path.unlink()
    found = [row for path in (paths if alone else paths[-1:]) for row in MindRecordFile(path, alone=alone).rows()]
    assert len(found) == len(rows)
    for one, other in zip(found, rows, strict=True):
        assert_same(one, other)
    shutil.rmtree(folder)


def test_rows_are_read_in_any_order_over_pages_and_partitions(tmp_path: Path) -> None:
    write(tmp_path / "x.mindrecord", [np.full(900, i) for i in range(500)], partitions=3)
    file = MindRecordFile(tmp_path / "x.mindrecord1")
    order = list(range(500))
    random.Random(0).shuffle(order)
    assert sum(page["page_type"] == "BLOB_DATA" for page in header_of(file.files[0])["page"]) > 5
    assert [int(file.row(i)["input_ids"][899]) for i in order] == order
    assert file.where(0) == f"{tmp_path}/x.mindrecord0 record 1"
    assert file.where(499) == f"{tmp_path}/x.mindrecord2 record 166"


# Single values, which only MindSpore writes: a row of each form that MessagePack has

RAW = b"\x88\xa1a\xd2\x80\0\0\0\xa1b\xca?\xc0\0\0\xa1d\xcb?\xb9\x99\x99\x99\x99\x99\x9a\xa1l\xcf@\0\0\0\0\0\0\0"
RAW += b"\xa1m\xff\xa1n\xcd\x01\0\xa1s\xa5h\xc3\xa9\xc3\xa9\xa1t\xd9\x02\xc3\xa9"
SINGLE = {
    "a": "int32",
    "b": "float32",
    "d": "float64",
    "l": "int64",
    "m": "int32",
    "n": "int64",
    "s": "string",
    "t": "string",
}
VALUES = {"a": -(2**31), "b": 1.5, "d": 0.1, "l": 2**62, "m": -1, "n": 256, "s": "héé", "t": "é"}


def test_single_values_are_read_beside_arrays() -> None:
    columns = [Column(name, kind) for name, kind in SINGLE.items()]
    blob = bytes.fromhex("0000000000000003616263 0000000000000010 0000803f000000400000404000008040".replace(" ", ""))
    both = sorted([*columns, Column("y", "bytes"), Column("z", "float32", (2, 2))], key=lambda column: column.name)
    row = unpack_row(both, np.frombuffer(blob, np.uint8), RAW)
    assert {name: row[name].item() for name in SINGLE} == VALUES
    assert row["a"].dtype == np.int32
    assert row["y"].tobytes() == b"abc"
    assert row["z"].tolist() == [[1, 2], [3, 4]]
    assert (
        unpack_row(columns, np.zeros(4, np.uint8), RAW).keys() == SINGLE.keys()
    )  # without arrays a blob is four zeros


@pytest.mark.parametrize(
    ("columns", "raw", "complaint"),
    [
        ([Column("q", "int32")], RAW, "column 'q': it is missing"),
        ([Column("l", "int32")], RAW, "column 'l': '4611686018427387904' is no int32"),
        ([Column("s", "int32")], RAW, "'héé' is no int32"),
        ([Column("a", "string")], RAW, "is no string"),
        ([Column("a", "int32")], RAW[:-1], "cut off"),
        ([Column("a", "int32")], RAW + b"\0", "end at byte"),
        ([Column("a", "int32")], b"", "cut off"),
        ([Column("a", "int32")], b"\x81\xa1a\xc1", "byte 0xc1 at 3 is no value"),
        ([Column("a", "int32")], b"\xdf\xff\xff\xff\xff", "cut off"),
        ([Column("a", "string")], b"\x81\xa1a\xa1\xff", "utf-8"),
    ],
)
def test_single_values_that_are_wrong_are_refused(columns: list[Column], raw: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        unpack_row(columns, np.zeros(0, np.uint8), raw)


# Partitions


def test_partitions_hold_equal_runs_and_know_each_other(tmp_path: Path) -> None:
    rows = [np.array([i]) for i in range(25)]
    write(tmp_path / "x.mindrecord", rows, partitions=11)
    paths = [tmp_path / f"x.mindrecord{i:02d}" for i in range(11)]
    assert partition_files(paths[7]) == paths
    assert [len(MindRecordFile(path, alone=True)) for path in paths] == [3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2]
    assert len({header_of(path)["compression_size"] for path in paths}) == 1
    for path in paths:
        assert [int(row["input_ids"][0]) for row in MindRecordFile(path).rows()] == list(range(25))
        assert [int(tokens.ids[0]) for tokens in read_mindrecord(path)] == list(range(25))
    assert [int(tokens.ids[0]) for tokens in read_mindrecord(paths[1], alone=True)] == [3, 4, 5]
    assert len(list(tmp_path.iterdir())) == 22


def test_an_empty_partition_as_mindspore_writes_it_is_read(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1], [2]], partitions=2)
    set_header(tmp_path / "x1", lambda header: header.update(page=None))
    (tmp_path / "x1.db").unlink()
    assert [row["input_ids"].tolist() for row in MindRecordFile(tmp_path / "x1").rows()] == [[1]]


@pytest.mark.parametrize("damage", ["missing", "renamed", "swapped", "foreign"])
def test_partitions_that_do_not_fit_are_refused(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "x", [[1], [2], [3]], partitions=3)
    write(tmp_path / "other", [[1], [2], [3]], partitions=3)
    first, second = tmp_path / "x0", tmp_path / "x1"
    complaint = {
        "missing": "x0 is one of 3 partitions, and x1 is not beside it",
        "renamed": "x9 is partition 1 of 3 and was called x1",
        "swapped": "x1 is no partition of the data",
        "foreign": "x1 is no partition of the data",
    }[damage]
    if damage == "missing":
        second.unlink()
    elif damage == "renamed":
        first = second.rename(tmp_path / "x9")
    else:
        shutil.copy(tmp_path / ("x2" if damage == "swapped" else "other1"), second)
    with pytest.raises(DataError, match=complaint):
        MindRecordFile(first)
    for path in tmp_path.glob("*.db"):
        path.unlink()
    assert len(MindRecordFile(first, alone=True)) == 1


def test_a_single_file_may_be_renamed_with_its_index(tmp_path: Path) -> None:
    path = write(tmp_path / "x", [[1], [2]])
    path.with_name("x.db").rename(tmp_path / "y.db")
    assert len(list(MindRecordFile(path.rename(tmp_path / "y")).rows())) == 2
