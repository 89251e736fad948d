"""What is read as records, in what order, how it is cut into units, and what a bad file says."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ostro.data import text_files
from ostro.data.records import Chat, Message, Record, Text, Tokens, Unit
from ostro.data.sources import DOCUMENTS, SOURCES, attempts, detect, exact, expand, find, parse_weight, read, units
from ostro.errors import DataError

WIKI = " \n = One = \n \n It is 3 @,@ 000 m . \n \n = = More = = \n \n Ü ( a ) . \n \n = Two = \n \n B @-@ c . \n "
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
RECORDS: dict[str, dict[str, Any]] = {
    "jsonl": {"text": "Grüße"},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello"},
    "sharegpt": {"conversations": SHARED},
    "messages": {"messages": TURNS},
    "prompt": {"prompt": "Hi", "completion": "Hello"},
}


def texts(*paths: str | Path, kind: str = "auto", documents: str = "file") -> list[str]:
    found = [record for unit in units(paths, kind, documents=documents) for record in read(unit)]
    assert all(isinstance(record, Text) for record in found)
    return [record.text for record in found if isinstance(record, Text)]


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def json_sample(kind: str) -> Callable[[Path], Path]:
    return lambda folder: lines(folder / "a.dat", RECORDS[kind], RECORDS[kind])


def written(name: str, content: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(content, "utf-8")
        return folder / name

    return write


def parquet_sample(folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        pyarrow.table({"text": ["one", "two", "three"], "id": [1, 2, 3]}), folder / "a.dat", row_group_size=2
    )
    return folder / "a.dat"


def mindrecord_sample(folder: Path) -> Path:
    from ostro.data.mindrecord import MindRecordWriter

    with MindRecordWriter(folder / "a.dat", ["input_ids"], "a test", header_size=1 << 14, page_size=1 << 15) as writer:
        writer.append({"input_ids": np.arange(5, dtype=np.int32)})
    return folder / "a.dat"


def megatron_sample(folder: Path) -> Path:
    from ostro.data.megatron import MegatronWriter

    with MegatronWriter(folder / "a", np.dtype(np.uint16)) as writer:
        writer.append(np.arange(5, dtype=np.uint16))
    return folder / "a.idx"


# A sample of every source; those whose kind is not found by content but said.
SAMPLES: dict[str, Callable[[Path], Path]] = {
    "text": written("a.dat", "one\n\ntwo\n"),
    "lines": written("a.dat", "one\n\ntwo\n"),
    "blocks": written("a.dat", "one\n\ntwo\n"),
    "wikitext": written("a.dat", WIKI),
    **{kind: json_sample(kind) for kind in RECORDS},
    "parquet": parquet_sample,
    "mindrecord": mindrecord_sample,
    "megatron": megatron_sample,
}
SAID = ("lines", "blocks")


def test_every_source_has_a_sample():
    assert SAMPLES.keys() == SOURCES.keys()
    assert all(source.name == name and source.what for name, source in SOURCES.items())


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_is_found_by_content_and_says_where_its_records_are_from(tmp_path: Path, kind: str):
    path = SAMPLES[kind](tmp_path)
    found = units([path], kind if kind in SAID else "auto")
    assert {unit.kind for unit in found} == {kind}
    assert units([path], kind) == found
    records = [record for unit in found for record in read(unit)]
    assert records
    for record in records:
        assert record.where.startswith(str(path.with_suffix("")))
        assert isinstance(record, Tokens if kind in ("mindrecord", "megatron") else Chat if kind in CHATS else Text)


CHATS = ("alpaca", "sharegpt", "messages", "prompt")


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("README.md", "text", 1),
        ("apache2_alpaca_format.json", "alpaca", 427),
        ("botchan.txt", "text", 1),
        ("c4_demo.jsonl", "jsonl", 300),
        ("mlx_wwdc25_prompt_completion.jsonl", "prompt", 1944),
        ("sharegpt_250.json", "sharegpt", 250),
        ("sharegpt_tools_150.json", "sharegpt", 150),
        ("wiki_demo.txt", "text", 1),
        ("wikitext2_valid.txt", "wikitext", 60),
    ],
)
def test_the_shared_samples(shared: Path, name: str, kind: str, count: int):
    path = shared / "data" / name
    assert detect(path) == kind
    whole = [record for unit in units([path]) for record in read(unit)]
    assert len(whole) == count
    assert same(whole, [record for unit in units([path], unit_bytes=50_000) for record in read(unit)])


def same(one: Iterable[Record], other: Iterable[Record]) -> bool:
    """Whether the records are the same, their places as they are shown."""
    shown = [[dataclasses.replace(record, where=exact(record.where)) for record in records] for records in (one, other)]
    return shown[0] == shown[1]


def test_a_text_file_is_one_document_kept_as_it_is(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\ttwo\x00\r three\n\n")
    assert list(read(Unit(str(path), "text"))) == [Text("one\r\n\ttwo\x00\r three\n\n", str(path))]


def test_a_text_file_may_be_a_document_a_line_or_block(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf one\r\n two\n \t\r\n\n\xc2\xa0\n\nthree\x0b\nfour")
    by_line, by_block = (list(read(units([path], documents=how)[0])) for how in ("line", "blank"))
    assert [record.where for record in by_line] == [f"{path} line {at}" for at in (1, 2, 7, 8)]
    assert texts(path, documents="line") == [" one", " two", "three\x0b", "four"]
    assert texts(path, documents="blank") == [" one\r\n two", "three\x0b\nfour"]
    assert [record.where for record in by_block] == [f"{path} line 1", f"{path} line 7"]
    with pytest.raises(DataError, match=r"'lines' is unknown: use file, line, blank\. Did you mean 'line'"):
        units([path], documents="lines")
    assert set(DOCUMENTS.values()) <= SOURCES.keys()


def test_json_lines_give_a_record_a_line(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one\\u2028x", "id": 3}\r\n\n{"text": "  "}\n{"text": "two"}')
    assert list(read(units([path])[0])) == [Text("one\u2028x", f"{path} line 1"), Text("two", f"{path} line 4")]


@pytest.mark.parametrize(
    "content", ['[{"text": "a"}, {"text": "b"}]', '{\n"text": "a"}\n\n{"text":\n"b"}', '{"text": "a"} {"text": "b"}']
)
def test_json_arrays_and_values_over_many_lines_give_a_record_each(tmp_path: Path, content: str):
    path = tmp_path / "a.json"
    path.write_text(content, "utf-8")
    assert units([path], unit_bytes=1) == [Unit(str(path), "jsonl")]
    assert list(read(Unit(str(path), "jsonl"))) == [Text("a", f"{path} record 1"), Text("b", f"{path} record 2")]


def test_a_chat_is_read_whatever_the_container(tmp_path: Path):
    for kind in CHATS:
        (tmp_path / "a.json").write_text(json.dumps([RECORDS[kind]], indent=2), "utf-8")
        for path in (tmp_path / "a.json", lines(tmp_path / "b.jsonl", RECORDS[kind])):
            (unit,) = units([path])
            assert unit.kind == kind
            (chat,) = read(unit)
            assert isinstance(chat, Chat)
            assert chat.messages[-1] == Message("assistant", "Hello")


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.txt", '\n  \n{"text": "x"}\n', "jsonl"),
        ("a.txt", '{"text": "x"\n', "text"),
        ("a.txt", '{\n"text": "x"}\n', "jsonl"),
        ("a.txt", '{\n"body": "x"}\n', "text"),
        ("a.md", "[1, 2]\n", "text"),
        ("a.md", "[a link](b.md)\n", "text"),
        ("a.txt", "", "text"),
        ("a.jsonl", "", "jsonl"),
        ("a.jsonl", "broken\n", "jsonl"),
        ("a.json", '{"text": "x"', "jsonl"),
        ("a.json.gz", "", "jsonl"),
        ("a.txt", "[" * 100_000, "text"),
        ("a.txt", json.dumps({"text": "x", **RECORDS["alpaca"]}), "alpaca"),
        ("a.txt", json.dumps({"text": "x", "prompt": "y"}), "jsonl"),
        ("a.txt", " = a = \n", "text"),
    ],
)
def test_content_decides_the_kind(tmp_path: Path, name: str, content: str, kind: str):
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    if content == " = a = \n":
        (tmp_path / name).write_bytes(b"some = words = \n")
    assert detect(tmp_path / name) == kind


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[1, 2]", r"a\.json record 1: it is no object"),
        ("a.jsonl", b'\n{"body": "x", "id": 1}\n', r"a\.jsonl line 1: it has 'body', 'id', and is no text"),
        ("a.txt", b'{"body": "x"}\n', r"a\.txt line 1: it has 'body'"),
        ("a.json", b'{\n"name": "x"}\n', r"a\.json record 1: it has 'name'"),
        ("a.txt", "text".encode("utf-16"), r"a\.txt is UTF-16: convert it"),
        ("a.txt", b"PK\x03\x04...", r"a\.txt is a ZIP archive: unpack it"),
    ],
)
def test_what_no_source_fits_is_said(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        units([tmp_path / name])


def test_the_kind_can_be_said(tmp_path: Path):
    path = lines(tmp_path / "a.jsonl", {"text": "one"})
    assert texts(path) == ["one"]
    assert texts(path, kind="text") == ['{"text": "one"}\n']
    with pytest.raises(DataError, match=r"'jsonll' is unknown: use auto, text, .*\. Did you mean 'jsonl'"):
        units([path], kind="jsonll")


def test_packed_files_are_known_by_content(tmp_path: Path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"pl") + gzip.compress(b"ain") + bytes(700))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "line"}\n'))
    (tmp_path / "c.txt").write_bytes(gzip.compress(b"\xef\xbb\xbfnot said"))
    assert texts(tmp_path) == ["plain", "line", "not said"]
    assert units([tmp_path / "b.jsonl.gz"], unit_bytes=1) == [Unit(str(tmp_path / "b.jsonl.gz"), "jsonl")]


def test_zstandard(tmp_path: Path):
    zstandard = pytest.importorskip("zstandard")
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(pack(b'{"text": "a"}\n{"te') + pack(b'xt": "b"}\n'))
    assert texts(tmp_path) == ["a", "b"]
    (tmp_path / "a.jsonl.zst").write_bytes(pack(os.urandom(5000))[:3000])
    with pytest.raises(DataError, match=r"a\.jsonl\.zst is not a whole Zstandard file"):
        texts(tmp_path)


@pytest.mark.parametrize(
    ("module", "name", "data", "message"),
    [
        ("zstandard", "a.txt.zst", b"\x28\xb5\x2f\xfd", r"needs Python 3\.14 or a package: pip install 'ostro.zstd.'"),
        ("pyarrow", "a.parquet", b"PAR1", r"needs the package pyarrow: pip install 'ostro.parquet.'"),
    ],
)
def test_a_package_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, data: bytes, message: str
):
    (tmp_path / name).write_bytes(data)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "compression", None)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / name)


def test_folders_are_searched_in_order_and_only_for_sources(tmp_path: Path):
    kept = ("a.text", "b/a.py", "b/z.md", "c.txt", "d.idx", "e.mindrecord", "e.mindrecord0", "g.jsonl.zst", "h.parquet")
    for name in (*kept, "d.bin", ".git/x.txt", "b/.y.txt", "e.npy", "f.gz", "other.idx", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, "utf-8")
    found = find([tmp_path])
    assert [path.relative_to(tmp_path).as_posix() for path in found.files] == list(kept)
    assert found.skipped == {".bin": 1, ".gz": 1, ".idx": 1, ".npy": 1, "no suffix": 1}
    assert texts(tmp_path / "README", tmp_path / "c.txt") == ["README", "c.txt"]


def test_globs_are_sorted_and_a_real_name_wins(tmp_path: Path):
    for name in ("b.txt", "a.txt", "sub/c.txt", "[x].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, "utf-8")
    assert texts(f"{tmp_path}/?.txt") == ["a.txt", "b.txt"]
    assert texts(f"{tmp_path}/**/c.txt") == ["sub/c.txt"]
    assert texts(f"{tmp_path}/[x].txt") == ["[x].txt"]


def test_names_that_lead_nowhere(tmp_path: Path):
    with pytest.raises(DataError, match=r"missing\.txt does not exist: check the path"):
        expand([tmp_path / "missing.txt"])
    with pytest.raises(DataError, match="matches no file: check the pattern"):
        expand([f"{tmp_path}/*.txt"])
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(DataError, match=r"holds no \.txt .* file .*, only 1 \.csv: name another"):
        expand([tmp_path])
    with pytest.raises(DataError, match="no data was named"):
        expand([])
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(DataError, match=r"cannot be looked at|does not exist"):
            expand([name])
    with pytest.raises(DataError, match=r"missing\.txt@0\.3 says a weight, which counts where data is trained on"):
        expand([f"{tmp_path}/missing.txt@0.3"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        expand([tmp_path / "pipe"])


def test_files_of_a_set_are_read_once(tmp_path: Path):
    from ostro.data.mindrecord import MindRecordWriter

    path = megatron_sample(tmp_path)
    for names in (["a.idx", "a.bin"], ["a"], ["a.bin"], ["."]):
        assert units([tmp_path / name for name in names]) == [Unit(str(path.with_suffix(".bin")), "megatron")]
    name = tmp_path / "m.mindrecord"
    with MindRecordWriter(name, ["input_ids"], "", partitions=2, header_size=1 << 14, page_size=1 << 15) as writer:
        for start in range(4):
            writer.append({"input_ids": np.arange(start, start + 3, dtype=np.int32)})
    for names in (["m.mindrecord1"], ["m.mindrecord0", "m.mindrecord1"]):
        found = units([tmp_path / name for name in names])
        assert [Path(unit.path).name for unit in found] == ["m.mindrecord0", "m.mindrecord1"]
        ids = [record.ids[0] for unit in found for record in read(unit) if isinstance(record, Tokens)]
        assert ids == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bad_utf8_is_named_by_line_and_byte(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes('{"text": "ü"}\n{"text": "'.encode() + b'caf\xe9"}\n')
    with pytest.raises(DataError, match=rf"{name} line 2: byte 14 of the line \(0xe9\) is not UTF-8"):
        texts(tmp_path / name, kind=name.removeprefix("a.").replace("txt", "text"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"', r"line 2: this is not JSON \(Expecting ',' delimiter at character 13\)"),
        ('{"text": "b"} {}', r"line 2: this is not JSON \(Extra data at character 14\)"),
        ('{"body": "b", "id": 1}', r"line 2: .* this is an object with 'body', 'id': add it"),
        ('{"prompt": "b", "completion": "c"}', "line 2: .*'completion': say --kind prompt"),
        ('["b"]', "line 2: .* this is no object"),
        ('{"text": null}', 'line 2: "text" must be a string, and is NoneType'),
        ('{"text": "a", "text": "b"}', "line 2: .*the key 'text' stands twice"),
        ('{"text": "\\ud83d"}', "line 2: .* half of a surrogate pair"),
        ('{"text": ' + "[" * 100_000, "line 2: .* nested too deeply"),
        ('{"text": ' + "1" * 5000 + "}", r"line 2: this is not JSON \(it holds a number of more than 4300"),
    ],
)
def test_a_malformed_line_is_named_and_the_others_are_read(tmp_path: Path, line: str, message: str):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + line + '\n{"text": "c"}\n', "utf-8")
    with pytest.raises(DataError, match=message):
        texts(path)
    good, bad, other = attempts(units([path])[0])
    assert [good, other] == [Text("a", f"{path} line 1"), Text("c", f"{path} line 3")]
    assert isinstance(bad, DataError)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n{"text" "b"}]', r"line 2: this is not JSON \(expecting ':' delimiter\)"),
        ('[{"text": "a"}\n{"text": "b"}]', r"line 2: this is not JSON \(expecting ',' or '\]'\)"),
        ('[{"text": "a"},\n', r"line 2: this is not JSON \(expecting value\)"),
        ('[{"text": "a"}\n\n', r"line 3: this is not JSON \(the file ends within the array\)"),
        ('[{"text": "a"}]\n[]', r"line 2: this is not JSON \(something follows the array\)"),
        ('[{"text": "a"},\n{"text": "b', r"line 2: this is not JSON \(unterminated string starting at\)"),
        ('[{"text": "a"},\n' + '{"a":' * 100_000, "line 2: this is not JSON .it is nested too deeply"),
        ('[{"text": "a"},\n{"b": 1}]', "record 2: a document needs the field"),
        ('[{"text": "a"},\n{"text": "b", "text": "c"}]', "line 2: .*the key 'text' stands twice"),
    ],
)
def test_a_malformed_array_is_named_and_what_comes_before_is_read(tmp_path: Path, content: str, message: str):
    path = tmp_path / "a.json"
    path.write_text(content, "utf-8")
    first, error = attempts(units([path])[0])
    assert first == Text("a", f"{path} record 1")
    with pytest.raises(DataError, match=message):
        raise error if isinstance(error, DataError) else AssertionError(error)


@pytest.mark.parametrize("chunk", [1, 7, 100, 1 << 18])
def test_lines_of_an_array_are_counted_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
):
    monkeypatch.setattr(text_files, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text("[\n" + ",\n\n".join(json.dumps({"text": str(at)}) for at in range(50)) + ",\n{bad}]", "utf-8")
    *good, error = attempts(units([path])[0])
    assert len(good) == 50
    assert str(error).startswith(f"{path} line 101: this is not JSON (expecting property name")


def test_nesting_at_the_limit_is_a_sentence_or_read(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    for depth in (200, 900, 940, 950, 960, 970, 980, 990, 1000, 1100):
        deep = "[" * depth + "]" * depth
        for kind, record in RECORDS.items():
            line = json.dumps({**record, "tools": 1}).replace("1}", deep + "}")
            for content in (line, f"[{line}]", line.replace('"Hi"', deep)):
                path.write_text(content, "utf-8")
                (item,) = attempts(Unit(str(path), kind))
                assert isinstance(item, Chat | Text | DataError)


def test_bad_bytes_in_an_array_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.json"
    for size in (1, 8, 1000):
        monkeypatch.setattr(text_files, "_CHUNK", size)
        path.write_bytes('[{"text": "ü"},\n{"text": "'.encode() + b'caf\xe9"}]\n')
        with pytest.raises(DataError, match=r"a\.json line 2: byte .* \(0xe9\) is not UTF-8"):
            list(read(Unit(str(path), "jsonl")))


def test_broken_gzip(tmp_path: Path):
    whole = gzip.compress(os.urandom(5000))
    damaged = bytearray(whole)
    damaged[2000] ^= 255
    for data in (b"not gzip", b"", whole[:3000], bytes(damaged), whole + b"more"):
        (tmp_path / "a.txt.gz").write_bytes(data)
        with pytest.raises(DataError, match=r"a\.txt\.gz is not a whole gzip file"):
            texts(tmp_path / "a.txt.gz")


def test_a_file_that_goes_away_or_shrinks(tmp_path: Path):
    path = lines(tmp_path / "a.jsonl", *[{"text": str(at)} for at in range(10)])
    first, *_, last = units([path], unit_bytes=50)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"a\.jsonl became shorter while it was read"):
        list(read(last))
    path.unlink()
    for unit in (first, Unit(str(path), "text"), Unit(str(path), "jsonl"), Unit(str(path), "parquet")):
        if unit.kind == "parquet":
            pytest.importorskip("pyarrow")
        with pytest.raises(DataError, match=r"a\.jsonl cannot be read: No such file"):
            list(read(unit))


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("a.txt", ("a.txt", None)),
        ("a.txt@0.3", ("a.txt", 0.3)),
        ("a@b/c.txt@2", ("a@b/c.txt", 2.0)),
        ("a@.5e1", ("a", 5.0)),
        ("data@v2", ("data@v2", None)),
        ("hf://a/b:train@1", ("hf://a/b:train", 1.0)),
        ("a@nan", ("a@nan", None)),
    ],
)
def test_weights(text: str, parsed: tuple[str, float | None]):
    assert parse_weight(text) == parsed


def test_weights_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for text in ("a@0", "a@-1", "@1", "a@1e999"):
        with pytest.raises(DataError, match="is no source with a weight: write PATH@WEIGHT"):
            parse_weight(text)
    monkeypatch.chdir(tmp_path)
    Path("a@2").touch()
    assert parse_weight("a@2") == ("a@2", None)
