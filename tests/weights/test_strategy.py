"""MindSpore's strategy files: against cuts that MindSpore made, against a slow cutter, and against damage."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ostro.errors import WeightsError
from ostro.weights.ckpt_file import CkptFile
from ostro.weights.reshard import Box
from ostro.weights.store import same_bits
from ostro.weights.strategy import Strategy, TensorLayout, read_strategies, write_merged, write_strategy

WQ = TensorLayout((4, 2), ((0,), ()), 2, 2)
NORM = TensorLayout((4, 2), ((),), 0, 0)
EXPERTS = TensorLayout((2, 2, 2), ((1,), (0,), ()), 4, -1)
TWO_AXES = TensorLayout((2, 4), ((1, 0),), 0, 0)
STAGES = {
    0: Strategy(0, {"embedding": WQ, "3-norm": NORM, "a-b-c": EXPERTS, "名": TWO_AXES}),
    1: Strategy(1, {"norm": NORM}),
}


# What MindSpore wrote, or cut.


@pytest.fixture(scope="module")
def distributed(shared: Path) -> Path:
    return shared / "golden" / "mindformers" / "distributed"


def test_the_boxes_are_the_slices_that_the_ranks_hold(distributed: Path) -> None:
    strategies = read_strategies(distributed / "strategy")
    assert {stage: strategy.num_ranks for stage, strategy in strategies.items()} == {0: 8, 1: 8}
    model = CkptFile(distributed.parent / "model.ckpt")
    assert {name for strategy in strategies.values() for name in strategy.layouts} == set(model.infos)
    count = 0
    for rank in range(16):
        file = CkptFile(next((distributed / "checkpoint" / f"rank_{rank}").glob("*.ckpt")))
        for name, layout in strategies[rank // 8].layouts.items():
            held = file.tensor(name)
            box = layout.box(rank % 8, tuple(held.shape))
            assert same_bits(model.tensor(name, box.where).contiguous(), held), (rank, name)
            assert layout.whole_shape(tuple(held.shape)) == model.infos[name].shape
            assert layout.local_shape(model.infos[name].shape) == tuple(held.shape)
            count += layout.opt_size > 1
    assert count > 50  # the optimizer's shards are among them


@pytest.mark.parametrize(("stage", "rank"), [(0, 0), (1, 8)])
def test_writing_repeats_every_byte_of_a_strategy_file(
    distributed: Path, tmp_path: Path, stage: int, rank: int
) -> None:
    source = distributed / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt"
    write_strategy(tmp_path / "x.ckpt", read_strategies(source)[stage], 2)
    assert (tmp_path / "x.ckpt").read_bytes() == source.read_bytes()


# The first of the 8 rows that each rank got from MindSpore 2.10's transform_checkpoints.
FIRST_ROWS = {
    "two axes": (TensorLayout((2, 2), ((1, 0), ()), 0, 0), [0, 2, 4, 6]),
    "two axes, the minor first": (TensorLayout((2, 2), ((0, 1), ()), 0, 0), [0, 4, 2, 6]),
    "half of an axis for the optimizer": (TensorLayout((4, 2), ((), ()), 1, 4), [0, 2, 4, 6, 0, 2, 4, 6]),
    "optimizer around a middle axis": (TensorLayout((2, 2, 2), ((1,), ()), 1, 4), [0, 1, 4, 5, 2, 3, 6, 7]),
    "a part of the same": (TensorLayout((2, 2, 2), ((1,), ()), 1, 2), [0, 2, 4, 6, 0, 2, 4, 6]),
    "two axes and optimizer": (TensorLayout((2, 2, 2), ((1, 0), ()), 4, 2), [0, 2, 4, 6, 1, 3, 5, 7]),
    "optimizer over all repeats": (TensorLayout((2, 2, 2), ((0,), ()), 2, -1), [0, 4, 1, 5, 2, 6, 3, 7]),
    "optimizer over some repeats": (TensorLayout((4, 2), ((0,), ()), 2, 2), [0, 4, 2, 6, 0, 4, 2, 6]),
    "optimizer step 2": (TensorLayout((2, 2), ((0,), ()), 2, 2), [0, 4, 2, 6]),
}


@pytest.mark.parametrize("what", FIRST_ROWS)
def test_cuts_as_mindspore_made_them(what: str) -> None:
    layout, rows = FIRST_ROWS[what]
    boxes = [layout.box(rank, layout.local_shape((8, 3))) for rank in range(layout.num_ranks)]
    assert [box.offsets for box in boxes] == [(row, 0) for row in rows]


# Any layout, against cutting a tensor up step by step.


@st.composite
def layouts(draw: st.DrawFn) -> TensorLayout:
    dev_matrix = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    axes = draw(st.permutations(range(len(dev_matrix))))
    dims: list[list[int]] = [[] for _ in range(draw(st.integers(1, 3)))]
    for axis in axes:
        where = draw(st.integers(-2, len(dims) - 1))
        if where >= 0:
            dims[where].append(axis)
    free = [a for a in range(len(dev_matrix)) if dev_matrix[-1 - a] > 1 and not any(a in dim for dim in dims)]
    tensor_map = tuple(map(tuple, dims))
    if not free or draw(st.booleans()):
        return TensorLayout(dev_matrix, tensor_map, 0, 0)
    step = math.prod(dev_matrix[len(dev_matrix) - free[0] :])
    size = draw(st.sampled_from([-1, 1, 2, 3, 4, 6, 8]))
    try:
        return TensorLayout(dev_matrix, tensor_map, step, size)
    except WeightsError:
        assume(False)
        raise


def cut(whole: torch.Tensor, layout: TensorLayout, rank: int) -> torch.Tensor:
    """Cut dim by dim and axis by axis, then give the copies their part of dim 0, as the docstring says it."""
    coordinates = list(itertools.product(*map(range, layout.dev_matrix)))
    mine = coordinates[rank]
    last = len(mine) - 1
    piece = whole
    for dim, axes in enumerate(layout.tensor_map):
        for axis in axes:
            piece = piece.chunk(layout.dev_matrix[last - axis], dim)[mine[last - axis]]
    if layout.opt_size == 0:
        return piece
    used = {last - axis for axes in layout.tensor_map for axis in axes}
    # The ranks that hold the same, in the order of their numbers: neighbours get neighbouring parts, and after
    # `size` of them it starts over.
    twins = [r for r, other in enumerate(coordinates) if all(other[i] == mine[i] for i in used)]
    size = len(twins) if layout.opt_size == -1 else layout.opt_size
    return piece.chunk(size, 0)[twins.index(rank) % size]


@given(layout=layouts(), local=st.lists(st.integers(1, 2), min_size=3, max_size=3))
def test_boxes_are_what_cutting_gives_and_cover_the_tensor_evenly(layout: TensorLayout, local: list[int]) -> None:
    local_shape = tuple(local[: len(layout.tensor_map)])
    shape = layout.whole_shape(local_shape)
    assume(math.prod(shape) < 5000)
    assert layout.local_shape(shape) == local_shape
    whole = torch.arange(math.prod(shape)).view(shape)
    held: Counter[Box] = Counter()
    counts = torch.zeros(shape)
    for rank in range(layout.num_ranks):
        box = layout.box(rank, local_shape)
        assert torch.equal(whole[box.where], cut(whole, layout, rank))
        held[box] += 1
        counts[box.where] += 1
    multiplicity = layout.num_ranks * math.prod(local_shape) // math.prod(shape)
    assert set(held.values()) == {multiplicity}
    assert bool((counts == multiplicity).all())


def test_a_run_that_only_pipelines_cuts_nothing() -> None:
    layout = TensorLayout((), (), 0, 0)
    assert layout.num_ranks == 1
    assert layout.box(0, (3, 4)) == Box((0, 0), (3, 4))
    assert layout.whole_shape((3, 4)) == (3, 4)


def test_a_shape_that_does_not_fit_the_layout() -> None:
    with pytest.raises(WeightsError, match=r"shape \[10, 3\] cannot be cut into \[4, 1\] equal parts"):
        WQ.local_shape((10, 3))
    for call in (WQ.whole_shape, WQ.local_shape, lambda shape: WQ.box(0, shape)):
        with pytest.raises(WeightsError, match=r"shape \[8\] cannot be cut by the tensor_map \[0, -1\]"):
            call((8,))
    with pytest.raises(WeightsError, match=r"shape \[\] cannot be cut"):
        TensorLayout((4,), (), 1, 4).whole_shape(())


UNSOUND = {
    "an axis without devices": (((0, 2), ((),), 0, 0), r"the dev_matrix \[0, 2\] has an axis without devices"),
    "an axis that is not there": (((2, 2), ((2,),), 0, 0), r"names an axis that the dev_matrix \[2, 2\] lacks"),
    "endless devices": (((1 << 16, 1 << 16), ((),), 0, 0), "has 2 axes of more devices than there are"),
    "endless axes": (((1,) * 99, ((),), 0, 0), "has 99 axes"),
    "a negative axis": (((2, 2), ((-2,),), 0, 0), "names an axis"),
    "one axis twice": (((2, 2), ((0,), (0,)), 0, 0), r"the tensor_map \[0, 0\] cuts twice along one axis"),
    "one axis twice in a dim": (((2, 2), ((0, 0), ()), 0, 0), r"the tensor_map \[\[0, 0\], -1\] cuts twice"),
    "a negative shard": (((2, 2), ((),), 1, -2), "the optimizer shard has size -2 and step 1"),
    "a negative step": (((2, 2), ((),), -1, 2), "the optimizer shard has size 2 and step -1"),
    "no axis for the shard": (((2, 2), ((1, 0),), 1, 2), "optimizer shard of size 2 does not fit the axes of"),
    "a shard that does not divide": (((4,), ((),), 1, 3), "optimizer shard of size 3 does not fit the axes of"),
    "a shard that is too large": (((2, 2), ((0,),), 2, 4), "optimizer shard of size 4 does not fit the axes of"),
    "another step": (((2, 2), ((0,),), 1, 2), "the optimizer shard has step 1 where the dev_matrix makes it 2"),
}


@pytest.mark.parametrize("what", UNSOUND)
def test_a_layout_that_contradicts_itself(what: str) -> None:
    arguments, sentence = UNSOUND[what]
    with pytest.raises(WeightsError, match=sentence):
        TensorLayout(*arguments)


def test_an_axis_of_one_device_may_stand_anywhere() -> None:
    layout = TensorLayout((4, 1), ((0,), (0, 1)), 0, 0)
    assert layout.box(3, (2, 2)) == Box((0, 6), (2, 2))


def test_layouts_of_one_stage_are_for_the_same_ranks() -> None:
    with pytest.raises(WeightsError, match="stage 0 has a on 8 ranks and b on 4"):
        Strategy(0, {"none": TensorLayout((), (), 0, 0), "a": WQ, "b": TensorLayout((4,), ((),), 0, 0)})
    with pytest.raises(WeightsError, match="stage 3 lists no parameter"):
        Strategy(3, {})


# Files.

FLAT = {stage: Strategy(stage, {n: x for n, x in s.layouts.items() if x != TWO_AXES}) for stage, s in STAGES.items()}


@pytest.mark.parametrize("suffix", ["ckpt", "json"])
def test_what_is_written_is_read_alone_merged_and_from_a_folder(tmp_path: Path, suffix: str) -> None:
    stages = FLAT if suffix == "json" else STAGES
    for stage, strategy in stages.items():
        for rank in range(2):  # one a rank
            write_strategy(tmp_path / f"ckpt_strategy_rank_{8 * stage + rank}.{suffix}", strategy, 2)
        assert read_strategies(tmp_path / f"ckpt_strategy_rank_{8 * stage}.{suffix}") == {stage: strategy}
    assert read_strategies(tmp_path) == stages
    write_merged(tmp_path / f"merged_ckpt_strategy.{suffix}", stages)
    assert read_strategies(tmp_path / f"merged_ckpt_strategy.{suffix}") == stages
    assert list(read_strategies(tmp_path)) == [0, 1]  # the merged one beside them agrees


@given(st.dictionaries(st.text(min_size=1, max_size=9), layouts(), min_size=1, max_size=4))
def test_any_layouts_survive_a_file(tmp_path_factory, found: dict[str, TensorLayout]) -> None:
    one = next(iter(found.values())).num_ranks
    found = {f"w.{name}": layout for name, layout in found.items() if layout.num_ranks == one}
    path = tmp_path_factory.mktemp("strategy") / "x.ckpt"
    write_strategy(path, Strategy(2, found), 3)
    assert read_strategies(path) == {2: Strategy(2, found)}
    write_merged(path, {0: Strategy(0, found), 1: Strategy(1, found)})
    assert read_strategies(path) == {0: Strategy(0, found), 1: Strategy(1, found)}


def test_what_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="a dim cut along several axes, which MindSpore does not read from JSON"):
        write_merged(tmp_path / "x.json", STAGES)
    assert not (tmp_path / "x.json").exists()


def test_files_that_disagree_are_named_both(tmp_path: Path) -> None:
    write_strategy(tmp_path / "a.ckpt", Strategy(0, {"w": WQ, "n": NORM}), 1)
    write_strategy(tmp_path / "b.ckpt", Strategy(0, {"w": NORM, "n": NORM}), 1)
    with pytest.raises(WeightsError, match=r"a\.ckpt and .*b\.ckpt cut stage 0 differently \(first w\)"):
        read_strategies(tmp_path)
    write_merged(tmp_path / "b.ckpt", {0: Strategy(0, {"w": WQ, "n": NORM, "more": NORM})})  # of another run
    with pytest.raises(WeightsError, match=r"cut stage 0 differently \(first more\)"):
        read_strategies(tmp_path)


def test_folders_that_are_not_one_run(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no strategy file"):
        read_strategies(tmp_path)
    with pytest.raises(WeightsError, match="cannot be read"):
        read_strategies(tmp_path / "absent.ckpt")
    write_strategy(tmp_path / "a.ckpt", STAGES[1], 2)
    with pytest.raises(WeightsError, match="has strategies of stages up to 1, and none of stage 0"):
        read_strategies(tmp_path)
    write_strategy(tmp_path / "b.ckpt", Strategy(0, {"w": TensorLayout((4,), ((),), 0, 0)}), 2)
    with pytest.raises(WeightsError, match="has 4 ranks in stage 0 and 8 in stage 1"):
        read_strategies(tmp_path)
    write_strategy(tmp_path / "b.json", STAGES[1], 2)
    with pytest.raises(WeightsError, match=r"holds a\.ckpt and b\.json: keep either"):
        read_strategies(tmp_path)


# Damage. Bytes by hand, so that the tests do not lean on the code they test.


def field(number: int, content: bytes) -> bytes:
    assert len(content) < 128
    return bytes((number * 8 + 2, len(content))) + content


MINUS_ONE = b"\xff" * 9 + b"\x01"
OPERATOR = field(2, field(1, b"op") + field(2, b"\x08\x00" + field(2, b"\x08\x01")))
NUMBERS = b"\x28\x00\x30\x00\x38\x00"
DEV, MAP = field(1, b"\x08\x04\x08\x02"), field(2, b"\x08\x00\x08" + MINUS_ONE)


def item(layout: bytes, name: bytes = b"w") -> bytes:
    return field(3, field(1, name) + field(2, layout))


def strategy_of(layout: bytes, operator: bytes = OPERATOR) -> bytes:
    return b"\x08\x00" + operator + item(layout)


CUT = TensorLayout((4, 2), ((0,), ()), 0, 0)
SOUND = {
    "as MindSpore writes it": DEV + MAP + field(3, b"") + field(4, b"") + NUMBERS,
    "without the empty messages": DEV + MAP + NUMBERS,
    "packed": field(1, field(1, b"\x04\x02")) + field(2, field(1, b"\x00" + MINUS_ONE)) + NUMBERS,
    "in another order": NUMBERS + MAP + b"\x48\x07" + DEV,
    "-1 in 32 bits": DEV + field(2, b"\x08\x00\x08\xff\xff\xff\xff\x0f") + NUMBERS,
    "a map a dim": DEV + field(2, b"\x08\x00") + field(2, b"\x08" + MINUS_ONE) + NUMBERS,
}


@pytest.mark.parametrize("what", SOUND)
def test_layouts_in_other_bytes(tmp_path: Path, what: str) -> None:
    (tmp_path / "x.ckpt").write_bytes(strategy_of(SOUND[what]))
    assert read_strategies(tmp_path / "x.ckpt") == {0: Strategy(0, {"w": CUT})}


UNEVEN = "cuts w into unequal parts .* which Ostro cannot join: transform the checkpoint to a whole one in MindSpore"
LACKS = "w lacks a sound dev_matrix, tensor_map, field or opt_weight_shard_step or _size"
DAMAGED = {
    "empty": (b"", "lists no parameter's layout"),
    "no layouts": (b"\x08\x00" + OPERATOR, "lists no parameter's layout"),
    "no operator": (strategy_of(DEV + MAP + NUMBERS, b""), "it lists no operator, which would give its stage"),
    "an operator without a stage": (
        strategy_of(DEV + MAP + NUMBERS, field(2, field(1, b"op") + field(2, b""))),
        "stage",
    ),
    "an operator without more": (
        strategy_of(DEV + MAP + NUMBERS, field(2, field(1, b"op"))),
        "0 fields 2 instead of one",
    ),
    "a group-info file": (
        field(1, field(1, b"g") + field(2, b"\x08\x00")) + field(2, b"\x08\x01"),
        "is a group-info file or a checkpoint of tensors, and neither has",
    ),
    "a checkpoint": (field(1, field(1, b"w") + field(2, b"")), "is a group-info file or a checkpoint"),
    "truncated": (strategy_of(DEV + MAP + NUMBERS)[:-1], r"bytes end 1 too late"),
    "no dev_matrix": (strategy_of(MAP + NUMBERS), LACKS),
    "two of them": (strategy_of(DEV + DEV + MAP + NUMBERS), LACKS),
    "no tensor_map": (strategy_of(DEV + NUMBERS), LACKS),
    "no numbers": (strategy_of(DEV + MAP), LACKS),
    "no step": (strategy_of(DEV + MAP + b"\x28\x00\x38\x00"), LACKS),
    "uneven sizes": (strategy_of(DEV + MAP + field(3, b"\x08\x05") + NUMBERS), UNEVEN),
    "uneven offsets": (strategy_of(DEV + MAP + field(4, b"\x08\x05") + NUMBERS), UNEVEN),
    "a field": (strategy_of(DEV + MAP + b"\x28\x02\x30\x00\x38\x00"), UNEVEN),
    "an unsound layout": (
        strategy_of(field(1, b"\x08\x00") + MAP + NUMBERS),
        r"of w, the dev_matrix \[0\] has an axis",
    ),
    "a negative size": (
        strategy_of(field(1, b"\x08" + MINUS_ONE) + MAP + NUMBERS),
        r"the dev_matrix \[-1\] has an axis",
    ),
    "no name": (b"\x08\x00" + OPERATOR + field(3, field(2, DEV)), "0 fields 1 instead of one"),
    "a name that is no text": (b"\x08\x00" + OPERATOR + item(DEV + MAP + NUMBERS, b"\xff"), "can't decode byte 0xff"),
    "a name twice": (
        strategy_of(DEV + MAP + NUMBERS) + item(DEV + field(2, b"\x08\x00") + NUMBERS),
        "w stands there twice, with different layouts",
    ),
    "a stage too many": (
        strategy_of(DEV + MAP + NUMBERS, field(2, field(2, b"\x08\xff\xff\xff\xff\x07"))),
        "its first operator has no sound stage",
    ),
    "ranks that differ": (
        item(DEV + MAP + NUMBERS, b"0-w") + item(field(1, b"\x08\x02") + MAP + NUMBERS, b"1-w"),
        "has 8 ranks in stage 0 and 2 in stage 1",
    ),
    "a stage that is missing": (
        item(DEV + MAP + NUMBERS, b"1-w"),
        "has strategies of stages up to 1, and none of stage 0",
    ),
    "ranks that differ within a stage": (
        strategy_of(DEV + MAP + NUMBERS) + item(field(1, b"\x08\x02") + MAP + NUMBERS, b"v"),
        "stage 0 has w on 8 ranks and v on 2",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_one_sentence(tmp_path: Path, what: str) -> None:
    content, sentence = DAMAGED[what]
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(WeightsError, match=sentence) as caught:
        read_strategies(tmp_path / "x.ckpt")
    assert str(tmp_path / "x.ckpt") in str(caught.value)


def json_of(**changes: object) -> dict:
    layout = {"dev_matrix": [4, 2], "tensor_map": [0, -1], "param_split_shape": [], "indices_offset": [], "field": 0}
    layout |= {"opt_weight_shard_step": 0, "opt_weight_shard_size": 0} | changes
    return {
        "current_stage": 1,
        "parallel_strategy_item": {"op": {"stage": 0}},
        "parallel_layout_item": {"w": {key: value for key, value in layout.items() if value is not None}},
    }


DAMAGED_JSON = {
    "no JSON": (b"{", "it is not sound JSON"),
    "not UTF-8": (b'{"\xff": 1}', "it is not sound JSON"),
    "nested too deep": (b"[" * 100_000, "it is not sound JSON"),
    "a list": ([], "parallel_strategy_item is not a JSON object in it"),
    "nothing": ({}, "lists no parameter's layout"),
    "a name twice": (b'{"a": 1, "a": 2}', "a name stands there twice"),
    "no operator": (json_of() | {"parallel_strategy_item": {}}, "it lists no operator"),
    "no stage": (json_of() | {"parallel_strategy_item": {"op": {}}}, "its first operator has no sound stage"),
    "a stage that is a word": (json_of() | {"parallel_strategy_item": {"op": {"stage": "0"}}}, "no sound stage"),
    "an operator that is a number": (
        json_of() | {"parallel_strategy_item": {"op": 1}},
        "op is not a JSON object in it",
    ),
    "a layout that is a list": (json_of() | {"parallel_layout_item": {"w": []}}, "w is not a JSON object in it"),
    "no map": (json_of(tensor_map=None), LACKS),
    "a map of words": (json_of(tensor_map=["0"]), "w has no sound tensor_map"),
    "a truth for a number": (json_of(dev_matrix=[True, 2]), LACKS),
    "a broken number": (json_of(opt_weight_shard_size=2.0), LACKS),
    "uneven": (json_of(param_split_shape=[3, 5]), UNEVEN),
    "an unsound layout": (json_of(tensor_map=[5, -1]), "of w, the tensor_map names an axis"),
}


@pytest.mark.parametrize("what", DAMAGED_JSON)
def test_damage_in_json_is_one_sentence(tmp_path: Path, what: str) -> None:
    content, sentence = DAMAGED_JSON[what]
    (tmp_path / "x.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(WeightsError, match=sentence):
        read_strategies(tmp_path / "x.json")


def test_json_as_mindspore_has_it(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(json_of(param_split_shape=None, indices_offset=None)))
    assert read_strategies(tmp_path / "x.json") == {0: Strategy(0, {"w": CUT})}
    (tmp_path / "x.json").write_text(json.dumps(json_of(tensor_map=[[1, 0], -1])))
    assert read_strategies(tmp_path / "x.json")[0].layouts["w"].tensor_map == ((1, 0), ())


@pytest.mark.parametrize("suffix", ["ckpt", "json"])
@pytest.mark.parametrize("write", [write_merged, lambda path, stages: write_strategy(path, stages[0], 2)])
def test_any_change_of_bytes_is_an_error_or_another_sound_file(
    tmp_path: Path, suffix: str, write: Callable[..., None]
) -> None:
    path = tmp_path / f"x.{suffix}"
    write(path, FLAT)
    content = path.read_bytes()
    rng = random.Random(suffix)
    outcomes = {True: 0, False: 0}
    for _ in range(250):
        changed = bytearray(content)
        for _ in range(rng.randint(1, 2)):
            at = rng.randrange(len(changed))
            match rng.randrange(4):
                case 0:
                    changed[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, changed[at] ^ (1 << rng.randrange(8))])
                case 1:
                    del changed[at : at + rng.randint(1, 9)]
                case 2:
                    changed[at:at] = changed[at : at + rng.randint(1, 60)]
                case _:
                    changed[at : at + 1] = rng.choice([b"0", b"9", b"-", b"\x08\x02"])
        path.write_bytes(changed)
        try:
            found = read_strategies(path)
        except WeightsError:
            outcomes[False] += 1
            continue
        outcomes[True] += 1
        for strategy in found.values():
            for layout in strategy.layouts.values():
                local = (2,) * len(layout.tensor_map)
                box, whole = layout.box(layout.num_ranks - 1, local), layout.whole_shape(local)
                assert all(offset + 2 <= size for offset, size in zip(box.offsets, whole, strict=True))
    assert min(outcomes.values()) > 10
