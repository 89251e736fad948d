"""Which row comes when: keyed permutations and fixed shares, as arithmetic on the position alone."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

_ROUNDS = 6
MOST_MIXED_ROWS = 2**31 - 1  # twice the square of it still is an int64


def permuted(places: np.ndarray, count: int, *key: int | str) -> np.ndarray:
    """Return where the permutation of range(count) that `key` names sends each of `places`, without a table of it.

    int64 in and out. A Feistel network over the next even number of bits, walked until it lands inside the range
    (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002): at most four steps on average.
    """
    return _walked(places, count, _keys(*key)[:, None])


def _walked(places: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """Permute with the round keys `keys`, uint64 [rounds, 1], or [rounds, places] where each has its own."""
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    found = places.astype(np.uint64)
    outside = np.arange(len(found))
    while len(outside):
        walked = found[outside]
        left, right = walked >> half, walked & mask
        for round_key in keys if keys.shape[1] == 1 else keys[:, outside]:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        walked = left << half | right
        found[outside] = walked
        outside = outside[walked >= count]
    return found.astype(np.int64)


@functools.lru_cache(maxsize=1024)
def _keys(*key: int | str) -> np.ndarray:
    digest = hashlib.sha512(" ".join(map(str, key)).encode()).digest()
    return np.frombuffer(digest, dtype="<u8")[:_ROUNDS].astype(np.uint64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return the finalizer of MurmurHash3 (Appleby): every bit of 64 depends on every other."""
    shift = np.uint64(33)
    values = (values ^ (values >> shift)) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> shift)) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> shift)


def epoch_order(positions: np.ndarray, count: int, *key: int | str) -> np.ndarray:
    """Return which of `count` things stands at each position; each epoch is another order of all of them."""
    epochs, places = np.divmod(positions, count)
    names, at = np.unique(epochs, return_inverse=True)
    keys = np.stack([_keys(*key, epoch) for epoch in names.tolist()], axis=1)
    return _walked(places, count, keys if len(names) == 1 else keys[:, at])


def interleaved(positions: np.ndarray, quotas: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return whose turn each position is, and how many turns that source had before it; both int64.

    Of every sum(quotas) positions source i has exactly quotas[i], and of every prefix its share to within two:
    sources are split in two again and again, no part that is split further above two thirds of the whole, and each
    split rounds to the nearest; so an error is at most ½ + ⅔ · the error above it, and with a last ½ below 2.
    """
    count = sum(quotas)
    assert 0 < count <= MOST_MIXED_ROWS
    epochs, places = np.divmod(positions, count)
    before, after = _turns(places, quotas), _turns(places + 1, quotas)
    sources = np.argmax(after - before, axis=0)
    return sources, before[sources, np.arange(len(places))] + epochs * np.asarray(quotas, dtype=np.int64)[sources]


def _turns(places: np.ndarray, quotas: Sequence[int]) -> np.ndarray:
    """Return int64 [sources, places]: how many of the first `place` positions are each source's."""
    turns = np.zeros((len(quotas), len(places)), dtype=np.int64)
    some = sorted((source for source in range(len(quotas)) if quotas[source]), key=lambda source: -quotas[source])
    parts = [(some, places)]
    while parts:
        sources, places = parts.pop()
        if len(sources) == 1:
            turns[sources[0]] = places
            continue
        whole = sum(quotas[source] for source in sources)
        taken, at = quotas[sources[0]], 1
        while 3 * taken < whole:
            taken += quotas[sources[at]]
            at += 1
        first = (2 * places * taken + whole) // (2 * whole)
        parts += [(sources[:at], first), (sources[at:], places - first)]
    return turns
