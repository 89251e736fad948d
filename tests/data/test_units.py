"""How files are cut into units: the same records whatever their size, little read for it, bounded memory."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostro.data import json_files, text_files
from ostro.data.records import Record, Unit
from ostro.data.sources import attempts, exact, read, units
from ostro.errors import DataError


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


BLANKS = st.sampled_from(["", "\n", " \n", "\t\r\n", "\n\n\n"])


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file of a kind that is cut, with records and blanks anywhere."""
    kind = draw(st.sampled_from(["lines", "blocks", "wikitext", "jsonl", "prompt"]))
    words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), max_size=20)
    parts = []
    for word in draw(st.lists(words, max_size=12)):
        if kind == "wikitext":
            parts.append(
                draw(st.sampled_from([f" = {word} = \n \n", f" = = {word} = = \n", f" {word} \n", " = a = \n"]))
            )
        elif kind == "jsonl":
            parts.append(json.dumps({"text": word}, ensure_ascii=draw(st.booleans())) + "\n")
        elif kind == "prompt":
            parts.append(json.dumps({"prompt": word + "?", "completion": word + "!"}) + "\n")
        else:
            parts.append(word + "\n")
        parts.append(draw(BLANKS))
    data = "".join(parts).encode()
    data = data[:-1] if draw(st.booleans()) else data
    return kind, b"\xef\xbb\xbf" + data if draw(st.booleans()) else data


@given(file=files(), unit_bytes=st.integers(1, 200), chunk=st.integers(1, 50))
def test_units_of_any_size_give_the_records_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, file: tuple[str, bytes], unit_bytes: int, chunk: int
):
    kind, data = file
    path = tmp_path_factory.getbasetemp() / "units.dat"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_CHUNK", chunk)
        found = units([path], kind, unit_bytes=unit_bytes)
        whole = list(attempts(Unit(str(path), kind, 0, len(data))))
        parts = [item for unit in found for item in attempts(unit)]
    assert [shown(item) for item in parts] == [shown(item) for item in whole]
    if len(found) > 1:
        assert found[0].start == 0
        assert found[-1].stop == len(data)
        assert all(one.stop == other.start for one, other in itertools.pairwise(found))
        assert all((one.stop or 0) > one.start for one in found)


def shown(item: Record | DataError) -> object:
    return str(item) if isinstance(item, DataError) else dataclasses.replace(item, where=exact(item.where))


@given(
    values=st.lists(
        st.recursive(
            st.none() | st.text(max_size=5) | st.integers() | st.floats(allow_nan=False), st.lists, max_leaves=5
        ),
        max_size=5,
    )
)
@settings(max_examples=50)
def test_arrays_are_read_in_pieces_of_any_size(tmp_path_factory: pytest.TempPathFactory, values: list[Any]):
    path = tmp_path_factory.getbasetemp() / "array.json"
    for indent, chunk in ((None, 1), (2, 3), (None, 1 << 20)):
        path.write_text(json.dumps(values, indent=indent, ensure_ascii=chunk > 1), "utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text_files, "_CHUNK", chunk)
            assert list(json_files.values(str(path), json.JSONDecoder().raw_decode)) == values


def test_lines_are_counted_from_the_start_of_the_file_where_it_is_shown(tmp_path: Path):
    path = lines(tmp_path / "a.jsonl", *[{"text": str(at)} for at in range(30)], {"text": 1})
    *_, last = units([path], unit_bytes=100)
    assert last.start > 0
    first, *_, error = attempts(last)
    assert "line 1 after byte" in first.where  # type: ignore[union-attr]
    assert str(error).startswith(f'{path} line 31: "text" must be a string')
    number = path.read_bytes().count(b"\n", 0, last.start) + 1
    assert exact(f"{first.where}: x") == f"{path} line {number}: x"  # type: ignore[union-attr]
    assert exact(f"{path} line 3: no line 4 after byte") == f"{path} line 3: no line 4 after byte"
    assert exact(f"{path}.gone line 1 after byte 5") == f"{path}.gone line 1 after byte 5"


def test_a_record_that_begins_at_the_cut_begins_the_unit(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("123456789\n" * 6)
    found = units([path], documents="line", unit_bytes=20)
    assert found == [Unit(str(path), "lines", at, at + 20) for at in (0, 20, 40)]


def test_cutting_looks_at_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.jsonl"
    record = json.dumps({"text": "word " * 100}) + "\n"
    path.write_text(record * 20_000, "utf-8")
    taken: list[int] = []
    chunks = text_files._plain

    def counted(*arguments: Any) -> Iterator[bytes]:
        for chunk in chunks(*arguments):
            taken.append(len(chunk))
            yield chunk

    monkeypatch.setattr(text_files, "_plain", counted)
    found = units([path], unit_bytes=1 << 20)
    assert len(found) == path.stat().st_size // (1 << 20) + 1
    assert all(unit.start % len(record) == 0 for unit in found)
    assert all(0 <= unit.start - at * (1 << 20) < len(record) for at, unit in enumerate(found))
    assert sum(taken) <= 2 << 20  # the beginning, for its kind and how its records stand; not the file's 10 MB


def test_memory_is_bounded_by_the_longest_record(tmp_path: Path):
    random = np.random.default_rng(0)
    records = [{"text": random.bytes(500).hex()} for _ in range(8_000)]
    lines(tmp_path / "a.jsonl", *records)
    (tmp_path / "b.json").write_text(json.dumps(records), "utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes(), 1))
    for name in ("a.jsonl", "b.json", "c.jsonl.gz"):
        tracemalloc.start()
        assert sum(1 for unit in units([tmp_path / name]) for _ in read(unit)) == 8_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20, (name, peak)  # each file is 8 MB, the packed one half of that


@pytest.mark.parametrize("kind", ["text", "lines", "blocks", "jsonl"])
def test_what_would_not_fit_into_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    for module in (text_files, json_files):
        monkeypatch.setattr(module, "LARGEST", 1000)
    monkeypatch.setattr(text_files, "_CHUNK", 100)
    path = tmp_path / "a.txt"
    bodies = {"blocks": "a\n" * 2000, "jsonl": '[{"text": "' + "a" * 2000 + '"}]'}
    path.write_text(bodies.get(kind, "a" * 2000), "utf-8")
    with pytest.raises(DataError, match=r"a\.txt.*: the .* is longer than .* MiB: cut it"):
        list(read(Unit(str(path), kind)))
