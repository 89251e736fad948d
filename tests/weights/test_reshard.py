"""Boxes, and any slice of a tensor out of the boxes it was cut into."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ostro.weights.reshard import Box, GatheredFile, Shard, gather, is_covered, whole
from ostro.weights.store import TensorInfo

Shape = tuple[int, ...]
Where = tuple[int | slice, ...]


@st.composite
def boxes(draw: st.DrawFn, shape: Shape) -> Box:
    """Draw a box of a tensor, seldom an empty one."""
    ends = [sorted((draw(st.integers(0, size)), draw(st.sampled_from([0, size // 2, size])))) for size in shape]
    return Box(tuple(start for start, _ in ends), tuple(stop - start for start, stop in ends))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    return tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))


@st.composite
def grids(draw: st.DrawFn, shape: Shape) -> list[Box]:
    """Cut a tensor by planes at uneven places, and shuffle what comes out; some are there twice."""
    cuts = []
    for size in shape:
        inner = draw(st.sets(st.integers(1, size - 1), max_size=3)) if size > 1 else set()
        cuts.append(list(itertools.pairwise([0, *sorted(inner), size])))
    found = [Box(tuple(a for a, _ in cell), tuple(b - a for a, b in cell)) for cell in itertools.product(*cuts)]
    found += draw(st.lists(st.sampled_from(found), max_size=3))
    return draw(st.permutations(found))


@st.composite
def indexes(draw: st.DrawFn, shape: Shape) -> Where:
    """Draw an index: of some leading dims; numbers, negative ones, slices with steps, open, empty or beyond the end."""
    where: list[int | slice] = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        bound = st.none() | st.integers(-size - 2, size + 2)
        number = st.integers(-size, size - 1)
        where.append(draw(number | st.builds(slice, bound, bound, st.sampled_from([None, 1, 2, 3]))))
    return tuple(where)


def values(shape: Shape) -> Tensor:
    """Return a tensor with no value twice."""
    return torch.arange(TensorInfo(shape, torch.uint8).num_bytes).view(shape)


def shard(tensor: Tensor, box: Box, reads: list[Box] | None = None) -> Shard:
    """Return a box of a tensor as one that notes that it was read."""
    part = tensor[box.where]

    def read(where: Where) -> Tensor:
        if reads is not None:
            reads.append(box)
        return part[where]

    return Shard(box, read)


def mask(shape: Shape, box: Box | None) -> Tensor:
    held = torch.zeros(shape, dtype=torch.bool)
    if box is not None:
        held[box.where] = True
    return held


@given(st.data())
def test_an_overlap_is_what_both_hold(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    a, b = data.draw(boxes(shape)), data.draw(boxes(shape))
    common = a.overlap(b)
    assert common == b.overlap(a)
    both = mask(shape, a) & mask(shape, b)
    assert torch.equal(mask(shape, common), both)
    assert (common is None) == (not both.any())
    assert int(both.sum()) == (common.num_elements if common else 0)


@given(st.data())
def test_a_box_within_another_cuts_the_same_out_of_it(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    outer = data.draw(boxes(shape))
    found = data.draw(boxes(outer.sizes))
    inner = Box(tuple(a + b for a, b in zip(outer.offsets, found.offsets, strict=True)), found.sizes)
    assert inner.within(outer) == found
    tensor = values(shape)
    assert torch.equal(tensor[outer.where][inner.within(outer).where], tensor[inner.where])
    assert inner.within(whole(shape)) == inner
    assert inner.within(inner) == whole(inner.sizes)


def test_boxes_that_touch_share_nothing() -> None:
    assert Box((0, 0), (2, 3)).overlap(Box((2, 0), (2, 3))) is None
    assert Box((1, 1), (0, 2)).overlap(Box((0, 0), (3, 3))) is None
    assert Box((0, 0), (2, 3)).overlap(Box((1, 2), (4, 4))) == Box((1, 2), (1, 1))
    assert Box((), ()).overlap(Box((), ())) == Box((), ())


@settings(max_examples=150)
@given(st.data())
def test_gathering_equals_indexing_the_whole(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    tensor = values(shape)
    shards = [shard(tensor, box) for box in data.draw(grids(shape))]
    where = data.draw(indexes(shape))
    found = gather(shape, tensor.dtype, shards, where)
    assert found.shape == tensor[where].shape
    assert torch.equal(found, tensor[where])


@given(st.data())
def test_only_boxes_that_are_asked_for_are_read(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    tensor, reads = values(shape), []
    grid = data.draw(grids(shape))
    where = tuple(data.draw(st.integers(0, size - 1)) for size in shape[:-1])
    gather(shape, tensor.dtype, [shard(tensor, box, reads) for box in grid], where)
    for box in reads:
        assert all(start <= at < start + n for at, start, n in zip(where, box.offsets, box.sizes, strict=False))
    assert reads


def test_a_scalar() -> None:
    tensor = torch.tensor(5.0)
    assert gather((), torch.float32, [shard(tensor, whole(()))]).item() == 5
    assert gather((), torch.float32, [shard(tensor, whole(()))], ()).shape == ()


@pytest.mark.parametrize("where", [(), (1,), (slice(0, 2), 3), (-1, slice(1, 7, 3)), (slice(None), slice(2, 4))])
def test_what_one_box_holds_is_a_view_of_it(where: Where) -> None:
    tensor = values((4, 9)).float()
    for boxes_of in ([whole((4, 9))], [Box((0, 0), (4, 9)), Box((0, 0), (4, 9))]):
        found = gather((4, 9), torch.float32, [shard(tensor, box) for box in boxes_of], where)
        assert found.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        assert torch.equal(found, tensor[where])


def test_a_part_of_one_of_several_boxes_is_a_view_and_across_two_a_copy() -> None:
    tensor = values((4, 9)).float()
    shards = [shard(tensor, Box((0, 0), (3, 9))), shard(tensor, Box((3, 0), (1, 9)))]
    storage = tensor.untyped_storage().data_ptr()
    assert gather((4, 9), torch.float32, shards, (slice(1, 3),)).untyped_storage().data_ptr() == storage
    assert gather((4, 9), torch.float32, shards, (-1,)).untyped_storage().data_ptr() == storage
    both = gather((4, 9), torch.float32, shards, (slice(2, 4),))
    assert both.untyped_storage().data_ptr() != storage
    assert torch.equal(both, tensor[2:4])


def test_a_copy_has_the_size_of_what_is_asked_for() -> None:
    tensor = values((64, 8)).float()
    shards = [shard(tensor, Box((start, 0), (1, 8))) for start in range(64)]
    found = gather((64, 8), torch.float32, shards, (slice(30, 33),))
    assert found.untyped_storage().nbytes() == 3 * 8 * 4


@given(st.data())
def test_a_grid_covers_and_one_without_a_cell_does_not(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    grid = data.draw(grids(shape))
    assert is_covered(shape, grid)
    missing = data.draw(st.sampled_from(grid))
    assert not is_covered(shape, [box for box in grid if box != missing])


def test_a_tensor_without_elements_is_covered_by_none() -> None:
    assert is_covered((0, 3), [])
    assert not is_covered((), [])
    assert is_covered((), [Box((), ())])


def test_a_gathered_file_gives_its_tensors_in_their_dtype(tmp_path: Path) -> None:
    tensors = {"a": values((5, 3)).bfloat16(), "b": values((4,)).half()}
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    cut = {
        "a": [shard(tensors["a"], Box((0, 0), (5, 2))), shard(tensors["a"], Box((0, 2), (5, 1)))],
        "b": [shard(tensors["b"], Box((0,), (1,))), shard(tensors["b"], Box((1,), (3,)))],
    }
    file = GatheredFile(tmp_path, infos, cut)
    assert (file.path, file.infos) == (tmp_path, infos)
    for name, tensor in tensors.items():
        assert file.tensor(name).dtype == tensor.dtype
        assert torch.equal(file.tensor(name), tensor)
    assert torch.equal(file.tensor("a", (slice(1, 4), -1)), tensors["a"][1:4, -1])


def test_a_box_is_a_value() -> None:
    assert {Box((0,), (2,)), Box((0,), (2,))} == {Box((0,), (2,))}
    with pytest.raises(dataclasses.FrozenInstanceError):
        Box((0,), (2,)).sizes = (3,)  # pyright: ignore[reportAttributeAccessIssue]
