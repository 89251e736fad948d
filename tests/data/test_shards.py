"""Shards on disk hold what the tokenizer says, are whole or not there, and notice when they were damaged."""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from ostro.data import shards as room
from ostro.data.shards import Manifest, is_prepared, open_shards, prepare, prepared
from ostro.data.tokenizer import Tokenizer, load_tokenizer
from ostro.errors import DataError, OutOfMemory

TEXTS = ["The wind rose.", "Grüße, 😀!\n\n  two\n", "three " * 50]


@functools.cache
def tokenizer() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, " "]), "utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path, corpus: Path) -> Path:
    prepare([corpus], tmp_path / "data", tokenizer=tokenizer())
    return tmp_path / "data"


def expected() -> list[list[int]]:
    return [tokenizer().encode(text, bos=True, eos=True) for text in TEXTS]


def is_mapped(array: np.ndarray) -> bool:
    """Whether `array` is a view of a file rather than a copy in memory."""
    while array.base is not None and not isinstance(array, np.memmap):
        array = array.base
    return isinstance(array, np.memmap)


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "partial" in path.name)


def rewrite(data: Path, **changes: object) -> None:
    manifest = json.loads((data / "manifest.json").read_text("utf-8"))
    (data / "manifest.json").write_text(json.dumps(manifest | changes), "utf-8")


def test_documents_become_bos_ids_eos(tmp_path: Path, corpus: Path, data: Path):
    shards = open_shards(data)
    stream = [token for ids in expected() for token in ids]
    assert shards.num_tokens == len(stream)
    assert shards.tokens(0, len(stream)).tolist() == stream
    assert shards.tokens(0, 1).dtype == np.uint16
    assert shards.document_ends.tolist() == np.cumsum([len(ids) for ids in expected()]).tolist()
    assert is_mapped(shards.tokens(2, 9))
    assert is_mapped(shards.document_ends)
    sizes = np.load(data / "documents.npy")[:, 1]
    assert sizes.tolist() == [len(text.encode()) for text in TEXTS]
    assert shards.manifest == Manifest(
        format="ostro-tokens-1",
        tokenizer="v1",
        tokenizer_sha256=tokenizer().sha256,
        vocab_size=32000,
        bos_token_id=1,
        eos_token_id=2,
        unk_token_id=0,
        dtype="uint16",
        num_tokens=len(stream),
        num_documents=3,
        num_bytes=sum(sizes),
        files=[{"name": "tokens-00000.npy", "num_tokens": len(stream)}],
        sources=[
            {
                "path": str(corpus),
                "num_bytes": corpus.stat().st_size,
                "sha256": hashlib.sha256(corpus.read_bytes()).hexdigest(),
            }
        ],
    )
    assert left_behind(tmp_path) == []
    (tmp_path / "fresh").mkdir()
    assert data.stat().st_mode == (tmp_path / "fresh").stat().st_mode


def test_files_are_cut_and_read_across(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "SHARD_TOKENS", 7)
    monkeypatch.setattr(room, "_BATCH_DOCUMENTS", 2)
    seen: list[tuple[int, int]] = []
    manifest = prepare([corpus], tmp_path / "data", tokenizer=tokenizer(), report=lambda *done: seen.append(done))
    stream = [token for ids in expected() for token in ids]
    assert [file["num_tokens"] for file in manifest.files[:-1]] == [7] * (len(manifest.files) - 1)
    assert sum(file["num_tokens"] for file in manifest.files) == len(stream)
    assert [tokens for tokens, _ in seen] == [len(expected()[0]) + len(expected()[1]), len(stream)]
    assert seen[-1] == (manifest.num_tokens, manifest.num_bytes)
    shards = open_shards(tmp_path / "data")
    for start in range(0, len(stream) + 1, 3):
        for stop in (start, start + 1, start + 20, len(stream)):
            if start <= stop <= len(stream):
                assert shards.tokens(start, stop).tolist() == stream[start:stop]


def test_a_stream_that_fills_its_files_exactly(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch):
    total = sum(map(len, expected()))
    monkeypatch.setattr(room, "SHARD_TOKENS", total)
    assert len(prepare([corpus], tmp_path / "data", tokenizer=tokenizer()).files) == 1
    assert open_shards(tmp_path / "data").num_tokens == total


def test_a_large_vocabulary_takes_wider_tokens(tmp_path: Path, corpus: Path):
    class Large:
        """The real tokenizer with every id moved up, as one of 128,000 pieces would have them."""

        name, sha256, vocab_size = "large", "0", 128_000
        bos_token_id, eos_token_id, unk_token_id = 100_001, 100_002, None

        def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
            return [ids + 90_000 for ids in tokenizer().encode_arrays(texts)]

    manifest = prepare([corpus], tmp_path / "data", tokenizer=Large())  # type: ignore[arg-type]
    shards = open_shards(tmp_path / "data")
    assert manifest.dtype == str(shards.tokens(0, 1).dtype) == "uint32"
    ids = shards.tokens(0, len(expected()[0])).tolist()
    assert ids == [100_001, *(token + 90_000 for token in expected()[0][1:-1]), 100_002]


def test_out_must_be_new(tmp_path: Path, corpus: Path, data: Path):
    with pytest.raises(DataError, match="already holds prepared data: choose another folder"):
        prepare([corpus], data, tokenizer=tokenizer())
    with pytest.raises(DataError, match="exists and is not an empty folder"):
        prepare([corpus], corpus, tokenizer=tokenizer())
    with pytest.raises(DataError, match="exists and is not an empty folder"):
        prepare([corpus], tmp_path, tokenizer=tokenizer())
    (tmp_path / "empty").mkdir()
    prepare([corpus], tmp_path / "empty", tokenizer=tokenizer())
    assert is_prepared(tmp_path / "empty")
    assert not is_prepared(tmp_path)
    with pytest.raises(DataError, match=r"inside cannot be prepared \((File exists|Not a directory)"):
        prepare([corpus], corpus / "inside", tokenizer=tokenizer())


@pytest.mark.parametrize("content", ["", " \n\n", '{"text": ""}\n'])
def test_an_empty_corpus_leaves_nothing(tmp_path: Path, content: str):
    (tmp_path / "a.txt").write_text(content, "utf-8")
    with pytest.raises(DataError, match=r"a\.txt: there is no text in it"):
        prepare([tmp_path / "a.txt"], tmp_path / "data", tokenizer=tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_bad_line_leaves_nothing(tmp_path: Path, corpus: Path):
    with corpus.open("a") as file:
        file.write("oops\n")
    with pytest.raises(DataError, match=r"corpus\.jsonl line 5: this is not JSON"):
        prepare([corpus], tmp_path / "data", tokenizer=tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


@pytest.mark.parametrize("writes", [0, 2, 4])
def test_a_full_disk_leaves_nothing(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, writes: int):
    real, left = room._ArrayFile.append, [writes]

    def append(self: room._ArrayFile, rows: np.ndarray) -> None:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        real(self, rows)

    monkeypatch.setattr(room._ArrayFile, "append", append)
    with pytest.raises(OutOfMemory, match=r"the disk is full, and nothing of .*data was kept: make room"):
        prepare([corpus], tmp_path / "data", tokenizer=tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def cut(data: Path, name: str, num_bytes: int) -> None:
    os.truncate(data / name, (data / name).stat().st_size - num_bytes)


DAMAGE = {
    "cut off by a token": (lambda data: cut(data, "tokens-00000.npy", 2), "tokens-00000.npy is cut off"),
    "nothing left": (lambda data: os.truncate(data / "tokens-00000.npy", 0), "tokens-00000.npy is cut off"),
    "a file away": (lambda data: (data / "tokens-00000.npy").unlink(), "tokens-00000.npy is missing"),
    "documents cut off": (lambda data: cut(data, "documents.npy", 16), "documents.npy is cut off"),
    "documents away": (lambda data: (data / "documents.npy").unlink(), "documents.npy is missing"),
    "another length": (
        lambda data: np.save(data / "tokens-00000.npy", np.ones(3, np.uint16)),
        r"manifest says \[\d+\] for the shape of tokens-00000.npy, and the files have \[3\]",
    ),
    "another dtype": (
        lambda data: rewrite(data, dtype="uint32"),
        "manifest says uint32 for the dtype of tokens-00000.npy, and the files have uint16",
    ),
    "another sum": (lambda data: rewrite(data, num_tokens=5), "manifest says 5 for num_tokens"),
    "more documents": (lambda data: rewrite(data, num_documents=9), "shape of documents.npy"),
    "ends that fall": (
        lambda data: np.save(data / "documents.npy", np.load(data / "documents.npy")[[1, 0, 2]]),
        "its ends do not rise",
    ),
    "another last end": (
        lambda data: np.save(data / "documents.npy", np.load(data / "documents.npy") - 1),
        "the end of the last document",
    ),
    "ends as floats": (
        lambda data: np.save(data / "documents.npy", np.load(data / "documents.npy").astype(float)),
        "the dtype of documents.npy",
    ),
    "a pickle": (
        lambda data: np.save(data / "documents.npy", np.array([{}]), allow_pickle=True),
        "documents.npy is cut off or no .npy file",
    ),
    "no manifest": (lambda data: (data / "manifest.json").unlink(), "is not prepared data"),
    "half a manifest": (lambda data: cut(data, "manifest.json", 9), "manifest.json is damaged"),
    "a list": (lambda data: (data / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    "a newer format": (
        lambda data: rewrite(data, format="ostro-tokens-9"),
        "in the format 'ostro-tokens-9', and this Ostro reads 'ostro-tokens-1'",
    ),
    "an unknown field": (lambda data: rewrite(data, extra=1), "manifest.json is damaged"),
    "a number in quotes": (lambda data: rewrite(data, num_tokens="5"), "manifest.json is damaged"),
    "no files": (lambda data: rewrite(data, files=[]), "manifest.json is damaged"),
    "files of nothing": (lambda data: rewrite(data, files=[{"name": "x"}]), "manifest.json is damaged"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_noticed(data: Path, what: str):
    damage, message = DAMAGE[what]
    open_shards(data)
    damage(data)
    with pytest.raises(DataError, match=message):
        open_shards(data)


def test_a_folder_that_is_not_there(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere is not prepared data"):
        open_shards(tmp_path / "nowhere")
    assert not is_prepared(tmp_path / "nowhere")


def test_raw_text_is_prepared_once(tmp_path: Path, corpus: Path):
    cache = tmp_path / "cache"
    runs: list[int] = []

    def get(version: str = "v1", kind: str = "auto") -> Path:
        chosen = tokenizer() if version == "v1" else load_tokenizer(version)
        return prepared([corpus], cache, tokenizer=chosen, kind=kind, report=lambda n, _: runs.append(n))

    first = get()
    assert open_shards(first).manifest.num_documents == 3
    assert get() == first
    assert len(runs) == 1
    assert get(kind="text") != first
    assert get("v3") != first
    os.utime(corpus, ns=(1, 1))
    changed = get()
    assert changed != first
    corpus.write_text('{"text": "other"}\n', "utf-8")
    os.utime(corpus, ns=(1, 1))
    assert get() not in (first, changed)
    assert len(runs) == 5
    assert len(list(cache.iterdir())) == 5


def test_prepared_data_is_taken_as_it_is(tmp_path: Path, corpus: Path, data: Path):
    assert prepared([data], tmp_path / "cache", tokenizer=tokenizer()) == data
    (data / "documents.npy").unlink()  # damaged is still prepared: open_shards says what is wrong
    assert prepared([data], tmp_path / "cache", tokenizer=tokenizer()) == data
    with pytest.raises(DataError, match="prepared already and cannot be mixed with raw files"):
        prepared([corpus, data], tmp_path / "cache", tokenizer=tokenizer())
    assert not (tmp_path / "cache").exists()


def test_another_process_was_faster(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch):
    first = prepared([corpus], tmp_path / "one", tokenizer=tokenizer())
    real = room._write

    def write(files: list[Path], folder: Path, *rest: object) -> Manifest:
        shutil.copytree(first, folder.parent / first.name)
        return real(files, folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(room, "_write", write)
    assert open_shards(prepared([corpus], tmp_path / "two", tokenizer=tokenizer())).num_tokens
    assert left_behind(tmp_path / "two") == []


def test_manifests_are_plain_json(data: Path):
    manifest = json.loads((data / "manifest.json").read_text("utf-8"))
    assert manifest == dataclasses.asdict(open_shards(data).manifest)
