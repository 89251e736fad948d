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
from typing import Any, NamedTuple, TypeGuard

from ostro.errors import WeightsError
from ostro.weights import wire
from ostro.weights.mapped import MappedFile
from ostro.weights.reshard import Box
from ostro.weights.store import Shape, printable

_NO_AXIS = -1
_ALL_REPEATS = -1
_MAX_STAGE = 999_999
_MAX_AXES = 32
_OPERATOR_STRATEGY = (1, 1)  # of the one operator a stage that carries its number
_MERGED_NAME = re.compile(r"(0|[1-9][0-9]{0,5})-(.+)", re.DOTALL)
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
            raise WeightsError(f"the dev_matrix {list(self.dev_matrix)} has an axis without devices.")
        if len(self.dev_matrix) > _MAX_AXES or math.prod(self.dev_matrix) >> 31:
            raise WeightsError(f"the dev_matrix has {len(self.dev_matrix)} axes of more devices than there are.")
        if any(not 0 <= axis < len(self.dev_matrix) for axis in axes):
            raise WeightsError(f"the tensor_map names an axis that the dev_matrix {list(self.dev_matrix)} lacks.")
        cutting = [axis for axis in axes if self._axis_size(axis) > 1]
        if len(set(cutting)) != len(cutting):
            raise WeightsError(f"the tensor_map {_listed(self.tensor_map)} cuts twice along one axis.")
        self._opt_axes()

    @property
    def num_ranks(self) -> int:
        """The ranks of the stage."""
        return math.prod(self.dev_matrix)

    def box(self, rank: int, local_shape: Shape) -> Box:
        """Return the part of the whole tensor that a rank of the stage holds in a tensor of `local_shape`."""
        self._check_dims(local_shape)
        assert 0 <= rank < self.num_ranks or not self.dev_matrix, rank
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
        """Return the rank's part along axes, major first, each cut into `size` that its ranks take in turn."""
        place = 0
        for axis, size in axes:
            stride = math.prod(self.dev_matrix[len(self.dev_matrix) - axis :])
            place = place * size + rank // stride % self._axis_size(axis) % size
        return place

    def _opt_axes(self) -> list[tuple[int, int]]:
        """Return the axes that the optimizer's sharding cuts along, major first, and into how many parts each.

        transform_checkpoints of MindSpore 2.10 does the same, except where only the slowest axis is free and the dims
        are not cut in the order of the axes: there it takes the dims' order for the ranks'.
        """
        if not self.opt_size or not self.opt_step:
            return []
        used = {axis for dim in self.tensor_map for axis in dim}
        free = [axis for axis in range(len(self.dev_matrix)) if axis not in used and self._axis_size(axis) > 1]
        left = math.prod(map(self._axis_size, free)) if self.opt_size == _ALL_REPEATS else self.opt_size
        if left < 1 or self.opt_step < 1:
            raise WeightsError(f"the optimizer shard has size {self.opt_size} and step {self.opt_step}.")
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
                f"the optimizer shard of size {asked} does not fit the axes of the dev_matrix "
                f"{list(self.dev_matrix)} that the tensor_map {_listed(self.tensor_map)} leaves free."
            )
        # With several free axes MindSpore does not look at the step, and neither is it one number.
        step = math.prod(self.dev_matrix[len(self.dev_matrix) - free[0] :]) if len(free) == 1 else self.opt_step
        if asked > 1 and step != self.opt_step:
            raise WeightsError(f"the optimizer shard has step {self.opt_step} where the dev_matrix makes it {step}.")
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
            raise WeightsError(f"stage {self.stage} lists no parameter.")
        first: tuple[str, TensorLayout] | None = None
        for name, layout in self.layouts.items():
            if first is None and layout.dev_matrix:
                first = name, layout
            if first is not None and layout.dev_matrix and layout.num_ranks != first[1].num_ranks:
                raise WeightsError(
                    f"stage {self.stage} has {first[0]} on {first[1].num_ranks} ranks and {name} on {layout.num_ranks}."
                )

    @property
    def num_ranks(self) -> int:
        """The ranks of the stage."""
        return max(layout.num_ranks for layout in self.layouts.values())


def read_strategies(path: Path) -> dict[int, Strategy]:
    """Return the strategy of every stage, by stage, from a file of one stage, a merged one, or a folder.

    Of a folder all .ckpt or all .json files count, one a stage or one a rank, a merged file among them too: those of
    one stage must agree. The stages must be 0, 1, … without a gap; only the lone file of one stage may be of any.

    Raises WeightsError for what is unsound, for uneven cuts, for group-info files, for files that disagree.
    """
    if not path.is_dir():
        return _read_file(path, _load(path))
    files = _files_of(path)
    found: dict[int, tuple[Path, Strategy]] = {}
    seen: set[bytes] = set()
    for file in files:
        data = _load(file)
        if data in seen:  # the ranks of a stage write the same
            continue
        seen.add(data)
        for stage, strategy in _read_file(file, data).items():
            other, known = found.setdefault(stage, (file, strategy))
            if known != strategy:
                a, b = known.layouts, strategy.layouts
                name = next(name for name in a | b if a.get(name) != b.get(name))
                raise WeightsError(
                    f"{other} and {file} cut stage {stage} differently (first {name}): keep the files of one run."
                )
    result = {stage: found[stage][1] for stage in sorted(found)}
    _check_stages(path, result)
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


class _Content(NamedTuple):
    """What a file says: the stage of its first operator, None without one, and its layouts under its own names."""

    stage: int | None
    layouts: dict[str, TensorLayout]


def _load(path: Path) -> bytes:
    data = MappedFile(path).data
    # Looked at before a checkpoint of many gigabytes is copied: a strategy has a number in field 1, not a message.
    if path.suffix != ".json" and data[:1] == wire.head(1, 0)[:1]:
        raise WeightsError(
            f"{path} is a group-info file or a checkpoint of tensors, and neither has layouts: "
            "name the strategy file or folder of the run."
        )
    return data[:]


def _files_of(folder: Path) -> list[Path]:
    by_suffix = {s: sorted(p for p in folder.glob(f"*{s}") if p.is_file()) for s in (".ckpt", ".json")}
    protobuf, twins = by_suffix.values()
    if protobuf and twins:
        raise WeightsError(f"{folder} holds {protobuf[0].name} and {twins[0].name}: keep either .ckpt or .json files.")
    if not protobuf and not twins:
        raise WeightsError(f"{folder} holds no strategy file (.ckpt or .json): check the path.")
    return protobuf or twins


def _read_file(path: Path, data: bytes) -> dict[int, Strategy]:
    """Return the strategies of one file by stage; one stage, or all of them if every name has its stage before it."""
    try:
        content = (_parse_json if path.suffix == ".json" else _parse)(data, path)
        matches = [_MERGED_NAME.fullmatch(name) for name in content.layouts]
        if not content.layouts:
            raise WeightsError(
                f"{path} lists no parameter's layout: name the strategy file of another rank of the run."
            )
        if not all(matches):
            if content.stage is None:
                raise ValueError("it lists no operator, which would give its stage")
            return {content.stage: _stage(content.stage, content.layouts)}
        by_stage: dict[int, dict[str, TensorLayout]] = {}
        for match, (name, layout) in zip(matches, content.layouts.items(), strict=True):
            assert match is not None, name
            by_stage.setdefault(int(match[1]), {})[match[2]] = layout
        result = {stage: _stage(stage, by_stage[stage]) for stage in sorted(by_stage)}
    except ValueError as error:
        raise WeightsError(f"{path} cannot be read as a strategy file ({printable(str(error))}): {_DAMAGED}.") from None
    _check_stages(path, result)
    return result


def _stage(stage: int, layouts: dict[str, TensorLayout]) -> Strategy:
    try:
        return Strategy(stage, layouts)
    except WeightsError as error:
        raise ValueError(str(error).rstrip(".")) from None


def _parse(data: bytes, path: Path) -> _Content:
    """Read a `ParallelStrategyMap`."""
    content = _Content(None, {})
    for field in wire.fields(data, 0, len(data)):
        if (field.number, field.wire) == (2, wire.BYTES) and content.stage is None:
            content = content._replace(stage=_operator_stage(data, field))
        elif (field.number, field.wire) == (3, wire.BYTES):
            inner = _messages(data, field)
            _add(content.layouts, wire.text(data, _one(inner, 1)), _raw_layout(data, _one(inner, 2)), path)
    return content


def _operator_stage(data: bytes, item: wire.Field) -> int | None:
    strategys = _one(_messages(data, item), 2)
    stages = [f.value for f in wire.fields(data, strategys.start, strategys.stop) if (f.number, f.wire) == (1, 0)]
    if not stages or stages[-1] > _MAX_STAGE:
        raise ValueError("its first operator has no sound stage")
    return stages[-1]


def _messages(data: bytes, outer: wire.Field) -> dict[int, list[wire.Field]]:
    """Return the fields of a message that hold bytes, by number."""
    found: dict[int, list[wire.Field]] = {}
    for field in wire.fields(data, outer.start, outer.stop):
        if field.wire == wire.BYTES:
            found.setdefault(field.number, []).append(field)
    return found


def _one(found: Mapping[int, list[wire.Field]], number: int) -> wire.Field:
    if len(found.get(number, ())) != 1:
        raise ValueError(f"an item has {len(found.get(number, ()))} fields {number} instead of one")
    return found[number][0]


def _raw_layout(data: bytes, layouts: wire.Field) -> dict[str, Any]:
    """Read a `ParallelLayouts` as the dict that its JSON twin is."""
    lists: dict[int, list[list[int]]] = {1: [], 2: [], 3: [], 4: []}
    scalars: dict[int, int] = {}
    for field in wire.fields(data, layouts.start, layouts.stop):
        if field.number in lists and field.wire == wire.BYTES:
            bits = 32 if field.number < 3 else 64
            inner = (f for f in wire.fields(data, field.start, field.stop) if f.number == 1 and f.wire in (0, 2))
            lists[field.number].append([wire.signed(value, bits) for f in inner for value in wire.varints(data, f)])
        elif field.wire == wire.VARINT:
            scalars[field.number] = wire.signed(field.value, 32)
    dev_matrix, tensor_map = lists[1], lists[2]
    return {
        "dev_matrix": dev_matrix[0] if len(dev_matrix) == 1 else None,
        # One message has an entry a dim; with several, each is a dim, and an empty one only makes them several.
        "tensor_map": [dim for dim in tensor_map if dim]
        if len(tensor_map) > 1
        else tensor_map[0]
        if tensor_map
        else None,
        "param_split_shape": [number for message in lists[3] for number in message],
        "indices_offset": [number for message in lists[4] for number in message],
        "field": scalars.get(5),
        "opt_weight_shard_step": scalars.get(6),
        "opt_weight_shard_size": scalars.get(7),
    }


def _parse_json(data: bytes, path: Path) -> _Content:
    try:
        found = json.loads(data, object_pairs_hook=_refuse_duplicates)
    except (RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"it is not sound JSON, {error}") from None
    operators, items = (_dict_in(found, f"parallel_{kind}_item") for kind in ("strategy", "layout"))
    stage = None
    if operators:
        stage = _dict_in(operators, next(iter(operators))).get("stage")
        if not _is_int(stage) or not 0 <= stage <= _MAX_STAGE:
            raise ValueError("its first operator has no sound stage")
    layouts: dict[str, TensorLayout] = {}
    for name in items:
        _add(layouts, name, _dict_in(items, name), path)
    return _Content(stage, layouts)


def _dict_in(holder: Any, key: str) -> dict[str, Any]:
    found = holder.get(key, {}) if isinstance(holder, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"{key} is not a JSON object in it")
    return found


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands there twice")
    return result


def _add(layouts: dict[str, TensorLayout], name: str, raw: Mapping[str, Any], path: Path) -> None:
    """Add a layout, whichever form it was read from, after checking all of it."""
    dev_matrix, tensor_map = raw.get("dev_matrix"), raw.get("tensor_map")
    field, step, size = (raw.get(key) for key in ("field", "opt_weight_shard_step", "opt_weight_shard_size"))
    if (
        not _are_ints(dev_matrix)
        or not isinstance(tensor_map, list)
        or not (_is_int(field) and _is_int(step) and _is_int(size))
    ):
        raise ValueError(f"{name} lacks a sound dev_matrix, tensor_map, field or opt_weight_shard_step or _size")
    dims = [dim if isinstance(dim, list) else [dim] for dim in tensor_map]
    if not all(map(_are_ints, dims)):
        raise ValueError(f"{name} has no sound tensor_map")
    if raw.get("param_split_shape") or raw.get("indices_offset") or field:
        raise WeightsError(
            f"{path} cuts {name} into unequal parts (param_split_shape, indices_offset or field), which Ostro cannot "
            "join: transform the checkpoint to a whole one in MindSpore first."
        )
    try:
        layout = TensorLayout(
            tuple(dev_matrix), tuple(tuple(axis for axis in dim if axis != _NO_AXIS) for dim in dims), step, size
        )
    except WeightsError as error:
        raise ValueError(f"of {name}, {str(error).rstrip('.')}") from None
    if layouts.setdefault(name, layout) != layout:
        raise ValueError(f"{name} stands there twice, with different layouts")


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_ints(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(map(_is_int, value))


def _check_stages(path: Path, strategies: Mapping[int, Strategy]) -> None:
    for stage in range(len(strategies)):
        if stage not in strategies:
            raise WeightsError(
                f"{path} has strategies of stages up to {max(strategies)}, and none of stage {stage}: "
                "add the file of a rank of that stage."
            )
        first, size = strategies[0].num_ranks, strategies[stage].num_ranks
        if first != size:
            raise WeightsError(
                f"{path} has {first} ranks in stage 0 and {size} in stage {stage}: keep the files of one run."
            )


def _listed(tensor_map: tuple[Shape, ...]) -> str:
    """Return a map as MindSpore's files have it."""
    return str([dim[0] if len(dim) == 1 else list(dim) or _NO_AXIS for dim in tensor_map])


def _write(path: Path, current_stage: int, stages: list[int], layouts: Mapping[str, TensorLayout]) -> None:
    path.write_bytes((_as_json if path.suffix == ".json" else _as_protobuf)(current_stage, stages, layouts))


def _as_protobuf(current_stage: int, stages: list[int], layouts: Mapping[str, TensorLayout]) -> bytes:
    out = [wire.number(1, current_stage)]
    for index, stage in enumerate(stages):
        strategys = wire.number(1, stage) + wire.content(2, wire.numbers(1, _OPERATOR_STRATEGY))
        out.append(wire.content(2, wire.content(1, _operator(index).encode()) + wire.content(2, strategys)))
    for name, layout in layouts.items():
        dims = [dim or (_NO_AXIS,) for dim in layout.tensor_map]
        if all(len(dim) == 1 for dim in dims):
            maps = [tuple(axis for dim in dims for axis in dim)]
        else:  # a single map would read as one with an axis a dim
            maps = [*dims, ()] if len(dims) == 1 else dims
        found = [
            wire.content(1, wire.numbers(1, layout.dev_matrix)),
            *(wire.content(2, wire.numbers(1, axes)) for axes in maps),
            wire.content(3, b""),  # MindSpore asks for the first of these
            wire.content(4, b""),
            wire.number(5, 0),
            wire.number(6, layout.opt_step),
            wire.number(7, layout.opt_size),
        ]
        out.append(wire.content(3, wire.content(1, name.encode()) + wire.content(2, b"".join(found))))
    return b"".join(out)


def _as_json(current_stage: int, stages: list[int], layouts: Mapping[str, TensorLayout]) -> bytes:
    items = {}
    for name, layout in layouts.items():
        if any(len(dim) > 1 for dim in layout.tensor_map):
            raise WeightsError(
                f"{name} has a dim cut along several axes, which MindSpore does not read from JSON: write .ckpt."
            )
        items[name] = {
            "dev_matrix": list(layout.dev_matrix),
            "tensor_map": [dim[0] if dim else _NO_AXIS for dim in layout.tensor_map],
            "param_split_shape": [],
            "indices_offset": [],
            "field": 0,
            "opt_weight_shard_step": layout.opt_step,
            "opt_weight_shard_size": layout.opt_size,
        }
    operators = {
        _operator(index): {"stage": stage, "parallel_strategy": [list(_OPERATOR_STRATEGY)]}
        for index, stage in enumerate(stages)
    }
    whole = {"current_stage": current_stage, "parallel_strategy_item": operators, "parallel_layout_item": items}
    return json.dumps(whole, indent=1).encode()


def _operator(index: int) -> str:
    return f"Default/op{index}"
