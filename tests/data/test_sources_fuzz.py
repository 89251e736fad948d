"""Damaged sources give a DataError with file and line or record, or what a slow reader of the same bytes gives.

About 1,500 mutations run with the tests; OSTRO_FUZZ=10000 runs as many as it says (OSTRO_FUZZ_SEED: other ones).
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from ostro.data import text_files
from ostro.data.conversations import CONVERSATIONS
from ostro.data.megatron import MegatronWriter
from ostro.data.mindrecord import MindRecordWriter
from ostro.data.records import Chat, Record, Text, Tokens, Unit
from ostro.data.sources import attempts, exact, units
from ostro.data.wikitext import read_wikitext
from ostro.errors import DataError

COUNT = int(os.environ.get("OSTRO_FUZZ", "1500"))
SEED = int(os.environ.get("OSTRO_FUZZ_SEED", "0"))

CALLS = [{"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
RECORDS: dict[str, list[dict[str, Any]]] = {
    "jsonl": [{"text": "Grüße aus Köln", "id": 1}, {"text": "two\nlines 🌍"}, {"text": "three", "meta": {"a": [1]}}],
    "alpaca": [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi ☕"},
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be kind."},
        {
            "conversations": [
                {"from": "human", "value": "1 and 2?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "3."},
            ],
            "tools": '[{"name": "add", "parameters": {}}]',
        },
    ],
    "messages": [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 0}]},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "1 and 2?"}]},
                {"role": "assistant", "content": None, "tool_calls": CALLS},
                {"role": "tool", "tool_call_id": "abcdefghi", "content": "3"},
                {"role": "assistant", "content": "3."},
            ],
            "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
        },
    ],
    "prompt": [
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]},
    ],
}
WIKI = " \n = One = \n \n It is 3 @,@ 000 m , says he . \n \n = = More = = \n \n <unk> ( a ) . \n \n"
WIKI += " = Two = \n \n B @-@ c . \n "
# JSON as it stands, put where a value was.
RAW = [
    "[" * 200 + "]" * 200,
    "[" * 3000,
    '{"a":' * 3000,
    "9" * 5000,
    "1e999",
    "-Infinity",
    "NaN",
    '"\\ud800"',
    '"\\ud83d\\ude00"',
    "01",
    "+1",
]
RAW += ["tru", '"\\x"', '"a\tb"', "'a'", "[1,]", "{,}", '{"a":1,"a":2}', "/* a */ 1", "\ufeff1", "1 2", '"', "[[[]]]"]
ODD = [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\0", b"\n", b"\r\n", b'"', b"[", b"}", b",", b"\\", b"\xef\xbb\xbf"]
VALUES: list[Any] = [None, True, 0, -1, 1.5, 2**70, "", " ", "x", "<s>", "\0", [], {}, [[]], [None], {"a": 1}, ["x"]]
VALUES += [[{"role": "user"}], {"text": "x"}, "[]", "{}", "{", "é" * 50]


def nodes(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths to everything within a record."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield (*at, key)
        yield from nodes(part, (*at, key))


def mutate_record(records: list[Any], random: Random) -> list[str]:
    """Return the records as JSON, one of them changed: retyped, mis-nested, a key gone, renamed or twice."""
    records = copy.deepcopy(records)
    at = random.randrange(len(records))
    raw = ""
    paths = list(nodes(records[at]))
    path = random.choice(paths)
    holder = records[at]
    for key in path[:-1]:
        holder = holder[key]
    key = path[-1]
    match random.randrange(9):
        case 0 | 1:
            holder[key] = copy.deepcopy(random.choice(VALUES))
        case 2 | 3:
            raw, holder[key] = random.choice(RAW), "@RAW@"
        case 4:
            del holder[key]
        case 5:
            holder[key] = [holder[key]] if random.random() < 0.5 else {str(key): holder[key]}
        case 6:
            other = random.choice(paths)
            holder[key] = copy.deepcopy(value_at(records[at], other))
        case 7 if isinstance(holder, dict):
            twice = f"@TWICE@{key}" if random.random() < 0.5 else str(key).upper()
            holder[twice] = holder[key] if random.random() < 0.5 else random.choice(VALUES)
        case _:
            records[at] = random.choice([[records[at]], records[at].get("text"), {"a": records[at]}, *VALUES])
    return [
        json.dumps(r, ensure_ascii=random.random() < 0.5).replace('"@RAW@"', raw).replace("@TWICE@", "")
        for r in records
    ]


def value_at(record: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        record = record[key]
    return record


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Return other bytes: cut, turned, doubled, in another encoding, or with something in them."""
    start, size = random.randrange(len(data) + 1), random.choice([1, 1, 2, 7, 60])
    match random.randrange(10):
        case 0:
            data = data[:start]
        case 1:
            data = data[start:]
        case 2:
            data = data[:start] + data[start + size :]
        case 3:
            data = data[:start] + data[start : start + size] + data[start:]
        case 4:
            data = data[:start] + bytes([random.randrange(256)]) + data[start + 1 :]
        case 5:
            data = data[:start] + random.choice(ODD) + data[start:]
        case 6:
            at = data.find(b"\n", start)
            data = data[:at] + data[at + 1 :] if at >= 0 else data.replace(b"\n", b"\r\n")
        case 7:
            codec = random.choice(["utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig", "cp1252"])
            data = data.decode(errors="replace").encode(codec, errors="replace")
        case 8:
            data = data.replace(b"\n", random.choice([b"\r", b"\r\n", b"\n\n", b" ", b"\x0b", "\u2028".encode()]))
        case _:
            bits = bytearray(data)
            for _ in range(random.randrange(1, 4)):
                if bits:
                    bits[random.randrange(len(bits))] ^= 1 << random.randrange(8)
            data = bytes(bits)
    return data


def laid_out(lines: list[str], layout: str) -> bytes:
    texts = {
        "lines": "\n".join(lines) + "\n",
        "array": "[" + ", ".join(lines) + "]",
        "spread": "[\n" + ",\n".join(lines) + "\n]\n",
    }
    return texts[layout].encode(errors="surrogatepass")


def is_good(item: Any) -> bool:
    return not isinstance(item, DataError)


def check_error(error: DataError, path: Path) -> None:
    message = str(error)
    assert message.startswith(str(path)), message
    assert message.endswith((".", "?")), message
    assert "\n" not in message, message
    assert len(message) < 1000, message
    assert "after byte" not in message


def named(error: DataError) -> int:
    found = re.search(r" (?:line|record) (\d+)", str(error))
    assert found, error
    return int(found[1])


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("twice")
    return dict(pairs)


def made_slowly(kind: str, text: str, where: str) -> Record | None:
    """Return a record by the plainest means; ValueError, RecursionError or DataError where it is none."""
    hook = None if kind == "jsonl" and text.count('"text"') < 2 else once
    value = json.loads(text, object_pairs_hook=hook)
    if kind != "jsonl":
        return CONVERSATIONS["prompt_completion" if kind == "prompt" else kind](value, where)
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise ValueError("no text")
    value["text"].encode()
    return Text(value["text"], where) if value["text"].strip() else None


def lines_slowly(kind: str, data: bytes, path: Path) -> tuple[list[Record], list[int]]:
    """Return the records of JSON Lines and the lines that are bad."""
    good, bad = [], []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            try:
                good.append(made_slowly(kind, line.decode(), f"{path} line {number}"))
            except (ValueError, RecursionError, DataError):
                bad.append(number)
    return [record for record in good if record is not None], bad


def check_lines(kind: str, data: bytes, path: Path) -> None:
    path.write_bytes(data)
    good, bad = lines_slowly(kind, data, path)
    items = list(attempts(Unit(str(path), kind, 0, len(data))))
    assert [item for item in items if is_good(item)] == good
    errors = [item for item in items if isinstance(item, DataError)]
    assert [named(error) for error in errors] == bad
    for error in errors:
        check_error(error, path)


def check_array(kind: str, data: bytes, path: Path) -> None:
    path.write_bytes(data)
    items = list(attempts(Unit(str(path), kind)))
    for item in items:
        if isinstance(item, DataError):
            check_error(item, path)
            named(item)
    try:
        values = json.loads(data.decode("utf-8-sig"), object_pairs_hook=once)
    except (ValueError, RecursionError):
        assert not data.strip() or isinstance(items[-1], DataError)
        return
    if not data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        values = [values]
    expected = []
    for number, value in enumerate(values, start=1):
        try:
            expected.append(made_slowly(kind, json.dumps(value), f"{path} record {number}"))
        except (ValueError, RecursionError, DataError):
            expected.append(number)
    assert [item if is_good(item) else named(item) for item in items] == [item for item in expected if item is not None]


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("layout", ["lines", "array", "spread"])
def test_damaged_json(tmp_path: Path, kind: str, layout: str, monkeypatch: pytest.MonkeyPatch):
    random = Random(f"{SEED} {kind} {layout}")
    path = tmp_path / ("a.jsonl" if layout == "lines" else "a.json")
    check = check_lines if layout == "lines" else check_array
    for _ in range(COUNT // 20):
        lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS[kind]]
        if random.random() < 0.6:
            lines = mutate_record(RECORDS[kind], random)
        data = laid_out(lines, layout)
        if random.random() < 0.5:
            data = mutate_bytes(data, random)
        monkeypatch.setattr(text_files, "_CHUNK", random.choice([1, 5, 64, 1 << 20]))
        check(kind, data, path)
        check_detection(path)


def check_detection(path: Path) -> None:
    """With the kind left open, too, nothing but a DataError comes, and a JSON file is never read as text."""
    try:
        found = units([path])
        assert found[0].kind in RECORDS or found[0].kind == "wikitext", found
        items = [item for unit in found for item in attempts(unit)]
        cut = [item for unit in units([path], found[0].kind, unit_bytes=40) for item in attempts(unit)]
    except DataError as error:
        check_error(error, path)
        return
    if len(units([path], unit_bytes=1)) > 1:
        assert [shown(item) for item in cut] == [shown(item) for item in items]


def shown(item: Record | DataError) -> Any:
    if isinstance(item, DataError):
        return str(item)
    content = item.text if isinstance(item, Text) else item.messages if isinstance(item, Chat) else item.ids.tolist()
    return exact(item.where), content


def texts_slowly(kind: str, data: bytes, path: Path) -> list[str]:
    text = data.removeprefix(b"\xef\xbb\xbf").decode()
    if kind == "wikitext":
        return [found.text for found in read_wikitext(text.split("\n"), str(path))]
    lines = text.split("\n")
    if kind == "text":
        found = [text]
    elif kind == "lines":
        found = [line.removesuffix("\r") for line in lines]
    else:
        found = [""]
        for line in lines:
            if line.encode().strip():
                found[-1] += line + "\n"
            else:
                found.append("")
        found = [block.removesuffix("\n").removesuffix("\r") for block in found]
    return [text for text in found if text.strip()]


@pytest.mark.parametrize("kind", ["text", "lines", "blocks", "wikitext"])
def test_damaged_text(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    random = Random(f"{SEED} {kind}")
    path = tmp_path / "a.txt"
    for _ in range(COUNT // 20):
        data = mutate_bytes((WIKI * 2 + "\n\n\u00a0\nGrüße\r\n\r\n").encode(), random)
        path.write_bytes(data)
        items = [
            item for unit in units([path], kind, unit_bytes=random.choice([1, 30, 1000])) for item in attempts(unit)
        ]
        errors = [item for item in items if isinstance(item, DataError)]
        try:
            assert [item.text for item in items if isinstance(item, Text)] == texts_slowly(kind, data, path)
            assert not errors
        except UnicodeDecodeError as error:
            first = data.count(b"\n", 0, len(data) - len(error.object) + error.start) + 1
            assert named(errors[0]) == first
        for error in errors:
            check_error(error, path)
        check_readable(path)


def check_readable(path: Path) -> None:
    try:
        for unit in units([path]):
            list(attempts(unit))
    except DataError as error:
        check_error(error, path)


def packers() -> dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]]:
    found = {".gz": (lambda data: gzip.compress(data, mtime=0), gzip.decompress)}
    try:
        import zstandard
    except ImportError:
        return found
    whole = zstandard.ZstdDecompressor()
    found[".zst"] = (
        zstandard.ZstdCompressor(write_checksum=True).compress,
        lambda data: whole.decompressobj().decompress(data),
    )
    return found


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_packing(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch):
    if suffix not in packers():
        pytest.skip("zstandard is not installed")
    pack, _ = packers()[suffix]
    random = Random(f"{SEED} {suffix}")
    lines = [json.dumps({"text": f"{random.random()} number {at}"}) for at in range(200)]
    path = tmp_path / f"a.jsonl{suffix}"
    whole = pack("\n".join(lines).encode())
    for _ in range(COUNT // 20):
        monkeypatch.setattr(text_files, "_PACKED_CHUNK", random.choice([1, 7, 64, 1 << 15]))
        path.write_bytes(whole + whole if random.random() < 0.1 else mutate_bytes(whole, random))
        try:
            items = [item for unit in units([path]) for item in attempts(unit)]
        except DataError as error:
            check_error(error, path)
            continue
        for item in items:
            if isinstance(item, DataError):
                check_error(item, path)
        if all(map(is_good, items)):
            texts = [item.text for item in items if isinstance(item, Text)]
            assert texts in (
                [],
                (once_more := [json.loads(line)["text"] for line in lines]),
                once_more[:-1] + once_more,
            )


def binary(kind: str, folder: Path) -> list[Path]:
    """Write a small file of `kind`; return the files that are to be damaged."""
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        path = folder / "a.parquet"
        rows = {"text": ["one", "zwei ü", "three"] * 5, "id": list(range(15))}
        parquet.write_table(pyarrow.table(rows), path, row_group_size=4)
        return [path]
    if kind == "mindrecord":
        path = folder / "a.mindrecord"
        with MindRecordWriter(
            path, ["input_ids", "labels"], "a test", header_size=1 << 14, page_size=1 << 15
        ) as writer:
            for start in range(5):
                ids = np.arange(start, start + 6, dtype=np.int32)
                writer.append({"input_ids": ids, "labels": np.where(ids < start + 2, -100, ids).astype(np.int32)})
        return [path]
    with MegatronWriter(folder / "a", np.dtype(np.uint16)) as writer:
        for start in range(5):
            writer.append(np.arange(start, start + 6, dtype=np.uint16))
    return [folder / "a.idx", folder / "a.bin"]


@pytest.mark.parametrize("kind", ["parquet", "mindrecord", "megatron"])
def test_damaged_binaries(tmp_path: Path, kind: str):
    random = Random(f"{SEED} {kind}")
    paths = binary(kind, tmp_path)
    whole = {path: path.read_bytes() for path in paths}
    for _ in range(COUNT // 20):
        path = random.choice(paths)
        data = whole[path]
        if random.random() < 0.5:  # where its structure stands: the first 300 bytes, or the last
            at = random.randrange(min(300, len(data)))
            at = at if random.random() < 0.5 else len(data) - 1 - at
            data = data[:at] + bytes([random.randrange(256)]) + data[at + 1 :]
        else:
            data = mutate_bytes(data, random)
        path.write_bytes(data)
        for said in ("auto", kind):
            try:
                items = [item for unit in units([path], said) for item in attempts(unit)]
            except DataError as error:
                items = [error]
            check_tokens(items, tmp_path)
        path.write_bytes(whole[path])


def check_tokens(items: list[Record | DataError], folder: Path) -> None:
    for item in items:
        if isinstance(item, DataError):
            assert str(folder) in str(item)
        elif isinstance(item, Tokens):
            assert item.ids.ndim == 1
            assert item.ids.dtype.kind in "iu"
