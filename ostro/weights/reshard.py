"""Tensors cut into boxes: which part of the whole a shard is, and any slice of the whole out of its shards."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from ostro.weights.store import Shape


@dataclasses.dataclass(frozen=True)
class Box:
    """A block of a tensor: where it starts and how large it is, along every dim."""

    offsets: Shape
    sizes: Shape

    @property
    def num_elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def where(self) -> tuple[slice, ...]:
        """The slices that cut it out of the whole."""
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.sizes, strict=True))

    def overlap(self, other: Box) -> Box | None:
        """Return the block both share, in the whole's coordinates; None if there is none."""
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = tuple(min(a + m, b + n) for a, m, b, n in zip(*self._pairs(other), strict=True))
        sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return Box(starts, sizes) if all(size > 0 for size in sizes) else None

    def within(self, outer: Box) -> Box:
        """Return the same block in the coordinates of `outer`, which holds it."""
        return Box(tuple(a - b for a, b in zip(self.offsets, outer.offsets, strict=True)), self.sizes)

    def _pairs(self, other: Box) -> tuple[Shape, Shape, Shape, Shape]:
        return self.offsets, self.sizes, other.offsets, other.sizes


def whole(shape: Shape) -> Box:
    """Return the box that is all of a tensor."""
    return Box((0,) * len(shape), shape)


def is_covered(shape: Shape, boxes: Sequence[Box]) -> bool:
    """Whether boxes that are equal or apart from each other make up the whole tensor."""
    return sum(box.num_elements for box in set(boxes)) == math.prod(shape)
