"""Checkpoints as one process writes and reads them, for the tests that are about what is in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ostro.weights.parts import hold, load_held
from ostro.weights.saver import Saver


def save(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write `step-…` with whole tensors, and raise what keeps it from being written."""
    saver = Saver(folder.parent, keep=1_000_000)
    saver.save(int(folder.name.removeprefix("step-")), hold(tensors), state)
    for saved in saver.finish():
        if saved.error is not None:
            raise saved.error


def load(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fill whole tensors and return the state."""
    return load_held(folder, hold(tensors))
