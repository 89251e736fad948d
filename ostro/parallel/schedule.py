"""In which order a rank of a pipeline computes: schedules as plain lists, without a tensor in sight.

A stage is a run of layers; with `chunks` > 1 stages lie round and round over the ranks: stage s is rank s % pp's chunk
s // pp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from ostro.errors import LayoutError


class Action(NamedTuple):
    """One piece of work: forward, backward (of inputs and weights, unless weights come later) or weights of a chunk."""

    kind: Literal["forward", "backward", "weights"]
    chunk: int
    micro: int


def one_forward_one_backward(pp: int, rank: int, chunks: int, num_micro: int) -> list[Action]:
    """1F1B (PipeDream-Flush, arXiv 2006.09503): at most pp − rank micro-batches are in flight."""
    _require_one_chunk("1f1b", chunks)
    ahead = min(pp - 1 - rank, num_micro)
    actions = [Action("forward", 0, micro) for micro in range(ahead)]
    for micro in range(num_micro):
        if micro + ahead < num_micro:
            actions.append(Action("forward", 0, micro + ahead))
        actions.append(Action("backward", 0, micro))
    return actions


def interleaved(pp: int, rank: int, chunks: int, num_micro: int) -> list[Action]:
    """Interleaved 1F1B (arXiv 2104.04473 §2.2): the bubble is `chunks` times smaller, micro-batches go pp at a time."""
    if num_micro % pp:
        raise LayoutError(
            f"parallel.schedule=interleaved takes micro-batches pp={pp} at a time and there are {num_micro}: use a "
            f"multiple of {pp} (train.global_batch_sequences), or 1f1b."
        )
    total = num_micro * chunks

    def piece(index: int) -> tuple[int, int]:
        group, within = divmod(index, pp * chunks)
        return within // pp, group * pp + within % pp

    ahead = min((pp - rank - 1) * 2 + (chunks - 1) * pp, total)
    actions = [Action("forward", *piece(index)) for index in range(ahead)]
    for index in range(total):
        if index + ahead < total:
            actions.append(Action("forward", *piece(index + ahead)))
        chunk, micro = piece(index)
        actions.append(Action("backward", chunks - 1 - chunk, micro))
    return actions


def zero_bubble(pp: int, rank: int, chunks: int, num_micro: int) -> list[Action]:
    """ZB-H1 (arXiv 2401.10241 §2.2): weights' gradients wait, `rank` micro-batches at most, to fill the bubble.

    Inputs' gradients leave as soon as they are there; activations in flight are no more than 1F1B's on the first rank.
    """
    _require_one_chunk("zero_bubble", chunks)
    actions, waiting = [], 0
    for action in one_forward_one_backward(pp, rank, chunks, num_micro):
        actions.append(action)
        if action.kind == "backward":
            waiting += 1
            if waiting > rank:
                actions.append(Action("weights", 0, action.micro - waiting + 1))
                waiting -= 1
    actions += [Action("weights", 0, micro) for micro in range(num_micro - waiting, num_micro)]
    return actions


Schedule = Callable[[int, int, int, int], list[Action]]

# pp, rank, chunks a rank, micro-batches.
SCHEDULES: dict[str, Schedule] = {
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
    "zero_bubble": zero_bubble,
}


def _require_one_chunk(name: str, chunks: int) -> None:
    if chunks != 1:
        raise LayoutError(
            f"parallel.schedule={name} gives each rank one stage and parallel.virtual_stages={chunks}: set it to 1, or "
            "parallel.schedule=interleaved."
        )
