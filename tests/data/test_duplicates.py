"""Equal records are found wherever they stand, and only those; however the work is shared, the same are left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostro.data import duplicates, sources
from ostro.data import prepare as room
from ostro.data.duplicates import digest, repeated
from ostro.data.prepare import Hands, prepare
from ostro.data.records import Chat, Message, Text, Tokens
from ostro.data.shards import open_shards
from ostro.data.tasks import Settings
from ostro.data.tokenizer import Tokenizer, load_tokenizer
from ostro.errors import DataError


@pytest.fixture(scope="module")
def v1() -> Tokenizer:
    return load_tokenizer("v1")


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.lists(st.integers(0, 12), max_size=30), max_size=5), part_rows=st.sampled_from([2, 7, 1 << 22])
)
def test_all_but_the_first_of_equals(values: list[list[int]], part_rows: int, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("digests")
    arrays = [np.stack([digest(Text(str(value), "")) for value in some] or [np.zeros(2, np.uint64)]) for some in values]
    arrays = [array[: len(some)] for array, some in zip(arrays, values, strict=True)]
    files = [folder / f"{at}.npy" for at in range(len(arrays))]
    for file, rows in zip(files, arrays, strict=True):
        np.save(file, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_PART_ROWS", part_rows)
        found = [(array, place) for array, places in repeated(files) for place in places.tolist()]
    seen: set[int] = set()
    expected = []
    for array, some in enumerate(values):
        for place, value in enumerate(some):
            if value in seen:
                expected.append((array, place))
            seen.add(value)
    assert sorted(found) == expected


def test_what_counts_is_what_is_said():
    def told(*said: str, **more: bool) -> Chat:
        return Chat([Message("user", said[0]), Message("assistant", said[1], **more)], "here")

    ids = np.array([1, 2, 3])
    different = [
        Text("a", ""),
        Text("a ", ""),
        Text('{"text": "a"}', ""),
        told("a", "b"),
        told("b", "a"),
        told("a", "b", trained=False),
        Tokens(ids, ""),
        Tokens(ids, "", np.array([True, False, True])),
        Tokens(ids + 1, ""),
        Tokens(np.arange(8), "", np.zeros(8, bool)),
        Tokens(np.append(np.arange(8), 0), ""),
        Text("chat{}", ""),
        Text("\ud800", ""),
    ]
    assert len({digest(record).tobytes() for record in different}) == len(different)
    assert digest(Text("a", "x")).tobytes() == digest(Text("a", "y")).tobytes()
    assert digest(Tokens(ids.astype(np.uint16), "")).tobytes() == digest(Tokens(ids.astype(np.int32), "")).tobytes()
    assert digest(told("a", "b")).tobytes() == digest(Chat(told("a", "b").messages, "there")).tobytes()


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four files, each a task, that share records among them and within them."""
    monkeypatch.setattr(room, "TASK_BYTES", 1)
    folder = tmp_path / "many"
    folder.mkdir()
    for at, texts in enumerate((["a", "b", "a"], ["c", "b"], ["b", "c", "a"], ["d", "a", "d", "e"])):
        lines = [json.dumps({"text": f"text {text}", "number": number}) for number, text in enumerate(texts)]
        (folder / f"{at}.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_first_of_equal_records_is_kept(tmp_path: Path, many: Path, v1: Tokenizer):
    manifest = prepare([many], tmp_path / "one", tokenizer=v1, settings=Settings(dedup=True), hands=Hands(1))
    assert manifest is not None
    assert (manifest.num_documents, manifest.num_repeats) == (5, 7)
    shards = open_shards(tmp_path / "one")
    stream = [token for text in "abcde" for token in v1.encode(f"text {text}", bos=True, eos=True)]
    assert shards.tokens(0, shards.num_tokens).tolist() == stream
    assert len(manifest.files) == 3  # of the third file nothing is left
    assert sorted(contents(tmp_path / "one")) == ["documents.npy", "manifest.json"] + [
        f"tokens-0000{at}.npy" for at in (0, 1, 3)
    ]
    whole = prepare([many], tmp_path / "two", tokenizer=v1, hands=Hands(1))
    assert whole is not None
    assert (whole.num_documents, whole.num_repeats) == (12, 0)


def test_workers_and_shares_leave_out_the_same(tmp_path: Path, many: Path, v1: Tokenizer):
    chosen = Settings(dedup=True)
    prepare([many], tmp_path / "one", tokenizer=v1, settings=chosen, hands=Hands(1))
    prepare([many], tmp_path / "two", tokenizer=v1, settings=chosen, hands=Hands(2))
    assert prepare([many], tmp_path / "three", tokenizer=v1, settings=chosen, hands=Hands(1, (1, 2))) is None
    assert prepare([many], tmp_path / "three", tokenizer=v1, settings=chosen, hands=Hands(1, (0, 2)))
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")


def test_a_file_that_grows_meanwhile_is_noticed(
    tmp_path: Path, many: Path, v1: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    real = room._make_shards

    def grown(*arguments: object) -> None:
        with (many / "1.jsonl").open("a") as file:
            file.write('\n{"text": "more"}')
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(room, "_make_shards", grown)
    with pytest.raises(DataError, match=r"1\.jsonl line 3: the file has changed since it was read"):
        prepare([many], tmp_path / "out", tokenizer=v1, settings=Settings(dedup=True), hands=Hands(1))


def test_reading_for_digests_stops_at_the_first_bad_record(tmp_path: Path, many: Path, v1: Tokenizer):
    (many / "2.jsonl").write_text('{"text": 5}\n')
    with pytest.raises(DataError, match=r"2\.jsonl line 1"):
        prepare([many], tmp_path / "out", tokenizer=v1, settings=Settings(dedup=True), hands=Hands(1))
    assert [path.name for path in tmp_path.iterdir()] == ["many"]


def test_as_json_reads_back(shared: Path, tmp_path: Path):
    """Every conversation of a real file with tools, written and read again, is what it was."""
    (unit,) = sources.units([shared / "data" / "sharegpt_tools_150.json"])
    records = list(sources.read(unit))
    path = tmp_path / "again.jsonl"
    path.write_text("".join(json.dumps(duplicates.as_json(record)) + "\n" for record in records), "utf-8")
    again = [record for unit in sources.units([path]) for record in sources.read(unit)]
    assert [digest(record).tobytes() for record in again] == [digest(record).tobytes() for record in records]
    assert len({digest(record).tobytes() for record in records}) > 100
