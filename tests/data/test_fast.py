"""The fast encoder gives the ids of the package tokenizers, and where it does not it is not used."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ostro.data import fast, sources, tasks
from ostro.data import prepare as room
from ostro.data import tokenizer as words
from ostro.data.fast import FastEncoder, fast_encoder
from ostro.data.prepare import Hands, prepare
from ostro.data.records import Chat, Record, Text
from ostro.data.shards import open_shards
from ostro.data.tokenizer import Tokenizer, load_tokenizer
from ostro.errors import DataError

NUM_FUZZED = int(os.environ.get("OSTRO_NUM_FUZZED", "100000"))
load = functools.cache(load_tokenizer)


@pytest.fixture(params=["v1", "v3"])
def quick(request: pytest.FixtureRequest) -> Tokenizer:
    pytest.importorskip("gigatoken")
    tokenizer = load(request.param).slow()
    assert tokenizer.hurry()
    return tokenizer


def assert_same(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.is_fast
    for text, ids, slow in zip(texts, tokenizer.encode_arrays(texts), tokenizer.encode_slowly(texts), strict=True):
        assert ids.dtype == slow.dtype == np.uint32
        if not np.array_equal(ids, slow):
            pytest.fail(f"other ids for {text[:2000]!a}")


def said(record: Record) -> Iterator[str]:
    if isinstance(record, Text):
        yield record.text
    elif isinstance(record, Chat):
        yield from (message.content for message in record.messages)


def test_the_sample_data(shared: Path, quick: Tokenizer):
    files = [path for path in sorted((shared / "data").iterdir()) if path.suffix != ".md"]
    assert len(files) >= 8
    records = [record for unit in sources.units(files) for record in sources.read(unit)]
    assert_same(quick, [text for record in records for text in said(record)])
    assert_same(quick, [path.read_text("utf-8") for path in files])  # and as they stand, JSON and all


def fuzzed(draw: random.Random) -> str:
    """Return a text of what tokenizers get wrong, in any order."""
    kinds = [
        lambda: " " * draw.choice([1, 2, 3, 7, 16, 17, 60]),
        lambda: chr(draw.choice([*range(32), 0x7F, 0x85, 0xA0, 0xAD, 0x200B, 0x2028, 0xFEFF, 0xFFFD])),
        lambda: "".join(chr(draw.randint(0x4E00, 0x9FFF)) for _ in range(draw.randint(1, 9))),
        lambda: draw.choice(["😀", "👩\u200d👩\u200d👧", "🇩🇪", "☀\ufe0f", "\U0010ffff", "𝔘"]),
        lambda: draw.choice(["▁", "▁▁", " ▁", "▁ ", "a▁b"]),
        lambda: draw.choice(["<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<0x0A>", "[TOOL_CALLS]", "<pad>"]),
        lambda: draw.choice(["\n", "\n\n", "\r\n", "\t", "\t\t", "\n \n"]),
        lambda: "".join(draw.choices("etaoin shrdlu", k=draw.randint(1, 40))),
        lambda: draw.choice(
            ["def f(self):", "0x1F", "3.14159", "e\u0301", "ﬁ", "İ", "ß", "ſ", "don't", "'s", "--", "…"]
        ),
        lambda: chr(draw.choice([draw.randint(0, 0xD7FF), draw.randint(0xE000, 0x10FFFF)])),
    ]
    return "".join(draw.choice(kinds)() for _ in range(draw.randint(0, 14)))


def test_fuzzed_texts(quick: Tokenizer):
    draw = random.Random(0)
    for _ in range(0, NUM_FUZZED, 1000):
        texts = [fuzzed(draw) for _ in range(1000)]
        assert len(set(texts)) > 850
        assert_same(quick, texts)


def test_long_texts_and_long_words(quick: Tokenizer):
    draw = random.Random(1)
    assert_same(
        quick, ["".join(fuzzed(draw) for _ in range(3000)), "a" * 20_000, "字" * 5_000, " " * 20_000, "x▁" * 9_000]
    )


def test_half_a_surrogate_pair_is_a_sentence(quick: Tokenizer):
    for tokenizer in (quick, quick.slow()):
        with pytest.raises(DataError, match="holds half of a surrogate pair"):
            tokenizer.encode_arrays(["a", "b\ud800"])


def test_an_encoder_is_made_anew_and_stays_right(quick: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """Its caches grow with what it has seen; a new one has seen nothing."""
    built: list[str] = []
    real = fast._build
    monkeypatch.setattr(fast, "_build", lambda blob: (built.append(blob), real(blob))[1])
    encoder = fast_encoder(quick)
    assert encoder is not None
    encoder._seen_bytes = 0
    monkeypatch.setattr(fast, "_FRESH_BYTES", 100)
    texts = [f"text number {at}, which is of forty letters" for at in range(10)]
    assert [ids.tolist() for ids in map(encoder.encode, texts)] == [ids.tolist() for ids in quick.encode_slowly(texts)]
    assert len(built) == 1 + 4  # two texts each
    assert len(set(built)) == 1


def test_slow_is_the_same_without(quick: Tokenizer):
    slow = quick.slow()
    assert (slow.is_fast, quick.is_fast) == (False, True)
    assert slow.sha256 == quick.sha256


def test_without_the_library_everything_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import sys

    monkeypatch.setitem(sys.modules, "gigatoken", None)
    tokenizer = load("v1").slow()
    assert not tokenizer.hurry()
    (tmp_path / "a.txt").write_text("wind")
    manifest = prepare([tmp_path / "a.txt"], tmp_path / "data", tokenizer=tokenizer)
    assert manifest is not None
    assert manifest.encoder == "tokenizers"


class Wrong:
    """An encoder that is right about everything but the letter q."""

    def __init__(self, blob: str) -> None:
        self._slow = load("v1").slow()

    def encode(self, text: str) -> np.ndarray:
        ids = self._slow.encode_slowly([text])[0]
        return ids[::-1] if "q" in text else ids


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_an_encoder_that_differs_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By task, from the batch on in which it is seen; the same in every run, and the manifest says so."""
    monkeypatch.setattr(fast, "_build", Wrong)
    monkeypatch.setattr(room, "TASK_BYTES", 1)
    tokenizer = load("v1").slow()
    assert tokenizer.hurry()
    paths = [
        write(tmp_path / f"{at}.jsonl", texts) for at, texts in enumerate((["a b c"], ["the wind", "a quick one"]))
    ]
    for name in ("one", "two"):
        manifest = prepare(paths, tmp_path / name, tokenizer=tokenizer, hands=Hands(1))
        assert manifest is not None
        assert manifest.encoder == "tokenizers"
    stream = [
        at for text in ("a b c", "the wind", "a quick one") for at in tokenizer.slow().encode(text, bos=True, eos=True)
    ]
    for name in ("one", "two"):
        shards = open_shards(tmp_path / name)
        assert shards.tokens(0, shards.num_tokens).tolist() == stream
    right = prepare(paths[:1], tmp_path / "right", tokenizer=tokenizer, hands=Hands(1))
    assert right is not None
    assert right.encoder == "gigatoken"


def test_a_task_of_which_any_sample_differs_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The difference is seen in the last batch: no token of the batches before is the fast encoder's either."""
    monkeypatch.setattr(fast, "_build", Wrong)
    monkeypatch.setattr(tasks, "_BATCH_RECORDS", 2)
    monkeypatch.setattr(words, "_PROVE_CHARS", 8)
    monkeypatch.setattr(words, "_PROVE_EVERY", 1)
    tokenizer = load("v1").slow()
    assert tokenizer.hurry()
    texts = ["first the wind, then q", "two", "three", "a quick one"]  # the first q lies behind the sample
    for name, few, word in (("all", texts, "tokenizers"), ("some", texts[:3], "gigatoken")):
        path = write(tmp_path / f"{name}.jsonl", few)
        manifest = prepare([path], tmp_path / name, tokenizer=tokenizer, hands=Hands(1))
        assert manifest is not None
        assert manifest.encoder == word
        shards = open_shards(tmp_path / name)
        right = [token for text in few for token in tokenizer.slow().encode(text, bos=True, eos=True)]
        assert (shards.tokens(0, shards.num_tokens).tolist() == right) == (word == "tokenizers")


@pytest.mark.parametrize("how", ["wrong", "raises"])
def test_a_vocabulary_that_it_cannot_do_is_left_to_tokenizers(monkeypatch: pytest.MonkeyPatch, how: str):
    def build(blob: str) -> object:
        if how == "raises":
            raise RuntimeError("not this one")
        wrong = Wrong(blob)
        wrong.encode = lambda text: np.array([5], np.uint32)  # type: ignore[method-assign]
        return wrong

    monkeypatch.setattr(fast, "_build", build)
    tokenizer = load("v1").slow()
    assert not tokenizer.hurry()
    assert tokenizer.encode_arrays(["a"])[0].tolist() == load("v1").encode("a")


def test_the_blob_has_no_specials(quick: Tokenizer):
    """With them the text "</s>" would be the end of a document."""
    encoder = fast_encoder(quick)
    assert isinstance(encoder, FastEncoder)
    assert json.loads(encoder._blob)["added_tokens"] == []
    for word in ("<s>", "</s>", "[INST]", "<unk>"):
        assert not {quick.bos_token_id, quick.eos_token_id, quick.unk_token_id} & set(encoder.encode(word).tolist())


GROWTH = """
import random, sys
from ostro.data import fast
from ostro.data.tokenizer import load_tokenizer
draw = random.Random(0)
letters = "abcdefghijklmnopqrstuvwxyz0123456789"
encoder = fast.fast_encoder(load_tokenizer(sys.argv[1]).slow())
before, most = fast._own_bytes(), 0
for _ in range(40):
    encoder.encode(" ".join("".join(draw.choices(letters, k=9)) for _ in range(60_000)))
    most = max(most, fast._own_bytes() - before)
print(most)
"""


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_memory_is_bounded_by_what_is_seen(name: str):
    """Random characters, each word seen once, fill the caches ten times as fast as prose.

    In a process of its own: here it would grow into what other tests have freed, and be seen growing less.
    """
    pytest.importorskip("gigatoken")
    if not fast._own_bytes():
        pytest.skip("this system does not tell the memory of a process")
    run = subprocess.run([sys.executable, "-c", GROWTH, name], stdout=subprocess.PIPE, text=True, check=True)
    assert 100 << 20 < int(run.stdout) < 380 << 20
