"""What the loss is multiplied by, so that gradients of fp16 do not vanish: MindFormers' DynamicLossScaleUpdateCell."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class LossScale:
    """The scale, and how many steps it has been since it last changed or an overflow was met."""

    value: float
    since: int = 0

    def after(self, overflowed: bool, window: int) -> LossScale:
        """Return what follows a step: half (1 at least) of it after an overflow, twice after `window` steps."""
        if overflowed:
            return LossScale(max(self.value / 2, 1.0))
        return LossScale(self.value * 2) if self.since + 1 >= window else LossScale(self.value, self.since + 1)
