"""The learning rate of every update."""

from __future__ import annotations

import math
from collections.abc import Callable

from ostro.sections import Optim


def _warmup_steps(optim: Optim, total_steps: int) -> int:
    return int(total_steps * optim.warmup_ratio)


def _fallen(optim: Optim, step: int, first: int, total_steps: int) -> float:
    """Return the rate on the straight line from the highest, at `first`, to the lowest at the end."""
    done = (step - first) / max(1, total_steps - first)
    return optim.min_learning_rate + (optim.learning_rate - optim.min_learning_rate) * (1 - done)


def _cosine(optim: Optim, step: int, total_steps: int) -> float:
    warmup = _warmup_steps(optim, total_steps)
    done = (step - warmup) / max(1, total_steps - warmup)
    span = optim.learning_rate - optim.min_learning_rate
    return optim.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * done))


def _linear(optim: Optim, step: int, total_steps: int) -> float:
    return _fallen(optim, step, _warmup_steps(optim, total_steps), total_steps)


def _wsd(optim: Optim, step: int, total_steps: int) -> float:
    first = max(_warmup_steps(optim, total_steps), total_steps - math.ceil(total_steps * optim.decay_ratio))
    return optim.learning_rate if step < first else _fallen(optim, step, first, total_steps)


def _constant(optim: Optim, step: int, total_steps: int) -> float:
    return optim.learning_rate


# Rates after warm-up; step counts from 0 at the first update.
SCHEDULES: dict[str, Callable[[Optim, int, int], float]] = {
    "cosine": _cosine,
    "cosine_mindformers": _cosine,
    "linear": _linear,
    "wsd": _wsd,
    "constant": _constant,
}


def learning_rate(optim: Optim, step: int, total_steps: int) -> float:
    """Return the rate of update `step` (from 0) of a run of `total_steps`, or of `optim.total_steps` where that is set.

    Warm-up climbs in `int(total · warmup_ratio)` equal steps, the first of which is not zero. `cosine_mindformers` is
    CosineWithWarmUpLR of MindFormers, whose climb starts one step later: its very first update has rate 0. `wsd` stays
    at its highest until the last `decay_ratio` of the steps, in which it falls linearly (arXiv 2404.06395 §4.2).
    """
    total_steps = optim.total_steps if optim.total_steps > 0 else total_steps
    warmup = _warmup_steps(optim, total_steps)
    if step >= total_steps:
        return optim.learning_rate if optim.schedule == "constant" else optim.min_learning_rate
    if step < warmup:
        climbed = step if optim.schedule == "cosine_mindformers" else step + 1
        return optim.learning_rate * climbed / warmup
    return SCHEDULES[optim.schedule](optim, step, total_steps)
