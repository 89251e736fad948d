"""Steps whose gradient is far larger than usual: which they are, and what they were made of."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ostro import log
from ostro.sections import Optim, Train

FILE = "spikes.jsonl"
# As many norms as are remembered, and as are needed before one is called large.
WINDOW, FEWEST = 128, 16


def limit(recent: Sequence[float], train: Train, optim: Optim) -> float:
    """Return the gradient norm above which a step is skipped: a number, or a factor of the recent ones' median."""
    most = math.inf if optim.skip_grad_norm is None else optim.skip_grad_norm
    if train.skip_spikes is None or len(recent) < FEWEST:
        return most
    return min(most, train.skip_spikes * statistics.median(recent))


def remembered(recent: Sequence[float], norm: float) -> list[float]:
    """Return the recent norms with another, spikes included: where all are large from now on none is a spike."""
    return [*recent, norm][-WINDOW:]


def note(run_dir: Path, row: Mapping[str, Any]) -> None:
    """Say that a step was skipped, and write it down with the documents it was made of."""
    if log.is_main_rank():
        with (run_dir / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    log.say(
        f"step {row['step']}: the gradient's norm is {row['grad_norm']:.4g}, more than {row['limit']:.4g}; nothing was "
        f"updated, and {run_dir / FILE} names the documents",
        style="yellow",
    )
