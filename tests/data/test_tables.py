"""Parquet and the Hub as sources: rows become the records that JSON Lines give, and a bad file says so."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ostro.data import tables
from ostro.data.records import Text
from ostro.data.sources import attempts, read, units
from ostro.data.tables import read_hub
from ostro.errors import DataError

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
RECORDS: dict[str, dict[str, Any]] = {
    "jsonl": {"text": "Grüße"},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello"},
    "sharegpt": {"conversations": SHARED},
    "messages": {"messages": TURNS},
    "prompt": {"prompt": "Hi", "completion": "Hello"},
}
CHATS = ("alpaca", "sharegpt", "messages", "prompt")


def texts(path: Path) -> list[str]:
    return [record.text for unit in units([path]) for record in read(unit) if isinstance(record, Text)]


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def parquet_of(path: Path, columns: dict[str, Any], **how: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path, **how)
    return path


def test_parquet_is_cut_at_row_groups(tmp_path: Path):
    rows = [f"{at} " + "word " * 50 for at in range(100)]
    path = parquet_of(
        tmp_path / "a.parquet",
        {"id": list(range(100)), "text": rows},
        row_group_size=10,
        compression="none",
        use_dictionary=False,
    )
    whole = [record for unit in units([path]) for record in read(unit)]
    assert whole == [Text(text, f"{path} record {at}") for at, text in enumerate(rows, start=1)]
    for unit_bytes in (1, 1000, 5000, 12_345):
        found = units([path], unit_bytes=unit_bytes)
        assert len(found) > 1
        assert [record for unit in found for record in read(unit)] == whole


@pytest.mark.parametrize("kind", CHATS)
def test_parquet_holds_conversations(tmp_path: Path, kind: str):
    others = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2", "weight": 0}]}
    rows = [RECORDS[kind], {**RECORDS[kind], **(others if kind == "messages" else {})}]
    path = parquet_of(tmp_path / "a.parquet", {**{key: [row[key] for row in rows] for key in rows[0]}, "date": [0, 1]})
    json_path = lines(tmp_path / "a.jsonl", *rows)
    expected = [record for unit in units([json_path]) for record in read(unit)]
    for said in ("auto", kind):
        found = [record for unit in units([path], said) for record in read(unit)]
        assert [chat.messages for chat in found] == [chat.messages for chat in expected]  # type: ignore[union-attr]
        assert [chat.where for chat in found] == [f"{path} record 1", f"{path} record 2"]


def test_parquet_that_cannot_be_used(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    with pytest.raises(DataError, match=r"has the columns 'body', and none of text"):
        texts(parquet_of(path, {"body": ["a"]}))
    bad = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(np.array([0, 1, 2], np.int32)), pyarrow.py_buffer(b"a\xff")]
    )
    good, error = attempts(units([parquet_of(path, {"text": bad})])[0])
    assert good == Text("a", f"{path} record 1")
    assert "record 2: a string in it is not UTF-8" in str(error)
    first, none, last = attempts(units([parquet_of(path, {"text": ["a", None, "c"]})])[0])
    assert [first, last] == [Text("a", f"{path} record 1"), Text("c", f"{path} record 3")]
    assert 'record 2: "text" must be a string, and is NoneType' in str(none)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"a\.parquet is no whole Parquet file"):
        texts(path)


def test_a_damaged_parquet_file_is_a_sentence_and_ends_no_process(tmp_path: Path):
    path = parquet_of(tmp_path / "a.parquet", {"text": ["one", "two"] * 6, "id": list(range(12))}, row_group_size=4)
    whole = path.read_bytes()
    # In a process of its own: pyarrow, asked for what the footer says of a column, calls abort.
    code = """
import sys
from pathlib import Path
from random import Random
from ostro.data.sources import attempts, units
from ostro.errors import DataError
path, whole, random = Path(sys.argv[1]), Path(sys.argv[1]).read_bytes(), Random(0)
refused = 0
footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
damage = [(at, random.randrange(256)) for at in range(footer, len(whole))]
damage += [(at, whole[at] ^ 1 << bit) for at in range(footer, footer + 48) for bit in range(8)]  # the schema
for at, byte in damage:
    path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
    for unit_bytes in (1, 1 << 26):
        try:
            found = [item for unit in units([path], "parquet", unit_bytes=unit_bytes) for item in attempts(unit)]
        except DataError as error:
            found = [error]
        for item in found:
            if isinstance(item, DataError):
                refused += 1
                assert str(item).isprintable() and str(path) in str(item), ascii(item)
print(refused)
"""
    found = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-1000:]
    assert int(found.stdout) > len(whole) // 4


def fake_hub(monkeypatch: pytest.MonkeyPatch, rows: Iterable[Any]) -> list[Any]:
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Iterable[Any]:
        asked.append((name, config, split, streaming))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_a_data_set_of_the_hub_becomes_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = fake_hub(monkeypatch, [{"text": "ü", "image": object()}, {"text": "b", "image": None}])
    for _ in range(2):
        path = read_hub("hf://owner/name/config:test[:10%]", tmp_path / "hub")
        assert texts(path) == ["ü", "b"]
    assert asked == [("owner/name", "config", "test[:10%]", True)]
    assert read_hub("hf://owner/name", tmp_path / "hub") != path
    assert asked[1:] == [("owner/name", None, "train", True)]
    assert all(file.suffix == ".jsonl" for file in (tmp_path / "hub").iterdir())


def failing() -> Iterator[dict[str, str]]:
    yield {"text": "a"}
    raise ConnectionError("the network\nis away")


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("hf://name", [], "is no data set's name: write hf://OWNER/NAME"),
        ("hf://a/b", failing(), r"hf://a/b cannot be fetched \(the network is away\)"),
        ("hf://a/b", [{"body": "a"}], "record 1: it has 'body', and none of text"),
        ("hf://a/b", [{"text": "a"}, {"text": object()}], "record 2: it is not JSON"),
        ("hf://a/b", [{"text": "\ud800"}], "record 1: it is not JSON"),
    ],
)
def test_a_data_set_that_cannot_be_had_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rows: Iterable[Any], message: str
):
    fake_hub(monkeypatch, rows)
    with pytest.raises(DataError, match=message):
        read_hub(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_hub_needs_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="hf://a/b is fetched with the package datasets: pip install"):
        read_hub("hf://a/b", tmp_path)
    assert tables.is_hub_id("hf://a/b")
    assert not tables.is_hub_id("a/b")
