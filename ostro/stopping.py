"""Which evaluation was the best so far, and when to stop waiting for a better one."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Evaluations:
    """The lowest loss and its step (None before the first evaluation), and how many evaluations came after it."""

    best_loss: float | None = None
    best_step: int = 0
    since_best: int = 0

    def after(self, loss: float, step: int) -> Evaluations:
        """Return what another evaluation makes of it; an equal loss, or one that is not a number, is no better one."""
        if loss < (math.inf if self.best_loss is None else self.best_loss):
            return Evaluations(loss, step)
        return dataclasses.replace(self, since_best=self.since_best + 1)

    def is_over(self, patience: int) -> bool:
        """Whether `patience` evaluations have brought nothing better; 0 waits for ever."""
        return 0 < patience <= self.since_best
