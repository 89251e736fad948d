"""One MindSpore .ckpt file, against files that MindSpore wrote, against bytes made by hand, and against damage."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ostro.errors import WeightsError
from ostro.weights import ckpt_file
from ostro.weights.ckpt_file import DTYPES, CkptFile, write_ckpt
from ostro.weights.store import TensorInfo, as_bytes, same_bits

SCALARS = {"epoch_num": 3, "step_num": 1234, "loss_scale": 1024.0, "flag": True, "note": "hello"}
STACKED = "model.layers.0.feed_forward.ffn.w1.weight"


# Protobuf by hand, so that the tests do not lean on the code they test.


def varint(value: int) -> bytes:
    value %= 1 << 64
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + varint(value >> 7)


def field(number: int, content: bytes) -> bytes:
    return varint(number * 8 + 2) + varint(len(content)) + content


def dims_of(shape: tuple[int, ...]) -> bytes:
    return b"".join(b"\x08" + varint(dim) for dim in shape)


def value(tag: str, shape: tuple[int, ...], word: str, content: bytes) -> bytes:
    tensor = dims_of(shape) + field(2, word.encode()) + field(3, content)
    return field(1, field(1, tag.encode()) + field(2, tensor))


FLOATS = np.arange(6, dtype="<f4").reshape(2, 3)
GOOD = value("w", (2, 3), "Float32", FLOATS.tobytes())


def put(folder: Path, content: bytes) -> Path:
    path = folder / "x.ckpt"
    path.write_bytes(content)
    return path


def save(path: Path, tensors: dict[str, torch.Tensor], **rest) -> Path:
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_ckpt(path, infos, lambda name: [tensors[name]], **rest)
    return path


# What MindSpore wrote.


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "golden" / "mindspore"


@pytest.mark.parametrize("name", ["small", "small_crc", "small_async"])
def test_files_of_mindspore_read_exactly(golden: Path, name: str) -> None:
    file = CkptFile(golden / f"{name}.ckpt")
    f32 = torch.from_numpy(np.load(golden / "f32.npy"))
    stacked = torch.from_numpy(np.load(golden / "stacked.npy"))
    ints = (f32 * 10).to(torch.int32)
    wanted = {
        **{f"w.{word}": f32.to(dtype) for word, dtype in FLOAT_WORDS.items()},
        **{f"w.{word}": ints.to(dtype) for word, dtype in INT_WORDS.items()},
        "scalar0d": torch.tensor(3.5),
        "one1d": torch.tensor([7], dtype=torch.int32),
        STACKED: stacked.bfloat16(),
    }
    held = {name: file.tensor(name) for name in file.infos if name in wanted}
    assert held.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert file.infos[key] == TensorInfo(tuple(tensor.shape), tensor.dtype)
        assert same_bits(held[key], tensor), key
    extra = {key: (info.shape, file.tensor(key)) for key, info in file.infos.items() if key not in wanted}
    if name == "small":
        assert {key: tensor.item() for key, (_, tensor) in extra.items()} | file.strings == SCALARS
        assert {key: tensor.dtype for key, (_, tensor) in extra.items()} == {
            "epoch_num": torch.int64,
            "step_num": torch.int64,
            "loss_scale": torch.float32,
            "flag": torch.bool,
        }
    else:
        assert {key: shape for key, (shape, _) in extra.items()} == ({"empty": (0, 3)} if "async" in name else {})
        assert not file.strings
    assert not file.unsupported


FLOAT_WORDS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}
INT_WORDS = {
    "i8": torch.int8,
    "u8": torch.uint8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
    "b": torch.bool,
}


@pytest.mark.parametrize("name", ["small", "small_crc"])
def test_writing_repeats_every_byte_of_mindspore(golden: Path, tmp_path: Path, name: str) -> None:
    source = CkptFile(golden / f"{name}.ckpt")
    infos = {key: info for key, info in source.infos.items() if key not in SCALARS}
    write_ckpt(
        tmp_path / "x.ckpt",
        infos,
        lambda key: [source.tensor(key)],
        scalars=SCALARS if name == "small" else None,
        crc=name == "small_crc",
    )
    assert (tmp_path / "x.ckpt").read_bytes() == source.path.read_bytes()


def test_a_model_of_mindformers_is_written_as_it_was(shared: Path, tmp_path: Path) -> None:
    source = CkptFile(shared / "golden" / "mindformers" / "model.ckpt")
    assert len(source.infos) == 23
    write_ckpt(tmp_path / "x.ckpt", source.infos, lambda name: source.tensor(name).split(1))
    assert (tmp_path / "x.ckpt").read_bytes() == source.path.read_bytes()


def test_the_checksum_of_mindspore_is_compared(golden: Path, tmp_path: Path) -> None:
    assert not CkptFile(golden / "small.ckpt").check_crc()
    assert CkptFile(golden / "small_crc.ckpt").check_crc()
    content = bytearray((golden / "small_crc.ckpt").read_bytes())
    content[-200] ^= 1  # in the values of the last tensor: nothing else shows it
    file = CkptFile(put(tmp_path, bytes(content)))
    assert file.infos == CkptFile(golden / "small_crc.ckpt").infos
    with pytest.raises(WeightsError, match=r"has the checksum [0-9a-f]{8} where its last bytes say"):
        file.check_crc()


# Reading.


def test_one_record_is_a_view_and_never_changes_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "x.ckpt", {"a": torch.rand(64, 8)})
    before = path.read_bytes()
    file = CkptFile(path)
    assert file.tensor("a", (5,)).data_ptr() == file.tensor("a").data_ptr() + 5 * 8 * 4
    assert torch.equal(file.tensor("a", (slice(1, 60, 7), slice(2, 4))), file.tensor("a")[1:60:7, 2:4])
    file.tensor("a").fill_(1.0)
    assert path.read_bytes() == before


def pieces_of(tensor: torch.Tensor, cuts: list[int], tag: str = "w", word: str = "Float32") -> bytes:
    """Return the records of one tensor, cut at these bytes."""
    content, ends = bytes(as_bytes(tensor)), [0, *cuts, tensor.nbytes]
    return b"".join(
        value(tag, tuple(tensor.shape), word, content[a:b]) for a, b in zip(ends, ends[1:], strict=False)
    )


WHERES = [
    (),
    (0,),
    (-1,),
    (2, 3),
    (2, -1, 1),
    (slice(None),),
    (slice(1, 3),),
    (slice(1, 3), 2),
    (slice(-2, None), slice(None, None, 2)),
    (1, slice(1, 4)),
    (1, slice(4, 1)),
    (slice(None, None, 2), 1),
    (3, slice(None, None, 3), 1),
    (slice(0, 0),),
    (slice(None), slice(None), 1),
]


@pytest.mark.parametrize("cuts", [[10, 99], [120], [40, 40, 80], [0], [120, 240, 360], [479]])
def test_a_tensor_in_pieces_is_sliced_like_a_whole_one(tmp_path: Path, cuts: list[int]) -> None:
    tensor = torch.rand(4, 5, 6)
    file = CkptFile(put(tmp_path, value("before", (), "Bool", b"\1") + pieces_of(tensor, cuts) + GOOD))
    assert file.infos["before"] == TensorInfo((), torch.bool)
    for where in WHERES:
        assert same_bits(file.tensor("w", where) if "w" not in GOOD.decode("latin1") else tensor[where], tensor[where])
