"""Ways to damage a file where it says what it holds: its lengths, tags, names, types, offsets.

A `File` knows its structural fields, and may know how to be changed so that what surrounds the change (a length, a
checksum) still fits it: only such a change gets past the first gate of a reader. Every draw comes from the
`random.Random` that is given.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import pickletools
import re
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

WIDTHS = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}
_WORD = re.compile(rb"[A-Za-z_][\w.-]{2,}")
_HUGE = (0, 1, 1 << 7, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


class Field(NamedTuple):
    """Structural bytes of a file: a number (u8 to u64, little-endian, or varint), text, or bytes of another kind."""

    start: int
    stop: int
    kind: str


Resealed = Callable[[Random], bytes]
"""Gives the whole file with a change inside, and whatever covers the change made to fit it."""


@dataclasses.dataclass(frozen=True)
class File:
    """A sound file, the fields of its structure, and how to change it from inside."""

    data: bytes
    fields: tuple[Field, ...]
    resealed: tuple[Resealed, ...] = ()

    @functools.cached_property
    def num_bytes(self) -> int:
        """The bytes of its structure."""
        return sum(field.stop - field.start for field in self.fields)


class Mutation(NamedTuple):
    """What was done, and the files that differ by it; None for one that was removed."""

    what: str
    changed: dict[str, bytes | None]


def mutate(files: dict[str, File], random: Random) -> Mutation:
    """Return one mutation of one file, or of the folder; something always differs."""
    while True:
        if len(files) > 1 and random.random() < 0.04:
            mutation = _mutate_folder(files, random)
        else:
            (name,) = random.choices(list(files), [math.sqrt(file.num_bytes) for file in files.values()])
            file = files[name]
            if file.resealed and random.random() < 0.4:
                kind, data = "resealed", random.choice(file.resealed)(random)
            else:
                kind, data = mutate_bytes(file.data, file.fields, random)
            mutation = Mutation(f"{kind} in {name}", {name: data})
        if any(files[name].data != data for name, data in mutation.changed.items()):
            return mutation


def _mutate_folder(files: dict[str, File], random: Random) -> Mutation:
    a, b = random.sample(list(files), 2)
    kind = random.choice(("swap", "remove", "empty", "copy"))
    if kind == "swap":
        return Mutation(f"{a} and {b} swapped", {a: files[b].data, b: files[a].data})
    if kind == "copy":
        return Mutation(f"{b} in the place of {a}", {a: files[b].data})
    return Mutation(f"{kind} {a}", {a: None if kind == "remove" else b""})


def mutate_bytes(data: bytes, fields: tuple[Field, ...], random: Random) -> tuple[str, bytes]:
    """Return a kind's name and the bytes changed so, somewhere in the fields; truncation is anywhere."""
    kind = random.choice(list(_KINDS))
    return kind, _KINDS[kind](data, fields, random)


def _at(fields: tuple[Field, ...], random: Random) -> int:
    field = random.choice(fields)
    return random.randrange(field.start, max(field.stop, field.start + 1))


def _flip(data: bytes, fields: tuple[Field, ...], random: Random) -> bytes:
    at = _at(fields, random)
    return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]


def _set(data: bytes, fields: tuple[Field, ...], random: Random) -> bytes:
    at = _at(fields, random)
    field = random.choice([f for f in fields if f.start <= at < f.stop] or [fields[0]])
    values = [b"\0", b"\xff", bytes([random.randrange(256)])]
    if field.kind == "opcode":
        values = [random.choice(_OPCODES)]
    elif field.kind == "text":
        values.append(bytes([random.choice(b'0123456789{}[]",:.-+eE \\\n')]))
    return data[:at] + random.choice(values) + data[at + 1 :]


def _number(data: bytes, fields: tuple[Field, ...], random: Random) -> bytes:
    """Change a length, a count, an offset: by one, to a huge one, or to the same of another field."""
    numbers = [field for field in fields if field.kind in WIDTHS or field.kind == "varint"]
    if not numbers:
        return _digits(data, fields, random)
    field = random.choice(numbers)
    value = number_in(data, field)
    others = [number_in(data, random.choice(numbers)), len(data), random.randrange(1 << 16)]
    return replaced(data, field, random.choice([value - 1, value + 1, *random.sample(_HUGE, 3), *others]))


def _digits(data: bytes, fields: tuple[Field, ...], random: Random) -> bytes:
    """Change a number that is written in digits."""
    text = random.choice(fields)
    found = list(re.finditer(rb"\d+", data[text.start : text.stop]))
    if not found:
        return data
    match = random.choice(found)
    value = int(match[0])
    new = random.choice([value - 1, value + 1, random.choice(_HUGE), -value, int(random.choice(found)[0])])
    return data[: text.start + match.start()] + str(new).encode() + data[text.start + match.end() :]


def _swap(data: bytes, fields: tuple[Field, ...], random: Random) -> bytes:
    """Swap two fields of a kind, or two runs of the same length within one."""
    a = random.choice(fields)
    b = random.choice([field for field in fields if field.kind == a.kind])
    if a == b:
        length = random.randint(1, max(1, min(16, (a.stop - a.start) // 2)))
        starts = sorted(random.randint(a.start, max(a.start, a.stop - length)) for _ in range(2))
        a, b = (Field(start, start + length, a.kind) for start in starts)
    first, second = sorted((a, b))
    if first.stop > second.start:
        return data
    return (
        data[: first.start]
        + data[second.start : second.stop]
        + data[first.stop : second.start]
        + data[first.start : first.stop]
        + data[second.stop :]
    )


def _delete(data: bytes, fields: tuple[Field, ...], random: Random) -> bytes:
    start, stop = _span(fields, random)
    return data[:start] + data[stop:]


def _duplicate(data: bytes, fields: tuple[Field, ...], random: Random) -> bytes:
    start, stop = _span(fields, random)
    return data[:stop] + data[start:stop] + data[stop:]


def _insert(data: bytes, fields: tuple[Field, ...], random: Random) -> bytes:
    at = _at(fields, random)
    start, stop = _span(fields, random)
    new = random.choice([bytes(random.randrange(1, 9)), random.randbytes(random.randrange(1, 9)), data[start:stop]])
    return data[:at] + new + data[at:]


def _span(fields: tuple[Field, ...], random: Random) -> tuple[int, int]:
    """Return a whole field, or a run of bytes from within one."""
    if random.random() < 0.3:
        field = random.choice(fields)
        return field.start, min(field.stop, field.start + 4096)
    start = _at(fields, random)
    return start, start + random.choice((1, 1, 2, 4, 8, random.randrange(1, 64)))


def _truncate(data: bytes, fields: tuple[Field, ...], random: Random) -> bytes:
    stop = random.choice([random.randrange(len(data)), len(data) - random.randint(1, 16), _at(fields, random)])
    return data[: max(0, stop)]


def _word(data: bytes, fields: tuple[Field, ...], random: Random) -> bytes:
    """Put one word of the file in the place of another: a type, a key, a name."""
    field, source = random.choice(fields), random.choice(fields)
    mine = list(_WORD.finditer(data, field.start, field.stop))
    theirs = _WORD.findall(data, source.start, source.stop)
    if not mine or not theirs:
        return data
    match = random.choice(mine)
    return data[: match.start()] + random.choice(theirs) + data[match.end() :]


_KINDS: dict[str, Callable[[bytes, tuple[Field, ...], Random], bytes]] = {
    "a bit flipped": _flip,
    "a byte set": _set,
    "a number changed": _number,
    "two fields swapped": _swap,
    "bytes deleted": _delete,
    "bytes doubled": _duplicate,
    "bytes inserted": _insert,
    "truncated": _truncate,
    "a word replaced": _word,
}

# Numbers in fields


def number_in(data: bytes, field: Field) -> int:
    """Return the value of a number's field."""
    if field.kind != "varint":
        return int.from_bytes(data[field.start : field.stop], "little")
    return sum((byte & 0x7F) << 7 * at for at, byte in enumerate(data[field.start : field.stop]))


def replaced(data: bytes, field: Field, value: int) -> bytes:
    """Return the bytes with another number in a field, cut to its width; a varint may get longer."""
    if field.kind == "varint":
        new = varint(value)
    else:
        width = WIDTHS[field.kind]
        new = (value % (1 << 8 * width)).to_bytes(width, "little")
    return data[: field.start] + new + data[field.stop :]


def varint(value: int) -> bytes:
    """Return protobuf's bytes of a number; a negative one is taken as 64 bits."""
    value %= 1 << 64
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


# JSON, from inside

_RAW = "@raw@"
_ODD: list[Any] = [-1, 0, 1, 2, 7, 1 << 31, 1 << 63, 10**40, 0.5, 1e308, float("inf"), float("nan"), True, False, None]
_ODD += ["", "1", "\ud800", "a\0b", "two\nlines", "../other", "/", ".", "x" * 300, [], [[]], [1, 2], {}, {"a": 1}]
_RAWS = ("[" * 100_000, "9" * 5000, "1e999", "-", "tru", '{"a":1,"a":2}', "{" * 3, '"\\ud800"', "0" * 20)


def mutate_json(text: bytes, random: Random) -> bytes:
    """Return a JSON document with one value, key or pair in it changed, removed, doubled or swapped."""
    content = json.loads(text)
    places = list(_places(content))
    if not places:
        return json.dumps(random.choice(_ODD)).encode()
    holder, key = random.choice(places)
    other, other_key = random.choice(places)
    kind = random.choice(("odd", "odd", "raw", "copy", "copy", "swap", "remove", "rename", "near"))
    raw = ""
    if kind == "odd":
        holder[key] = copy.deepcopy(random.choice(_ODD))
    elif kind == "raw":
        holder[key], raw = _RAW, random.choice(_RAWS)
    elif kind == "copy":
        holder[key] = copy.deepcopy(other[other_key])
    elif kind == "swap":
        a, b = copy.deepcopy(holder[key]), copy.deepcopy(other[other_key])
        holder[key], other[other_key] = b, a
    elif kind == "near" and type(holder[key]) in (int, float):
        holder[key] += random.choice((-1, 1))
    elif kind == "rename" and isinstance(holder, dict):
        names = [str(k) for _, k in places if isinstance(k, str)]
        holder[random.choice([*names, key[:-1], key.replace(".0.", ".1."), "", "\n"])] = holder.pop(key)
    else:
        del holder[key]
    return json.dumps(content).replace(f'"{_RAW}"', raw).encode()


def _places(content: Any) -> Any:
    """Yield every value in it as a container and a key."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield content, key
        yield from _places(value)


# Protobuf, from inside

Node = list[Any]
"""[number, wire type, value]: a whole number, bytes, or the nodes of a message."""

Schema = dict[int, Any]
"""Numbers of the fields that are messages, with their schemas."""


def parse_nodes(data: bytes, schema: Schema) -> list[Node]:
    """Return the fields of a sound message."""
    nodes: list[Node] = []
    at = 0
    while at < len(data):
        key, at = _read(data, at)
        value, at = _read(data, at)
        if key & 7 == 2:
            value, at = data[at : at + value], at + value
            if key >> 3 in schema:
                value = parse_nodes(value, schema[key >> 3])
        nodes.append([key >> 3, key & 7, value])
    return nodes


def _read(data: bytes, at: int) -> tuple[int, int]:
    stop = at
    while data[stop] & 0x80:
        stop += 1
    return number_in(data, Field(at, stop + 1, "varint")), stop + 1


def encode_nodes(nodes: list[Node]) -> bytes:
    """Return a message, every length in it as it should be."""
    out = []
    for number, wire, value in nodes:
        body = encode_nodes(value) if isinstance(value, list) else value
        out.append(varint(number << 3 | wire))
        out.append(varint(body) if isinstance(body, int) else varint(len(body)) + body)
    return b"".join(out)


def mutate_nodes(nodes: list[Node], random: Random) -> bytes:
    """Return a message with one field in it changed, removed, doubled, moved or renumbered."""
    nodes = _copied(nodes)
    holders = [nodes, *_holders(nodes)]
    holder = random.choice(holders)
    at = random.randrange(len(holder))
    node = holder[at]
    leaves = [leaf for one in holders for leaf in one if not isinstance(leaf[2], list) and leaf[1] == node[1]]
    kind = random.choice(("value", "value", "value", "value", "remove", "double", "move", "number", "wire"))
    if kind == "remove":
        del holder[at]
    elif kind == "double":
        holder.insert(random.randrange(len(holder) + 1), copy.deepcopy(node))
    elif kind == "move":
        random.choice(holders).append(holder.pop(at))
    elif kind == "number":
        node[0] = random.choice((node[0] + 1, max(0, node[0] - 1), random.randrange(20), 1 << 40))
    elif kind == "wire" and isinstance(node[2], bytes):
        node[1], node[2] = 0, len(node[2])
    elif isinstance(node[2], int):
        node[2] = random.choice([node[2] + 1, node[2] - 1, *random.sample(_HUGE, 2), -1, random.choice(leaves)[2]])
    elif isinstance(node[2], bytes) and leaves:
        cut = random.randrange(len(node[2]) + 1)
        other = random.choice(leaves)[2]
        node[2] = random.choice([other, other, node[2][:cut], node[2] + b"\0", node[2][:cut] + b"\xff\n"])
    else:
        random.shuffle(node[2])
    return encode_nodes(nodes)


def _copied(nodes: list[Node]) -> list[Node]:
    return [[number, wire, _copied(value) if isinstance(value, list) else value] for number, wire, value in nodes]


def _holders(nodes: list[Node]) -> Any:
    for _, _, value in nodes:
        if isinstance(value, list) and value:
            yield value
            yield from _holders(value)
