"""Schedules of pipelines: every piece of work once, in an order that ends, with no more in flight than promised."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from ostro.degrees import Degrees
from ostro.errors import LayoutError
from ostro.parallel.mesh import Mesh
from ostro.parallel.schedule import SCHEDULES, Action

CASES = [
    (name, pp, chunks, num_micro)
    for name in SCHEDULES
    for pp, chunks, num_micro in itertools.product((1, 2, 4), (1, 2, 8), (1, 2, 4, 8, 12))
    if (name == "interleaved" or chunks == 1) and (name != "interleaved" or num_micro % pp == 0)
]


def walked(name: str, pp: int, chunks: int, num_micro: int) -> tuple[list[list[Action]], list[int]]:
    """Walk all ranks' lists as messages allow; return them and the most micro-batches in flight on each rank."""
    lists = [SCHEDULES[name](pp, rank, chunks, num_micro) for rank in range(pp)]
    done: set[tuple[str, int, int]] = set()
    at, flying, most = [0] * pp, [0] * pp, [0] * pp
    while any(at[rank] < len(lists[rank]) for rank in range(pp)):
        moved = False
        for rank in range(pp):
            while at[rank] < len(lists[rank]) and _is_ready(lists[rank][at[rank]], rank, pp, chunks, done):
                kind, chunk, micro = lists[rank][at[rank]]
                done.add((kind, chunk * pp + rank, micro))
                flying[rank] += {"forward": 1, "backward": -1, "weights": 0}[kind]
                most[rank] = max(most[rank], flying[rank])
                at[rank] += 1
                moved = True
        assert moved, "everybody waits"
    return lists, most


def _is_ready(action: Action, rank: int, pp: int, chunks: int, done: set[tuple[str, int, int]]) -> bool:
    kind, stage, micro = action.kind, action.chunk * pp + rank, action.micro
    if kind == "forward":
        return stage == 0 or ("forward", stage - 1, micro) in done
    if kind == "weights":
        return ("backward", stage, micro) in done
    is_last = stage == pp * chunks - 1
    return ("forward", stage, micro) in done and (is_last or ("backward", stage + 1, micro) in done)


@pytest.mark.parametrize(("name", "pp", "chunks", "num_micro"), CASES)
def test_everything_is_done_once_and_nobody_waits_forever(name: str, pp: int, chunks: int, num_micro: int) -> None:
    lists, _ = walked(name, pp, chunks, num_micro)
    kinds = ("forward", "backward", "weights") if name == "zero_bubble" else ("forward", "backward")
    every = sorted(Action(kind, c, m) for kind in kinds for c in range(chunks) for m in range(num_micro))
    assert all(sorted(actions) == every for actions in lists)


@pytest.mark.parametrize(("name", "pp", "chunks", "num_micro"), CASES)
def test_messages_between_two_ranks_come_in_the_order_they_leave(
    name: str, pp: int, chunks: int, num_micro: int
) -> None:
    lists, _ = walked(name, pp, chunks, num_micro)
    for rank, kind in itertools.product(range(pp), ("forward", "backward")):
        ahead = 1 if kind == "forward" else -1
        other = (rank + ahead) % pp

        def carried(where: int, kind: str = kind) -> list[tuple[int, int]]:
            return [(a.chunk * pp + where, a.micro) for a in lists[where] if a.kind == kind]

        left = [(stage + ahead, micro) for stage, micro in carried(rank) if 0 <= stage + ahead < pp * chunks]
        arrived = [one for one in carried(other) if 0 <= one[0] - ahead < pp * chunks]
        assert left == arrived


def test_1f1b_keeps_no_more_than_the_ranks_behind_it() -> None:
    for name in ("1f1b", "zero_bubble"):
        assert walked(name, 4, 1, 12)[1] == [4, 3, 2, 1]
    assert walked("interleaved", 4, 8, 8)[1] == [min(2 * (3 - rank) + 7 * 4 + 1, 64) for rank in range(4)]


def test_weights_wait_for_no_more_micro_batches_than_the_rank() -> None:
    for rank in range(4):
        waiting, most = 0, 0
        for action in SCHEDULES["zero_bubble"](4, rank, 1, 12):
            waiting += {"forward": 0, "backward": 1, "weights": -1}[action.kind]
            most = max(most, waiting)
        assert most == rank + 1


def test_what_a_schedule_cannot_do_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"takes micro-batches pp=4 at a time and there are 6: use a multiple of 4"):
        SCHEDULES["interleaved"](4, 0, 2, 6)
    with pytest.raises(LayoutError, match=r"zero_bubble gives each rank one stage and parallel\.virtual_stages=2"):
        SCHEDULES["zero_bubble"](2, 0, 2, 4)


@pytest.mark.parametrize("pp", range(2, 10))
def test_a_rank_has_a_communicator_for_each_direction_and_neighbour(pp: int) -> None:
    """NCCL works through a communicator in order: were two directions on one, a message could wait for its answer."""
    names: Any = [f"group {i}" for i in range(4 + 2 * (pp % 2))]
    for rank in range(pp):
        mesh = Mesh(Degrees(pp=pp), rank, torch.device("cpu"), edges=names)
        used = [
            mesh.edge(is_forward, source)
            for is_forward, ahead in ((True, 1), (False, -1))
            for source in (rank, (rank - ahead) % pp)  # what it sends, and what it receives
        ]
        assert len(set(used)) == 4
        for is_forward, ahead in ((True, 1), (False, -1)):
            other = Mesh(Degrees(pp=pp), (rank + ahead) % pp, torch.device("cpu"), edges=names)
            assert mesh.edge(is_forward, rank) == other.edge(is_forward, rank)
