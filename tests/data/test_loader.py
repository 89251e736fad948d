"""Rows: nothing lost, nothing invented, the same on any number of ranks, a function of the position alone."""

from __future__ import annotations

import itertools
import json
import math
import resource
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostro.data import loader as loader_module
from ostro.data import packing
from ostro.data.loader import Loader, Row
from ostro.data.packing import OVERLONG, PACKINGS, best_fit
from ostro.data.shards import FORMAT, Manifest, Shards
from ostro.errors import ConfigError, DataError

Documents = list[list[int]]
PACKED = [name for name in PACKINGS if name != "concat"]


def shards(documents: Documents, file_tokens: int = 10**9, name: str = "x", untrained: frozenset[int] = frozenset()):
    """Return shards in memory, cut into files of `file_tokens` tokens; some token ids are not learned."""
    stream = np.array([token for document in documents for token in document], dtype=np.uint16)
    ends = np.cumsum([len(document) for document in documents])
    files = [stream[at : at + file_tokens] for at in range(0, len(stream), file_tokens)]
    masks = [~np.isin(file, list(untrained)) for file in files]
    manifest = Manifest(
        format=FORMAT,
        tokenizer=f"tokenizer {name}",
        tokenizer_sha256=name,
        vocab_size=2**16,
        bos_token_id=1,
        eos_token_id=2,
        unk_token_id=0,
        dtype="uint16",
        num_tokens=len(stream),
        num_documents=len(documents),
        num_bytes=0,
        num_trained=int(sum(mask.sum() for mask in masks)),
        encoder="tokenizers",
        settings={},
        files=[{"name": f"tokens-{at:05}.npy", "num_tokens": len(file)} for at, file in enumerate(files)],
        sources=[],
    )
    # A file all of which is learned has no mask, though its neighbour may have one.
    trained = [None if mask.all() else mask for mask in masks]
    return Shards(Path(name), manifest, files, np.stack([ends, ends], axis=1), trained)


# Every token of the corpus is different, so that a row says by itself where it is from.
@st.composite
def corpora(draw: st.DrawFn, longest: int = 12, most: int = 8) -> list[Documents]:
    lengths = draw(st.lists(st.lists(st.integers(1, longest), min_size=1, max_size=most), min_size=1, max_size=3))
    tokens = iter(range(1, 60_000))
    return [[[next(tokens) for _ in range(length)] for length in part] for part in lengths]


def flat(parts: list[Documents]) -> list[int]:
    return [token for part in parts for document in part for token in document]


@st.composite
def masks(draw: st.DrawFn, parts: list[Documents]) -> frozenset[int]:
    """Some tokens that are not learned: none at all, or runs of any size."""
    salt = draw(st.sampled_from([0, 2, 3, 7]))
    return frozenset(token for token in flat(parts) if salt and token // salt % 2)


def oracle(parts: list[Documents], seq_length: int, index: int, untrained: frozenset[int]) -> Row:
    """The row of `concat` in plain words: walk over every token of the stream."""
    stream = [(token, d, p) for p, part in enumerate(parts) for d, document in enumerate(part) for token in document]
    row = stream[index * seq_length : (index + 1) * seq_length]
    following = [*stream[index * seq_length + 1 : (index + 1) * seq_length + 1], (0, -1, -1)]
    same = [here[1:] == after[1:] for here, after in zip(row, following, strict=False)]
    labels = [after[0] if ok else 0 for after, ok in zip(following, same, strict=False)]
    lengths = Counter(entry[1:] for entry in row)  # counts in order of appearance
    return Row(
        np.array([entry[0] for entry in row]),
        np.array(labels),
        np.array([ok and label not in untrained for ok, label in zip(same, labels, strict=True)], np.float32),
        tuple(lengths.values()),
    )


def same(a: Row, b: Row) -> bool:
    return (
        np.array_equal(a.tokens_L, b.tokens_L)
        and np.array_equal(a.labels_L, b.labels_L)
        and np.array_equal(a.weights_L, b.weights_L)
        and a.document_lengths == b.document_lengths
    )


def same_rows(a: list[Row], b: list[Row]) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


Piece = tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]


def pieces_of(row: Row) -> list[Piece]:
    """Take a row apart: the tokens, labels and weights of each of its documents."""
    cuts = [0, *itertools.accumulate(row.document_lengths)]
    assert cuts[-1] == len(row.tokens_L) == len(row.labels_L) == len(row.weights_L)
    return [
        (tuple(row.tokens_L[a:b].tolist()), tuple(row.labels_L[a:b].tolist()), tuple((row.weights_L[a:b] > 0).tolist()))
        for a, b in itertools.pairwise(cuts)
    ]


def expected(document: list[int], how: str, overlong: str, length: int, pad: int, untrained: frozenset[int]):
    """The pieces that become of a document, in plain words."""
    inputs = document[:-1] if how == "records" else document
    labels = document[1:] if how == "records" else [*document[1:], 0]
    weights = [label not in untrained and token != pad for token, label in zip(inputs, labels, strict=True)]
    if how != "records":
        weights[-1] = False
    if len(inputs) > length and overlong == "drop":
        return []
    if len(inputs) > length and overlong == "truncate":
        inputs, labels, weights = inputs[:length], labels[:length], weights[:length]
        if how != "records":
            labels[-1], weights[-1] = 0, False
    return [
        (tuple(inputs[at : at + length]), tuple(labels[at : at + length]), tuple(weights[at : at + length]))
        for at in range(0, len(inputs), length)
    ]


def small_windows() -> Any:
    """Three documents a window and two windows a pool, so that few documents make many of both."""
    return mock.patch.multiple(packing, WINDOW_PIECES=3, _WINDOW_ROWS=1, _POOL_PIECES=6)


def loader_or_none(*args: Any, **options: Any) -> Loader | None:
    try:
        return Loader(*args, **options)
    except DataError:
        return None


@given(corpora(), st.integers(1, 20), st.integers(1, 7), st.data())
def test_rows_are_what_the_obvious_loop_gives(
    parts: list[Documents], seq_length: int, file_tokens: int, data: st.DataObject
):
    untrained = data.draw(masks(parts))
    loader = Loader(
        [shards(part, file_tokens, untrained=untrained) for part in parts],
        seq_length=seq_length,
        shuffle=False,
        drop_last=False,
    )
    together = loader.read(0, loader.num_rows)
    for position, row in enumerate(together):
        assert same(row, oracle(parts, seq_length, position, untrained))
        assert same(row, loader.row(position))
        assert row.tokens_L.dtype == row.labels_L.dtype == np.int64
        assert row.weights_L.dtype == np.float32


@given(corpora(), st.integers(1, 20), st.integers(0, 9), st.data())
def test_unpacking_concat_loses_and_invents_no_token(
    parts: list[Documents], seq_length: int, seed: int, data: st.DataObject
):
    untrained = data.draw(masks(parts))
    loader = Loader(
        [shards(part, untrained=untrained) for part in parts], seq_length=seq_length, seed=seed, drop_last=False
    )
    for epoch in range(2):
        rows = loader.read(epoch * loader.num_rows, loader.num_rows)
        assert sorted(token for row in rows for token in row.tokens_L.tolist()) == flat(parts)
        # What is scored: every learned token but the first of each document, exactly once.
        scored = sorted(int(label) for row in rows for label in row.labels_L[row.weights_L > 0])
        assert scored == [t for part in parts for document in part for t in document[1:] if t not in untrained]


@pytest.mark.parametrize("overlong", ["split", "drop", "truncate"])
@pytest.mark.parametrize("how", PACKED)
@given(corpora(), st.integers(1, 14), st.integers(0, 5), st.booleans(), st.data())
def test_unpacking_gives_the_documents_back(
    how: Any, overlong: Any, parts: list[Documents], seq_length: int, seed: int, shuffle: bool, data: st.DataObject
):
    untrained = data.draw(masks(parts))
    pad = data.draw(st.sampled_from([-1, 3]))
    wanted = Counter(
        piece
        for part in parts
        for document in part
        for piece in expected(document, how, overlong, seq_length, pad, untrained)
    )
    options = {"seq_length": seq_length, "seed": seed, "shuffle": shuffle, "packing": how, "overlong": overlong}
    with small_windows():
        loader = loader_or_none([shards(part, 5, untrained=untrained) for part in parts], **options, pad_token_id=pad)
        assert (loader is None) == (not wanted)
        if loader is None:
            return
        for epoch in range(3):  # an epoch has the same number of rows each time
            rows = loader.read(epoch * loader.num_rows, loader.num_rows)
            pieces = [pieces_of(row) for row in rows]
            assert Counter(piece for row in pieces for piece in row) == wanted
            assert all(1 <= len(row.tokens_L) <= seq_length for row in rows)
            assert how == "bestfit" or all(len(row) == 1 for row in pieces)
            assert sum(len(row.tokens_L) for row in rows) == loader.epoch_tokens
    inputs = [len(document) - (how == "records") for part in parts for document in part]
    assert loader.num_overlong == sum(length > seq_length for length in inputs)


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


@pytest.mark.parametrize("seq_length", [512, 4096])
def test_best_fit_wastes_little_on_chats(shared: Path, seq_length: int):
    from ostro.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("v1")
    chats = json.loads((shared / "data" / "sharegpt_250.json").read_text("utf-8"))
    texts = ["".join(turn["value"] for turn in chat["conversations"]) for chat in chats]
    documents = [[1, *ids, 2] for ids in tokenizer.encode_batch(texts)]
    loader = Loader([shards(documents)], seq_length=seq_length, packing="bestfit")
    tokens = sum(map(len, documents))
    assert loader.epoch_tokens == tokens
    assert loader.num_rows <= math.ceil(tokens / seq_length) * 1.02 + 1


@pytest.mark.parametrize("seq_length", [512, 4096, 32768])
def test_best_fit_wastes_little_over_many_windows(seq_length: int):
    lengths = np.random.default_rng(0).lognormal(4.5, 1.0, 50_000).astype(np.int64).clip(1)
    documents = [[0] * length for length in lengths.tolist()]
    with mock.patch.object(packing, "WINDOW_PIECES", 64):
        loader = Loader([shards(documents)], seq_length=seq_length, packing="bestfit")
    assert loader.num_rows <= math.ceil(lengths.sum() / seq_length) * 1.02 + 1


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
@pytest.mark.parametrize("how", PACKINGS)
@settings(max_examples=25)
@given(
    corpora(),
    st.integers(1, 5),
    st.tuples(*[st.sampled_from([1, 2, 3, 4, 6, 12])] * 2),
    st.integers(0, 9),
    st.integers(0, 40),
)
def test_resumed_on_other_ranks_every_row_comes_once(
    how: Any,
    weights: Any,
    parts: list[Documents],
    seq_length: int,
    ranks: tuple[int, int],
    seed: int,
    share: int,
):
    parts = [[[*range(60_000, 60_060)]], *parts, [[*range(61_000, 61_024)]]]  # enough for rows
    options = {"seq_length": seq_length, "seed": seed, "packing": how, "drop_last": False}
    if weights is not None:
        options |= {"weights": [weights[at % 3] for at in range(len(parts))], "weights_by": "epochs"}
        parts = [[*part, [62_000 + at, 63_000 + at]] for at, part in enumerate(parts)]  # a record needs two tokens
    with small_windows():
        first = Loader([shards(part) for part in parts], **options)
        num_steps = -(-2 * first.num_rows // 12)
        alone = [row for step in range(num_steps) for row in first.rows(step, 12)]
        stop = share * num_steps // 40
        before = [row for step in range(stop) for r in range(ranks[0]) for row in first.rows(step, 12, r, ranks[0])]
        again = Loader([shards(part, 7) for part in parts], **options)  # a new process, other files, other ranks
        after = [
            row for step in range(stop, num_steps) for r in range(ranks[1]) for row in again.rows(step, 12, r, ranks[1])
        ]
    assert same_rows(alone, before + after)
    if weights is None:
        epochs = [
            Counter(piece for row in alone[at : at + first.num_rows] for piece in pieces_of(row))
            for at in (0, first.num_rows)
        ]
        assert epochs[0] == epochs[1]
        assert max(epochs[0].values()) == 1


@pytest.mark.parametrize("how", PACKINGS)
def test_a_row_depends_on_nothing_but_its_position(how: Any):
    parts = [shards([[*range(at, at + 7)] for at in range(1, 400, 7)], 50)]
    options = {"seq_length": 16, "packing": how}
    with small_windows():
        one = Loader(parts, seed=3, **options)
        rows = one.read(0, 60)
        assert same_rows([one.row(position) for position in range(60)], rows)
        two = Loader(parts, seed=3, **options)
        with mock.patch.object(loader_module, "_BLOCK_ROWS", (1, 5)):
            small = Loader(parts, seed=3, **options)
        for other in (two, small):
            assert all(same(other.row(position), rows[position]) for position in reversed(range(60)))
        assert not same_rows(Loader(parts, seed=4, **options).read(0, 60), rows)
        plain = Loader(parts, shuffle=False, **options)
        assert same_rows(plain.read(0, plain.num_rows), plain.read(3 * plain.num_rows, plain.num_rows))


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


@pytest.mark.parametrize("how", PACKINGS)
def test_epochs_have_other_orders(how: Any):
    documents = [[at, at + 10_000] for at in range(1, 400)]  # one window
    loader = Loader([shards(documents)], seq_length=2, packing=how, seed=1)
    first, second = ([int(row.tokens_L[0]) for row in loader.read(epoch * 399, 399)] for epoch in range(2))
    assert sorted(first) == sorted(second)
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 8


def test_shuffled_windows_mix():
    documents = [[at, at + 30_000] for at in range(20_000)]
    with mock.patch.object(packing, "WINDOW_PIECES", 4096 * 2):
        loader = Loader([shards(documents)], seq_length=2, packing="none")
    firsts = np.array([row.tokens_L[0] for row in loader.read(0, 2000)])
    shares = np.bincount(firsts // 4096, minlength=5) / 2000
    assert np.abs(shares - np.array([0.2048] * 4 + [0.1808])).max() < 0.04
    neighbours = np.abs(np.diff(firsts)) == 1
    assert neighbours.sum() < 5


def test_mixing_by_tokens():
    small = [[*range(1, 65)]]  # eight rows of eight
    large = [[*range(1000, 1320)]]  # forty
    loader = Loader([shards(small), shards(large)], seq_length=8, weights=[3, 1], seed=5)
    assert (loader.num_rows, loader.epoch_tokens) == (48, 384)
    rows = loader.read(0, 4 * 48)
    is_small = np.array([row.tokens_L[0] < 1000 for row in rows])
    assert np.abs(np.cumsum(is_small) - 0.75 * np.arange(1, 4 * 48 + 1)).max() < 2
    # The small one repeats, every eight of its rows an epoch of its own; the large one goes on where it stopped.
    firsts = [int(row.tokens_L[0]) for row in rows]
    from_small = [first for first in firsts if first < 1000]
    assert [sorted(from_small[at : at + 8]) for at in range(0, 144, 8)] == [[*range(1, 65, 8)]] * 18
    assert len({tuple(from_small[at : at + 8]) for at in range(0, 144, 8)}) > 10
    from_large = [first for first in firsts if first >= 1000]
    assert sorted(from_large[:40]) == [*range(1000, 1320, 8)]


def test_mixing_by_epochs():
    small, large = [[*range(1, 65)]], [[*range(1000, 1320)]]
    loader = Loader([shards(small), shards(large)], seq_length=8, weights=[2, 0.5], weights_by="epochs")
    assert (loader.num_rows, loader.epoch_tokens) == (36, 288)
    seen = Counter(int(row.tokens_L[0]) for row in loader.read(0, 2 * 36))
    assert seen == dict.fromkeys(range(1, 65, 8), 4) | dict.fromkeys(range(1000, 1320, 8), 1)


def test_sources_of_a_mixture_have_orders_of_their_own():
    parts = [shards([[*range(at, at + 400)]]) for at in (1000, 2000)]
    rows = Loader(parts, seq_length=4, weights=[1, 1]).read(0, 200)
    orders = [[int(row.tokens_L[0]) % 1000 for row in rows if row.tokens_L[0] // 1000 == at] for at in (1, 2)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_mixing_short_rows_shares_tokens_and_not_rows():
    short = [[*range(at, at + 4)] for at in range(1, 4001, 4)]
    long = [[*range(at, at + 16)] for at in range(10_000, 20_000, 16)]
    loader = Loader([shards(short), shards(long)], seq_length=16, packing="none", weights=[0.5, 0.5])
    rows = loader.read(0, loader.num_rows)
    tokens = [sum(len(row.tokens_L) for row in rows if (row.tokens_L[0] < 10_000) == is_short) for is_short in (1, 0)]
    assert abs(tokens[0] / sum(tokens) - 0.5) < 0.002
    assert abs(sum(tokens) - 14_000) <= 16
    assert loader.epoch_tokens == sum(tokens)


def test_drop_last():
    parts = [shards([[1, 5, 6, 7, 2], [1, 8, 2]])]
    assert Loader(parts, seq_length=3).num_rows == 2
    whole = Loader(parts, seq_length=3, shuffle=False, drop_last=False)
    assert (whole.num_rows, whole.epoch_tokens) == (3, 8)
    assert whole.row(2).tokens_L.tolist() == [8, 2]
    assert whole.row(2).labels_L.tolist() == [2, 0]
    assert whole.row(2).weights_L.tolist() == [1.0, 0.0]


def test_records_are_shifted_by_one_and_not_learned_after_the_pad_id():
    record = [1, 7, 8, 9, 2, 0, 0]  # as the seed pads: seq_length + 1 tokens
    row = Loader([shards([record])], seq_length=6, packing="records", pad_token_id=0).row(0)
    assert row.tokens_L.tolist() == record[:-1]
    assert row.labels_L.tolist() == record[1:]
    assert row.weights_L.tolist() == [1, 1, 1, 1, 1, 0]  # the mask looks at the input: the first pad is a label
    assert row.document_lengths == (6,)
    assert Loader([shards([record])], seq_length=6, packing="records").row(0).weights_L.tolist() == [1] * 6
    chat = shards([record], untrained=frozenset([0, 7]))
    row = Loader([chat], seq_length=6, packing="records", pad_token_id=0).row(0)
    assert row.weights_L.tolist() == [0, 1, 1, 1, 0, 0]


def test_it_starts_without_reading_the_tokens(tmp_path: Path):
    num_tokens = 2**34  # 32 GiB in a file without blocks
    tokens = np.lib.format.open_memmap(tmp_path / "tokens-00000.npy", "w+", np.uint16, (num_tokens,))
    ends = np.arange(2**16, num_tokens + 1, 2**16)
    small = shards([[1]]).manifest
    fields = vars(small) | {"num_tokens": num_tokens, "files": [{"name": "tokens-00000.npy", "num_tokens": num_tokens}]}
    large = Shards(tmp_path, Manifest(**fields), [tokens], np.stack([ends, ends], axis=1))
    for how in PACKINGS:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        loader = Loader([large], seq_length=4096, packing=how)
        rows = loader.rows(10**9, 8)
        assert sum(len(row.tokens_L) for row in rows) > 8 * 4000
        now = resource.getrusage(resource.RUSAGE_SELF)
        pages = now.ru_minflt + now.ru_majflt - usage.ru_minflt - usage.ru_majflt
        assert pages * resource.getpagesize() < num_tokens // 16


def test_what_cannot_be_loaded():
    part = shards([[1, 5, 2]])
    with pytest.raises(DataError, match=r"x: data\.seq_length=4 asks for more than the 3 tokens there are: use a"):
        Loader([part], seq_length=4)
    assert Loader([part], seq_length=4, drop_last=False).num_rows == 1
    with pytest.raises(DataError, match=r"different tokenizers \(tokenizer x, tokenizer y\)"):
        Loader([part, shards([[1, 2]], name="y")], seq_length=1)
    with pytest.raises(DataError, match="no prepared data"):
        Loader([], seq_length=1)
    with pytest.raises(ConfigError, match=r"data\.seq_length=0 must be at least 1"):
        Loader([part], seq_length=0)
    with pytest.raises(ConfigError, match="6 rows does not divide over 4 data-parallel ranks"):
        Loader([part], seq_length=1).rows(0, 6, 0, 4)
    with pytest.raises(DataError, match=r"x: data\.seq_length=2 leaves none of the 1 documents a row: use a longer"):
        Loader([part], seq_length=2, packing="bestfit", overlong="drop")
    with pytest.raises(DataError, match="leaves none of the 1 documents a row"):
        Loader([shards([[1]])], seq_length=2, packing="records")
    with pytest.raises(ConfigError, match=r"data\.packing=best is none of concat, bestfit, none, records"):
        Loader([part], seq_length=2, packing="best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"data\.overlong=cut is none of {', '.join(OVERLONG)}"):
        Loader([part], seq_length=2, overlong="cut")  # type: ignore[arg-type]


def test_weights_that_cannot_be():
    part = shards([[1, 5, 2]])
    with pytest.raises(ConfigError, match="2 weights were given for 1 sources"):
        Loader([part], seq_length=1, weights=[1, 2])
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="x has the weight"):
            Loader([part], seq_length=1, weights=[weight])
    with pytest.raises(ConfigError, match="by tokens or by epochs, not by 'rows'"):
        Loader([part], seq_length=1, weights=[1], weights_by="rows")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"an epoch of 3e\+12 rows and a mixture holds 2147483647"):
        Loader([part], seq_length=1, weights=[1e12], weights_by="epochs")
    # A weight too small for a row still gives one, or the source would be named in vain.
    tiny = Loader([part, shards([[7, 8, 9]])], seq_length=1, weights=[1, 1e-9])
    assert sum(row.tokens_L[0] > 5 for row in tiny.read(0, tiny.num_rows)) == 1
