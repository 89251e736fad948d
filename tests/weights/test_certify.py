"""A conversion that is proved: both sides read again and compared, and what is wrong with the target is named."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import TINY, Altered, random

from ostro import weights
from ostro.errors import WeightsError
from ostro.model import layout
from ostro.weights import FORMATS, CastReader, Hints, RandomReader, Reader, TensorInfo, convert, open_reader, prove
from ostro.weights.certify import certify, evict
from ostro.weights.ckpt_file import CkptFile, write_ckpt
from ostro.weights.mindspore_layout import MindSporeDegrees

WRITABLE = [name for name, format in FORMATS.items() if format.write]
W2 = "model.layers.1.block_sparse_moe.experts.w2"


def sha256(reader: Reader) -> str:
    """Return the digest of all values, in the table's order, from whole tensors."""
    total = hashlib.sha256()
    for parameter in layout.parameters(reader.model):
        total.update(reader.read(parameter.name).contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("keep_fp32", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", WRITABLE)
def test_the_digest_is_that_of_what_was_meant(
    tmp_path: Path, name: str, dtype: torch.dtype | None, keep_fp32: bool
) -> None:
    made = convert(random(), tmp_path / "x", to=name, dtype=dtype, keep_fp32=keep_fp32, verify=True)
    meant = random() if dtype is None else CastReader(random(), dtype, keep_fp32=keep_fp32)
    if name == "gguf" and dtype is not None:
        meant = weights.gguf.as_stored(meant, None)  # its norms and router are fp32 in any case
    assert made.sha256 == sha256(meant) == sha256(open_reader(tmp_path / "x"))


@pytest.mark.parametrize("name", WRITABLE)
def test_one_digest_for_one_model_in_all_formats(tmp_path: Path, name: str) -> None:
    assert convert(random(), tmp_path / "x", to=name, verify=True).sha256 == sha256(random())


def test_without_verify_there_is_no_digest(tmp_path: Path) -> None:
    assert convert(random(), tmp_path / "x", to="hf").sha256 is None


@pytest.mark.parametrize("name", [name for name in WRITABLE if name != "gguf"])
def test_norms_and_router_stay_in_fp32(tmp_path: Path, name: str) -> None:
    convert(random(), tmp_path / "x", to=name, dtype=torch.bfloat16, keep_fp32=True)
    infos = open_reader(tmp_path / "x").names()
    for parameter in layout.parameters(TINY):
        is_kept = "norm" in parameter.name or "gate" in parameter.name
        assert infos[parameter.name].dtype == (torch.float32 if is_kept else torch.bfloat16), parameter.name
        kept = open_reader(tmp_path / "x").read(parameter.name)
        assert torch.equal(kept, random().read(parameter.name).to(infos[parameter.name].dtype))


# What is wrong with the target


def shift(name: str, where: Any, tensor: torch.Tensor) -> torch.Tensor:
    """Change one bit of one expert's w2."""
    if name == W2 and where and where[0] in (2, slice(2, 3)):
        tensor.view(torch.int32)[(0,) * tensor.dim()] ^= 1
    return tensor


@pytest.mark.parametrize("name", WRITABLE)
def test_a_bit_that_was_written_wrong_is_found(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    format = FORMATS[name]
    assert format.write is not None
    sound = format.write

    def write(reader: Reader, path: Path, **settings: Any) -> Any:
        return sound(Altered(reader, shift), path, **settings)

    monkeypatch.setitem(FORMATS, name, dataclasses.replace(format, write=write))
    with pytest.raises(WeightsError) as caught:
        convert(random(), tmp_path / "x", to=name, verify=True)
    assert f"{W2}[2] was read back with other values than were written" in str(caught.value)
    # Whoever looks into it finds it.
    assert not torch.equal(open_reader(tmp_path / "x").read(W2), random().read(W2))


@pytest.mark.parametrize("name", WRITABLE)
def test_a_byte_that_changed_on_the_disk_is_found(tmp_path: Path, name: str) -> None:
    """Every format, its file altered at the place where the values of a norm lie."""
    reader = Altered(random(), lambda name, where, t: t.fill_(7.25) if name == "model.norm.weight" else t)
    convert(reader, tmp_path / "x", to=name)
    assert prove(reader, tmp_path / "x", name) == sha256(reader)
    pattern = torch.full((16,), 7.25).numpy().tobytes()
    (file,) = (f for f in (tmp_path / "x").rglob("*") if f.is_file() and pattern in f.read_bytes())
    content = bytearray(file.read_bytes())
    content[content.index(pattern) + 9] ^= 0x40
    file.write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        prove(reader, tmp_path / "x", name)
    assert "model.norm.weight was read back with other values" in str(caught.value)


def test_a_target_of_another_type_is_named(tmp_path: Path) -> None:
    convert(random(), tmp_path / "x", to="hf", dtype=torch.bfloat16)
    with pytest.raises(WeightsError, match=r"model\.embed_tokens\.weight was to be .*float32.* and is .*bfloat16"):
        prove(random(), tmp_path / "x", "hf")


def test_a_target_that_is_gone_or_cut_short_is_an_error(tmp_path: Path) -> None:
    convert(random(), tmp_path / "x", to="hf")
    file = tmp_path / "x" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        prove(random(), tmp_path / "x", "hf")
    file.unlink()
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        prove(random(), tmp_path / "x", "hf")


def test_a_source_that_is_damaged_is_not_certified(tmp_path: Path) -> None:
    reader = RandomReader(dataclasses.replace(TINY, num_local_experts=4, vocab_size=20_000))
    convert(reader, tmp_path / "ranks", to="mindspore", degrees=MindSporeDegrees(dp=2))
    file = tmp_path / "ranks" / "checkpoint" / "rank_1" / "checkpoint_1.ckpt"
    data = bytearray(file.read_bytes())
    data[500_000] ^= 1  # in the embedding, of which both ranks hold a copy of more than a megabyte
    file.write_bytes(data)
    convert(open_reader(tmp_path / "ranks"), tmp_path / "unproved", to="hf")
    with pytest.raises(WeightsError, match="rank_0 and rank_1 should hold the same values of"):
        convert(tmp_path / "ranks", tmp_path / "out", to="hf", verify=True)
    assert not (tmp_path / "out").exists()


def save(path: Path, held: dict[str, torch.Tensor]) -> None:
    write_ckpt(path, {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in held.items()}, lambda name: [held[name]])


def test_the_optimizer_is_proved_too(tmp_path: Path) -> None:
    convert(random(), tmp_path / "a.ckpt", to="mindspore")
    file = CkptFile(tmp_path / "a.ckpt")
    moments = {f"adam_m.{name}": file.tensor(name).clone() for name in file.infos}
    held = {name: file.tensor(name) for name in file.infos} | moments
    save(tmp_path / "b.ckpt", held)
    source = open_reader(tmp_path / "b.ckpt", Hints(model=TINY))
    made = convert(source, tmp_path / "c", to="mindspore-gmm", optimizer=source, verify=True)
    assert made.sha256 == sha256(random())
    held["adam_m.lm_head.weight"] += 1
    save(tmp_path / "d.ckpt", held)
    other = open_reader(tmp_path / "d.ckpt", Hints(model=TINY))
    with pytest.raises(WeightsError, match=r"lm_head\.weight was read back with other values"):
        prove(other, tmp_path / "c", "mindspore-gmm", optimizer=other)


def test_a_nan_is_equal_to_itself() -> None:
    spoiled = Altered(random(), lambda name, where, t: t.fill_(float("nan")) if name == "model.norm.weight" else t)
    assert certify(spoiled, spoiled) == sha256(spoiled)


# The page cache


def test_evicting_leaves_the_files_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "inner" / "empty").mkdir(parents=True)
    (tmp_path / "inner" / "a").write_bytes(b"a" * 10_000)
    (tmp_path / "b").touch()
    for path in (tmp_path, tmp_path / "inner" / "a", tmp_path / "b", tmp_path / "inner" / "empty"):
        evict(path)
    assert (tmp_path / "inner" / "a").read_bytes() == b"a" * 10_000
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "empty", "inner"]


def test_evicting_where_the_system_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.posix_fadvise", raising=False)
    evict(tmp_path)
    evict(tmp_path / "absent")
