"""One .safetensors file, against the safetensors library and against damage."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ostro.errors import WeightsError
from ostro.weights.safetensors_file import DTYPES, SafetensorsFile, write_file
from ostro.weights.store import TensorInfo

TENSORS = {word: torch.arange(24).remainder(2).to(dtype).reshape(2, 3, 4) for word, dtype in DTYPES.items()} | {
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "negative": -torch.rand(5),
}


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_file(path, infos, lambda name: [tensors[name]])
    return path


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    theirs = load_file(write(tmp_path / "x.safetensors", TENSORS))
    assert theirs.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert theirs[name].dtype == tensor.dtype
        assert torch.equal(theirs[name], tensor)
    with (tmp_path / "x.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        assert length % 8 == 0
        assert json.loads(file.read(length))["__metadata__"] == {"format": "pt"}


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    for name, tensor in TENSORS.items():
        assert file.infos[name] == TensorInfo(tuple(tensor.shape), tensor.dtype)
        assert torch.equal(file.tensor(name), tensor)


def test_tensors_are_views_of_the_file_and_never_change_it(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": torch.rand(64, 8)})
    before = path.read_bytes()
    file = SafetensorsFile(path)
    assert file.tensor("a").data_ptr() == file.tensor("a").data_ptr()
    assert file.tensor("a")[5].data_ptr() == file.tensor("a").data_ptr() + 5 * 8 * 4
    file.tensor("a").fill_(1.0)
    assert path.read_bytes() == before


def test_a_slice_touches_its_own_pages_alone(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    rows = 1 << 22  # 64 GiB of float32, none of it on the disk
    header = json.dumps({"a": {"dtype": "F32", "shape": [rows, 4096], "data_offsets": [0, rows * 16384]}}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + rows * 16384)
    assert SafetensorsFile(path).tensor("a")[rows - 1].sum() == 0


def test_a_header_that_is_not_padded_can_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": torch.rand(6), "b": torch.rand(2).bfloat16()})
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].rstrip()
    header += b" " * ((3 - len(header)) % 4)  # the data starts 3 bytes off
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    file = SafetensorsFile(path)
    assert file._start % 4 == 3
    assert torch.equal(file.tensor("a"), load_file(path)["a"])
    assert torch.equal(file.tensor("b"), load_file(path)["b"])


def entry(dtype="F32", shape=(4,), offsets=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def file_of(header: object, data: bytes = b"\0" * 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


DAMAGED = {
    "empty": (b"", "has 0 bytes, too few"),
    "no header": (b"\x01\0\0", "has 3 bytes, too few"),
    "an endless header": (b"\xff" * 32, "announces a header of 18446744073709551615 bytes"),
    "cut in the header": (file_of({"a": entry()})[:20], "announces a header of"),
    "no JSON": (file_of(b"{'a'"), "header that is not sound JSON"),
    "not UTF-8": (file_of(b'{"\xff\xfe": 1}'), "header that is not sound JSON"),
    "nested too deep": (file_of(b"[" * 100_000), "header that is not sound JSON"),
    "a list": (file_of([1]), "not a JSON object"),
    "a name twice": (
        file_of(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2)),
        "a stands there twice",
    ),
    "no entry": (file_of({"a": 3}), "describes a without a sound shape"),
    "a negative size": (file_of({"a": entry(shape=(-4,))}), "describes a without a sound shape"),
    "a broken size": (file_of({"a": entry(shape=(4.0,))}), "describes a without a sound shape"),
    "one offset": (file_of({"a": entry(offsets=(0,))}), "describes a without a sound shape"),
    "an unknown dtype": (file_of({"a": entry(dtype="F4")}), "holds a as 'F4'; Ostro reads F64, F32"),
    "a dtype that is a list": (file_of({"a": entry(dtype=["F32"])}), "holds a as \\['F32'\\]"),
    "a wrong size": (file_of({"a": entry(shape=(5,))}), "gives a 16 bytes, its shape .5. as F32 takes 20"),
    "an endless shape": (file_of({"a": entry(shape=(10**18, 10**18))}), "gives a 16 bytes"),
    "reversed offsets": (file_of({"a": entry(offsets=(16, 0))}), "gives a -16 bytes"),
    "a gap": (
        file_of({"a": entry(offsets=(16, 32))}, b"\0" * 32),
        "puts a at byte 16, the one before it ends at 0",
    ),
    "an overlap": (
        file_of({"a": entry(), "b": entry(offsets=(8, 24))}, b"\0" * 24),
        "puts b at byte 8, the one before it ends at 16",
    ),
    "truncated": (
        file_of({"a": entry()}, b"\0" * 15),
        "is truncated: .* describes 16 bytes of tensors, 15 are there",
    ),
    "too long": (file_of({"a": entry()}, b"\0" * 17), "has 1 bytes that no tensor"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_one_sentence(tmp_path: Path, what: str) -> None:
    content, sentence = DAMAGED[what]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=sentence) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(WeightsError, match="cannot be read"):
            SafetensorsFile(path)
