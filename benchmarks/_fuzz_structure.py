"""Where each format of checkpoints has its structure, and how to change it so that what covers a change still fits."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import itertools
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from _mutations import (
    WIDTHS,
    Field,
    File,
    encode_nodes,
    mutate_bytes,
    mutate_json,
    mutate_nodes,
    number_in,
    parse_nodes,
)

from ostro.weights.gguf_file import ALIGNMENT


def json_file(path: Path) -> File:
    data = path.read_bytes()
    return File(data, (Field(0, len(data), "text"),), (functools.partial(mutate_json, data),))


def safetensors_file(path: Path) -> File:
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = data[8:end]

    def resealed(random: Random) -> bytes:
        text = mutate_json(header, random) if random.random() < 0.8 else mutate_bytes(*header_text, random)[1]
        return struct.pack("<Q", len(text)) + text + data[end:]

    header_text = (header, (Field(0, end - 8, "text"),))
    return File(data, (Field(0, 8, "u64"), *[Field(8, end, "text")] * 4), (resealed,))


def strategy_file(path: Path) -> File:
    cut = {1: {}, 2: {}, 3: {}, 4: {}}
    return _protobuf_file(path, {2: {2: {2: {}}}, 3: {2: cut}})


def ckpt_file_(path: Path) -> File:
    return _protobuf_file(
        path, {1: {2: {}}}, mark=b"crc_num", is_content=lambda depth, number: (depth, number) == (2, 3)
    )


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
    records = [data[a:b] for a, b in itertools.pairwise(marks)]
    pairs, infos = records[:first_info], records[first_info:]
    start = -(-marks[-1] // ALIGNMENT) * ALIGNMENT
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
    return header + bytes(-len(header) % ALIGNMENT) + data[start:]


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
            fields += (
                pickle_fields(found, content) if entry.filename.endswith(".pkl") else [Field(content, end, "text")]
            )
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
    return [
        field for field in fields + _struct_fields(begin, "4HHHHIIH") if field.stop <= stop and field.start < field.stop
    ]


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
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name, pickled = next((name, content) for name, content in records.items() if name.endswith("/data.pkl"))
    fields = tuple(pickle_fields(pickled))

    def resealed(random: Random) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for other, content in (records | {name: mutate_bytes(pickled, fields, random)[1]}).items():
                archive.writestr(zipfile.ZipInfo(other), content)
        return out.getvalue()

    return File(data, tuple(zip_fields(data)), (resealed,))


def distcp_file(path: Path) -> File:
    """Describe DCP's file of many small archives; changed inside, a pickle keeps its length and has its checksum."""
    from torch.distributed.checkpoint import FileSystemReader

    data = path.read_bytes()
    found = FileSystemReader(path.parent).read_metadata().storage_data.values()
    spans = sorted((info.offset, info.length) for info in found if info.relative_path == path.name)
    fields = [zip_fields(data, offset, length) for offset, length in spans]
    pickles = [_pickle_in(data[offset : offset + length]) for offset, length in spans]

    def resealed(random: Random) -> bytes:
        at = random.randrange(len(spans))
        (offset, length), (pickled, inner) = spans[at], pickles[at]
        new = mutate_bytes(pickled, inner, random)[1][: len(pickled)]
        new += bytes(len(pickled) - len(new))
        old_crc, crc = (zlib.crc32(content).to_bytes(4, "little") for content in (pickled, new))
        item = data[offset : offset + length].replace(pickled, new).replace(old_crc, crc)
        return data[:offset] + item + data[offset + length :]

    return File(data, tuple(field for item in fields for field in item), (resealed,))


def _pickle_in(item: bytes) -> tuple[bytes, tuple[Field, ...]]:
    with zipfile.ZipFile(io.BytesIO(item)) as archive:
        pickled = next(archive.read(entry) for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
    return pickled, tuple(pickle_fields(pickled))


def metadata_file(path: Path) -> File:
    data = path.read_bytes()
    return File(data, tuple(pickle_fields(data)), (functools.partial(_mutate_metadata, data),))


def _mutate_metadata(data: bytes, random: Random) -> bytes:
    """Change one thing that DCP's metadata say, and pickle them again."""
    metadata = pickle.loads(data)  # our own file
    entries, storage = metadata.state_dict_metadata, metadata.storage_data
    name, index = random.choice(list(entries)), random.choice(list(storage))
    chunk = random.choice(entries[name].chunks)
    kind = random.choice(("offsets", "sizes", "size", "dtype", "rename", "storage", "chunks", "move", "swap", "remove"))
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
    elif kind == "move":  # a piece, consistently
        places = [random.choice((0, 0, 1, 2)) + at for at in index.offset]
        for one in entries[index.fqn].chunks:
            one.offsets = torch.Size(places) if one.offsets == index.offset else one.offsets
        storage[dataclasses.replace(index, offset=torch.Size(places))] = storage.pop(index)
    elif kind == "swap":
        other = random.choice(list(storage))
        storage[index], storage[other] = storage[other], storage[index]
    else:
        holder, key = random.choice(((entries, name), (storage, index)))
        del holder[key]
    return pickle.dumps(metadata)
