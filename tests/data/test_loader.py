"""Rows: nothing lost, nothing invented, the same on any number of ranks, a function of the position alone."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostro.data.loader import Loader, Row, permuted
from ostro.data.shards import FORMAT, Manifest, Shards
from ostro.errors import ConfigError, DataError

Documents = list[list[int]]


def shards(documents: Documents, file_tokens: int = 10**9, sha256: str = "x") -> Shards:
    """Return shards in memory, cut into files of `file_tokens` tokens."""
    stream = np.array([token for document in documents for token in document], dtype=np.uint16)
    ends = np.cumsum([len(document) for document in documents])
    files = [stream[at : at + file_tokens] for at in range(0, len(stream), file_tokens)]
    manifest = Manifest(
        format=FORMAT,
        tokenizer=f"tokenizer {sha256}",
        tokenizer_sha256=sha256,
        vocab_size=2**16,
        bos_token_id=1,
        eos_token_id=2,
        unk_token_id=0,
        dtype="uint16",
        num_tokens=len(stream),
        num_documents=len(documents),
        num_bytes=0,
        files=[],
        sources=[],
    )
    return Shards(Path(sha256), manifest, files, np.stack([ends, ends], axis=1))


# Every token of the corpus is different, so that a row says by itself where it is from.
@st.composite
def corpora(draw: st.DrawFn) -> list[Documents]:
    lengths = draw(st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=8), min_size=1, max_size=3))
    tokens = iter(range(1, 60_000))
    return [[[next(tokens) for _ in range(length)] for length in part] for part in lengths]


def oracle(parts: list[Documents], seq_length: int, index: int) -> Row:
    """The row in plain words: walk over every token of the stream."""
    stream = [(token, d, p) for p, part in enumerate(parts) for d, document in enumerate(part) for token in document]
    row = stream[index * seq_length : (index + 1) * seq_length]
    following = [*stream[index * seq_length + 1 : (index + 1) * seq_length + 1], (0, -1, -1)]
    same = [here[1:] == after[1:] for here, after in zip(row, following, strict=False)]
    labels = [after[0] if ok else 0 for after, ok in zip(following, same, strict=False)]
    lengths = Counter(entry[1:] for entry in row)  # counts in order of appearance
    return Row(
        np.array([entry[0] for entry in row]),
        np.array(labels),
        np.array(same, np.float32),
        tuple(lengths.values()),
    )


def same(a: Row, b: Row) -> bool:
    return (
        np.array_equal(a.tokens_L, b.tokens_L)
        and np.array_equal(a.labels_L, b.labels_L)
        and np.array_equal(a.weights_L, b.weights_L)
        and a.document_lengths == b.document_lengths
    )


@given(corpora(), st.integers(1, 20), st.integers(1, 7))
def test_rows_are_what_the_obvious_loop_gives(parts: list[Documents], seq_length: int, file_tokens: int):
    loader = Loader(
        [shards(part, file_tokens) for part in parts], seq_length=seq_length, shuffle=False, drop_last=False
    )
    for position in range(loader.num_rows):
        row = loader.row(position)
        assert same(row, oracle(parts, seq_length, position))
        assert row.tokens_L.dtype == row.labels_L.dtype == np.int64
        assert row.weights_L.dtype == np.float32
        assert sum(row.document_lengths) == len(row.tokens_L)


@given(corpora(), st.integers(1, 20), st.integers(0, 9))
def test_unpacking_loses_and_invents_no_token(parts: list[Documents], seq_length: int, seed: int):
    loader = Loader([shards(part) for part in parts], seq_length=seq_length, seed=seed, drop_last=False)
    rows = [loader.row(position) for position in range(loader.num_rows)]
    everything = [token for part in parts for document in part for token in document]
    assert sorted(token for row in rows for token in row.tokens_L.tolist()) == everything
    # What is scored: every token but the first of each document, exactly once.
    scored = sorted(int(label) for row in rows for label in row.labels_L[row.weights_L > 0])
    assert scored == [token for part in parts for document in part for token in document[1:]]


@given(corpora(), st.integers(1, 5), st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 9))
def test_every_row_once_an_epoch_on_any_number_of_ranks(
    parts: list[Documents], seq_length: int, num_ranks: int, seed: int
):
    parts = [[[*range(100, 160)]], *parts]  # enough for a row
    loader = Loader([shards(part) for part in parts], seq_length=seq_length, seed=seed)
    num_steps = -(-2 * loader.num_rows // 12)
    alone = [row for step in range(num_steps) for row in loader.rows(step, 12)]
    ranks = [row for step in range(num_steps) for r in range(num_ranks) for row in loader.rows(step, 12, r, num_ranks)]
    assert all(map(same, alone, ranks))
    assert len(alone) == len(ranks)
    for epoch in range(2):
        seen = [loader.index(position) for position in range(epoch * loader.num_rows, (epoch + 1) * loader.num_rows)]
        assert sorted(seen) == list(range(loader.num_rows))


@given(st.integers(1, 3000), st.integers(0, 2**31), st.integers(0, 5))
def test_the_permutation_is_one(count: int, seed: int, epoch: int):
    assert sorted(permuted(place, count, seed, epoch) for place in range(count)) == list(range(count))


@pytest.mark.parametrize("count", [2, 3, 10, 100])
def test_the_permutation_sends_a_place_anywhere_alike(count: int):
    draws = 40 * count
    for place in (0, count - 1):
        hits = Counter(permuted(place, count, seed, 0) for seed in range(draws))
        chi = sum((hits[at] - 40) ** 2 / 40 for at in range(count))
        assert chi < count - 1 + 5 * (2 * count) ** 0.5


def test_seeds_and_epochs_give_other_orders():
    orders = [[permuted(place, 500, seed, epoch) for place in range(500)] for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    # Neighbours do not stay neighbours: about one pair in 500 does by chance.
    assert all(sum(abs(a - b) == 1 for a, b in itertools.pairwise(o)) < 12 for o in orders)


def test_a_row_depends_on_nothing_but_its_position():
    parts = [shards([[*range(at, at + 7)] for at in range(1, 400, 7)])]
    one = Loader(parts, seq_length=16, seed=3)
    rows = [one.row(position) for position in range(60)]
    two = Loader(parts, seq_length=16, seed=3)
    assert all(same(two.row(position), rows[position]) for position in reversed(range(60)))
    other = Loader(parts, seq_length=16, seed=4)
    assert not all(same(other.row(position), rows[position]) for position in range(60))
    plain = Loader(parts, seq_length=16, shuffle=False)
    assert plain.num_rows == 24
    assert same(plain.row(25), plain.row(1))


def test_drop_last():
    parts = [shards([[1, 5, 6, 7, 2], [1, 8, 2]])]
    assert Loader(parts, seq_length=3).num_rows == 2
    whole = Loader(parts, seq_length=3, shuffle=False, drop_last=False)
    assert whole.num_rows == 3
    assert whole.row(2).tokens_L.tolist() == [8, 2]
    assert whole.row(2).labels_L.tolist() == [2, 0]
    assert whole.row(2).weights_L.tolist() == [1.0, 0.0]


def test_what_cannot_be_loaded():
    part = shards([[1, 5, 2]])
    with pytest.raises(DataError, match=r"data\.seq_length=4 asks for more than the 3 tokens"):
        Loader([part], seq_length=4)
    assert Loader([part], seq_length=4, drop_last=False).num_rows == 1
    with pytest.raises(DataError, match=r"different tokenizers \(tokenizer x, tokenizer y\)"):
        Loader([part, shards([[1, 2]], sha256="y")], seq_length=1)
    with pytest.raises(DataError, match="no prepared data"):
        Loader([], seq_length=1)
    with pytest.raises(ConfigError, match=r"data\.seq_length=0 must be at least 1"):
        Loader([part], seq_length=0)
    with pytest.raises(ConfigError, match="6 rows does not divide over 4 data-parallel ranks"):
        Loader([part], seq_length=1).rows(0, 6, 0, 4)
