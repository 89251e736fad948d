"""MindSpore's strategy files: how a run cut each parameter over the ranks of a pipeline stage.

Protobuf (`ParallelStrategyMap`, mindspore/train/node_strategy.proto) or, with the suffix .json, its twin in JSON. A run
with pipeline stages leaves one file a stage, or `merge_pipeline_strategys` made one of them all, where every name has
its stage before it: "0-model.tok_embeddings.embedding_weight". Stages count from 0.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ostro.errors import WeightsError
from ostro.weights import wire
from ostro.weights.reshard import Box
from ostro.weights.store import Shape

_NO_AXIS = -1
_ALL_REPEATS = -1
_MERGED_NAME = re.compile(r"([0-9]{1,6})-(.+)", re.DOTALL)
_DAMAGED = "the file is damaged or is not a MindSpore strategy file; take it from the run again"


@dataclasses.dataclass(frozen=True)
class TensorLayout:
    """How one parameter is cut over the ranks of a stage.

    `dev_matrix` are the sizes of the device axes, the slowest first: a rank within the stage is its row-major
    coordinates. `tensor_map` has, for each dim of the tensor, the axes that cut it, major to minor, counted from the
    last axis as 0; () is a dim that is not cut. With `opt_size` ≠ 0 the optimizer's sharding cuts dim 0 once more into
    that many parts, among ranks that would hold the same: along the axes that cut nothing, the last one first, until
    there are as many parts (-1: along all of them). `opt_step` is then the distance between neighbours.

    Raises WeightsError for what contradicts itself. Rules: mindspore/parallel/_tensor.py.
    """

    dev_matrix: Shape
    tensor_map: tuple[Shape, ...]
    opt_step: int
    opt_size: int

    def __post_init__(self) -> None:
        axes = [axis for dim in self.tensor_map for axis in dim]
        if any(size < 1 for size in self.dev_matrix):
            raise WeightsError(f"its dev_matrix {list(self.dev_matrix)} has an axis without devices")
        if any(not 0 <= axis < len(self.dev_matrix) for axis in axes):
            raise WeightsError(f"its tensor_map names an axis that its dev_matrix {list(self.dev_matrix)} lacks")
        cutting = [axis for axis in axes if self._axis_size(axis) > 1]
        if len(set(cutting)) != len(cutting):
            raise WeightsError(f"its tensor_map {_listed(self.tensor_map)} cuts twice along one axis")
        self._opt_axes()

    @property
    def num_ranks(self) -> int:
        """The ranks of the stage."""
        return math.prod(self.dev_matrix)

    def box(self, rank: int, local_shape: Shape) -> Box:
        """Return the part of the whole tensor that a rank of the stage holds in a tensor of `local_shape`."""
        self._check_dims(local_shape)
        place = [self._place(rank, [(axis, self._axis_size(axis)) for axis in dim]) for dim in self._dims(local_shape)]
        opt_axes = self._opt_axes()
        if opt_axes:
            place[0] = place[0] * math.prod(size for _, size in opt_axes) + self._place(rank, opt_axes)
        return Box(tuple(at * size for at, size in zip(place, local_shape, strict=True)), local_shape)

    def whole_shape(self, local_shape: Shape) -> Shape:
        """Return the shape of the tensor that ranks with `local_shape` hold together."""
        return tuple(size * parts for size, parts in zip(local_shape, self._splits(local_shape), strict=True))

    def local_shape(self, whole_shape: Shape) -> Shape:
        """Return the shape that each rank holds of a tensor; WeightsError if a dim does not divide."""
        splits = self._splits(whole_shape)
        if any(size % parts for size, parts in zip(whole_shape, splits, strict=True)):
            raise WeightsError(
                f"the shape {list(whole_shape)} cannot be cut into {list(splits)} equal parts along its dims: "
                "use degrees that divide it."
            )
        return tuple(size // parts for size, parts in zip(whole_shape, splits, strict=True))

    def _splits(self, shape: Shape) -> Shape:
        self._check_dims(shape)
        splits = [math.prod(map(self._axis_size, dim)) for dim in self._dims(shape)]
        for _, size in self._opt_axes():
            splits[0] *= size
        return tuple(splits)

    def _dims(self, shape: Shape) -> tuple[Shape, ...]:
        # A run that only pipelines writes neither devices nor maps.
        return self.tensor_map or ((),) * len(shape)

    def _check_dims(self, shape: Shape) -> None:
        if len(self._dims(shape)) != len(shape) or (not shape and self._opt_axes()):
            raise WeightsError(
                f"a tensor of shape {list(shape)} cannot be cut by the tensor_map {_listed(self.tensor_map)}: "
                "the strategy belongs to another model."
            )

    def _axis_size(self, axis: int) -> int:
        return self.dev_matrix[-1 - axis]

    def _place(self, rank: int, axes: list[tuple[int, int]]) -> int:
        """Return which of the parts along some axes is the rank's; of an axis, `size` parts counted from its minor end."""
        place = 0
        for axis, size in axes:
            stride = math.prod(self.dev_matrix[len(self.dev_matrix) - axis :])
            place = place * size + rank // stride % self._axis_size(axis) % size
        return place

    def _opt_axes(self) -> list[tuple[int, int]]:
        """Return the axes that the optimizer's sharding cuts along, major first, and into how many parts each."""
        if not self.opt_size or not self.opt_step:
            return []
        used = {axis for dim in self.tensor_map for axis in dim}
        free = [axis for axis in range(len(self.dev_matrix)) if axis not in used and self._axis_size(axis) > 1]
        left = math.prod(map(self._axis_size, free)) if self.opt_size == _ALL_REPEATS else self.opt_size
        if left < 1 or self.opt_step < 1:
            raise WeightsError(f"its optimizer shard has size {self.opt_size} and step {self.opt_step}")
        found: list[tuple[int, int]] = []
        asked = left
        for axis in free:
            size = min(left, self._axis_size(axis))
            if left % size or self._axis_size(axis) % size:
                break
            left //= size
            found.insert(0, (axis, size))
            if left == 1:
                break
        if left > 1:
            raise WeightsError(
                f"its optimizer shard of size {asked} does not fit the axes of its dev_matrix "
                f"{list(self.dev_matrix)} that its tensor_map {_listed(self.tensor_map)} leaves free"
            )
        # With several free axes MindSpore does not look at the step, and neither is it one number.
        step = math.prod(self.dev_matrix[len(self.dev_matrix) - free[0] :]) if len(free) == 1 else self.opt_step
        if asked > 1 and step != self.opt_step:
            raise WeightsError(f"its optimizer shard has step {self.opt_step} where its dev_matrix makes it {step}")
        return [(axis, size) for axis, size in found if size > 1]


@dataclasses.dataclass(frozen=True)
class Strategy:
    """The layouts of one pipeline stage, counted from 0, by parameter name.

    Raises WeightsError if there are none or if they are for different numbers of ranks.
    """

    stage: int
    layouts: dict[str, TensorLayout]

    def __post_init__(self) -> None:
        if not self.layouts:
            raise WeightsError(f"stage {self.stage} lists no parameter")
        first: tuple[str, TensorLayout] | None = None
        for name, layout in self.layouts.items():
            if first is None and layout.dev_matrix:
                first = name, layout
            if first is not None and layout.dev_matrix and layout.num_ranks != first[1].num_ranks:
                raise WeightsError(
                    f"stage {self.stage} has {first[0]} on {first[1].num_ranks} ranks and {name} on {layout.num_ranks}"
                )

    @property
    def num_ranks(self) -> int:
        """The ranks of the stage."""
        return max(layout.num_ranks for layout in self.layouts.values())


def read_strategies(path: Path) -> dict[int, Strategy]:
    """Return the strategy of every stage, by stage, from a file of one stage, a merged one, or a folder.

    Of a folder all .ckpt or all .json files count, one a stage or one a rank, a merged file among them too: those of
    one stage must agree, and the stages must be 0, 1, … without a gap. A lone file gives the stages that it has.

    Raises WeightsError for what is unsound, for uneven cuts, for group-info files, for files that disagree.
    """
    if not path.is_dir():
        return _read_file(path, _read_bytes(path))
    files = _files_of(path)
    found: dict[int, tuple[Path, Strategy]] = {}
    seen: set[bytes] = set()
    for file in files:
        data = _read_bytes(file)
        if data in seen:  # the ranks of a stage write the same
            continue
        seen.add(data)
        for stage, strategy in _read_file(file, data).items():
            other, known = found.setdefault(stage, (file, strategy))
            if known != strategy:
                raise WeightsError(
                    f"{other} and {file} cut stage {stage} differently ({_first_difference(known, strategy)}): "
                    "keep the files of one run."
                )
    if sorted(found) != list(range(len(found))):
        missing = next(stage for stage in range(len(found)) if stage not in found)
        raise WeightsError(
            f"{path} has strategies of the stages {_counted(sorted(found))} and none of stage {missing}: "
            "add the file of a rank of that stage."
        )
    result = {stage: found[stage][1] for stage in sorted(found)}
    _check_equal_ranks(path, result)
    return result


def write_strategy(path: Path, strategy: Strategy, num_stages: int) -> None:
    """Write the file of one stage, of `num_stages`; JSON if the suffix is .json. OSError is the caller's."""
    assert 0 <= strategy.stage < num_stages, (strategy.stage, num_stages)
    _write(path, strategy.stage, [strategy.stage], strategy.layouts)


def write_merged(path: Path, strategies: Mapping[int, Strategy]) -> None:
    """Write one file of all stages, as `merge_pipeline_strategys` makes it; JSON if the suffix is .json.

    OSError is the caller's.
    """
    layouts = {
        f"{stage}-{name}": layout
        for stage, strategy in sorted(strategies.items())
        for name, layout in strategy.layouts.items()
    }
    _write(path, 1, sorted(strategies), layouts)
