"""What the tests of preparing data share."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from preparations import TEXTS, WORDS, load, write_talks, write_texts

from ostro.data import prepare as room
from ostro.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def v1() -> Tokenizer:
    return load("v1")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "corpus.jsonl", [*TEXTS, " "])


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seven small files of texts, conversations and blanks, each a task of its own."""
    monkeypatch.setattr(room, "TASK_BYTES", 1)
    folder = tmp_path / "many"
    folder.mkdir()
    draw = random.Random(0)
    for at in range(4):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 60))) + "." for _ in range(3 + at)]
        write_texts(folder / f"{at}.jsonl", texts)
    write_talks(folder / "2-talks.jsonl")
    (folder / "1-blank.txt").write_text(" \n")
    (folder / "9.txt").write_text("The end, " * 40)
    return folder
