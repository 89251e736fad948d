"""Shards on disk hold what the tokenizer says, are whole or not there, and notice when they were damaged."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ostro.data.prepare import prepare
from ostro.data.shards import is_prepared, open_shards
from ostro.data.tokenizer import Tokenizer, load_tokenizer
from ostro.errors import DataError

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


def rewrite(data: Path, **changes: object) -> None:
    manifest = json.loads((data / "manifest.json").read_text("utf-8"))
    (data / "manifest.json").write_text(json.dumps(manifest | changes), "utf-8")


def test_a_folder_holds_what_was_written(data: Path):
    shards = open_shards(data)
    stream = [token for ids in expected() for token in ids]
    assert shards.num_tokens == len(stream)
    assert shards.tokens(0, len(stream)).tolist() == stream
    assert shards.tokens(0, 1).dtype == np.uint16
    assert shards.trained(0, len(stream)) is None
    assert shards.document_ends.tolist() == np.cumsum([len(ids) for ids in expected()]).tolist()
    assert is_mapped(shards.tokens(2, 9))
    assert is_mapped(shards.document_ends)


def test_streams_are_read_across_files(data: Path):
    """Files of any lengths, some with a mask, give the same stream as one."""
    whole = open_shards(data).tokens(0, open_shards(data).num_tokens)
    mask = np.arange(len(whole)) % 3 != 0
    files, edges = [], [0, 5, 6, 20, len(whole)]
    for at, (start, stop) in enumerate(itertools.pairwise(edges)):
        np.save(data / f"tokens-{at:05d}.npy", whole[start:stop])
        if at == 1:
            mask[start:stop] = True
        else:
            np.save(data / f"trained-{at:05d}.npy", mask[start:stop])
        counts = {"num_tokens": stop - start, "num_trained": int(mask[start:stop].sum())}
        files.append({"name": f"tokens-{at:05d}.npy", **counts})
    rewrite(data, files=files, num_trained=int(mask.sum()))
    shards = open_shards(data)
    for start in range(len(whole) + 1):
        for stop in {start, start + 1, start + 20, len(whole)}:
            if start <= stop <= len(whole):
                assert shards.tokens(start, stop).tolist() == whole[start:stop].tolist()
                trained = shards.trained(start, stop)
                assert trained is not None
                assert trained.tolist() == mask[start:stop].tolist()


def cut(data: Path, name: str, num_bytes: int) -> None:
    os.truncate(data / name, (data / name).stat().st_size - num_bytes)


def masked(data: Path) -> Path:
    """Mark one token in all as not learned."""
    size = open_shards(data).num_tokens
    np.save(data / "trained-00000.npy", np.arange(size) > 0)
    files = [{"name": "tokens-00000.npy", "num_tokens": size, "num_trained": size - 1}]
    rewrite(data, files=files, num_trained=size - 1)
    open_shards(data)
    return data / "trained-00000.npy"


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
        "in the format 'ostro-tokens-9', and this Ostro reads 'ostro-tokens-2'",
    ),
    "an unknown field": (lambda data: rewrite(data, extra=1), "manifest.json is damaged"),
    "a number in quotes": (lambda data: rewrite(data, num_tokens="5"), "manifest.json is damaged"),
    "no files": (lambda data: rewrite(data, files=[]), "manifest.json is damaged"),
    "an older format": (lambda data: rewrite(data, format="ostro-tokens-1"), "'ostro-tokens-1', and this Ostro reads"),
    "a mask away": (lambda data: masked(data).unlink(), "trained-00000.npy is missing, though the manifest names it"),
    "half a mask": (lambda data: cut(data, masked(data).name, 3), "trained-00000.npy is cut off"),
    "a mask of other data": (
        lambda data: np.save(masked(data), np.ones(3, bool)),
        "for the shape of trained-00000.npy, and the files have",
    ),
    "a mask of numbers": (
        lambda data: np.save(masked(data), np.load(masked(data)).astype(np.int8)),
        "for the dtype of trained-00000.npy, and the files have int8",
    ),
    "another sum of masks": (lambda data: rewrite(data, num_trained=1), "manifest says 1 for num_trained"),
    "files without masks said": (
        lambda data: rewrite(data, files=[{"name": "tokens-00000.npy", "num_tokens": 9}]),
        "manifest.json is damaged",
    ),
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


def test_a_mask_that_nobody_names_is_none(data: Path):
    np.save(data / "trained-00000.npy", np.zeros(3, bool))
    assert open_shards(data).trained(0, 3) is None


def test_manifests_are_plain_json(data: Path):
    manifest = json.loads((data / "manifest.json").read_text("utf-8"))
    assert manifest == dataclasses.asdict(open_shards(data).manifest)


def test_more_shards_than_files_may_be_open(tmp_path: Path):
    """1,024 is the usual limit, and a mapped file counts as open."""
    resource = pytest.importorskip("resource")
    text = tmp_path / "a.jsonl"
    text.write_text("".join(json.dumps({"text": f"text {at}"}) + "\n" for at in range(60)))
    code = """
import resource, sys
from ostro.data import prepare as room, sources
from ostro.data.shards import open_shards
from ostro.data.tasks import Settings
from ostro.data.tokenizer import load_tokenizer
sources._LEAST_BYTES = 1
sources._FEWEST = 1 << 30
tokenizer = load_tokenizer()
from ostro.data import shards
shards._FEW_FILES = 40
resource.setrlimit(resource.RLIMIT_NOFILE, (40, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
room.prepare([sys.argv[1]], sys.argv[2], tokenizer=tokenizer, settings=Settings(dedup=True), hands=room.Hands(1))
print(len(open_shards(sys.argv[2]).manifest.files))
"""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 400:
        pytest.skip("this system's hard limit is lower still")
    run = subprocess.run(
        [sys.executable, "-c", code, text, tmp_path / "data"], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (0, "60\n"), run.stderr
