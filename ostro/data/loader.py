"""Rows of tokens for training and evaluation: packed, mixed, shuffled and dealt out by arithmetic alone.

Nothing is carried from one row to the next. A row is a function of (seed, position), so resuming means asking
for the next step, and any number of ranks see the same rows. What a row is made of comes from where documents end;
tokens are read when their row is asked for, and not before.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ostro.data.order import MOST_MIXED_ROWS, interleaved
from ostro.data.packing import OVERLONG, PACKINGS, Concat, Overlong, Packing, Pieces, Windows, cut, gathered
from ostro.data.shards import Shards
from ostro.errors import ConfigError, DataError

_FATES = {"split": "cut into several rows", "drop": "left out", "truncate": "cut off there"}

# Rows are planned so many tokens at a time: enough that a row's share of the planning is small.
_BLOCK_TOKENS = 2**21
_BLOCK_ROWS = (64, 8192)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of at most L tokens.

    `tokens_L` int64 [L]; `labels_L` int64 [L], the next token; `weights_L` float32 [L], 1 where the next token
    belongs to the same document and is learned, else 0 (at a document's end the label is 0 as well);
    `document_lengths`, the pieces of documents in this row, whose sum is L.
    """

    tokens_L: np.ndarray
    labels_L: np.ndarray
    weights_L: np.ndarray
    document_lengths: tuple[int, ...]


class Loader:
    """Packs documents into rows of at most `seq_length` tokens and serves the rows in shuffled order.

    `packing`: `concat` cuts the stream of all documents every `seq_length` tokens; a document goes on in the next
    row, as one of its own: within a row each piece stands alone. With `drop_last` the tokens that fill no row are
    left out; without, the last row is short. `bestfit` packs whole documents, `none` gives each a row, and `records`
    gives each a row of its tokens but the last with the tokens but the first as labels; their rows may be short, and
    `overlong` says what becomes of documents that fit into none (`packing.Windows`; num_overlong counts them).
    Except under `drop` and `truncate` (and the last row that `drop_last` leaves out) every learned token but the
    first of its document is a label exactly once an epoch. A token after `pad_token_id` (−1: none) is not learned.

    Without `weights` an epoch is every row of all shards once. With them each of the shards is a source of its own,
    that goes through its rows in its own epochs, one after another, however long the others are. By "tokens" the
    sources have these shares of the tokens, and an epoch is as many tokens as all sources have together: a source
    given more than it has repeats, one given less goes on in the next epoch where it stopped. By "epochs" source i is
    read weights[i] times an epoch. Either way each source has a fixed number of rows an epoch, and of any first part
    of the epoch its share to within two rows.

    num_rows and epoch_tokens are the rows and input tokens of an epoch (of a mixture: what its rows hold on
    average). Raises DataError for too little data, documents too long under `error`, or shards of different
    tokenizers; ConfigError for settings that contradict themselves.
    """

    def __init__(
        self,
        shards: Sequence[Shards],
        *,
        seq_length: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        packing: Packing = "concat",
        overlong: Overlong = "split",
        pad_token_id: int = -1,
        weights: Sequence[float] | None = None,
        weights_by: Literal["tokens", "epochs"] = "tokens",
    ) -> None:
        _check(seq_length, packing, overlong, shards)
        self.seq_length, self.seed, self.shuffle = seq_length, seed, shuffle
        self.num_tokens = sum(part.num_tokens for part in shards)
        self._drop_last, self._pad = drop_last, pad_token_id
        self._packing: Packing = packing
        self._overlong: Overlong = overlong
        self._stream = _Stream(shards)
        if weights is None:
            self._sources = [self._source(0, len(self._stream.ends), (seed,))]
            self._quotas = [self._sources[0].num_rows]
            self.epoch_tokens = self._sources[0].num_tokens
        else:
            _check_weights(weights, weights_by, shards)
            bounds = [0, *itertools.accumulate(len(part.document_ends) for part in shards)]
            self._sources = [
                self._source(first, last, (seed, "source", at))
                for at, (first, last) in enumerate(itertools.pairwise(bounds))
            ]
            self._quotas = _quotas(self._sources, weights, weights_by)
            self.epoch_tokens = sum(
                round(quota * source.num_tokens / source.num_rows)
                for quota, source in zip(self._quotas, self._sources, strict=True)
            )
        self.num_rows = sum(self._quotas)
        self.num_overlong = sum(source.num_overlong for source in self._sources)
        few, many = _BLOCK_ROWS
        self._block_rows = min(max(_BLOCK_TOKENS // seq_length, few), many, self.num_rows)
        self._blocks: dict[int, Pieces] = {}

    def row(self, position: int) -> Row:
        """Return the row at `position`, counted over all epochs."""
        return self.read(position, 1)[0]

    def rows(self, step: int, count: int, rank: int = 0, num_ranks: int = 1) -> list[Row]:
        """Return the rows of global batch `step` that belong to `rank`: a contiguous block of its `count`."""
        if count < 1 or num_ranks < 1 or count % num_ranks:
            raise ConfigError(
                f"a global batch of {count} rows does not divide over {num_ranks} data-parallel ranks: "
                f"use a multiple of {num_ranks} for train.global_batch_sequences."
            )
        assert 0 <= rank < num_ranks
        share = count // num_ranks
        return self.read(step * count + rank * share, share)

    def documents(self, step: int, count: int) -> dict[str, list[int]]:
        """Return which documents global batch `step` of `count` rows has parts of: by folder, counted from 1."""
        found: set[tuple[str, int]] = set()
        for position in range(step * count, (step + 1) * count):
            number, at = divmod(position, self._block_rows)
            starts_P = self._block(number).between(at, at + 1).starts_P
            found |= {self._stream.place(int(i)) for i in self._stream.ends.searchsorted(starts_P, side="right")}
        folders = sorted({folder for folder, _ in found})
        return {folder: sorted(number for its, number in found if its == folder) for folder in folders}

    def read(self, first: int, count: int) -> list[Row]:
        """Return `count` rows from position `first` on; those read together share their memory."""
        assert first >= 0
        rows = []
        while count:
            number, at = divmod(first, self._block_rows)
            here = min(count, self._block_rows - at)
            rows += self._read(self._block(number).between(at, at + here))
            first, count = first + here, count - here
        return rows

    def num_unlearned(self) -> int:
        """Count the parts of documents too long for a row, and documents cut off, of which nothing is learned.

        Reads the masks of those documents and, with a pad id, their tokens; documents that fit are not looked at.
        """
        return sum(
            not self._stream.is_learned(start, start + length + goes_on, self._pad)
            for source in self._sources
            for pieces in source.overlong()
            for start, length, goes_on in zip(
                pieces.starts_P.tolist(), pieces.lengths_P.tolist(), pieces.goes_on_P.tolist(), strict=True
            )
        )

    def notes(self) -> list[str]:
        """Return a sentence on the documents that are too long for a row, where there are any."""
        if not self.num_overlong:
            return []
        are = "is" if self.num_overlong == 1 else "are"
        note = (
            f"{self.num_overlong:,} of {len(self._stream.ends):,} documents {are} longer than "
            f"data.seq_length={self.seq_length} and {are} {_FATES[self._overlong]} (data.overlong={self._overlong})"
        )
        count = self.num_unlearned()
        if count:
            what = "documents" if self._overlong == "truncate" else "parts"
            note += f"; {count:,} of these {what} {'has' if count == 1 else 'have'} no token that is learned"
        return [note]

    def _source(self, first: int, last: int, key: tuple[int | str, ...]) -> Concat | Windows:
        """Return documents `first` to `last` of the stream as rows."""
        stream, length = self._stream, self.seq_length
        if self._packing == "concat":
            start, stop = int(stream.ends[first - 1]) if first else 0, int(stream.ends[last - 1])
            source = Concat(stream.ends, start, stop, length, drop_last=self._drop_last, shuffle=self.shuffle, key=key)
            lack = f"asks for more than the {stop - start} tokens there are: use a shorter one or more text"
        else:
            source = Windows(
                stream.ends,
                first,
                last,
                length,
                packing=self._packing,
                overlong=self._overlong,
                shuffle=self.shuffle,
                key=key,
                where=stream.where,
            )
            lack = f"leaves none of the {last - first} documents a row: use a longer one, or data.overlong=split"
        if source.num_rows < 1:
            raise DataError(f"{stream.folder(first)}: data.seq_length={length} {lack}.")
        return source

    def _block(self, number: int) -> Pieces:
        """Return what the rows of a block of positions are made of; the last two blocks are remembered."""
        if number not in self._blocks:
            while len(self._blocks) > 1:
                del self._blocks[next(iter(self._blocks))]
            positions = np.arange(number * self._block_rows, (number + 1) * self._block_rows)
            if len(self._sources) == 1 and self._quotas[0] == self._sources[0].num_rows:
                self._blocks[number] = self._sources[0].pieces(positions)
            else:
                sources, turns = interleaved(positions, self._quotas)
                self._blocks[number] = gathered(sources, lambda source, at: self._sources[source].pieces(turns[at]))
        return self._blocks[number]

    def _read(self, pieces: Pieces) -> list[Row]:
        """Read rows: their tokens, and as labels the same one place further, but for the last of each piece."""
        stops_P = pieces.starts_P + pieces.lengths_P
        ends_P = np.cumsum(pieces.lengths_P)
        lasts_P = ends_P - 1
        is_new = np.empty(len(stops_P), dtype=bool)  # pieces that lie one after another in the stream are read as one
        is_new[0] = True
        np.not_equal(pieces.starts_P[1:], stops_P[:-1], out=is_new[1:])
        firsts = np.flatnonzero(is_new)
        tokens_T, trained_T = self._stream.read(pieces.starts_P[firsts], stops_P[np.append(firsts[1:], 0) - 1])
        following, their_lasts = stops_P[pieces.goes_on_P], lasts_P[pieces.goes_on_P]
        labels, trained = self._stream.at(following)
        labels_T = np.empty_like(tokens_T)
        labels_T[:-1] = tokens_T[1:]
        labels_T[lasts_P] = 0
        labels_T[their_lasts] = labels
        weights_T = np.ones(len(tokens_T), dtype=np.float32)
        if trained_T is not None:
            weights_T[:-1] = trained_T[1:]
        weights_T[lasts_P] = 0.0
        weights_T[their_lasts] = trained
        if self._pad >= 0:
            weights_T[tokens_T == self._pad] = 0.0
        bounds = pieces.bounds.tolist()
        cuts = np.append(0, ends_P)[pieces.bounds].tolist()
        lengths = pieces.lengths_P.tolist()
        return [
            Row(tokens_T[a:b], labels_T[a:b], weights_T[a:b], tuple(lengths[p:q]))
            for a, b, p, q in zip(cuts, cuts[1:], bounds, bounds[1:], strict=False)
        ]


class _Stream:
    """All shards as one stream of tokens: files one after another, and the ends of all documents.

    The ends are in memory, eight bytes a document.
    """

    def __init__(self, shards: Sequence[Shards]) -> None:
        self._paths = [part.path for part in shards]
        self._documents = np.cumsum([len(part.document_ends) for part in shards])
        self._files: list[np.ndarray] = []
        self._trained: list[np.ndarray | None] = []
        stops, ends, start = [], [], 0
        for part in shards:
            ends.append(part.document_ends + start if start else part.document_ends)
            low = 0
            for file in part.manifest.files:
                high = low + int(file["num_tokens"])
                if high > low:
                    self._files.append(part.tokens(low, high))
                    self._trained.append(part.trained(low, high))
                    stops.append(start + high)
                low = high
            assert low == part.num_tokens, (low, part.num_tokens)
            start += low
        self.ends = np.ascontiguousarray(ends[0] if len(ends) == 1 else np.concatenate(ends))
        self._stops = np.asarray(stops, dtype=np.int64)
        self._starts = np.append(0, self._stops[:-1])
        self._is_masked = any(mask is not None for mask in self._trained)

    def folder(self, document: int) -> Path:
        """Return the folder that a document of the stream is in."""
        return self._paths[int(self._documents.searchsorted(document, side="right"))]

    def where(self, document: int) -> str:
        """Name a document of the stream in an error."""
        folder, number = self.place(document)
        return f"{folder} document {number}"

    def place(self, document: int) -> tuple[str, int]:
        """Return the folder of a document of the stream, and its number there, counted from 1."""
        part = int(self._documents.searchsorted(document, side="right"))
        return str(self._paths[part]), document - (int(self._documents[part - 1]) if part else 0) + 1

    def read(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the tokens of runs [start, stop), one after another, and which are learned (None: all)."""
        files = self._stops.searchsorted(starts, side="right")
        if (stops > self._stops[files]).any():
            ends, files, bounds = cut(starts, stops, self._stops)
            firsts = np.empty_like(ends)
            firsts[1:] = ends[:-1]
            firsts[bounds[:-1]] = starts
            starts, stops = firsts, ends
        highs = np.cumsum(stops - starts)
        tokens = np.empty(highs[-1], dtype=np.int64)
        trained = np.ones(len(tokens), dtype=bool) if self._is_masked else None
        bases = self._starts[files]
        runs = (files, starts - bases, stops - bases, highs - (stops - starts), highs)
        for file, start, stop, low, high in zip(*(run.tolist() for run in runs), strict=True):
            tokens[low:high] = self._files[file][start:stop]
            mask = self._trained[file]
            if trained is not None and mask is not None:
                trained[low:high] = mask[start:stop]
        return tokens, trained

    def is_learned(self, start: int, stop: int, pad: int) -> bool:
        """Whether any of tokens [start, stop) but the first is learned, where none is after the id `pad`."""
        if pad >= 0:
            tokens, trained = self.read(np.array([start]), np.array([stop]))
            after = tokens[:-1] != pad
            return bool((after if trained is None else after & trained[1:]).any())
        start += 1
        while start < stop:
            file = int(self._stops.searchsorted(start, side="right"))
            base, end = int(self._starts[file]), min(stop, int(self._stops[file]))
            mask = self._trained[file]
            if mask is None or mask[start - base : end - base].any():
                return True
            start = end
        return False

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens at these places, as int64, and whether each is learned."""
        tokens, trained = np.empty(len(places), dtype=np.int64), np.ones(len(places), dtype=bool)
        files = self._stops.searchsorted(places, side="right")
        for file in np.unique(files).tolist():
            here = files == file
            tokens[here] = self._files[file][places[here] - self._starts[file]]
            mask = self._trained[file]
            if mask is not None:
                trained[here] = mask[places[here] - self._starts[file]]
        return tokens, trained


def _check(seq_length: int, packing: str, overlong: str, shards: Sequence[Shards]) -> None:
    if seq_length < 1:
        raise ConfigError(f"data.seq_length={seq_length} must be at least 1.")
    for name, value, known in (("packing", packing, PACKINGS), ("overlong", overlong, OVERLONG)):
        if value not in known:
            raise ConfigError(f"data.{name}={value} is none of {', '.join(known)}: choose one of them.")
    if not shards:
        raise DataError("no prepared data was named: give at least one folder.")
    for other in shards[1:]:
        if _vocabulary(other) != _vocabulary(shards[0]):
            raise DataError(
                f"{shards[0].path} and {other.path} were prepared with different tokenizers "
                f"({shards[0].manifest.tokenizer}, {other.manifest.tokenizer}): prepare one of them again."
            )


def _check_weights(weights: Sequence[float], weights_by: str, shards: Sequence[Shards]) -> None:
    if weights_by not in ("tokens", "epochs"):
        raise ConfigError(f"weights are by tokens or by epochs, not by {weights_by!r}: choose one of them.")
    if len(weights) != len(shards):
        raise ConfigError(
            f"{len(weights)} weights were given for {len(shards)} sources: give each source a weight, or none of them."
        )
    for weight, part in zip(weights, shards, strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"{part.path} has the weight {weight}: use a number above 0, or leave the source out.")


def _quotas(sources: Sequence[Concat | Windows], weights: Sequence[float], weights_by: str) -> list[int]:
    """Return how many rows of each source an epoch has."""
    if weights_by == "epochs":
        rows = [weight * source.num_rows for weight, source in zip(weights, sources, strict=True)]
    else:
        whole, total = sum(source.num_tokens for source in sources), math.fsum(weights)
        rows = [
            weight / total * whole * source.num_rows / source.num_tokens
            for weight, source in zip(weights, sources, strict=True)
        ]
    if not sum(rows) <= MOST_MIXED_ROWS:
        raise ConfigError(
            f"these weights make an epoch of {sum(rows):.3g} rows and a mixture holds {MOST_MIXED_ROWS}: use smaller "
            "weights or a longer data.seq_length."
        )
    return [max(1, round(count)) for count in rows]


def packing_of(shards: Sequence[Shards], asked: Packing | Literal["auto"] = "auto") -> Packing:
    """Return how data is packed: as asked for, or under `auto` as what it is asks for.

    MindRecord's rows as records, whole documents where only some tokens are learned, else concatenated.
    """
    if asked != "auto":
        return asked
    if all(source.get("kind") == "mindrecord" for part in shards for source in part.manifest.sources):
        return "records"
    is_partly = any(part.manifest.num_trained < part.num_tokens for part in shards)
    return "bestfit" if is_partly else "concat"


def _vocabulary(shards: Shards) -> tuple[str, int, int]:
    manifest = shards.manifest
    return manifest.tokenizer_sha256, manifest.bos_token_id, manifest.eos_token_id
