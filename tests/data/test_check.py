"""Everything is read and counted, each bad record is named, and the good ones are written whole or not at all."""

from __future__ import annotations

import errno
import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from ostro.data import chat, sources, tasks
from ostro.data import check as room
from ostro.data.check import as_json, check, preview
from ostro.data.megatron import MegatronWriter
from ostro.data.records import Chat, Text, Tokens
from ostro.data.tasks import Settings
from ostro.data.tokenizer import Tokenizer, load_tokenizer
from ostro.errors import DataError, OutOfMemory

load = functools.cache(load_tokenizer)
SETTINGS = Settings(template="auto")


@pytest.fixture(scope="module")
def v3() -> Tokenizer:
    return load("v3")


def lines(path: Path, *records: object) -> Path:
    """Write records a line each; a string stands as it is."""
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records), "utf-8")
    return path


def talk(*turns: str, **more: object) -> dict[str, object]:
    """Return a conversation in which user and assistant alternate."""
    return {
        "messages": [{"role": ("user", "assistant")[at % 2], "content": each} for at, each in enumerate(turns)],
        **more,
    }


def test_texts_are_counted(tmp_path: Path, v3: Tokenizer):
    texts = ["The wind rose.", "It fell.", "The wind rose.", "long " * 30, "The wind rose."]
    path = lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    lengths = [len(v3.encode(text, bos=True, eos=True)) for text in texts]
    found = check([path], v3, SETTINGS, 20)
    assert found.errors == found.notes == []
    assert (found.num_records, found.num_tokens, found.num_trained) == (5, sum(lengths), sum(lengths))
    assert found.longest == max(lengths)
    assert found.num_over == sum(length > 20 for length in lengths) == 1
    assert check([path], v3, SETTINGS, max(lengths)).num_over == 0
    assert check([path], v3, SETTINGS, max(lengths) - 1).num_over == 1
    assert found.num_duplicates == 2


def test_conversations_are_counted_as_rendered(tmp_path: Path, v3: Tokenizer):
    path = lines(tmp_path / "a.jsonl", talk("a", "b c d"), talk("e", "f", "and after it"), talk("a", "b c d"))
    found = check([path], v3, SETTINGS, 512)
    chats = [record for unit in sources.units([path]) for record in sources.read(unit)]
    rendered = [chat.render(each, chat.mistral_v3, v3) for each in chats if isinstance(each, Chat)]
    assert found.num_tokens == sum(len(one.ids) for one in rendered)
    assert found.num_trained == sum(int(one.trained.sum()) for one in rendered) < found.num_tokens
    assert found.num_duplicates == 1
    assert found.notes == [
        f"{path} line 2: the last turn comes after the assistant's last one and is left out."
    ]  # where it is, once


def test_every_bad_record_is_named(tmp_path: Path, v3: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tasks, "_BATCH_RECORDS", 2)
    path = lines(
        tmp_path / "a.jsonl",
        talk("a", "b"),
        "{oops",
        talk("only a question"),
        talk("a", "b"),
        talk("a", 5),
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "tool", "content": "y"},
                {"role": "assistant", "content": "z"},
            ]
        },
        talk("last", "one"),
    )
    found = check([path], v3, SETTINGS, 512)
    assert found.num_records == 3
    assert len(found.errors) == 4
    for number, words in ((2, "not JSON"), (3, "assistant says nothing"), (5, "content"), (6, "a tool's answer")):
        (error,) = [error for error in found.errors if error.startswith(f"{path} line {number}: ")]
        assert words in error
        assert "\n" not in error


def test_errors_of_several_files(tmp_path: Path, v3: Tokenizer):
    one = lines(tmp_path / "one.jsonl", {"text": "a"}, {"text": 1})
    two = lines(tmp_path / "two.jsonl", {"text": "b"}, {"text": "\ud800"})
    three = tmp_path / "three.txt"
    three.write_bytes(b"good\nbad \xff\n")
    found = check([one, two, three], v3, SETTINGS, 512)
    assert found.num_records == 2
    assert [error.split(":")[0] for error in found.errors] == [f"{one} line 2", f"{two} line 2", f"{three} line 2"]


def test_a_half_pair_in_a_conversation_is_one_bad_record(tmp_path: Path, v3: Tokenizer):
    path = lines(tmp_path / "a.jsonl", talk("a", "b"), talk("a", "\ud800"), talk("c", "d"))
    found = check([path], v3, SETTINGS, 512)
    assert found.num_records == 2
    assert len(found.errors) == 1
    assert "line 2" in found.errors[0]


def test_tokens_of_another_vocabulary_are_bad_records(tmp_path: Path, v3: Tokenizer):
    with MegatronWriter(tmp_path / "m") as writer:
        for row in ([1, 2], [1, 40_000], [1, 3, 2]):
            writer.append(row)
    found = check([tmp_path / "m"], v3, SETTINGS, 2)
    assert (found.num_records, found.num_tokens, found.num_over) == (2, 5, 1)
    assert len(found.errors) == 1
    assert "m.bin record 2: its tokens go from 0 to 40000" in found.errors[0]


@pytest.mark.parametrize(
    "name",
    [
        "sharegpt_250.json",
        "sharegpt_tools_150.json",
        "apache2_alpaca_format.json",
        "mlx_wwdc25_prompt_completion.jsonl",
        "c4_demo.jsonl",
        "wikitext2_valid.txt",
        "botchan.txt",
    ],
)
def test_what_is_fixed_reads_back_the_same(shared: Path, tmp_path: Path, v3: Tokenizer, name: str):
    path, good = shared / "data" / name, tmp_path / "good.jsonl"
    found = check([path], v3, SETTINGS, 512, good)
    before = [record for unit in sources.units([path]) for record in sources.read(unit)]
    after = [record for unit in sources.units([good]) for record in sources.read(unit)]
    assert [as_json(record) for record in after] == [as_json(record) for record in before]
    again = check([good], v3, SETTINGS, 512)
    assert again.errors == []
    for field in ("num_records", "num_tokens", "num_trained", "longest", "num_over", "num_duplicates"):
        assert getattr(again, field) == getattr(found, field), field


def test_only_good_records_are_written(tmp_path: Path, v3: Tokenizer):
    rare = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "ü\u2028 </s>"}]}
    rare["messages"] += [{"role": "assistant", "content": "no", "weight": 0}, {"role": "user", "content": "q"}]
    rare["messages"] += [{"role": "assistant", "content": "yes"}]
    path = lines(tmp_path / "a.jsonl", talk("a", "b"), "{oops", talk("nobody answers"), rare)
    found = check([path], v3, SETTINGS, 512, tmp_path / "good.jsonl")
    assert len(found.errors) == 2
    written = [json.loads(line) for line in (tmp_path / "good.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert written == [talk("a", "b"), rare]
    again = check([tmp_path / "good.jsonl"], v3, SETTINGS, 512)
    assert (again.errors, again.num_trained, again.num_tokens) == ([], found.num_trained, found.num_tokens)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "good.jsonl"]


def test_what_cannot_be_fixed_leaves_nothing(tmp_path: Path, v3: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    texts = lines(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})
    talks = lines(tmp_path / "b.jsonl", talk("a", "b"))
    with MegatronWriter(tmp_path / "m") as writer:
        writer.append([1, 2])
    before = sorted(tmp_path.iterdir())
    good = tmp_path / "good.jsonl"
    with pytest.raises(DataError, match=r"b\.jsonl line 1: texts and conversations do not go into one file"):
        check([texts, talks], v3, SETTINGS, 512, good)
    with pytest.raises(DataError, match=r"m\.bin record 1: records of tokens have no text to write"):
        check([tmp_path / "m"], v3, SETTINGS, 512, good)
    with pytest.raises(DataError, match=r"a\.jsonl exists already: choose another name"):
        check([texts], v3, SETTINGS, 512, texts)

    def full(record: object) -> object:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(room.Beside, "keep", full)
        with pytest.raises(OutOfMemory, match=r"the disk is full, and nothing of .*good\.jsonl was kept"):
            check([texts], v3, SETTINGS, 512, good)
    assert sorted(tmp_path.iterdir()) == before


def test_previews_are_what_is_learned(tmp_path: Path, v3: Tokenizer):
    texts = lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": "x" * 50})
    talks = lines(tmp_path / "b.jsonl", talk("a", "b"), talk("c", "d"))
    shown = list(preview([texts, talks], v3, SETTINGS, 3, max_chars=9))
    assert [one.where for one in shown] == [f"{texts} line 1", f"{texts} line 2", f"{talks} line 1"]
    assert shown[0].pieces == [("<s>", False), ("one", True), ("</s>", True)]
    assert shown[1].pieces[1] == ("x" * 9, True)
    assert "".join(text for text, trained in shown[2].pieces if trained) == "b</s>"
    assert ("a" in "".join(text for text, trained in shown[2].pieces if not trained)) is True
    assert list(preview([texts], v3, SETTINGS, 0)) == []


def test_previews_of_tokens_are_their_text_and_mask(tmp_path: Path, v3: Tokenizer):
    ids = v3.encode("The wind rose.")
    with MegatronWriter(tmp_path / "m") as writer:
        writer.append(ids)
    (shown,) = preview([tmp_path / "m"], v3, SETTINGS, 5)
    assert shown.pieces == [("The wind rose.", True)]


def test_records_of_tokens_show_what_is_learned(v3: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    ids = np.array(v3.encode("The wind rose."), np.uint32)
    mask = np.arange(len(ids)) >= 2
    monkeypatch.setattr(room.sources, "units", lambda *_, **__: ["a"])
    monkeypatch.setattr(room.sources, "read", lambda _: iter([Tokens(ids, "a", mask), Text("b", "b")]))
    shown = list(preview(["a"], v3, SETTINGS, 2))
    assert [trained for _, trained in shown[0].pieces] == [False, True]
    assert shown[0].pieces[1][0].strip() == v3.decode(ids[2:].tolist()).strip()
