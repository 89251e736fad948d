"""Orders and shares: permutations without a table, and every source's turn, from the position alone."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostro.data import order


def permuted_slowly(place: int, count: int, *key: int | str) -> int:
    """The permutation with whole numbers, one place at a time."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for round_key in order._keys(*key).tolist():
            value = right ^ round_key
            for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
                value = (value ^ (value >> 33)) * factor & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((value ^ (value >> 33)) & mask)
        place = left << half | right
        if place < count:
            return place


def permutation(count: int, *key: int | str) -> list[int]:
    return order.permuted(np.arange(count), count, *key).tolist()


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 5))
def test_the_permutation_is_one(count: int, seed: int, epoch: int):
    found = permutation(count, seed, epoch)
    assert sorted(found) == list(range(count))
    assert found[:50] == [permuted_slowly(place, count, seed, epoch) for place in range(min(count, 50))]


@given(st.integers(2**40, 2**60), st.integers(0, 2**60))
def test_the_permutation_of_more_than_there_will_be(count: int, place: int):
    place %= count
    found = order.permuted(np.array([place]), count, 1, 2).tolist()
    assert found == [permuted_slowly(place, count, 1, 2)]
    assert found[0] < count


@pytest.mark.parametrize("count", [2, 3, 10, 100])
def test_the_permutation_sends_a_place_anywhere_alike(count: int):
    draws = 40 * count
    for place in (0, count - 1):
        hits = Counter(order.permuted(np.array([place]), count, seed, 0).item() for seed in range(draws))
        chi = sum((hits[at] - 40) ** 2 / 40 for at in range(count))
        assert chi < count - 1 + 5 * (2 * count) ** 0.5


def test_seeds_and_epochs_give_other_orders():
    orders = [permutation(500, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(one) for one in orders}) == 4
    # Neighbours do not stay neighbours: about one pair in 500 does by chance.
    assert all(sum(abs(a - b) == 1 for a, b in itertools.pairwise(one)) < 12 for one in orders)
    both = order.epoch_order(np.arange(1000), 500, 1).tolist()
    assert both == permutation(500, 1, 0) + permutation(500, 1, 1)


@given(st.lists(st.integers(0, 400), min_size=1, max_size=12).filter(any))
def test_of_every_prefix_each_source_has_its_share(quotas: list[int]):
    count = sum(quotas)
    sources, turns = order.interleaved(np.arange(2 * count), quotas)
    had = [0] * len(quotas)
    for position, (source, turn) in enumerate(zip(sources.tolist(), turns.tolist(), strict=True)):
        assert turn == had[source]
        had[source] += 1
        assert all(abs(had[at] - (position + 1) * quota / count) < 2 for at, quota in enumerate(quotas))
        if (position + 1) % count == 0:
            assert had == [(position + 1) // count * quota for quota in quotas]


def test_shares_at_the_largest_size():
    quotas = [order.MOST_MIXED_ROWS // 3] * 3
    count = sum(quotas)
    positions = np.arange(5 * count - 9, 5 * count)
    sources, turns = order.interleaved(positions, quotas)
    assert sorted(sources.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert turns.max() == 5 * quotas[0] - 1
