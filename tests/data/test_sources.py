"""What is read as documents, in what order, and what a bad file says."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from ostro.data.sources import SOURCES, Document, detect, expand, read_documents
from ostro.errors import DataError


def texts(*paths: str | Path, kind: str = "auto") -> list[str]:
    return [document.text for document in read_documents(paths, kind)]


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_documents_that_say_where_they_are_from(tmp_path: Path, kind: str):
    path = lines(tmp_path / "a.dat", {"text": "Grüße"}, {"text": "two"})
    documents = list(SOURCES[kind](path))
    assert documents
    assert all(document.source == str(path) and document.text.strip() for document in documents)


def test_a_text_file_is_one_document_kept_as_it_is(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\ttwo\x00\r three\n\n")
    assert list(read_documents([path])) == [Document("one\r\n\ttwo\x00\r three\n\n", str(path), None)]


def test_json_lines_give_a_document_a_line(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one\\u2028x", "id": 3}\r\n\n{"text": "  "}\n{"text": "two"}')
    assert list(read_documents([path])) == [
        Document("one\u2028x", str(path), 1),
        Document("two", str(path), 4),
    ]


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.txt", '\n  \n{"text": "x"}\n', "jsonl"),
        ("a.txt", '{"text": "x"\n', "text"),
        ("a.json", '{\n"text": "x"}\n', "text"),
        ("a.json", "[1, 2]\n", "text"),
        ("a.txt", "", "text"),
        ("a.jsonl", "broken\n", "jsonl"),
        ("a.txt", "[" * 100_000, "text"),
    ],
)
def test_content_decides_the_kind(tmp_path: Path, name: str, content: str, kind: str):
    (tmp_path / name).write_text(content, "utf-8")
    assert detect(tmp_path / name) == kind


def test_the_kind_can_be_said(tmp_path: Path):
    path = lines(tmp_path / "a.jsonl", {"text": "one"})
    assert texts(path) == ["one"]
    assert texts(path, kind="text") == ['{"text": "one"}\n']
    with pytest.raises(DataError, match=r"'jsonlines' is unknown: use auto, text, jsonl\. Did you mean 'jsonl'"):
        texts(path, kind="jsonlines")


def test_gzip_is_transparent(tmp_path: Path):
    with gzip.open(tmp_path / "a.txt.gz", "wb") as file:
        file.write(b"plain")
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(b'{"text": "line"}\n')
    assert texts(tmp_path) == ["plain", "line"]


def test_folders_are_searched_in_order_and_only_for_text(tmp_path: Path):
    for name in ("b/z.md", "b/a.py", "a.text", "c.txt", "d.bin", ".git/x.txt", "b/.y.txt", "e.npy", "f.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, "utf-8")
    assert [path.relative_to(tmp_path).as_posix() for path in expand([tmp_path])] == [
        "a.text",
        "b/a.py",
        "b/z.md",
        "c.txt",
    ]
    assert texts(tmp_path / "d.bin", tmp_path / "c.txt") == ["d.bin", "c.txt"]


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
    with pytest.raises(DataError, match=r"holds no \.txt .* file"):
        expand([tmp_path])
    with pytest.raises(DataError, match="no data was named"):
        expand([])
    with pytest.raises(DataError, match=r"cannot be looked at: File name too long|does not exist"):
        expand(["x" * 5000])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        expand([tmp_path / "pipe"])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bad_utf8_is_named_by_line_and_byte(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes('{"text": "ü"}\n{"text": "'.encode() + b'caf\xe9"}\n')
    with pytest.raises(DataError, match=rf"{name} line 2: byte 14 of the line \(0xe9\) is not UTF-8"):
        texts(tmp_path / name, kind=name.removeprefix("a.").replace("txt", "text"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"', r"line 2: this is not JSON \(Expecting ',' delimiter at character 13\)"),
        ('{"body": "b", "id": 1}', r"line 2: .* this line is an object with 'body', 'id': add it"),
        ('["b"]', "line 2: .* this line is no object"),
        ('{"text": null}', 'line 2: "text" must be a string, and is NoneType'),
        ('{"text": "\\ud83d"}', "line 2: .* half of a surrogate pair"),
        ('{"text": ' + "[" * 100_000, "line 2: .* nested too deeply"),
        ('{"text": ' + "1" * 5000 + "}", "line 2: this is not JSON"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n", "utf-8")
    with pytest.raises(DataError, match=message):
        texts(path)


def test_broken_gzip(tmp_path: Path):
    whole = gzip.compress(os.urandom(5000))
    damaged = bytearray(whole)
    damaged[2000] ^= 255
    for data in (b"not gzip", whole[:3000], bytes(damaged)):
        (tmp_path / "a.txt.gz").write_bytes(data)
        with pytest.raises(DataError, match=r"a\.txt\.gz is not a whole gzip file"):
            texts(tmp_path / "a.txt.gz")


def test_a_file_that_goes_away(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a", "utf-8")
    documents = read_documents([tmp_path / "a.txt", tmp_path])
    next(documents)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt cannot be read: No such file"):
        next(documents)
