"""PyTorch's pickles: the tensors torch.load would give, nothing run, nothing believed, nothing copied."""

from __future__ import annotations

import io
import json
import os
import pickletools
import random as dice
import struct
import sys
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import models, random
from torch import Tensor

from ostro.errors import WeightsError
from ostro.weights import convert, digest, hf, open_reader
from ostro.weights.hf_config import config_fields, write_json
from ostro.weights.pickle_file import PickleFile
from ostro.weights.store import same_bits
from ostro.weights.stored import file_tensors

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.bool]
DTYPES += [torch.int32, torch.int16, torch.uint8, torch.float8_e4m3fn]


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        PickleFile(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.endswith(".")
    assert "\n" not in message
    return message


def archive(pickled: bytes, **records: bytes) -> bytes:
    """An archive as torch.save writes it, around any pickle; `data_0` is the record `data/0`."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("x/data.pkl", pickled)
        file.writestr("x/version", b"3\n")
        for name, content in records.items():
            file.writestr(f"x/{name.replace('_', '/')}", content)
    return out.getvalue()


def saved(content: Any, **settings: Any) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, **settings)
    return out.getvalue()


def pickle_of(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return next(file.read(name) for name in file.namelist() if name.endswith("/data.pkl"))


# What torch.load gives


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """A tensor of any type and shape, whole or a part of a larger one, transposed or not."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    bits = torch.randint(0, 255, (*shape, 8), dtype=torch.uint8)
    dtype = draw(st.sampled_from(DTYPES))
    tensor = bits.view(torch.float64).squeeze(-1) if dtype is torch.float64 else bits[..., 0].to(dtype)
    if tensor.dim() and draw(st.booleans()):
        tensor = tensor[draw(st.integers(0, tensor.shape[0])) :]
    if tensor.dim() > 1 and draw(st.booleans()):
        tensor = tensor.transpose(0, -1)
    if tensor.dim() > 1 and draw(st.booleans()):
        tensor = tensor[:, ::2]
    return torch.nn.Parameter(tensor) if tensor.is_floating_point() and draw(st.booleans()) else tensor


@settings(max_examples=60)
@given(
    held=st.dictionaries(st.text("abc.w0", min_size=1, max_size=8), tensors(), min_size=1, max_size=5),
    wrapping=st.sampled_from([None, "state_dict", "model", "module"]),
    is_ordered=st.booleans(),
)
def test_what_is_read_is_what_torch_saved(held: dict[str, Tensor], wrapping: str | None, is_ordered: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pt"
        bare = OrderedDict(held) if is_ordered else held
        others = {"epoch": 3, "best": 0.5, "ids": [1, (2, None)], "seen": {1}, "size": torch.Size([2]), "on": True}
        torch.save({**others, wrapping: bare} if wrapping else bare, path)
        file = PickleFile(path)
        assert list(file.infos) == list(held)
        for name, tensor in held.items():
            assert (file.infos[name].shape, file.infos[name].dtype) == (tuple(tensor.shape), tensor.dtype)
            found = file.tensor(name)
            assert found.shape == tensor.shape
            assert same_bits(found, tensor.detach().clone(memory_format=torch.contiguous_format))
            if tensor.dim():
                part = file.tensor(name, (slice(1, 3),))
                assert part.tolist() == tensor.tolist()[1:3] or tensor.dtype is torch.float8_e4m3fn


def test_tensors_that_share_a_storage(tmp_path: Path) -> None:
    stack = torch.arange(24.0).view(4, 3, 2)
    held = {"stack": stack, "one": stack[1], "turned": stack[2].T, "again": stack}
    torch.save(held, tmp_path / "x.pt")
    file = PickleFile(tmp_path / "x.pt")
    assert all(torch.equal(file.tensor(name), tensor) for name, tensor in held.items())


def test_a_module_and_later_protocols(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    for protocol in (2, 3, 4, 5):
        torch.save(module.state_dict(), tmp_path / "x.pt", pickle_protocol=protocol)  # 4 on: not for weights_only
        assert torch.equal(PickleFile(tmp_path / "x.pt").tensor("weight"), module.weight)


def test_nothing_is_copied(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(8.0), "b": torch.ones(3)}, tmp_path / "x.pt")
    file = PickleFile(tmp_path / "x.pt")
    assert file.tensor("a").data_ptr() == file.tensor("a", (slice(1, None),)).data_ptr() - 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_is_mapped_and_not_held(tmp_path: Path) -> None:
    def anonymous_bytes() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line)
        return int(line.split()[1]) * 1024

    torch.save({str(i): torch.ones(1 << 22) for i in range(4)}, tmp_path / "x.pt")  # 64 MiB
    before = anonymous_bytes()
    file = PickleFile(tmp_path / "x.pt")
    assert sum(file.tensor(name).sum().item() for name in file.infos) == 1 << 24
    assert anonymous_bytes() - before < 16 << 20


# Transformers' folders


@settings(max_examples=10)
@given(config=models(), num_files=st.integers(1, 3), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_hugging_face_folders_of_pickles(config: Any, num_files: int, dtype: torch.dtype) -> None:
    source = random(config)
    state = {
        name: torch.cat([part.reshape(-1) for part in tensor.parts()]).view(tensor.info.shape).to(dtype)
        for name, tensor in file_tensors(source, hf.source).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_json(path / "config.json", config_fields(config, dtype))
        files = [f"pytorch_model-{i + 1:05d}-of-{num_files:05d}.bin" for i in range(num_files)]
        files = files if num_files > 1 else ["pytorch_model.bin"]
        weight_map = {name: files[i % num_files] for i, name in enumerate(state)}
        for file in files:
            torch.save({name: state[name] for name in state if weight_map[name] == file}, path / file)
        if num_files > 1:
            (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        torch.save({"lr": 0.1}, path / "training_args.bin")
        convert(source, path / "expected", to="hf", dtype=dtype)
        assert digest(open_reader(path)) == digest(open_reader(path / "expected"))


# What is refused


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("is_beside", [False, True])
def test_code_is_not_run(tmp_path: Path, protocol: int, is_beside: bool) -> None:
    bomb = Bomb(tmp_path / "boom")
    state = {"a": torch.ones(2)}
    content = {"state_dict": state, "x": bomb} if is_beside else state | {"x": bomb}
    torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
    assert f"cannot be read as tensors alone (it asks for '{os.mkdir.__module__}.mkdir'): it is" in refusal(
        tmp_path / "x.pt"
    )
    assert not (tmp_path / "boom").exists()
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "boom").exists()  # it would have


class Huge:
    """A call that torch.load with weights_only=True would make: it asks for a terabyte."""

    def __reduce__(self) -> Any:
        return bytearray, (1 << 40,)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"a": Huge()}, "it asks for '__builtin__.bytearray'"),
        ({"a": torch.ones(2).to_sparse()}, "it asks for 'torch._utils._rebuild_sparse_tensor'"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "it asks for 'torch.ComplexFloatStorage'"),
        ({"a": torch._neg_view(torch.ones(2))}, "a tensor in it is not a plain one"),
        ({"a": torch.ones(1).expand(9)}, "gives a the shape 9, which reaches beyond its storage of 4 bytes"),
        ({"a": torch.ones([1] * 9)}, "a tensor in it has no sound shape"),
        ({"a": torch.ones(2), "n": 3}, "holds 'n', which is not a dense tensor: save the state dict alone"),
        ({"a": torch.ones(2), 5: torch.ones(2)}, "holds 5, which is not a dense tensor"),
        ({"a\nb": torch.ones(2)}, r"holds 'a\nb', which is not a dense tensor"),
        ({}, "holds an empty state dict where one is expected: give another file"),
        ({"model": {}}, "holds an empty state dict"),
        ([torch.ones(2)], "holds no state dict where one is expected"),
        (torch.ones(2), "holds no state dict where one is expected"),
        ({(1, 2): 3}, "a dict in it has keys that are neither text nor numbers"),
    ],
)
def test_what_is_no_state_dict(tmp_path: Path, content: Any, sentence: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    assert sentence in refusal(tmp_path / "x.pt")


def test_what_torch_no_longer_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert "is not an archive as PyTorch writes it since 1.6 (BadZipFile: File is not a zip file): it is" in refusal(
        path
    )
    path.write_bytes(saved({"a": torch.ones(2)}))
    with zipfile.ZipFile(path) as file, zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as squeezed:
        for name in file.namelist():
            squeezed.writestr(name, file.read(name))
    assert "is a compressed or encrypted archive" in refusal(tmp_path / "y.pt")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1  # the flag of the first entry in the directory
    path.write_bytes(data)
    assert "is a compressed or encrypted archive" in refusal(path)


def test_a_directory_that_points_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    data = bytearray(archive(pickle_of(saved({"a": torch.ones(2)})), data_0=bytes(8)))
    end = data.index(b"PK\5\6")
    (offset,) = struct.unpack_from("<I", data, end + 16)
    for more in (1, 64, 1 << 20, 1 << 31):
        struct.pack_into("<I", data, end + 16, (offset + more) % (1 << 32))
        path.write_bytes(data)
        assert "is not an archive as PyTorch writes it since 1.6" in refusal(path)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory): check the path" in refusal(tmp_path / "absent.pt")
    (tmp_path / "folder.pt").mkdir()
    assert "cannot be read (Is a directory)" in refusal(tmp_path / "folder.pt")
    for content in (b"", b"PK", b"version https://git-lfs.github.com/spec/v1\n", bytes(5000)):
        (tmp_path / "x.pt").write_bytes(content)
        assert "is not an archive as PyTorch writes it since 1.6" in refusal(tmp_path / "x.pt")


def test_archives_without_what_belongs_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pt"
    pickled = pickle_of(saved({"a": torch.ones(2)}))
    values = struct.pack("2f", 1, 1)
    path.write_bytes(archive(pickled, data_0=values))
    assert PickleFile(path).tensor("a").tolist() == torch.load(path)["a"].tolist() == [1, 1]
    path.write_bytes(archive(pickled, data_0=values, byteorder=b"big"))
    assert "its values are not in this machine's byte order, little-endian" in refusal(path)
    path.write_bytes(archive(pickled, data_0=values, **{"constants.pkl": b""}))
    assert "it is a TorchScript program" in refusal(path)
    path.write_bytes(archive(pickled, data_0=values, data_1=values).replace(b"data/1", b"data/0"))
    assert "is not an archive as PyTorch writes it since 1.6 (two of its records have one name)" in refusal(path)
    path.write_bytes(archive(pickled))
    assert "puts a into a storage of 8 bytes, its archive has none of it: the file is damaged" in refusal(path)
    for content in (values[:4], values * 2):
        path.write_bytes(archive(pickled, data_0=content))
        assert f"puts a into a storage of 8 bytes, its archive has {len(content)} bytes of it" in refusal(path)
    path.write_bytes(archive(pickled, data_0=values).replace(b"x/data.pkl", b"x/data.pki"))
    assert "it has no data.pkl" in refusal(path)
    damaged = pickled.replace(b"cpu", b"gpu")
    path.write_bytes(archive(pickled, data_0=values).replace(pickled, damaged))
    assert "the checksum of its data.pkl is wrong" in refusal(path)
    monkeypatch.setattr("ostro.weights.pickle_file._MAX_PICKLE_BYTES", len(pickled) - 1)
    assert f"its data.pkl has {len(pickled)} bytes" in refusal(path)


@pytest.mark.parametrize(
    ("opcode", "value", "sentence"),
    [
        (0, 1 << 40, "puts a into a storage of 4398046511104 bytes, its archive has 24 bytes of it"),
        (1, 1 << 40, "reaches beyond its storage of 24 bytes"),
        (1, 1, "reaches beyond its storage of 24 bytes"),
        (1, -1, "has no sound shape"),
        (2, 1 << 40, "reaches beyond its storage of 24 bytes"),
        (2, 1 << 61, "has no sound shape"),  # times 3 is more than 2⁶²
        (2, -2, "has no sound shape"),
        (2, 3, "reaches beyond its storage of 24 bytes"),
        (4, 1 << 50, "reaches beyond its storage of 24 bytes"),
        (4, -3, "has no sound shape"),
    ],
)
def test_a_pickle_that_lies_about_sizes(tmp_path: Path, opcode: int, value: int, sentence: str) -> None:
    """Its numbers are, in this order: items of the storage, offset, two of the shape, two of the stride."""
    pickled = pickle_of(saved({"a": torch.zeros(2, 3)}))
    ends = [position for _, _, position in pickletools.genops(pickled)] + [len(pickled)]
    at = [p for op, _, p in pickletools.genops(pickled) if op.name == "BININT1"][opcode]
    number = b"\x8a\x08" + struct.pack("<q", value)
    lie = pickled[:at] + number + pickled[ends[ends.index(at) + 1] :]
    path = tmp_path / "x.pt"
    path.write_bytes(archive(lie, data_0=bytes(24)))
    assert sentence in refusal(path)


@pytest.mark.parametrize(
    ("pickled", "sentence"),
    [
        (b"", "pickle exhausted"),
        (b"\x80\x02}", "pickle exhausted"),
        (b"\x80\x02.", "it takes a value that is not there"),
        (b"\x80\x02(.", "it takes a value that is not there"),
        (b"\x80\x02h\x05.", "KeyError: 5"),
        (b"\x80\x02q\x05.", "IndexError"),
        (b"\x80\x02K\x01)R.", "it calls what is no function"),
        (b"\x80\x02K\x01Q.", "TypeError"),
        (b"\x80\x02)Ktb.", "it sets attributes of what is no dict"),
        (b"\x80\x02)(K\x01e.", "it appends to what is no list"),
        (b"\x80\x02](K\x01K\x02u.", "it sets keys of what is no dict"),
        (b"\x80\x02}(K\x01u.", "zip() argument"),
        (b"\x80\x02" + b"(" * 9 + b"l.", "it has the opcode LIST"),
        (b"\x80\x02X\xff\xff\xff\x7fa.", "expected 2147483647 bytes"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "it asks for 'os.system'"),
        (b"cos\nsystem\n(S'x'\ntR.", "it asks for 'os.system'"),
        (b"\x80\x02ccollections\nOrderedDict\n](](K\x01K\x02ee\x85R.", "TypeError"),
    ],
)
def test_pickles_that_make_no_sense(tmp_path: Path, pickled: bytes, sentence: str) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(archive(pickled))
    message = refusal(path)
    assert "cannot be read as tensors alone (" in message
    assert sentence in message


def test_no_depth_is_too_deep(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(archive(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."))
    assert "holds no state dict" in refusal(path)


# Mutations

STATE = {"w": torch.arange(6.0).view(2, 3), "v": torch.arange(4, dtype=torch.int16), "u": torch.ones(3, 5).T}
SOUND = saved(OrderedDict(STATE))


def read_whole(data: bytes, path: Path) -> dict[str, Tensor] | None:
    """Every tensor of a file, having checked that none is larger than the file; None if it is refused."""
    path.write_bytes(data)
    try:
        file = PickleFile(path)
    except WeightsError:
        return None
    assert all(info.num_bytes <= len(data) for info in file.infos.values())
    return {name: file.tensor(name).clone() for name in file.infos}


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    for length in range(0, len(SOUND), 7):
        assert read_whole(SOUND[:length], tmp_path / "x.pt") is None, length
    assert read_whole(SOUND, tmp_path / "x.pt") is not None


def test_a_byte_changed_in_the_archive_is_refused_or_harmless(tmp_path: Path) -> None:
    payload: set[int] = set()
    with zipfile.ZipFile(io.BytesIO(SOUND)) as file:
        for entry in file.infolist():
            if "/data/" in entry.filename:
                start = SOUND.index(file.read(entry), entry.header_offset + 30)
                payload |= set(range(start, start + entry.file_size))
    places = [at for at in range(len(SOUND)) if at not in payload and SOUND[at] != ord("Z")]
    rolls = dice.Random(0)
    refused = 0
    for _ in range(500):
        data = bytearray(SOUND)
        for at in rolls.sample(places, rolls.choice([1, 1, 2, 5])):
            data[at] = rolls.choice([data[at] ^ 1 << rolls.randrange(8), rolls.randrange(256), 0, 255])
        found = read_whole(bytes(data), tmp_path / "x.pt")
        refused += found is None
        assert found is None or (list(found) == list(STATE) and all(same_bits(found[n], STATE[n]) for n in STATE))
    assert 100 < refused < 500


def test_a_byte_changed_in_the_pickle_is_refused_or_read_within_bounds(tmp_path: Path) -> None:
    pickled = pickle_of(SOUND)
    with zipfile.ZipFile(io.BytesIO(SOUND)) as file:
        records = {f"data_{i}": file.read(f"archive/data/{i}") for i in range(3)}
    assert read_whole(archive(pickled, **records), tmp_path / "x.pt") is not None
    rolls = dice.Random(1)
    refused = 0
    for _ in range(800):
        data = bytearray(pickled)
        for _ in range(rolls.choice([1, 1, 2, 4])):
            at = rolls.randrange(len(data))
            change = rolls.randrange(4)
            if change == 0:
                del data[at : at + rolls.randrange(1, 6)]
            elif change == 1:
                data[at:at] = data[rolls.randrange(len(data)) :][: rolls.randrange(1, 20)]
            else:
                data[at] = rolls.choice([data[at] ^ 1 << rolls.randrange(8), rolls.randrange(256), 255])
        refused += read_whole(archive(bytes(data), **records), tmp_path / "x.pt") is None
    assert 300 < refused < 800
