"""Rows of tokens for training and evaluation: packed, shuffled and dealt out by arithmetic alone.

Nothing is carried from one row to the next. A row is a function of (seed, position), so resuming means asking
for the next step, and any number of ranks see the same rows.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np

from ostro.data.shards import Shards
from ostro.errors import ConfigError, DataError

_ROUNDS = 6


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of L tokens.

    `tokens_L` int64 [L]; `labels_L` int64 [L], the next token; `weights_L` float32 [L], 1 where the next
    token belongs to the same document, else 0 (and the label is 0); `document_lengths`, the pieces of
    documents in this row, whose sum is L.
    """

    tokens_L: np.ndarray
    labels_L: np.ndarray
    weights_L: np.ndarray
    document_lengths: tuple[int, ...]


class Loader:
    """Cuts the token stream of all documents every `seq_length` tokens and serves the rows in shuffled order.

    A document goes on in the next row, as one of its own: within a row each piece stands alone. With
    `drop_last` the tokens that fill no row are left out; without, the last row is short and every token but
    the first of each document is a label exactly once. Raises DataError for too little data or shards of
    different tokenizers.
    """

    def __init__(
        self,
        shards: Sequence[Shards],
        *,
        seq_length: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        if seq_length < 1:
            raise ConfigError(f"data.seq_length={seq_length} must be at least 1.")
        if not shards:
            raise DataError("no prepared data was named: give at least one folder.")
        for other in shards[1:]:
            if _vocabulary(other) != _vocabulary(shards[0]):
                raise DataError(
                    f"{shards[0].path} and {other.path} were prepared with different tokenizers "
                    f"({shards[0].manifest.tokenizer}, {other.manifest.tokenizer}): prepare one of them "
                    "again."
                )
        self.seq_length, self.seed, self.shuffle = seq_length, seed, shuffle
        self.num_tokens = sum(part.num_tokens for part in shards)
        self.num_rows = self.num_tokens // seq_length
        if not drop_last and self.num_tokens % seq_length:
            self.num_rows += 1
        if self.num_rows < 1:
            raise DataError(
                f"data.seq_length={seq_length} asks for more than the {self.num_tokens} tokens there are: "
                "use a shorter one or more text."
            )
        self._shards = tuple(shards)
        self._starts = [0, *itertools.accumulate(part.num_tokens for part in shards)]

    def index(self, position: int) -> int:
        """Return which row of the stream stands at `position`; each epoch is another order of all rows."""
        epoch, place = divmod(position, self.num_rows)
        return permuted(place, self.num_rows, self.seed, epoch) if self.shuffle else place

    def row(self, position: int) -> Row:
        """Return the row at `position`, counted over all epochs."""
        start = self.index(position) * self.seq_length
        stop = min(start + self.seq_length, self.num_tokens)
        length = stop - start
        tokens = np.empty(length + 1, dtype=np.int64)
        tokens[-1] = 0  # the stream's last token has no next one, and a document ends there
        ends = self._read(start, min(stop + 1, self.num_tokens), tokens) - start
        ends = ends[ends <= length]
        labels = tokens[1:].copy()
        weights = np.ones(length, dtype=np.float32)
        labels[ends - 1] = 0
        weights[ends - 1] = 0.0
        bounds = [0, *ends.tolist()]
        if bounds[-1] != length:
            bounds.append(length)
        return Row(tokens[:-1], labels, weights, tuple(b - a for a, b in itertools.pairwise(bounds)))

    def rows(self, step: int, count: int, rank: int = 0, num_ranks: int = 1) -> list[Row]:
        """Return the rows of global batch `step` that belong to `rank`: a contiguous block of its `count`."""
        if count < 1 or num_ranks < 1 or count % num_ranks:
            raise ConfigError(
                f"a global batch of {count} rows does not divide over {num_ranks} data-parallel ranks: "
                f"use a multiple of {num_ranks} for train.global_batch_sequences."
            )
        assert 0 <= rank < num_ranks
        share = count // num_ranks
        first = step * count + rank * share
        return [self.row(position) for position in range(first, first + share)]

    def _read(self, start: int, stop: int, into: np.ndarray) -> np.ndarray:
        """Copy tokens [start, stop) of the whole stream; return the document ends in (start, stop]."""
        ends = []
        for base, part in zip(self._starts, self._shards, strict=False):
            low, high = max(start - base, 0), min(stop - base, part.num_tokens)
            if low >= high:
                continue
            into[base + low - start : base + high - start] = part.tokens(low, high)
            first, last = part.document_ends.searchsorted((low, high), side="right")
            ends.append(part.document_ends[first:last] + base)
        return ends[0] if len(ends) == 1 else np.concatenate(ends)


def permuted(place: int, count: int, seed: int, epoch: int) -> int:
    """Return where a keyed permutation of range(count) sends `place`, without a table of it.

    A Feistel network over the next even number of bits, walked until it lands inside the range (Black and
    Rogaway, Ciphers with Arbitrary Finite Domains, 2002): at most four steps on average.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = _keys(seed, epoch)
    while True:
        left, right = place >> half, place & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        place = left << half | right
        if place < count:
            return place


@functools.lru_cache(maxsize=8)
def _keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.sha512(f"{seed} {epoch}".encode()).digest()
    return tuple(int.from_bytes(digest[8 * at : 8 * at + 8], "little") for at in range(_ROUNDS))


def _mixed(value: int) -> int:
    """Return the finalizer of MurmurHash3 (Appleby): every bit of 64 depends on every other."""
    value = (value ^ (value >> 33)) * 0xFF51AFD7ED558CCD & 0xFFFFFFFFFFFFFFFF
    value = (value ^ (value >> 33)) * 0xC4CEB9FE1A85EC53 & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 33)


def _vocabulary(shards: Shards) -> tuple[str, int, int]:
    manifest = shards.manifest
    return manifest.tokenizer_sha256, manifest.bos_token_id, manifest.eos_token_id
