"""One MindSpore .ckpt file, against files that MindSpore wrote, against bytes made by hand, and against damage."""

from __future__ import annotations

import itertools
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


def pieces_of(tensor: torch.Tensor, cuts: list[int], tag: str = "x", word: str = "Float32") -> bytes:
    """Return the records of one tensor, cut at these bytes."""
    content, ends = bytes(as_bytes(tensor)), [0, *cuts, tensor.nbytes]
    return b"".join(value(tag, tuple(tensor.shape), word, content[a:b]) for a, b in itertools.pairwise(ends))


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
    assert list(file.infos) == ["before", "x", "w"]
    for where in WHERES:
        assert same_bits(file.tensor("x", where), tensor[where]), where
    assert torch.equal(file.tensor("w"), torch.from_numpy(FLOATS))


def test_of_pieces_only_what_crosses_a_boundary_is_copied(tmp_path: Path) -> None:
    tensor = torch.rand(6, 4)
    file = CkptFile(put(tmp_path, pieces_of(tensor, [56])))  # in the middle of row 3
    for where, is_view in [((0,), True), ((slice(0, 3),), True), ((3,), False), ((slice(4, 6), 1), True), ((), False)]:
        first, second = file.tensor("x", where), file.tensor("x", where)
        assert (first.data_ptr() == second.data_ptr()) is is_view, where
        assert first.untyped_storage().nbytes() <= tensor.nbytes


def test_a_slice_touches_its_own_pages_alone(tmp_path: Path) -> None:
    path, shape = tmp_path / "sparse.ckpt", (1 << 22, 4096)  # 64 GiB of float32, none of it on the disk
    one = 512 << 20
    tensor = dims_of(shape) + field(2, b"Float32") + b"\x1a" + varint(one)
    inner = field(1, b"w") + b"\x12" + varint(len(tensor) + one) + tensor
    head = b"\x0a" + varint(len(inner) + one) + inner
    with path.open("wb") as file:
        for index in range(128):
            file.seek(index * (len(head) + one))
            file.write(head)
        file.truncate(128 * (len(head) + one))
    opened = CkptFile(path)
    assert opened.infos == {"w": TensorInfo(shape, torch.float32)}
    assert opened.tensor("w", (-1, slice(0, 2))).tolist() == [0, 0]
    across = opened.tensor("w", (slice((1 << 15) - 1, (1 << 15) + 1), 0))
    assert across.tolist() == [0, 0]
    assert across.untyped_storage().nbytes() == 2 * 4096 * 4


def test_fields_in_any_order_unknown_ones_packed_dims_and_several_values(tmp_path: Path) -> None:
    unknown = b"\x78\x96\x01" + field(9, b"?") + b"\x41" + b"\0" * 8 + b"\x3d" + b"\0" * 4
    tensor = field(3, FLOATS.tobytes()) + unknown + field(1, b"\x02\x03") + field(2, b"Float32")
    first = field(1, unknown + field(2, tensor) + field(1, b"a"))
    both = first + unknown + field(1, field(2, tensor) + field(1, "ä".encode()))
    file = CkptFile(put(tmp_path, unknown + both + GOOD))
    assert list(file.infos) == ["a", "ä", "w"]
    assert all(torch.equal(file.tensor(name), torch.from_numpy(FLOATS)) for name in file.infos)


def test_of_a_name_that_comes_again_the_last_counts(tmp_path: Path) -> None:
    other = value("w", (3,), "Int8", b"\1\2\3")
    file = CkptFile(put(tmp_path, GOOD + value("v", (), "Bool", b"\1") + other))
    assert file.tensor("w").tolist() == [1, 2, 3]
    file = CkptFile(put(tmp_path, other + value("v", (), "Bool", b"\1") + value("w", (0,), "str", b"x\0\0\0")))
    assert (file.strings, list(file.infos)) == ({"w": "x"}, ["v"])


def test_scalars_of_old_versions_and_tensors_without_elements(tmp_path: Path) -> None:
    content = value("old", (0,), "Float32", FLOATS[:1, :1].tobytes()) + value("empty", (0,), "Float32", b"")
    file = CkptFile(put(tmp_path, content + value("none", (0, 3), "Int64", b"")))
    assert {name: info.shape for name, info in file.infos.items()} == {"old": (), "empty": (0,), "none": (0, 3)}
    assert file.tensor("old") == 0
    assert file.tensor("none").shape == (0, 3)


def test_what_torch_has_no_type_for_may_be_there_but_not_asked_for(tmp_path: Path) -> None:
    parts = field(1, dims_of((1,)) + field(2, b"int32") + field(3, b"\0" * 4)) * 3
    maps = field(1, field(1, b"table") + field(3, parts)) * 2
    file = CkptFile(put(tmp_path, value("q", (4,), "Int4", b"\0\0") + maps + GOOD + value("c", (), "Complex64", b"")))
    assert file.unsupported == {"q": "Int4", "table": "maptensor", "c": "Complex64"}
    assert list(file.infos) == ["w"]
    for name, word in file.unsupported.items():
        with pytest.raises(WeightsError, match=f"holds {name} as {word}, which Ostro cannot read"):
            file.tensor(name)


def test_strings_in_pieces_and_padded(tmp_path: Path) -> None:
    text = "日本 ok".encode("utf-32-le")
    content = value("a", (0,), "str", text[:5]) + value("a", (0,), "str", text[5:])
    file = CkptFile(put(tmp_path, content + value("b", (0,), "str", b"x" + b"\0" * 11)))
    assert file.strings == {"a": "日本 ok", "b": "x"}


# Writing.


def test_records_are_cut_like_mindspore_cuts_them_whatever_the_parts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ckpt_file, "RECORD_BYTES", 100)
    tensor = torch.rand(5, 13)  # 260 bytes
    wanted = pieces_of(tensor, [100, 200])
    for parts in (
        [tensor],
        tensor.split(1),
        tensor.split([2, 0, 3]),
        [tensor.reshape(-1)[:25], tensor.reshape(-1)[25:]],
    ):
        write_ckpt(tmp_path / "x.ckpt", {"x": TensorInfo((5, 13), torch.float32)}, lambda _, parts=parts: parts)
        assert (tmp_path / "x.ckpt").read_bytes() == wanted
    full = torch.rand(5, 5)  # one record exactly, and no empty one after it
    assert save(tmp_path / "x.ckpt", {"x": full}).read_bytes() == pieces_of(full, [])


def test_scalars_stand_at_the_end_in_types_of_their_own(tmp_path: Path) -> None:
    scalars = {"i": -5, "f": 1e-3, "b": False, "s": "日本", "none": ""}
    path = save(tmp_path / "x.ckpt", {"w": torch.from_numpy(FLOATS), "gone": torch.zeros(0, 3)}, scalars=scalars)
    wanted = GOOD + value("i", (), "Int64", b"\xfb" + b"\xff" * 7)
    wanted += value("f", (), "Float32", np.float32(1e-3).tobytes()) + value("b", (), "Bool", b"\0")
    wanted += value("s", (0,), "str", "日本".encode("utf-32-le")) + value("none", (0,), "str", b"\0" * 4)
    assert path.read_bytes() == wanted
    assert CkptFile(path).strings == {"s": "日本", "none": ""}


def test_the_checksum_is_that_of_all_bytes_before_it(tmp_path: Path) -> None:
    content = save(tmp_path / "x.ckpt", {"w": torch.rand(40)}, scalars={"s": "x"}, crc=True).read_bytes()
    assert content[-17:-10] == b"crc_num"
    assert int.from_bytes(content[-10:], "big") == zlib.crc32(content[:-17])
    assert CkptFile(tmp_path / "x.ckpt").check_crc()


SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)
NAMES = st.text(min_size=1, max_size=8).filter(lambda name: name.isprintable())


@st.composite
def where_of(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int | slice, ...]:
    found: list[int | slice] = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        bounds = st.none() | st.integers(-size - 1, size + 1)
        index = st.integers(-size, size - 1) | st.builds(slice, bounds, bounds, st.none() | st.integers(1, 3))
        found.append(draw(index))
    return tuple(found)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_written_is_read(tmp_path: Path, monkeypatch, data: st.DataObject) -> None:
    monkeypatch.setattr(ckpt_file, "RECORD_BYTES", data.draw(st.integers(1, 90), "record bytes"))
    tensors = {}
    for name in data.draw(st.lists(NAMES, min_size=1, max_size=4, unique=True), "names"):
        shape = data.draw(SHAPES, "shape")
        dtype = data.draw(st.sampled_from(list(DTYPES.values())), "dtype")
        raw = torch.from_numpy(np.random.default_rng(len(name)).integers(0, 2, math.prod(shape) * 8, np.uint8))
        tensors[name] = raw[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
    crc = data.draw(st.booleans(), "crc")
    file = CkptFile(save(tmp_path / "x.ckpt", tensors, crc=crc))
    assert list(file.infos) == list(tensors)
    assert file.check_crc() is crc
    for name, tensor in tensors.items():
        assert same_bits(file.tensor(name), tensor)
        where = data.draw(where_of(tuple(tensor.shape)), "where")
        part = file.tensor(name, where).clone(memory_format=torch.contiguous_format)
        assert same_bits(part, tensor[where].clone(memory_format=torch.contiguous_format))


# Damage.

HALF = len(GOOD) // 2
DAMAGED = {
    "empty": (b"", "holds no entry"),
    "only a checksum": (b"crc_num" + b"\0" * 10, "holds no entry"),
    "a strategy file": (b"\x08\x01" + field(2, b"op") + field(3, b"layout"), "holds no entry"),
    "text": (b"PK\3\4 a zip of another framework", "cannot be read as a MindSpore checkpoint"),
    "zeros": (b"\0" * 64, "a field with the number 0"),
    "truncated": (GOOD[:-1], r"starts a field whose \d+ bytes end 1 too late"),
    "cut in a head": (GOOD + GOOD[:1], "a number goes on and its message ends"),
    "an endless length": (b"\x0a" + b"\xff" * 9 + b"\x01", r"field whose \d+ bytes end \d+ too late"),
    "an endless number": (b"\x0a" + b"\xff" * 40, "goes on beyond its ten bytes"),
    "a group": (b"\x0b" + GOOD, "unknown wire type 3"),
    "no name": (field(1, field(2, field(2, b"Bool") + field(3, b"\1"))), "an entry without a name or a tensor"),
    "no tensor": (field(1, field(1, b"w")), "an entry without a name or a tensor"),
    "two names": (field(1, field(1, b"w") + field(1, b"v")), "gives an entry its tag a second time"),
    "no type": (field(1, field(1, b"w") + field(2, field(3, b"\1"))), "w has no type or no content"),
    "no content": (field(1, field(1, b"w") + field(2, field(2, b"Bool"))), "w has no type or no content"),
    "a name that is no text": (value("w", (), "Bool", b"\1").replace(b"w", b"\xff"), "can't decode byte 0xff"),
    "a type that is no text": (GOOD.replace(b"Float32", b"Float3\xff"), "can't decode byte 0xff"),
    "a negative dim": (value("w", (-2, 3), "Float32", b"\0" * 24), r"gives w the dims \[-2, 3\], which no tensor has"),
    "endless dims": (value("w", (0, 1 << 40, 1 << 40), "Float32", b""), "which no tensor has"),
    "too many dims": (value("w", (1,) * 200, "Float32", b"\0" * 4), r"the dims \[1, 1, 1, 1, 1, 1, 1, 1, …\]"),
    "a huge dim": (
        value("w", (1 << 50,), "Float32", b"\0" * 4),
        r"gives w 4 bytes, its shape .* takes 4503599627370496",
    ),
    "too few bytes": (value("w", (2, 3), "Float32", b"\0" * 23), r"gives w 23 bytes, its shape \[2, 3\] as Float32"),
    "a doubled entry": (GOOD * 2, r"gives w 48 bytes in 2 pieces, its shape \[2, 3\] as Float32 takes 24"),
    "pieces that differ": (GOOD + value("w", (3, 2), "Float32", b""), "the pieces of w differ in shape or type"),
    "pieces of two kinds": (GOOD + value("w", (2, 3), "Int32", b""), "the pieces of w differ in shape or type"),
    "half a character": (value("s", (0,), "str", b"x\0\0"), "holds the string s in bytes that are no UTF-32"),
    "no character": (value("s", (0,), "str", b"\xff" * 4), "holds the string s in bytes that are no UTF-32"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_one_sentence(tmp_path: Path, what: str) -> None:
    content, sentence = DAMAGED[what]
    with pytest.raises(WeightsError, match=sentence) as caught:
        CkptFile(put(tmp_path, content))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("low", [0xD8, 0xD9, 0xDA])
def test_an_encrypted_file_is_named_so(tmp_path: Path, low: int) -> None:
    with pytest.raises(WeightsError, match=r"is encrypted \(enc_key\): load it in MindSpore with dec_key"):
        CkptFile(put(tmp_path, bytes((low, 0x5E, 0x3A, 0x7F)) + b"\x88\0\0\0" * 8))


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.ckpt"):
        with pytest.raises(WeightsError, match="cannot be read"):
            CkptFile(path)


def mutations(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yield copies with bytes changed, cut off, dropped, or doubled; heads rather than values."""
    rng = random.Random(seed)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(changed))
            match rng.randrange(5):
                case 0:
                    changed[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, changed[at] ^ (1 << rng.randrange(8))])
                case 1:
                    del changed[at + 1 :]
                case 2:
                    del changed[at : at + rng.randint(1, 9)]
                case 3:
                    changed[at:at] = bytes(rng.choices([0x0A, 0x12, 0x1A, 0x08, 0xFF, 0x80, 0], k=rng.randint(1, 9)))
                case _:
                    changed[at:at] = changed[at : at + rng.randint(1, 60)]
            if not changed:
                break
        yield bytes(changed)


def test_any_change_of_bytes_is_an_error_or_another_sound_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ckpt_file, "RECORD_BYTES", 300)
    tensors = {"a": torch.arange(144.0).view(9, 16), "b": torch.ones(40).half(), "c": torch.tensor(7)}
    path = save(tmp_path / "x.ckpt", tensors, scalars={"s": "ab", "n": 1}, crc=True)
    outcomes = {True: 0, False: 0}
    for content in mutations(path.read_bytes(), 500, 7):
        path.write_bytes(content)
        try:
            file = CkptFile(path)
        except WeightsError:
            outcomes[False] += 1
            continue
        outcomes[True] += 1
        for name, info in file.infos.items():
            tensor = file.tensor(name)
            assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype)
            assert tensor.nbytes <= len(content)
            assert tensor.dim() == 0 or file.tensor(name, (slice(None),)).shape == tensor.shape
    assert min(outcomes.values()) > 20
