"""From pieces to the tensors of files and back: orders, blocks, boxes, and reading one ahead."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import threading
import time
from collections.abc import Iterable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import TINY, Altered, models, random
from torch import Tensor

from ostro.errors import WeightsError
from ostro.model import layout
from ostro.weights import Reader, stored
from ostro.weights.reshard import Box
from ostro.weights.store import Shape, pieces
from ostro.weights.stored import AS_IT_IS, TRANSPOSED, FileTensor, Source, SourceOf, file_tensors, interleaved, streamed

EXPERTS = (layout.W13, layout.W2)
_HEAD_DIM = TINY.head_dim


def stacked(is_transposed: bool) -> SourceOf:
    """Return a map with one (E, F, D) or (E, D, F) stack for each of w1, w3 and w2, and q and k in pairs."""

    def source(parameter: layout.Parameter, stack: tuple[int, ...]) -> Source:
        if not stack:
            is_rotary = parameter.kind in (layout.Q, layout.K)
            return Source(parameter.name, parameter.shape, order=interleaved(_HEAD_DIM) if is_rotary else AS_IT_IS)
        expert, *half = stack
        matrix = parameter.shape[:-3:-1] if is_transposed else parameter.shape[-2:]
        name = f"{parameter.name}{''.join(map(str, half))}"
        order = TRANSPOSED if is_transposed else AS_IT_IS
        return Source(name, (parameter.shape[0], *matrix), (expert,), order=order)

    return source


def in_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Return rows in Meta's order, one row at a time: (0, half), (1, half + 1), … of each head."""
    found = []
    for head in rows.split(head_dim):
        for i in range(head_dim // 2):
            found += [head[i], head[i + head_dim // 2]]
    return torch.stack(found)


def expected(reader: Reader, is_transposed: bool) -> dict[str, Tensor]:
    """Return the tensors of `stacked`, whole, the obvious way."""
    found: dict[str, Tensor] = {}
    for parameter in layout.parameters(reader.model):
        value = reader.read(parameter.name)
        if parameter.kind in (layout.Q, layout.K):
            value = in_pairs(value, _HEAD_DIM)
        halves = {"0": value[:, 0], "1": value[:, 1]} if parameter.kind is layout.W13 else {"": value}
        for half, each in halves.items():
            turned = each.transpose(1, 2) if is_transposed and parameter.kind in EXPERTS else each
            found[parameter.name + half] = turned.contiguous()
    return found


def joined(parts: Iterable[Tensor], shape: Shape) -> Tensor:
    """Return what the parts' bytes make when written one after another."""
    return torch.cat([part.reshape(-1) for part in parts]).view(shape)


# Orders


@given(st.integers(1, 4), st.sampled_from([2, 4, 6]), st.integers(1, 5))
def test_pairs_of_rotary_rows(heads: int, head_dim: int, columns: int) -> None:
    piece = torch.arange(heads * head_dim * columns).view(heads * head_dim, columns)
    order = interleaved(head_dim)
    held = order.save(piece)
    assert torch.equal(held, in_pairs(piece, head_dim))
    assert torch.equal(order.load(held), piece)
    assert torch.equal(order.save(order.load(piece)), piece)
    assert held.shape == piece.shape


def test_transposing_is_a_view_and_its_own_inverse() -> None:
    piece = torch.rand(3, 5)
    assert torch.equal(TRANSPOSED.save(piece), piece.T)
    assert torch.equal(TRANSPOSED.load(TRANSPOSED.save(piece)), piece)
    assert TRANSPOSED.load(piece).data_ptr() == TRANSPOSED.save(piece).data_ptr() == piece.data_ptr()
    assert AS_IT_IS.load(piece) is AS_IT_IS.save(piece) is piece


# Tensors of files


@settings(max_examples=25)
@given(st.data())
@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_files_tensors_are_what_the_pieces_make(is_transposed: bool, data: st.DataObject) -> None:
    reader = random(dataclasses.replace(data.draw(models()), head_dim=_HEAD_DIM))
    tensors = file_tensors(reader, stacked(is_transposed))
    wanted = expected(reader, is_transposed)
    assert list(tensors) == list(wanted)
    for name, tensor in tensors.items():
        assert tensor.info.shape == wanted[name].shape
        assert torch.equal(joined(tensor.parts(), tensor.info.shape), wanted[name]), name


@settings(max_examples=60)
@given(st.data())
@pytest.mark.parametrize("block_bytes", [1, 40, 1 << 20])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_box_of_a_files_tensor_is_a_slice_of_it(is_transposed: bool, block_bytes: int, data: st.DataObject) -> None:
    reader = random(dataclasses.replace(data.draw(models()), head_dim=_HEAD_DIM))
    tensors = file_tensors(reader, stacked(is_transposed))
    name = data.draw(st.sampled_from(list(tensors)))
    whole = expected(reader, is_transposed)[name]
    starts = [data.draw(st.integers(0, size - 1)) for size in whole.shape]
    sizes = [data.draw(st.integers(1, size - start)) for start, size in zip(starts, whole.shape, strict=True)]
    box = Box(tuple(starts), tuple(sizes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "_BLOCK_BYTES", block_bytes)
        parts = list(tensors[name].parts(box))
    assert torch.equal(joined(parts, box.sizes), whole[box.where])


def test_experts_outside_of_a_box_are_not_read() -> None:
    asked: list[object] = []

    def note(name: str, where: object, tensor: Tensor) -> Tensor:
        asked.append(where)
        return tensor

    tensors = file_tensors(Altered(random(), note), stacked(True))
    w2 = next(tensor for name, tensor in tensors.items() if name.endswith("w2"))
    list(w2.parts(Box((1, 0, 0), (1, 10, 16))))
    assert asked == [(1,)]


def test_large_pieces_come_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "_BLOCK_BYTES", 200)  # a row of the embedding has 64 bytes
    embedding = file_tensors(random(), stacked(False))["model.embed_tokens.weight"]
    parts = list(embedding.parts())
    assert [len(part) for part in parts] == [3] * 16
    assert torch.equal(torch.cat(parts), random().read("model.embed_tokens.weight"))
    monkeypatch.setattr(stored, "_BLOCK_BYTES", 10)
    assert [len(part) for part in embedding.parts()] == [1] * 48  # never less than a row


def test_pieces_of_a_stack_below_each_other() -> None:
    def source(parameter: layout.Parameter, stack: tuple[int, ...]) -> Source:
        if not stack:
            return Source(parameter.name, parameter.shape)
        *_, rows, columns = parameter.shape
        num_rows = rows * len(list(pieces(parameter)))
        return Source(parameter.name, (num_rows, columns), stack, split=parameter.shape)

    for name, tensor in file_tensors(random(), source).items():
        value = random().read(name)
        assert torch.equal(joined(tensor.parts(), tensor.info.shape), value.reshape(tensor.info.shape))


# Reading one ahead


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    gc.collect()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def consumed(tensors: dict[str, FileTensor], pause_seconds: float = 0.0) -> dict[str, Tensor]:
    """Take all parts in order; each is copied only after a pause, in which the next one is read."""
    parts = streamed(tensors.values())
    found = {}
    for name, tensor in tensors.items():
        copies = []
        for part in parts(name):
            assert part.is_contiguous()
            if pause_seconds:
                time.sleep(pause_seconds)
            copies.append(part.clone())
        found[name] = joined(copies, tensor.info.shape)
    return found


@pytest.mark.usefixtures("no_thread_is_left")
@pytest.mark.parametrize("block_bytes", [100, 1 << 20])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("pause_seconds", [0.0, 0.002])
def test_a_part_is_good_until_the_next_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, is_transposed: bool, block_bytes: int, pause_seconds: float
) -> None:
    monkeypatch.setattr(stored, "_BLOCK_BYTES", block_bytes)
    wanted = expected(random(), is_transposed)
    found = consumed(file_tensors(random(), stacked(is_transposed)), pause_seconds)
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_what_is_turned_goes_through_two_buffers() -> None:
    tensors = {name: tensor for name, tensor in file_tensors(random(), stacked(True)).items() if ".w13" in name}
    parts = streamed(tensors.values())
    places = [part.data_ptr() for name in tensors for part in parts(name)]
    assert len(places) == 2 * 2 * 3  # layers, halves, experts
    assert len(set(places)) == 2
    assert all(a != b for a, b in itertools.pairwise(places))


def test_what_keeps_its_order_is_not_copied() -> None:
    held = random().read("lm_head.weight")
    reader = Altered(random(), lambda name, where, tensor: held[where])
    tensor = file_tensors(reader, stacked(False))["lm_head.weight"]
    (part,) = streamed([tensor])("lm_head.weight")
    assert part.data_ptr() == held.data_ptr()


def test_boxes_are_streamed() -> None:
    tensors = file_tensors(random(), stacked(True))
    boxes = {name: Box((0,) * len(t.info.shape), (1, *t.info.shape[1:])) for name, t in tensors.items()}
    parts = streamed(tensors.values(), boxes)
    for name, whole in expected(random(), True).items():
        assert torch.equal(joined((part.clone() for part in parts(name)), (1, *whole.shape[1:])), whole[:1])


def test_tensors_are_asked_for_in_order() -> None:
    parts = streamed(file_tensors(random(), stacked(False)).values())
    with pytest.raises(AssertionError):
        parts("lm_head.weight")


@pytest.mark.usefixtures("no_thread_is_left")
def test_a_reader_that_fails_ends_the_stream_with_its_error() -> None:
    def fail(name: str, where: object, tensor: Tensor) -> Tensor:
        if name.endswith("layers.1.block_sparse_moe.experts.w2"):
            raise WeightsError("the tape is torn.")
        return tensor

    tensors = file_tensors(Altered(random(), fail), stacked(True))
    parts = streamed(tensors.values())
    taken: list[str] = []
    with pytest.raises(WeightsError, match="the tape is torn"):
        taken.extend(name for name in tensors for _ in parts(name))
    whole = expected(random(), True)
    names = list(dict.fromkeys(taken))
    assert names == list(whole)[: list(whole).index("model.layers.1.block_sparse_moe.experts.w2")]


@pytest.mark.usefixtures("no_thread_is_left")
def test_a_writer_that_fails_leaves_no_thread() -> None:
    def write() -> None:
        tensors = file_tensors(random(), stacked(True))
        parts = streamed(tensors.values())
        for number, name in enumerate(tensors):
            for _ in parts(name):
                if number == 5:
                    raise OSError(28, "full")

    with pytest.raises(OSError, match="full"):
        write()


def test_one_model_of_every_dtype_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from ostro.weights import CastReader

    monkeypatch.setattr(stored, "_BLOCK_BYTES", 64)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        reader = CastReader(random(), dtype)
        found = consumed(file_tensors(reader, stacked(True)))
        assert all(torch.equal(found[name], value) for name, value in expected(reader, True).items())
        assert {tensor.dtype for tensor in found.values()} == {dtype}
