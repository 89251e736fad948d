"""Rows: nothing lost, nothing invented, the same on any number of ranks, a function of the position alone."""

from __future__ import annotations

import itertools
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
from token_shards import Documents, corpora, shards, small_windows

from ostro.data import loader as loader_module
from ostro.data.loader import Loader, Row
from ostro.data.packing import OVERLONG, PACKINGS
from ostro.data.shards import Manifest, Shards
from ostro.errors import ConfigError, DataError

PACKED = [name for name in PACKINGS if name != "concat"]


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


def epochs_of(rows: list[Row], parts: list[Documents], num_rows: list[int]) -> list[list[list[Piece]]]:
    """For each source: the pieces of its rows, as they came, by its own epochs; the last may be unfinished."""
    source_of = {token: at for at, part in enumerate(parts) for token in flat([part])}
    found: list[list[list[Piece]]] = [[] for _ in parts]
    counts = [0] * len(parts)
    for row in rows:
        at = source_of[int(row.tokens_L[0])]
        assert {source_of[token] for token in row.tokens_L.tolist()} == {at}
        if counts[at] % num_rows[at] == 0:
            found[at].append([])
        found[at][-1] += pieces_of(row)
        counts[at] += 1
    return found


@pytest.mark.parametrize("mixed", [None, "tokens", "epochs"])
@pytest.mark.parametrize("how", PACKINGS)
@settings(max_examples=30)
@given(corpora(), st.integers(1, 6), st.tuples(*[st.integers(1, 5)] * 3), st.integers(0, 9), st.data())
def test_resumed_on_other_ranks_every_sample_comes_once_an_epoch(
    how: Any, mixed: Any, parts: list[Documents], seq_length: int, ranks: tuple[int, int, int], seed: int, data: Any
):
    # Of each source something that makes a row by every packing, records included.
    parts = [[*part, [60_000 + at, 61_000 + at]] for at, part in enumerate(parts)]
    options: dict[str, Any] = {"seq_length": seq_length, "seed": seed, "packing": how, "drop_last": False}
    options["overlong"] = data.draw(st.sampled_from(["split", "truncate"]))
    given_ = {}
    if mixed:
        share = st.floats(0.2, 3.0)
        given_ = {"weights": [data.draw(share) for _ in parts], "weights_by": mixed}
    batch = math.lcm(*ranks)
    with small_windows():
        first = Loader([shards(part) for part in parts], **options, **given_)
        num_steps = -(-3 * first.num_rows // batch)
        alone = [row for step in range(num_steps) for row in first.rows(step, batch)]
        stops = [0, *sorted(data.draw(st.integers(0, num_steps)) for _ in range(2)), num_steps]
        resumed = []
        for number, (start, stop) in enumerate(itertools.pairwise(stops)):
            again = Loader([shards(part, 5 + number) for part in parts], **options, **given_)  # as a new process has it
            num_ranks = ranks[number]
            resumed += [
                row
                for step in range(start, stop)
                for r in range(num_ranks)
                for row in again.rows(step, batch, r, num_ranks)
            ]
        groups = parts if mixed else [[document for part in parts for document in part]]
        num_rows = [Loader([shards(part)], **options).num_rows for part in groups]
    assert same_rows(alone, resumed)
    for part, epochs in zip(groups, epochs_of(alone, groups, num_rows), strict=True):
        pieces = [expected(document, how, options["overlong"], seq_length, -1, frozenset()) for document in part]
        wanted = Counter(piece for some in pieces for piece in some)
        tokens = Counter(flat([part]))
        for at, epoch in enumerate(epochs):
            is_last = at == len(epochs) - 1
            if how == "concat":
                seen = Counter(token for piece in epoch for token in piece[0])
                assert seen <= tokens if is_last else seen == tokens
            else:
                assert Counter(epoch) <= wanted if is_last else Counter(epoch) == wanted
        assert mixed or len(epochs) >= 3


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


@pytest.mark.parametrize("how", PACKINGS)
def test_epochs_have_other_orders(how: Any):
    documents = [[at, at + 10_000] for at in range(1, 400)]  # one window
    loader = Loader([shards(documents)], seq_length=2, packing=how, seed=1)
    first, second = ([int(row.tokens_L[0]) for row in loader.read(epoch * 399, 399)] for epoch in range(2))
    assert sorted(first) == sorted(second)
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 8


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
    how: Any
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
