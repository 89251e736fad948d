"""Megatron's .bin and .idx: the published layout byte for byte, and whatever is damaged refused in a sentence."""

from __future__ import annotations

import errno
import random
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostro.data import megatron
from ostro.data.megatron import DTYPES, MegatronFile, MegatronWriter, is_megatron, read_megatron
from ostro.errors import DataError, OutOfMemory

# A document: its sequences.
Document = list[list[int]]

# struct's letters for the codes of types, from the table DType of megatron/core/datasets/indexed_dataset.py
LETTERS = {
    "uint8": (1, "B"),
    "int8": (2, "b"),
    "int16": (3, "h"),
    "int32": (4, "i"),
    "int64": (5, "q"),
    "uint16": (8, "H"),
}
# what IndexedDatasetBuilder of Megatron-Core 0.16.1 wrote for uint16 and the documents [1, 2], [3] + [40000] and []
THEIRS_BIN = bytes.fromhex("010002000300409c")
THEIRS_IDX = bytes.fromhex(
    "4d4d49444944580000010000000000000008030000000000000004000000000000000200000001000000010000"
    "000000000000000000040000000000000006000000000000000000000000000000010000000000000003000000"
    "000000000300000000000000"
)


def layout(documents: list[Document], dtype: str, modes: list[int] | None = None) -> tuple[bytes, bytes]:
    """Return the .bin and the .idx, field for field."""
    code, letter = LETTERS[dtype]
    sequences = [sequence for document in documents for sequence in document]
    data = b"".join(struct.pack(f"<{len(sequence)}{letter}", *sequence) for sequence in sequences)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(documents) + 1)
    index += b"".join(struct.pack("<i", len(sequence)) for sequence in sequences)
    offset = 0
    for sequence in sequences:
        index += struct.pack("<q", offset)
        offset += len(sequence) * struct.calcsize(letter)
    bound = 0
    index += struct.pack("<q", 0)
    for document in documents:
        bound += len(document)
        index += struct.pack("<q", bound)
    return data, index + b"".join(struct.pack("<b", mode) for mode in modes or [])


def put(folder: Path, data: bytes, index: bytes) -> Path:
    for path, content in ((folder / "x.bin", data), (folder / "x.idx", index)):
        path.unlink(missing_ok=True)
        path.write_bytes(content)
    return folder / "x"


def write(prefix: Path, documents: Iterable[Any], dtype: Any = "int32") -> Path:
    with MegatronWriter(prefix, dtype) as writer:
        for document in documents:
            writer.append(document)
    return prefix


@st.composite
def data_sets(draw: st.DrawFn) -> tuple[str, list[Document]]:
    dtype = draw(st.sampled_from(sorted(LETTERS)))
    bounds = np.iinfo(dtype)
    edges = st.sampled_from([int(bounds.min), int(bounds.max), 0])
    sequence = st.lists(st.one_of(edges, st.integers(int(bounds.min), int(bounds.max))), max_size=6)
    return dtype, draw(st.lists(st.lists(sequence, max_size=4), max_size=8))


@settings(max_examples=150)
@given(data_sets())
def test_what_is_written_is_the_layout_and_is_read(
    tmp_path_factory: pytest.TempPathFactory, data_set: tuple[str, list[Document]]
) -> None:
    dtype, documents = data_set
    folder = tmp_path_factory.mktemp("round")
    prefix = folder / "x.v1"
    with MegatronWriter(prefix, dtype) as writer:
        for document in documents:
            ids = np.array([token for sequence in document for token in sequence], dtype)
            writer.append(ids, [len(sequence) for sequence in document])
    assert sorted(path.name for path in folder.iterdir()) == ["x.v1.bin", "x.v1.idx"]
    assert (Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()) == layout(documents, dtype)
    file = MegatronFile(prefix)
    assert (len(file), file.num_sequences, file.dtype) == (len(documents), sum(map(len, documents)), np.dtype(dtype))
    for i, document in enumerate(documents):
        assert file.document(i).dtype == dtype
        assert file.document(i).tolist() == [token for sequence in document for token in sequence]
        assert [file.sequence(j).tolist() for j in file.sequences_of(i)] == document
    shutil.rmtree(folder)


def test_the_layout_is_what_megatron_wrote(tmp_path: Path) -> None:
    assert layout([[[1, 2]], [[3], [40000]], []], "uint16") == (THEIRS_BIN, THEIRS_IDX)
    with MegatronWriter(tmp_path / "y", np.uint16) as writer:
        writer.append([1, 2])
        writer.append([3, 40000], [1, 1])
        writer.append([], [])
    assert (tmp_path / "y.bin").read_bytes() == THEIRS_BIN
    assert (tmp_path / "y.idx").read_bytes() == THEIRS_IDX


def test_many_sequences_are_written_and_checked_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "_CHUNK", 7)
    documents = [[[i] * (i % 5) for i in range(n)] for n in (3, 0, 29, 1, 7, 60)]
    with MegatronWriter(tmp_path / "x", "int64") as writer:
        for document in documents:
            writer.append([token for part in document for token in part], [len(part) for part in document])
    data, index = layout(documents, "int64")
    assert ((tmp_path / "x.bin").read_bytes(), (tmp_path / "x.idx").read_bytes()) == (data, index)
    assert [file.document(i).tolist() for file in [MegatronFile(tmp_path / "x")] for i in range(6)] == [
        [token for part in document for token in part] for document in documents
    ]
    at = megatron._HEADER.size + 4 * 77
    put(tmp_path, data, index[:at] + struct.pack("<i", 9) + index[at + 4 :])
    assert len(MegatronFile(tmp_path / "x").sequence(77)) == 9  # still within the file
    put(tmp_path, data, index[:at] + struct.pack("<i", 9999) + index[at + 4 :])
    with pytest.raises(DataError, match="sequence 78 does not lie within"):
        MegatronFile(tmp_path / "x")


def test_documents_are_views_of_the_file_read_by_any_of_its_names(tmp_path: Path) -> None:
    put(tmp_path, *layout([[[1, 2], [3]], [[]], [[4]]], "uint16"))
    for name in ("x", "x.bin", "x.idx"):
        path = tmp_path / name
        assert is_megatron(path)
        found = list(read_megatron(path))
        assert [tokens.ids.tolist() for tokens in found] == [[1, 2, 3], [4]]
        assert [tokens.where for tokens in found] == [f"{tmp_path}/x.bin record 1", f"{tmp_path}/x.bin record 3"]
        assert all(tokens.trained is None and tokens.ids.dtype == np.uint16 for tokens in found)
        assert not found[0].ids.flags.owndata


def test_sequences_that_lie_elsewhere_are_joined(tmp_path: Path) -> None:
    data, index = layout([[[1, 2], [3, 4]]], "int32")
    at = megatron._HEADER.size + 8
    put(tmp_path, data, index[:at] + struct.pack("<qq", 8, 0) + index[at + 16 :])
    assert MegatronFile(tmp_path / "x").document(0).tolist() == [3, 4, 1, 2]


def test_sequences_with_modes_are_read_where_they_are_text(tmp_path: Path) -> None:
    documents = [[[1], [2]], [[3]]]
    put(tmp_path, *layout(documents, "int32", [0, 0, 0]))
    assert MegatronFile(tmp_path / "x").modes is not None
    assert [tokens.ids.tolist() for tokens in read_megatron(tmp_path / "x")] == [[1, 2], [3]]
    put(tmp_path, *layout(documents, "int32", [0, 0, 1]))
    with pytest.raises(DataError, match="record 2: it holds sequences that are not text"):
        list(read_megatron(tmp_path / "x"))


# What cannot be read


def changed(index: bytes, at: int, value: int, form: str = "<q") -> bytes:
    return index[:at] + struct.pack(form, value) + index[at + struct.calcsize(form) :]


@pytest.mark.parametrize(
    ("at", "value", "form", "complaint"),
    [
        (9, 2, "<Q", "x.idx is of version 2, and 1 is known"),
        (17, 6, "<B", "its tokens are of type 6, which is none of integers"),
        (17, 0, "<B", "its tokens are of type 0"),
        (17, 5, "<B", "sequence 3 does not lie within the 16 bytes"),
        (17, 8, "<B", "its uint16 tokens end at byte 14 of the 16 of x.bin"),
        (18, 4, "<Q", "4 sequences in 2 documents do not take"),
        (18, 2**64 - 1, "<Q", "do not take"),
        (26, 2**63, "<Q", "do not take"),
        (34, -1, "<i", "sequence 1 does not lie within"),
        (38, 2**31 - 1, "<i", "sequence 2 does not lie within"),
        (46, -4, "<q", "sequence 1 does not lie within"),
        (62, 2**63 - 1, "<q", "sequence 3 does not lie within the 16 bytes of x.bin"),
        (70, 1, "<q", "its documents do not hold its 3 sequences"),
        (78, 4, "<q", "document 2 ends before it starts"),
        (78, -1, "<q", "document 1 ends before it starts"),
        (86, 2, "<q", "its documents do not hold its 3 sequences"),
    ],
)
def test_an_index_that_says_wrong_things_is_refused(
    tmp_path: Path, at: int, value: int, form: str, complaint: str
) -> None:
    data, index = layout([[[1, 2]], [[3], [4]]], "int32")
    put(tmp_path, data, changed(index, at, value, form))
    with pytest.raises(DataError, match=complaint):
        MegatronFile(tmp_path / "x")


@pytest.mark.parametrize("content", [b"", b"MMIDIDX", b"TNTIDX\0\0" + bytes(40), b"text" * 20])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    put(tmp_path, b"", content)
    assert not is_megatron(tmp_path / "x")
    with pytest.raises(DataError, match=r"x.idx is no index of Megatron's, or only its start"):
        MegatronFile(tmp_path / "x")


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    data, index = layout([[[1]]], "int32")
    (tmp_path / "x.idx").write_bytes(index)
    with pytest.raises(DataError, match=r"x.bin' cannot be read: .*: a data set is a .bin and an .idx beside it"):
        MegatronFile(tmp_path / "x")
    put(tmp_path, data, index)
    (tmp_path / "x.idx").unlink()
    for path in (tmp_path / "x.bin", tmp_path / "no", tmp_path, Path("a\0b"), Path("/"), Path()):
        assert not is_megatron(path)
        with pytest.raises(DataError, match=r"cannot be read|names no data set"):
            MegatronFile(path)


def test_tokens_below_zero_are_refused(tmp_path: Path) -> None:
    put(tmp_path, *layout([[[1]], [[2, -3]]], "int32"))
    with pytest.raises(DataError, match=r"x.bin record 2: token -3 is below 0"):
        list(read_megatron(tmp_path / "x"))


# What cannot be written


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ([1, 65536], "its tokens go from 1 to 65536, which uint16 does not hold"),
        (np.array([-1, 5]), "its tokens go from -1 to 5"),
        ([2**63], "its tokens go from 9223372036854775808"),
        ([2**64], "must be a list of token ids"),
        ([1.0], "must be a list of token ids"),
        ([[1]], "must be a list"),
        ([[1], [2, 3]], "must be a list"),
        (["a"], "must be a list"),
        ([True], "must be a list"),
        (5, "must be a list"),
        (None, "must be a list"),
    ],
)
def test_a_wrong_document_is_refused_and_nothing_is_left(tmp_path: Path, document: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=f"x record 2: .*{complaint}"):
        write(tmp_path / "x", [[1], document], np.uint16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lengths", [[1], [1, 2], [-1, 3], [[2]], []])
def test_lengths_that_are_not_the_documents_are_refused(tmp_path: Path, lengths: Any) -> None:
    with MegatronWriter(tmp_path / "x") as writer:
        with pytest.raises(DataError, match="record 1: its sequences must be as long together as its 2 tokens"):
            writer.append([1, 2], lengths)
        writer.append([3])
    assert [tokens.ids.tolist() for tokens in read_megatron(tmp_path / "x")] == [[3]]


@pytest.mark.parametrize("dtype", ["float32", "uint32", object, "nothing", bool])
def test_types_that_megatron_has_not_are_refused(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(DataError, match=f"use one of {', '.join(DTYPES.values())}"):
        MegatronWriter(tmp_path / "x", dtype)
    with pytest.raises(DataError, match="is no prefix of files"):
        MegatronWriter("/", "int32")


@pytest.mark.parametrize("taken", ["x.bin", "x.idx"])
def test_what_is_there_is_not_written_over(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("mine")
    with pytest.raises(DataError, match=f"{taken} exists already"):
        write(tmp_path / "x", [[1]])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(taken, "mine")]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(megatron, "_copy", full)
    with pytest.raises(OutOfMemory, match=r"the disk is full, and nothing of .*x was kept"):
        write(tmp_path / "x", [[1], [2]])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"x.bin cannot be written \("):
        write(tmp_path / "file" / "x", [[1]])


# Damage by the thousand


def damaged(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    kind = chance.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + data[at + chance.randrange(1, 9) :]
    word = chance.choice(
        [bytes(8), b"\xff" * 8, b"\xff" * 7 + b"\x7f", struct.pack("<q", len(data)), struct.pack("<q", 1)]
    )
    return data[:at] + word + data[at + 8 * (kind == 3) :]


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    documents = [[[i, 300 * i], [5] * i] for i in range(5)]
    data, index = layout(documents, "int32")
    flat = [[token for part in document for token in part] for document in documents]
    chance, refused = random.Random(8), []
    for turn in range(2400):
        in_data = turn % 6 == 0
        put(tmp_path, damaged(data, chance) if in_data else data, index if in_data else damaged(index, chance))
        try:
            found = list(read_megatron(tmp_path / "x"))
        except DataError as error:
            refused.append(str(error))
            continue
        assert all(tokens.ids.ndim == 1 and tokens.ids.dtype.kind in "iu" and tokens.ids.size for tokens in found)
        if in_data:  # no checksum tells that a token has changed, but their number is known
            assert [len(tokens.ids) for tokens in found] == [len(ids) for ids in flat]
    assert all(str(tmp_path / "x") in message for message in refused)
    assert 1200 < len(refused) < 2350
