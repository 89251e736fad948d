"""MindFormers' records: the recorded ones bit for bit, others against its rules written down the slow way."""

from __future__ import annotations

import functools
import json
import random
import re
import tracemalloc
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ostro.data import mindformers as room
from ostro.data.mindformers import QaReport, alpaca_to_conversations, qa_records, wiki_records, write_conversations
from ostro.data.tokenizer import Tokenizer, load_tokenizer
from ostro.errors import DataError

BOS, EOS, PAD = 1, 2, 0
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. "
)

load = functools.cache(load_tokenizer)


@pytest.fixture(scope="module")
def v1() -> Tokenizer:
    return load("v1")


# The oracle: reference/seed_system.md §5.2 and §5.3 on the whole text at once, with sentencepiece itself.


@functools.cache
def pieces() -> sentencepiece.SentencePieceProcessor:
    file = Path(str(resources.files("mistral_common") / "data" / "tokenizer.model.v1"))
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


def tokenized(text: str) -> list[int]:
    ids = [BOS]
    for part in re.split("(<s>|</s>|<unk>)", text):
        if part in ("<s>", "</s>", "<unk>"):
            ids.append(pieces().piece_to_id(part))
        elif part:
            ids += pieces().encode(part)
    return [*ids, EOS]


def cleaned(text: str) -> str:
    text = text.replace("s '", "s'")
    text = re.sub("/' [0-9]/", "/'[0-9]/", text)
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for opener, closer in ("()", "[]", "{}", '""', "''"):
        inner = rf"\s*([^{re.escape(closer)}]*?)\s*"
        text = re.sub(re.escape(opener) + inner + re.escape(closer), rf"{opener}\1{closer}", text)
    for bars in (4, 3, 2):
        text = text.replace(" ".join("=" * bars), "=" * bars)
    text = text.replace(" ° ", "°").replace(" \n", "\n").replace("\n ", "\n")
    return text.replace(" N ", " 1 ").replace(" 's", "'s")


def wiki_oracle(text: str, length: int, repeat: int = 1) -> list[list[int]]:
    ids: list[int] = []
    for paragraph in cleaned(text).split("\n\n"):
        if paragraph and not paragraph.strip().startswith("="):
            ids += tokenized(paragraph)
    ids *= repeat
    return [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]


def qa_oracle(turns: list[dict], length: int) -> tuple[list[int], list[int]] | None:
    """One record, or None where the script breaks off."""
    turns = turns if turns[0]["from"] == "human" else turns[1:]
    prompt = SYSTEM
    for at, turn in enumerate(turns):
        if turn["from"] != ("human", "gpt")[at % 2]:
            return None
        title = ("USER", "ASSISTANT")[at % 2]
        prompt += f"{title}: {turn['value']}{(' ', '</s>')[at % 2]}" if turn["value"] else f"{title}:"
    rounds = prompt.split("</s>")
    rounds = rounds[: rounds.index("")] if "" in rounds else rounds
    ids = [BOS]
    for part in rounds:
        ids += tokenized(part)[1:]
    ids += [PAD] * (length - len(ids))
    labels = [-100, *ids[1:]]
    at = 1
    for part in rounds:
        if part.count(" ASSISTANT: ") != 1:
            break
        instruction = len(tokenized(part[: part.index(" ASSISTANT: ") + len(" ASSISTANT: ")])) - 3
        for masked in range(at, min(at + instruction, len(labels))):
            labels[masked] = -100
        at += len(tokenized(part)) - 1
    labels[at:] = [-100] * len(labels[at:])
    if at < length:
        if at != sum(token != PAD for token in ids):
            labels = [-100] * len(labels)
        if len(labels) > length:
            return None
    return ids[:length], labels[:length]


def test_wiki_is_the_recorded_one(shared: Path, v1: Tokenizer):
    golden = np.load(shared / "golden" / "preprocess" / "wikitext2_valid_seq4096.npz")["input_ids"]
    records = np.stack(list(wiki_records(shared / "data" / "wikitext2_valid.txt", v1, 4096)))
    assert records.dtype == np.int32
    np.testing.assert_array_equal(records, golden)


def test_wiki_at_another_length_cuts_the_same_stream(shared: Path, v1: Tokenizer):
    golden = np.load(shared / "golden" / "preprocess" / "wikitext2_valid_seq4096.npz")["input_ids"].ravel()
    records = np.stack(list(wiki_records(shared / "data" / "wikitext2_valid.txt", v1, 511)))
    assert len(golden) <= records.size < len(golden) + 4097
    np.testing.assert_array_equal(records.ravel()[: len(golden)], golden)


def test_qa_is_the_recorded_one(shared: Path, v1: Tokenizer, tmp_path: Path):
    golden = np.load(shared / "golden" / "preprocess" / "apache2_alpaca_seq2048.npz")
    path, report = tmp_path / "conversations.json", QaReport()
    write_conversations(alpaca_to_conversations(shared / "data" / "apache2_alpaca_format.json"), path)
    records = list(qa_records(path, v1, 2048, report))
    np.testing.assert_array_equal([ids for ids, _ in records], golden["input_ids"])
    np.testing.assert_array_equal([labels for _, labels in records], golden["labels"])
    assert {array.dtype for record in records for array in record} == {np.dtype(np.int32)}
    assert report == QaReport(records=427)


@pytest.mark.parametrize("seq_length", [512, 160])
def test_qa_at_another_length(shared: Path, v1: Tokenizer, seq_length: int):
    conversations = alpaca_to_conversations(shared / "data" / "apache2_alpaca_format.json")
    report = QaReport()
    records = list(qa_records(conversations, v1, seq_length, report))
    expected = [qa_oracle(record["conversations"], seq_length + 1) for record in conversations]
    np.testing.assert_array_equal([np.stack(record) for record in records], expected)
    assert report.useless == sum(set(labels) == {-100} for _, labels in expected if labels)
    assert report.truncated > 0


WIKI_PARTS = st.sampled_from(
    [
        *(
            "s '",
            " '",
            "'",
            "/' 5/",
            "/' 5/' 6/",
            '"',
            "(",
            ")",
            "[",
            "]",
            "{",
            "}",
            " °",
            " ",
            "  ",
            "\t",
            "\u3000",
            "\x1c",
        ),
        *(
            " @-@ ",
            " @,@ ",
            " @.@ ",
            " : ",
            " ; ",
            " . ",
            " ! ",
            " ? ",
            " , ",
            "= ",
            " =",
            "\n",
            " \n",
            "\n ",
            "\n\n",
            "\r\n",
        ),
        *(" N ", " 's", "word", "é", "😀", "<unk>", "<s>", "</s>", "<unk", "▁", "\ufeff"),
    ]
)


@settings(max_examples=300)
@given(
    parts=st.lists(WIKI_PARTS, max_size=40),
    chunk=st.sampled_from([1, 2, 3, 7, 1000]),
    batch=st.sampled_from([1, 40, 1000]),
    length=st.integers(2, 7),
    repeat=st.integers(1, 3),
)
@example(parts=["(", " (", "  a", " ", ")", '" ', "b", " '", ' "', "/' 5/"], chunk=1, batch=1, length=2, repeat=2)
def test_wiki_in_pieces_of_any_size(tmp_path_factory, parts, chunk, batch, length, repeat):
    path = tmp_path_factory.getbasetemp() / "wiki.tokens"
    path.write_bytes("".join(parts).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_CHUNK_CHARS", chunk)
        patch.setattr(room, "_BATCH_CHARS", batch)
        records = [record.tolist() for record in wiki_records(path, load("v1"), length - 1, repeat)]
    assert records == wiki_oracle(path.read_text("utf-8"), length, repeat)


@given(parts=st.lists(WIKI_PARTS, max_size=12))
def test_the_quick_split_is_a_split(parts: list[str]):
    text = "".join(parts) + "-" * 20_000  # which makes every mark rare
    for old, _ in (*room._BEFORE_BRACKETS, *room._AFTER_BRACKETS, ("s '", "")):
        assert room._split(text, old) == text.split(old)


VALUES = st.lists(
    st.sampled_from(
        ["Hello", " world", "</s>", "<s>", "<unk>", " ASSISTANT: ", "USER: ", " ", "\n", "é", "日本", " x" * 9]
    ),
    max_size=4,
).map("".join)


@settings(max_examples=300)
@given(values=st.lists(VALUES, min_size=1, max_size=5), headless=st.booleans(), length=st.integers(2, 120))
def test_qa_with_its_faults(values: list[str], headless: bool, length: int):
    turns = [{"from": ("human", "gpt")[at % 2], "value": value} for at, value in enumerate(values)]
    turns = [{"from": "gpt", "value": "Welcome"}, *turns] if headless else turns
    expected, report = qa_oracle(turns, length), QaReport()
    if expected is None:
        with pytest.raises(DataError, match=r"^record 1: the sample has \d+ tokens, more than"):
            list(qa_records([{"conversations": turns}], load("v1"), length - 1, report))
        return
    ((ids, labels),) = qa_records([{"conversations": turns}], load("v1"), length - 1, report)
    assert (ids.tolist(), labels.tolist()) == expected
    useless = int(set(expected[1]) == {-100})
    assert (report.useless, report.first_useless) == (useless, 1 if useless else None)


def chat(*values: str) -> dict:
    return {"conversations": [{"from": ("human", "gpt")[at % 2], "value": value} for at, value in enumerate(values)]}


GOOD = json.dumps(chat("Hi", "Hello"))


def test_the_report_says_what_became_useless(v1: Tokenizer):
    report = QaReport()
    records = [chat("Hi", "Hello"), chat("What is <unk>?", "A word"), chat("word " * 200, "Yes"), chat("Hi", "No")]
    labels = [labels for _, labels in qa_records(records, v1, 99, report)]
    assert report == QaReport(records=4, truncated=1, useless=2, first_useless=2)
    assert [bool((found != -100).any()) for found in labels] == [True, False, False, True]
    trained = labels[0][labels[0] != -100].tolist()
    assert trained == [*v1.encode("Hello"), EOS]


class Counter:
    """A tokenizer that costs nothing: eight ids a text."""

    bos_token_id, eos_token_id, unk_token_id = BOS, EOS, PAD

    def encode_arrays(self, texts):
        return [np.full(8, 7, dtype=np.uint32) for _ in texts]


def test_wiki_needs_no_more_memory_for_more_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "_CHUNK_CHARS", 1 << 14)
    monkeypatch.setattr(room, "_BATCH_CHARS", 1 << 14)
    path, peaks = tmp_path / "wiki.tokens", []
    text = ' \n = T = \n \n The word , said " he " ( it is 1 @,@ 000 , with an " odd quote ) . \n' * 1000
    for times in (1, 10):
        path.write_text(text * times, encoding="utf-8")
        tracemalloc.start()
        assert sum(1 for _ in wiki_records(path, Counter(), 512)) > 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_alpaca_is_written_as_by_its_converter(tmp_path: Path):
    records = [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Say é.", "input": "", "output": "é"},
        {"instruction": "Go on.", "input": " ", "output": ""},
        {"instruction": "Stop.", "output": "."},
    ]
    found = alpaca_to_conversations(records)
    short = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    long = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
    )
    assert [record["id"] for record in found] == ["1", "2", "3", "4"]
    assert [record["conversations"][0]["value"] for record in found] == [
        f"{long}\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:",
        f"{short}\n\n### Instruction:\nSay é.\n\n### Response:",
        f"{long}\n\n### Instruction:\nGo on.\n\n### Input:\n \n\n### Response:",
        f"{short}\n\n### Instruction:\nStop.\n\n### Response:",
    ]
    path = tmp_path / "new" / "conversations.json"
    write_conversations(found[1:2], path)
    prompt = json.dumps(found[1]["conversations"][0]["value"], ensure_ascii=False)
    assert path.read_text("utf-8") == (
        '[\n  {\n    "id": "2",\n    "conversations": [\n      {\n        "from": "human",\n        "value": '
        + prompt
        + '\n      },\n      {\n        "from": "gpt",\n        "value": "é"\n      }\n    ]\n  }\n]'
    )
    assert [file.name for file in path.parent.iterdir()] == ["conversations.json"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("there.json", "exists already"),
        (".", "is a folder"),
        ("there.json/x.json", "cannot be written"),
        ("a\0b", "null"),
    ],
)
def test_conversations_are_written_to_a_new_file_only(tmp_path: Path, name: str, message: str):
    (tmp_path / "there.json").write_text("kept")
    with pytest.raises(DataError, match=message):
        write_conversations([chat("Hi", "Hello")], f"{tmp_path}/{name}")
    assert (tmp_path / "there.json").read_text() == "kept"
    assert len(list(tmp_path.iterdir())) == 1


def test_half_a_character_leaves_no_file(tmp_path: Path):
    with pytest.raises(DataError, match=r"cannot be written: .*surrogates"):
        write_conversations([chat("\ud800", "x")], tmp_path / "new.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"conversations": []}', r"not a JSON list of records: it must start with \["),
        ("", r"must start with \["),
        ("[", "record 1: this is not JSON"),
        (f"[{GOOD}", "damaged or cut after record 1"),
        (f"[{GOOD} {GOOD}]", "damaged or cut after record 1"),
        (f"[{GOOD},]", "record 2: this is not JSON"),
        (f"[{GOOD}]]", "goes on after the list of its 1 records"),
        ('[{"conversations": [{"from": "human', r"record 1: this is not JSON \(Unterminated string"),
        ("[" * 100_000, "record 1: it is nested too deeply"),
        ("[" + "9" * 5000 + "]", "record 1: "),
        ("[3]", 'record 1: "conversations" must be a list'),
        ('[{"conversations": "abc"}]', "must be a list"),
        ('[{"conversations": []}]', "must be a list of at least one"),
        ('[{"conversations": [4]}]', "must be a list"),
        ('[{"conversations": [{"from": "human", "value": 4}]}]', 'the "value" of turn 1 must be a text'),
        ('[{"conversations": [{"from": "human"}]}]', 'the "value" of turn 1 must be a text'),
        ('[{"conversations": [{"from": "human", "value": "\\ud800"}]}]', "half of a surrogate pair"),
        (
            json.dumps([chat("a", "b"), {"conversations": [{"from": "human", "value": "a"}] * 2}]),
            "record 2: turns must go human, gpt, human, …; turn 2 is from 'human'",
        ),
    ],
)
def test_bad_conversations_are_named(tmp_path: Path, v1: Tokenizer, content: str, message: str):
    path = tmp_path / "conversations.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as raised:
        list(qa_records(path, v1, 64))
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("record", [3, {}, {"instruction": "a"}, {"instruction": 1, "output": "b"}, {"output": "b"}])
def test_bad_alpaca_is_named(record: object):
    good = {"instruction": "a", "input": "b", "output": "c"}
    with pytest.raises(DataError, match=r'^record 2: "(instruction|output)" must be a text'):
        alpaca_to_conversations([good, record])
    with pytest.raises(DataError, match=r'^record 1: "input" must be a text'):
        alpaca_to_conversations([{**good, "input": None}])


def test_bad_files_and_lengths(tmp_path: Path, v1: Tokenizer):
    path = tmp_path / "wiki.tokens"
    path.write_bytes(b"good\nbad \xff\n")
    for name, message in [(path, "line 2: byte 5 .*0xff"), (tmp_path, "not a file"), (tmp_path / "none", "not a file")]:
        with pytest.raises(DataError, match=message):
            list(wiki_records(name, v1, 8))
        with pytest.raises(DataError, match=message):
            list(qa_records(name, v1, 8))
    with pytest.raises(DataError, match="seq_length=0"):
        list(wiki_records(path, v1, 0))
    with pytest.raises(DataError, match="repeat=0"):
        list(wiki_records(path, v1, 8, repeat=0))
    bare = Counter()
    bare.unk_token_id = None
    with pytest.raises(DataError, match="padded with the id of <unk>"):
        list(qa_records([], bare, 8))


def test_mutated_conversations_are_read_or_named(tmp_path: Path):
    path, draw = tmp_path / "c.json", random.Random(0)
    good = json.dumps([chat("Hi <unk>", "Hello"), chat("a", "b", "c é", "d")], indent=1).encode()
    refused = 0
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(data))
            data[at : at + draw.randint(0, 12)] = draw.choice(
                [b"", b"[", b"}", b'"', b"null", b"7", b"\xff", b"\\ud800", b","]
            )
        path.write_bytes(bytes(data))
        try:
            records = list(qa_records(path, Counter(), 40))
        except DataError as error:
            records, refused = [], refused + 1
            message = str(error)
            assert message.startswith(str(path)), message
        assert all(len(ids) == len(labels) == 41 for ids, labels in records)
    assert 500 < refused < 1500
