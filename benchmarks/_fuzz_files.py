"""Small checkpoints of every format, as files that know where their structure is."""

from __future__ import annotations

import dataclasses
import functools
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from _fuzz_structure import (
    ckpt_file_,
    distcp_file,
    gguf_file_,
    json_file,
    metadata_file,
    safetensors_file,
    strategy_file,
    torch_file,
)
from _mutations import File

from ostro.degrees import Degrees
from ostro.model import layout
from ostro.model.settings import ModelConfig
from ostro.weights import (
    CastReader,
    Hints,
    RandomReader,
    Reader,
    TensorInfo,
    Where,
    ckpt_file,
    dcp,
    gguf,
    hf,
    mindspore,
    mindspore_layout,
    mistral,
)
from ostro.weights.gguf_vocabulary import Vocabulary
from ostro.weights.mindspore_layout import MindSporeDegrees
from ostro.weights.parts import hold
from ostro.weights.saver import Saver
from ostro.weights.store import NO_HINTS
from ostro.weights.strategy import read_strategies, write_merged

MODEL = ModelConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=2,
    max_position_embeddings=64,
    initializer_range=0.3,
)
WIDE = dataclasses.replace(MODEL, hidden_size=32, intermediate_size=32)  # rows of whole blocks
ONE_LAYER = dataclasses.replace(MODEL, num_hidden_layers=1)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A sound checkpoint: the files to damage, those to leave alone, and what is opened of the folder."""

    files: dict[str, File]
    others: dict[str, bytes]
    path: str = "."
    hints: Hints = NO_HINTS


def _source(model: ModelConfig = MODEL, dtype: torch.dtype = torch.float32) -> Reader:
    return CastReader(_Uneven(RandomReader(model)), dtype)


@dataclasses.dataclass(frozen=True)
class _Uneven:
    """Random weights whose norms are no ones: each value has to come from its own place."""

    source: RandomReader

    format = "random"
    notes = ()

    @property
    def model(self) -> ModelConfig:
        return self.source.model

    def names(self) -> dict[str, TensorInfo]:
        return self.source.names()

    def read(self, name: str, where: Where = ()) -> torch.Tensor:
        shape = self.names()[name].shape
        if len(shape) > 1:
            return self.source.read(name, where)
        return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))[where]


def _sample(folder: Path, targets: dict[str, Callable[[Path], File]], path: str = ".", **hints: Any) -> Sample:
    """Gather a folder's files: those that match a pattern of `targets`, and the others as they are."""
    files = {}
    for pattern, describe in targets.items():
        found = sorted(folder.glob(pattern))
        assert found, pattern
        files |= {file.relative_to(folder).as_posix(): describe(file) for file in found}
    every = (file for file in sorted(folder.rglob("*")) if file.is_file())
    others = {file.relative_to(folder).as_posix(): file.read_bytes() for file in every}
    return Sample(files, {name: data for name, data in others.items() if name not in files}, path, Hints(**hints))


def _hf_single(folder: Path) -> Sample:
    hf.write(_source(dtype=torch.bfloat16), folder / "a")
    return _sample(folder / "a", {"config.json": json_file, "*.safetensors": safetensors_file})


def _hf_sharded(folder: Path) -> Sample:
    hf.write(_source(), folder / "a", max_shard_bytes=6_000)
    return _sample(
        folder / "a", {"config.json": json_file, "*.index.json": json_file, "*.safetensors": safetensors_file}
    )


def _hf_bin(folder: Path) -> Sample:
    hf.write(_source(dtype=torch.float16), folder / "a")
    single = folder / "a" / "model.safetensors"
    opened = hf.open_file(single)
    torch.save({name: opened.tensor(name).clone() for name in opened.infos}, folder / "a" / "pytorch_model.bin")
    single.unlink()
    return _sample(folder / "a", {"config.json": json_file, "pytorch_model.bin": torch_file})


def _mistral(folder: Path) -> Sample:
    mistral.write(_source(dtype=torch.bfloat16), folder / "a")
    return _sample(folder / "a", {"params.json": json_file, "*.safetensors": safetensors_file})


def _mistral_pth(folder: Path) -> Sample:
    mistral.write(_source(dtype=torch.bfloat16), folder / "a")
    single = folder / "a" / "consolidated.safetensors"
    opened = hf.open_file(single)
    torch.save({name: opened.tensor(name).clone() for name in opened.infos}, folder / "a" / "consolidated.00.pth")
    single.unlink()
    return _sample(folder / "a", {"params.json": json_file, "consolidated.00.pth": torch_file})


def _mindspore(folder: Path, *, is_gmm: bool = False) -> Sample:
    """One .ckpt with tensors in several records, moments, scalars, strings and a checksum."""
    mindspore.write(_source(), folder / "a", is_gmm=is_gmm)
    file = folder / "a" / "mixtral.ckpt"
    opened = ckpt_file.CkptFile(file)
    held = {name: opened.tensor(name).clone() for name in opened.infos}
    held |= {f"adam_m.{name}": tensor + 1 for name, tensor in held.items() if "wq" in name or "norm" in name}
    held["global_step"] = torch.tensor([7], dtype=torch.int32)
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in held.items()}
    scalars = {"epoch_num": 3, "learning_rate": 0.25, "network": "Mixtral", "is_sink": True}
    with mock.patch.object(ckpt_file, "RECORD_BYTES", 700):
        ckpt_file.write_ckpt(file, infos, lambda name: [held[name]], scalars=scalars, crc=True)
    return _sample(folder / "a", {"config.json": json_file, "*.ckpt": ckpt_file_})


def _mindspore_safetensors(folder: Path) -> Sample:
    (folder / "a").mkdir()
    mindspore.write(_source(), folder / "a" / "mixtral.safetensors")
    return _sample(folder / "a", {"*.safetensors": safetensors_file}, "mixtral.safetensors", model=MODEL)


def _mindspore_ranks(folder: Path) -> Sample:
    degrees = MindSporeDegrees(dp=2, tp=2, ep=2, opt=1)
    with mock.patch.object(mindspore_layout, "_OPT_THRESHOLD_BYTES", 0):
        mindspore.write(_source(), folder / "a", degrees=degrees)
    targets = {"config.json": json_file, "strategy/*.ckpt": strategy_file, "checkpoint/*/*.ckpt": ckpt_file_}
    return _sample(folder / "a", targets)


def _mindspore_json(folder: Path) -> Sample:
    """Two stages, and one merged strategy file in JSON."""
    mindspore.write(_source(), folder / "a", degrees=MindSporeDegrees(dp=2, ep=2, pp=2))
    place = folder / "a" / "strategy"
    found = read_strategies(place)
    for file in list(place.iterdir()):
        file.unlink()
    write_merged(place / "merged.json", found)
    targets = {"config.json": json_file, "strategy/*.json": json_file, "checkpoint/*/*.ckpt": ckpt_file_}
    return _sample(folder / "a", targets)


_DCP_TARGETS = {".metadata": metadata_file, "state.json": json_file, "*.distcp": distcp_file}


def _dcp(folder: Path) -> Sample:
    dcp.write(_source(ONE_LAYER, torch.bfloat16), folder / "a")
    return _sample(folder / "a", _DCP_TARGETS)


def _dcp_sharded(folder: Path) -> Sample:
    """Rows on four ranks, whose places DCP pickles once, for the piece and for where it is stored."""
    dcp.write(_source(ONE_LAYER), folder / "a", degrees=Degrees(fsdp=4))
    file = folder / "a" / ".metadata"
    metadata = pickle.loads(file.read_bytes())  # our own file
    for index in list(metadata.storage_data):
        for chunk in metadata.state_dict_metadata[index.fqn].chunks:
            if chunk.offsets == index.offset:
                stored = metadata.storage_data.pop(index)
                metadata.storage_data[dataclasses.replace(index, offset=chunk.offsets)] = stored
    file.write_bytes(pickle.dumps(metadata))
    return _sample(folder / "a", _DCP_TARGETS)


def _dcp_train(folder: Path) -> Sample:
    source = _source(ONE_LAYER)
    tensors = {f"model.{p.name}": source.read(p.name).clone() for p in layout.parameters(ONE_LAYER)}
    tensors["optim.step"] = torch.tensor(3.0)
    saver = Saver(folder / "checkpoints", keep=1)
    saver.save(100, hold(tensors), {"model": ONE_LAYER.as_fields(), "step": 100})
    assert [saved.error for saved in saver.finish()] == [None]
    place = "checkpoints/step-00000100/"
    return _sample(folder, {place + name: describe for name, describe in _DCP_TARGETS.items()})


def _gguf(folder: Path, quantization: str, model: ModelConfig = MODEL) -> Sample:
    pieces = [f"piece {at}" for at in range(model.vocab_size - 2)]
    ids = {"bos": 1, "eos": 2, "unk": 0}
    vocabulary = Vocabulary(pieces, [-float(at) for at in range(len(pieces))], [1] * len(pieces), ids, True, "{{ x }}")
    with mock.patch.object(gguf, "vocabulary_of", return_value=(vocabulary, [])):
        gguf.write(_source(model, torch.bfloat16), folder / "a", quantization=quantization)
    return _sample(folder / "a", {"*.gguf": gguf_file_})


SAMPLES: dict[str, Callable[[Path], Sample]] = {
    "hf": _hf_single,
    "hf-sharded": _hf_sharded,
    "hf-bin": _hf_bin,
    "mistral": _mistral,
    "mistral-pth": _mistral_pth,
    "mindspore": _mindspore,
    "mindspore-gmm": functools.partial(_mindspore, is_gmm=True),
    "mindspore-safetensors": _mindspore_safetensors,
    "mindspore-ranks": _mindspore_ranks,
    "mindspore-ranks-json": _mindspore_json,
    "dcp": _dcp,
    "dcp-sharded": _dcp_sharded,
    "dcp-train": _dcp_train,
    "gguf-f32": functools.partial(_gguf, quantization="f32"),
    "gguf-bf16": functools.partial(_gguf, quantization="bf16"),
    "gguf-q8_0": functools.partial(_gguf, quantization="q8_0", model=WIDE),
}
