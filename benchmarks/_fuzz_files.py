"""Small checkpoints of every format, as files that know where their structure is."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import json
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import torch
from _mutations import WIDTHS, Field, File, encode_nodes, mutate_bytes, mutate_json, mutate_nodes, number_in, parse_nodes

from ostro.model import layout
from ostro.model.settings import ModelConfig
from ostro.weights import CastReader, Hints, RandomReader, Reader, TensorInfo, Where, ckpt_file, dcp, gguf, gguf_file
from ostro.weights import hf, mindspore, mindspore_layout, mistral
from ostro.weights.gguf_vocabulary import Vocabulary
from ostro.weights.mindspore_layout import MindSporeDegrees
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
    hints: Hints = Hints()


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


# Where the structure is


def json_file(path: Path) -> File:
    data = path.read_bytes()
    return File(data, (Field(0, len(data), "text"),), (functools.partial(mutate_json, json.loads(data)),))


def safetensors_file(path: Path) -> File:
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])

    def resealed(random: Random) -> bytes:
        text = mutate_json(header, random) if random.random() < 0.8 else mutate_bytes(*header_text, random)[1]
        return struct.pack("<Q", len(text)) + text + data[end:]

    header_text = (data[8:end], (Field(0, end - 8, "text"),))
    return File(data, (Field(0, 8, "u64"), *[Field(8, end, "text")] * 4), (resealed,))


def strategy_file(path: Path) -> File:
    cut = {1: {}, 2: {}, 3: {}, 4: {}}
    return _protobuf_file(path, {2: {2: {2: {}}}, 3: {2: cut}})


def ckpt_file_(path: Path) -> File:
    return _protobuf_file(path, {1: {2: {}}}, mark=b"crc_num", is_content=lambda depth, number: (depth, number) == (2, 3))


def _protobuf_file(
    path: Path, schema: Any, mark: bytes = b"", is_content: Callable[[int, int], bool] = lambda depth, number: False
) -> File:
    data = path.read_bytes()
    end = data.rfind(mark) if mark and mark in data else len(data)
    fields: list[Field] = [] if end == len(data) else [Field(end, len(data), "bytes")]

    def walk(at: int, stop: int, inner: Any, depth: int) -> None:
        while at < stop:
            numbers = []
            for _ in range(2):
                after = at + 1
                while data[after - 1] & 0x80:
                    after += 1
                numbers.append(Field(at, after, "varint"))
                at = after
            fields.extend(numbers)
            key, value = (number_in(data, field) for field in numbers)
            if key & 7 == 2:
                if key >> 3 in inner:
                    walk(at, at + value, inner[key >> 3], depth + 1)
                elif value and not is_content(depth, key >> 3):
                    fields.append(Field(at, at + value, "text"))
                at += value

    walk(0, end, schema, 0)
    nodes = parse_nodes(data[:end], schema)
    assert encode_nodes(nodes) == data[:end]
    return File(data, tuple(fields), (lambda random: mutate_nodes(nodes, random) + data[end:],))


def gguf_file_(path: Path) -> File:
    data = path.read_bytes()
    fields: list[Field] = [Field(0, 4, "bytes")]
    at = 4

    def take(kind: str, size: int = 0) -> int:
        nonlocal at
        fields.append(Field(at, at + (size or WIDTHS[kind]), kind))
        at = fields[-1].stop
        return number_in(data, fields[-1])

    def text() -> None:
        size = take("u64")
        if size:
            take("text", size)

    def value(kind: int) -> None:
        if kind == 8:
            text()
        elif kind == 9:
            inner, count = take("u32"), take("u64")
            for _ in range(count):
                value(inner)
        else:
            take({1: "u8", 2: "u16", 4: "u32", 8: "u64"}[struct.calcsize("<" + _GGUF_CODES[kind])])

    take("u32")
    num_tensors, num_pairs = take("u64"), take("u64")
    marks = [at]
    for _ in range(num_pairs):
        text()
        value(take("u32"))
        marks.append(at)
    first_info = len(marks) - 1
    for _ in range(num_tensors):
        text()
        for _ in range(take("u32")):
            take("u64")
        take("u32")
        take("u64")
        marks.append(at)
    return File(data, tuple(fields), (functools.partial(_mutate_gguf, data, marks, first_info),))


_GGUF_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def _mutate_gguf(data: bytes, marks: list[int], first_info: int, random: Random) -> bytes:
    """Remove, double or swap whole keys or tensors; the counts and the padding fit."""
    records = [data[a:b] for a, b in zip(marks, marks[1:])]
    pairs, infos = records[:first_info], records[first_info:]
    start = -(-marks[-1] // gguf_file.ALIGNMENT) * gguf_file.ALIGNMENT
    chosen = random.choice((pairs, pairs, infos))
    a, b = random.randrange(len(chosen)), random.randrange(len(chosen))
    kind = random.choice(("remove", "double", "swap", "crop"))
    if kind == "remove":
        del chosen[a]
    elif kind == "double":
        chosen.insert(b, chosen[a])
    elif kind == "swap":
        chosen[a], chosen[b] = chosen[b], chosen[a]
    else:  # the head of one with the tail of another
        cut = random.randrange(len(chosen[a]))
        chosen[a] = chosen[a][:cut] + chosen[b][cut:]
    header = data[:8] + struct.pack("<QQ", len(infos), len(pairs)) + b"".join(pairs + infos)
    return header + bytes(-len(header) % gguf_file.ALIGNMENT) + data[start:]


def pickle_fields(data: bytes, at: int = 0) -> list[Field]:
    """Return the opcodes of a pickle and the numbers, lengths and texts behind them."""
    fields = []
    ops = [(opcode, position) for opcode, _, position in pickletools.genops(data)]
    for (opcode, position), stop in zip(ops, [*(position for _, position in ops[1:]), len(data)]):
        fields.append(Field(at + position, at + position + 1, "opcode"))
        begin = position + 1
        width = next((width for names, width in _PICKLE_WIDTHS.items() if opcode.name in names.split()), None)
        if width:
            fields.append(Field(at + begin, at + begin + WIDTHS[width], width))
            begin += WIDTHS[width]
        if begin < stop:
            fields.append(Field(at + begin, at + stop, "text"))
    return fields


_PICKLE_WIDTHS = {
    "BININT1 BINPUT BINGET SHORT_BINUNICODE SHORT_BINBYTES LONG1 PROTO": "u8",
    "BININT2": "u16",
    "BININT LONG_BINPUT LONG_BINGET BINUNICODE BINBYTES": "u32",
    "FRAME": "u64",
}


def zip_fields(data: bytes, at: int = 0, size: int | None = None) -> list[Field]:
    """Return the headers, the directory and the description of an archive of torch.save's; no values."""
    stop = len(data) if size is None else at + size
    with zipfile.ZipFile(io.BytesIO(data[at:stop])) as archive:
        entries, directory = archive.infolist(), archive.start_dir
    fields: list[Field] = []
    for entry in entries:
        begin = at + entry.header_offset
        name_size, extra_size = struct.unpack("<HH", data[begin + 26 : begin + 30])
        fields += _struct_fields(begin, "4HHHHHIIIHH")
        content = begin + 30 + name_size + extra_size
        fields.append(Field(begin + 30, content, "text"))
        end = content + entry.file_size
        if not entry.filename.partition("/")[2].startswith("data/"):
            found = data[content:end]
            fields += pickle_fields(found, content) if entry.filename.endswith(".pkl") else [Field(content, end, "text")]
        if data[end : end + 4] == b"PK\7\x08":
            fields += _struct_fields(end, "4III")
    begin = at + directory
    for _ in entries:
        name_size, extra_size, comment_size = struct.unpack("<HHH", data[begin + 28 : begin + 34])
        fields += _struct_fields(begin, "4HHHHHHIIIHHHHHII")
        stop_name = begin + 46 + name_size + extra_size + comment_size
        fields.append(Field(begin + 46, stop_name, "text"))
        begin = stop_name
    if data[begin : begin + 4] == b"PK\6\6":
        fields += _struct_fields(begin, "4QHHIIQQQQ4IQI")
        begin += 76
    return [field for field in fields + _struct_fields(begin, "4HHHHIIH") if field.stop <= stop and field.start < field.stop]


def _struct_fields(at: int, codes: str) -> list[Field]:
    fields = []
    for code in codes:
        size, kind = {"4": (4, "bytes"), "H": (2, "u16"), "I": (4, "u32"), "Q": (8, "u64")}[code]
        fields.append(Field(at, at + size, kind))
        at += size
    return fields


def torch_file(path: Path) -> File:
    """Describe a file of torch.save's; changed inside, its pickle has another checksum in a new archive."""
    data = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]

    def resealed(random: Random) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, content in records:
                is_pickle = name.endswith("/data.pkl")
                archive.writestr(
                    zipfile.ZipInfo(name),
                    mutate_bytes(content, tuple(pickle_fields(content)), random)[1] if is_pickle else content,
                )
        return out.getvalue()

    return File(data, tuple(zip_fields(data)), (resealed,))


def distcp_file(path: Path) -> File:
    """Describe DCP's file of many small archives; changed inside, a pickle keeps its length and has its checksum."""
    from torch.distributed.checkpoint import FileSystemReader

    data = path.read_bytes()
    found = FileSystemReader(path.parent).read_metadata().storage_data.values()
    spans = sorted((info.offset, info.length) for info in found if info.relative_path == path.name)
    fields = [zip_fields(data, offset, length) for offset, length in spans]

    def resealed(random: Random) -> bytes:
        offset, length = random.choice(spans)
        item = data[offset : offset + length]
        with zipfile.ZipFile(io.BytesIO(item)) as archive:
            pickled = next(archive.read(entry) for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
        new = mutate_bytes(pickled, tuple(pickle_fields(pickled)), random)[1][: len(pickled)]
        new += bytes(len(pickled) - len(new))
        item = item.replace(pickled, new)
        old_crc, crc = (zlib.crc32(content).to_bytes(4, "little") for content in (pickled, new))
        return data[:offset] + item.replace(old_crc, crc) + data[offset + length :]

    return File(data, tuple(field for item in fields for field in item), (resealed,))


def metadata_file(path: Path) -> File:
    data = path.read_bytes()
    return File(data, tuple(pickle_fields(data)), (functools.partial(_mutate_metadata, data),))


def _mutate_metadata(data: bytes, random: Random) -> bytes:
    """Change one thing that DCP's metadata say, and pickle them again."""
    metadata = pickle.loads(data)  # our own file
    entries, storage = metadata.state_dict_metadata, metadata.storage_data
    name, index = random.choice(list(entries)), random.choice(list(storage))
    chunk = random.choice(entries[name].chunks)
    kind = random.choice(("offsets", "sizes", "size", "dtype", "rename", "storage", "chunks", "index", "swap", "remove"))
    odd = random.choice((-1, 0, 1, 2, 3, 1 << 31, 1 << 62, (1 << 63) - 1))
    if kind in ("offsets", "sizes", "size"):
        holder = entries[name] if kind == "size" else chunk
        values = list(getattr(holder, kind))
        if values:
            values[random.randrange(len(values))] = odd
        setattr(holder, kind, torch.Size(values))
    elif kind == "dtype":
        dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.complex64]
        object.__setattr__(entries[name].properties, "dtype", random.choice(dtypes))
    elif kind == "rename":
        new = random.choice([*entries, name + ".x", name.replace(".0.", ".1."), name.removeprefix("model."), ""])
        entries[new] = entries.pop(name)
    elif kind == "storage":
        attribute = random.choice(("offset", "length", "relative_path"))
        other = storage[random.choice(list(storage))]
        old = getattr(storage[index], attribute)
        new = [getattr(other, attribute), odd if attribute != "relative_path" else "../x", old + old]
        storage[index] = copy.copy(storage[index])
        object.__setattr__(storage[index], attribute, random.choice(new))
    elif kind == "chunks":
        other = random.choice(entries[name].chunks)
        chunk.offsets, chunk.sizes = random.choice(((other.offsets, chunk.sizes), (other.offsets, other.sizes)))
    elif kind == "index":
        other = random.choice(list(storage))
        storage[dataclasses.replace(index, offset=other.offset)] = storage.pop(index)
    elif kind == "swap":
        other = random.choice(list(storage))
        storage[index], storage[other] = storage[other], storage[index]
    else:
        holder, key = random.choice(((entries, name), (storage, index)))
        del holder[key]
    return pickle.dumps(metadata)


# The checkpoints


def _hf_single(folder: Path) -> Sample:
    hf.write(_source(dtype=torch.bfloat16), folder / "a")
    return _sample(folder / "a", {"config.json": json_file, "*.safetensors": safetensors_file})


def _hf_sharded(folder: Path) -> Sample:
    hf.write(_source(), folder / "a", max_shard_bytes=6_000)
    return _sample(folder / "a", {"config.json": json_file, "*.index.json": json_file, "*.safetensors": safetensors_file})


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


def _dcp_train(folder: Path) -> Sample:
    source = _source(ONE_LAYER)
    tensors = {f"model.{p.name}": source.read(p.name).clone() for p in layout.parameters(ONE_LAYER)}
    tensors["optim.step"] = torch.tensor(3.0)
    dcp.save(folder / "checkpoints" / "step-00000100", tensors, {"model": ONE_LAYER.as_fields(), "step": 100})
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
    "dcp-train": _dcp_train,
    "gguf-f32": functools.partial(_gguf, quantization="f32"),
    "gguf-bf16": functools.partial(_gguf, quantization="bf16"),
    "gguf-q8_0": functools.partial(_gguf, quantization="q8_0", model=WIDE),
}
