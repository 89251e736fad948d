"""Rank arithmetic: degrees of parallelism, whether they fit a model, and which part of a parameter is whose.

Pure Python: the planner and the converter ask here as well as the ranks of a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ostro.errors import LayoutError, nearest

D = TypeVar("D")

_ALIASES = {"mp": "tp"}  # MindSpore's word


def parse(text: str, degrees: type[D]) -> D:
    """Return degrees (a dataclass of whole numbers) from a text like `dp=8,ep=8,pp=2`; the others are their defaults.

    MindSpore's `mp` is taken for `tp`. Raises LayoutError for anything else.
    """
    assert dataclasses.is_dataclass(degrees)
    known = [field.name for field in dataclasses.fields(degrees)]
    values: dict[str, Any] = {}
    for part in text.replace(" ", "").split(","):
        name, _, number = part.partition("=")
        name = _ALIASES.get(name, name)
        if name not in known:
            raise LayoutError(
                f"layout {text!r}: {name!r} is no degree here; known: {', '.join(known)}.{nearest(name, known)}"
            )
        if not (number.isascii() and number.isdigit()) or int(number) < 1 or name in values:
            raise LayoutError(f"layout {text!r}: {part!r} must be one name=number of at least 1, as in dp=8,ep=8,pp=2.")
        values[name] = int(number)
    return degrees(**values)


def require_divides(degrees: Mapping[str, int], sizes: Mapping[str, tuple[str, int]]) -> None:
    """Raise LayoutError unless each named degree divides the (setting, size) it cuts, saying which would."""
    for name, (setting, size) in sizes.items():
        degree = degrees[name]
        if size % degree:
            fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0 and n <= 64)
            raise LayoutError(f"{name}={degree} does not divide {setting}={size}: use {name} {fitting}.")


def host_ranks(num_ranks: int, host: int, num_hosts: int) -> range:
    """Return the ranks of a host, counted from 0, where all hosts have equally many."""
    if not 0 <= host < num_hosts:
        raise LayoutError(f"host {host}/{num_hosts}: hosts are counted from 0 to {num_hosts - 1}.")
    if num_ranks % num_hosts:
        raise LayoutError(
            f"{num_ranks} ranks cannot be shared evenly by {num_hosts} hosts: use a number that divides them."
        )
    each = num_ranks // num_hosts
    return range(host * each, (host + 1) * each)


def stage_of(layer: int, num_layers: int, num_stages: int) -> int:
    """Return the pipeline stage of a layer, where all stages have equally many."""
    return layer * num_stages // num_layers
