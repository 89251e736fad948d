"""How documents become rows: as full as can be, none cut that fits, and what becomes of those that are too long."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from token_shards import Documents, corpora, shards, small_windows

from ostro.batch import batch_of
from ostro.data import packing
from ostro.data.loader import Loader, packing_of
from ostro.data.packing import best_fit
from ostro.data.prepare import prepare
from ostro.data.shards import Shards, open_shards
from ostro.data.tokenizer import load_tokenizer
from ostro.errors import DataError


@given(corpora(), st.integers(1, 14))
def test_too_long_is_an_error_where_asked_for(parts: list[Documents], seq_length: int):
    opened = [shards(part, name="chats") for part in parts]
    lengths = [(len(document), at + 1) for part in parts for at, document in enumerate(part)]
    long = [entry for entry in lengths if entry[0] > seq_length]
    with small_windows():
        if not long:
            assert Loader(opened, seq_length=seq_length, packing="bestfit", overlong="error").num_overlong == 0
            return
        with pytest.raises(DataError) as caught:
            Loader(opened, seq_length=seq_length, packing="bestfit", overlong="error")
    length, number = long[0]
    assert str(caught.value) == (
        f"chats document {number} makes a row of {length} tokens, more than data.seq_length={seq_length}: "
        "use a longer one, or data.overlong split, drop or truncate."
    )


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The rule in plain words: one thing after another, into the fullest bin that has room."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [one for one in bins if sum(one) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            bins.append([length])
    return bins


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), max_size=60))))
def test_best_fit_is_best_fit_decreasing(drawn: tuple[int, list[int]]):
    capacity, lengths = drawn
    bins, num_bins = best_fit(np.bincount(np.array(lengths, dtype=np.int64)), capacity)
    found: list[list[int]] = [[] for _ in range(num_bins)]
    for bin_, length in zip(bins, sorted(lengths, reverse=True), strict=True):
        found[bin_].append(length)
    # Which of equally full bins is taken is open; how full they get is not.
    assert sorted(map(sum, found)) == sorted(map(sum, best_fit_decreasing(lengths, capacity)))


@pytest.mark.parametrize("seq_length", [512, 4096, 32768])
def test_best_fit_wastes_little_over_many_windows(seq_length: int):
    lengths = np.random.default_rng(0).lognormal(4.5, 1.0, 50_000).astype(np.int64).clip(1)
    documents = [[0] * length for length in lengths.tolist()]
    with mock.patch.object(packing, "WINDOW_PIECES", 64):
        loader = Loader([shards(documents)], seq_length=seq_length, packing="bestfit")
    assert loader.num_rows <= math.ceil(lengths.sum() / seq_length) * 1.02 + 1


def test_without_shuffling_documents_keep_their_order():
    documents = [[*range(at, at + 3)] for at in range(1, 100, 3)]
    rows = Loader([shards(documents)], seq_length=8, shuffle=False, packing="none").read(0, len(documents))
    assert [row.tokens_L.tolist() for row in rows] == documents


def test_epochs_pack_other_documents_together():
    documents = [[at, at + 10_000, at + 20_000] for at in range(1, 400)]
    loader = Loader([shards(documents)], seq_length=9, packing="bestfit", seed=1)
    epochs = [
        {frozenset(row.tokens_L[::3].tolist()) for row in loader.read(epoch * loader.num_rows, loader.num_rows)}
        for epoch in range(2)
    ]
    assert len(epochs[0] & epochs[1]) < 5


def test_shuffled_windows_mix():
    documents = [[at, at + 30_000] for at in range(20_000)]
    with mock.patch.object(packing, "WINDOW_PIECES", 4096 * 2):
        loader = Loader([shards(documents)], seq_length=2, packing="none")
    firsts = np.array([row.tokens_L[0] for row in loader.read(0, 2000)])
    shares = np.bincount(firsts // 4096, minlength=5) / 2000
    assert np.abs(shares - np.array([0.2048] * 4 + [0.1808])).max() < 0.04
    neighbours = np.abs(np.diff(firsts)) == 1
    assert neighbours.sum() < 5


@pytest.fixture(scope="module", params=["v1", "v3"])
def chats(request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Conversations of the ShareGPT sample as Mixtral's template renders them."""
    out = tmp_path_factory.mktemp("chats") / request.param
    prepare([shared / "data" / "sharegpt_250.json"], out, tokenizer=load_tokenizer(request.param))
    return open_shards(out)


@pytest.mark.parametrize("seq_length", [512, 4096])
def test_best_fit_wastes_little_on_chats(chats: Shards, seq_length: int):
    assert packing_of([chats]) == "bestfit"
    loader = Loader([chats], seq_length=seq_length, packing="bestfit")
    assert loader.epoch_tokens == chats.num_tokens
    assert loader.num_rows <= math.ceil(chats.num_tokens / seq_length) * 1.02 + 1
    rows = loader.read(0, loader.num_rows)
    pieces = Counter(
        part.tobytes() for row in rows for part in np.split(row.tokens_L, np.cumsum(row.document_lengths)[:-1])
    )
    ends = [0, *chats.document_ends.tolist()]
    documents = [chats.tokens(a, b).astype(np.int64) for a, b in itertools.pairwise(ends)]
    cuts = [one[at : at + seq_length] for one in documents for at in range(0, len(one), seq_length)]
    assert pieces == Counter(cut.tobytes() for cut in cuts)
    batch = batch_of(rows, torch.device("cpu"))
    assert batch.spans.num_sequences == loader.num_rows
    positions = [np.arange(n) for row in rows for n in row.document_lengths]
    np.testing.assert_array_equal(batch.spans.positions_T.numpy(), np.concatenate(positions))


def test_what_nobody_asked_for_packs_whole_documents_where_some_tokens_are_not_learned():
    plain, masked = shards([[1, 2, 3]]), shards([[4, 5, 6]], untrained=frozenset([5]))
    rows = shards([[1, 2, 3]], kind="mindrecord")
    assert packing_of([plain]) == packing_of([plain, rows]) == "concat"
    assert (
        packing_of([rows])
        == packing_of([rows, shards([[4, 5]], untrained=frozenset([5]), kind="mindrecord")])
        == "records"
    )
    assert packing_of([plain, masked]) == "bestfit"
    assert packing_of([masked], "none") == "none"


def parts_of(document: list[int], how: str, overlong: str, length: int) -> list[list[int]]:
    """What becomes of a document that is too long, each part with its last label."""
    inputs = document[:-1] if how == "records" else document
    if len(inputs) <= length or overlong == "drop":
        return []
    if overlong == "truncate":
        return [document[: length + (how == "records")]]
    return [document[at : at + length + 1] for at in range(0, len(inputs), length)]


@pytest.mark.parametrize("overlong", ["split", "drop", "truncate"])
@pytest.mark.parametrize("how", ["bestfit", "none", "records"])
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=9),
    st.integers(2, 9),
    st.integers(1, 7),
    st.integers(0, 3),
    st.sampled_from([-1, 3, 40]),
)
def test_parts_of_which_nothing_is_learned_are_counted(
    how: Any, overlong: Any, lengths: list[int], seq_length: int, file_tokens: int, salt: int, pad: int
):
    tokens = iter(range(1, 1000))
    documents = [[next(tokens) for _ in range(length)] for length in [*lengths, 2]]
    untrained = frozenset(token for document in documents for token in document if salt and token // (4 * salt) % 2)
    with small_windows():
        loader = Loader(
            [shards(documents, file_tokens, untrained=untrained)],
            seq_length=seq_length,
            packing=how,
            overlong=overlong,
            pad_token_id=pad,
        )
        rows = loader.read(0, loader.num_rows)
    parts = [part for document in documents for part in parts_of(document, how, overlong, seq_length)]
    empty = [
        part
        for part in parts
        if not any(label not in untrained and token != pad for token, label in itertools.pairwise(part))
    ]
    assert loader.num_unlearned() == len(empty)
    if how == "none":  # where each part is a row, rows say the same
        firsts = {part[0] for part in parts}
        assert len(empty) == sum(not row.weights_L.any() for row in rows if int(row.tokens_L[0]) in firsts)


def answer_last(length: int) -> list[list[int]]:
    """Conversations of which the last two tokens are learned: a long one, two short ones."""
    return [[*range(1, length - 1), 901, 902], [1, 901, 902], [2, 3, 901, 902]]


@pytest.mark.parametrize(
    ("overlong", "what"),
    [
        ("split", "is cut into several rows (data.overlong=split); 2 of these parts have no token that is learned"),
        ("truncate", "is cut off there (data.overlong=truncate); 1 of these documents has no token that is learned"),
        ("drop", "is left out (data.overlong=drop)"),
    ],
)
def test_what_became_of_documents_too_long_is_said(overlong: Any, what: str):
    part = shards(answer_last(12), untrained=frozenset(range(1, 900)))
    loader = Loader([part], seq_length=4, packing="bestfit", overlong=overlong)
    assert loader.notes() == [f"1 of 3 documents is longer than data.seq_length=4 and {what}"]
    assert Loader([part], seq_length=12, packing="bestfit", overlong=overlong).notes() == []


def test_many_documents_too_long_are_many():
    part = shards(answer_last(12) + answer_last(2000), untrained=frozenset([*range(1, 900), *range(903, 3000)]))
    assert Loader([part], seq_length=3, packing="none", overlong="truncate").notes() == [
        "4 of 6 documents are longer than data.seq_length=3 and are cut off there (data.overlong=truncate); "
        "2 of these documents have no token that is learned"
    ]


def test_documents_that_fit_are_not_looked_at_to_count():
    """With a mask that can be read only where long documents lie."""
    part = shards([[1] * 5, [2] * 50, [3] * 5], untrained=frozenset([1, 3]))
    seen: list[tuple[int, int]] = []

    class Watched(np.ndarray):
        def __getitem__(self, key: Any) -> Any:
            if isinstance(key, slice):
                seen.append((key.start, key.stop))
            return super().__getitem__(key)

    loader = Loader([part], seq_length=10, packing="bestfit")
    stream = loader._stream
    stream._trained = [mask.view(Watched) if mask is not None else None for mask in stream._trained]
    assert loader.num_unlearned() == 0
    assert min(start for start, _ in seen) >= 5
    assert max(stop for _, stop in seen) <= 55
