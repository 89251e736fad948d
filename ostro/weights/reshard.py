"""Tensors cut into boxes: which part of the whole a shard is, and any slice of the whole out of its shards."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ostro.errors import WeightsError
from ostro.weights.store import Shape, TensorInfo, Where


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


@dataclasses.dataclass(frozen=True)
class Shard:
    """A block of a tensor, and what reads a slice of it."""

    box: Box
    read: Callable[[Where], Tensor]


def is_covered(shape: Shape, boxes: Iterable[Box]) -> bool:
    """Whether boxes, of which any two are equal or apart, make up the whole tensor."""
    return sum(box.num_elements for box in set(boxes)) == math.prod(shape)


def shared(boxes: Iterable[Box]) -> tuple[Box, Box] | None:
    """Return two boxes that have elements in common, or None; swept along dim 0, which is the one most often cut."""
    open_boxes: list[Box] = []
    for box in sorted((box for box in boxes if box.num_elements), key=lambda box: box.offsets):
        open_boxes = [o for o in open_boxes if not o.sizes or o.offsets[0] + o.sizes[0] > box.offsets[0]]
        for other in open_boxes:
            if box.overlap(other) is not None:
                return other, box
        open_boxes.append(box)
    return None


def gather(shape: Shape, dtype: torch.dtype, shards: Sequence[Shard], where: Where = ()) -> Tensor:
    """Return `tensor[where]` out of shards that cover it, any two equal or apart: what one holds is not copied.

    Raises WeightsError where they do not cover it.
    """
    asked, index = _asked(shape, where)
    out: Tensor | None = None
    filled: set[Box] = set()
    for shard in shards:
        common = asked.overlap(shard.box)
        if common is None or common in filled:
            continue
        if common == asked:
            return shard.read(common.within(shard.box).where)[index]
        if out is None:
            out = torch.empty(asked.sizes, dtype=dtype)
        out[common.within(asked).where] = shard.read(common.within(shard.box).where)
        filled.add(common)
    missing = asked.num_elements - sum(box.num_elements for box in filled)
    if missing:
        raise WeightsError(
            f"{missing} of {asked.num_elements} values that were asked for are not here: give a checkpoint, or all "
            "folders of one, that has what this host's ranks hold."
        )
    return torch.empty(asked.sizes, dtype=dtype)[index] if out is None else out[index]


class GatheredFile:
    """Tensors that lie in pieces in many files, as one file. `shards` cover each tensor of `infos`."""

    def __init__(self, path: Path, infos: Mapping[str, TensorInfo], shards: Mapping[str, Sequence[Shard]]) -> None:
        self.path = path
        self.infos = infos
        self._shards = shards

    def tensor(self, name: str, where: Where = ()) -> Tensor:
        """Return a tensor or a slice of it: a view of a file where one file holds it."""
        info = self.infos[name]
        try:
            return gather(info.shape, info.dtype, self._shards[name], where)
        except WeightsError as error:
            raise WeightsError(f"{self.path}, {name}: {error}") from None

    def boxes(self, name: str) -> list[Box]:
        """Return the boxes that the files hold of a tensor."""
        return [shard.box for shard in self._shards[name]]

    def parts(self, name: str, box: Box) -> Iterator[tuple[Box, Tensor]]:
        """Yield what the files hold of a box of a tensor, in the whole's coordinates, each a view of its file."""
        for shard in self._shards[name]:
            common = box.overlap(shard.box)
            if common is not None:
                yield common, shard.read(common.within(shard.box).where)


def _asked(shape: Shape, where: Where) -> tuple[Box, Where]:
    """Return the block that an index touches, and the index to apply to the block."""
    offsets: list[int] = []
    sizes: list[int] = []
    index: list[int | slice] = []
    for dim, size in enumerate(shape):
        at = where[dim] if dim < len(where) else slice(None)
        if isinstance(at, int):
            offsets.append(range(size)[at])
            sizes.append(1)
            index.append(0)
        else:
            picked = range(size)[at]
            assert picked.step > 0
            offsets.append(picked.start if picked else 0)
            sizes.append(picked[-1] + 1 - picked.start if picked else 0)
            index.append(slice(None, None, picked.step))
    return Box(tuple(offsets), tuple(sizes)), tuple(index)
