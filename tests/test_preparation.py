"""The verb `prepare` as a user meets it: what is refused, what is said of the data, and what is written."""

from __future__ import annotations

import functools
import gzip
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich

from ostro import log
from ostro.cli import main
from ostro.data import sources
from ostro.data.duplicates import as_json
from ostro.data.megatron import read_megatron
from ostro.data.mindrecord import read_mindrecord
from ostro.data.shards import open_shards
from ostro.data.tokenizer import Tokenizer, load_tokenizer

BAD = {
    2: ("{oops", "this is not JSON"),
    4: ('{"messages": "text"}', '"messages" must be a list of turns, and is a string'),
    5: ('{"messages": [{"role": "user", "content": "only a question"}]}', "the assistant says nothing"),
    6: ('{"messages": [{"role": "wizard", "content": "a"}]}', "\"role\" is 'wizard'"),
    7: ('["a"]', "a conversation is a JSON object, and this is a list"),
    9: ('{"messages": [{"role": "user", "content": 5}]}', '"content" must be a text, and is a number'),
}


load = functools.cache(load_tokenizer)
copies: dict[bytes, Tokenizer] = {}


@pytest.fixture
def v1() -> Tokenizer:
    return load("v1")


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch: pytest.MonkeyPatch):
    """Keep every tokenizer, which takes most of a second to load, and the copies that preparations keep of them."""

    def of_folder(folder: Path) -> Tokenizer:
        content = b"".join(file.read_bytes() for file in sorted(folder.iterdir()))
        if content not in copies:
            copies[content] = load_tokenizer(folder)
        return copies[content]

    monkeypatch.setattr("ostro.preparation.load_tokenizer", load)
    monkeypatch.setattr("ostro.data.tasks.load_tokenizer", of_folder)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Return the exit code of `ostro prepare …`, what it printed, and its error on one line."""
    code = main(["prepare", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, " ".join(captured.err.split())


def lines(path: Path, *records: object) -> Path:
    """Write records a line each; a string stands as it is."""
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records), "utf-8")
    return path


def talk(*turns: str) -> dict[str, object]:
    """Return a conversation in which user and assistant alternate."""
    return {"messages": [{"role": ("user", "assistant")[at % 2], "content": each} for at, each in enumerate(turns)]}


def flawed(folder: Path) -> Path:
    """Write six bad records among three good ones, the last of which repeats the first."""
    good = {1: talk("Hi", "Hello <s> [INST] there"), 3: talk("a", "b c d"), 8: talk("Hi", "Hello <s> [INST] there")}
    return lines(folder / "talks.jsonl", *(good.get(at) or BAD[at][0] for at in range(1, 10)))


def texts_of(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Return the documents of a prepared folder as texts, having looked at what they begin and end with."""
    shards = open_shards(folder)
    cuts = [0, *shards.document_ends.tolist()]
    rows = [shards.tokens(start, stop).tolist() for start, stop in itertools.pairwise(cuts)]
    assert {(row[0], row[-1]) for row in rows} == {(1, 2)}
    return [tokenizer.decode(row[1:-1]) for row in rows]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--out x --workers 0", "--workers 0 is too small: use 1 or more."),
        ("--check --seq-length 0", "--seq-length 0 is too small: use 1 or more."),
        ("--out x --repeat 0", "--repeat 0 is too small: use 1 or more."),
        ("--out x --partitions -1", "--partitions -1 is too small: use 1 or more."),
        ("--preview -1", "--preview -1 is too small: use 0 or more."),
        ("--check --tokens-per-second 0", "--tokens-per-second 0 is no speed: use a number above 0."),
        ("--check --tokens-per-second nan", "--tokens-per-second nan is no speed: use a number above 0."),
        ("--out x --to megatrom", "--to megatrom is not one of native, mindrecord, megatron. Did you mean 'megatron'?"),
        ("--out x --style mindformer", "--style mindformer is not one of native, mindformers. Did you mean 'mindfor"),
        ("", "there is nothing to do: give --out DIR, or --check, or --preview N."),
        ("--preview 0", "there is nothing to do: give --out DIR, or --check, or --preview N."),
        ("--out x --to mindrecord --seq-length 8", "--style mindformers and --to mindrecord go together:"),
        ("--out x --style mindformers --seq-length 8", "--style mindformers and --to mindrecord go together:"),
        ("--out x --style mindformers --to megatron", "--style mindformers and --to mindrecord go together:"),
        ("--out x --style mindformers --to mindrecord", "makes records of one length: give --seq-length"),
        ("--out x --repeat 2", "--repeat and --partitions are for --style mindformers: leave them out."),
        ("--out x --partitions 2", "--repeat and --partitions are for --style mindformers: leave them out."),
        ("--check --dedup", "--shard, --ray and --dedup are for a folder of token shards: give --out"),
        ("--check --shard 0/2", "--shard, --ray and --dedup are for a folder of token shards: give --out"),
        ("--preview 1 --ray local", "--shard, --ray and --dedup are for a folder of token shards: give --out"),
        ("--out x --to megatron --dedup", "--shard, --ray and --dedup are for a folder of token shards: give --out"),
        ("--out x --shard 0/2 --ray local", "--shard and --ray both say who does the work: give one of them."),
        ("--conversations x", "--conversations is for --style mindformers: leave it out."),
        (
            "--out x --style mindformers --to mindrecord --seq-length 8 --check",
            "show Ostro's own tokens, not MindFormers' records: give them without --style.",
        ),
        ("--style mindformers --conversations y --preview 1", "show Ostro's own tokens, not MindFormers' records"),
        (
            "--out x --style mindformers --to mindrecord --seq-length 8 --kind text",
            "--kind is not for --style mindformers",
        ),
        ("--style mindformers --conversations y --documents line", "--documents is not for --style mindformers"),
        ("--style mindformers --conversations y --template vicuna", "--template is not for --style mindformers"),
        ("--out x --seq-length 8", "--seq-length and --tokens-per-second are what --check counts by: add it"),
        ("--preview 1 --tokens-per-second 8", "--seq-length and --tokens-per-second are what --check counts by"),
        ("--out x --shard 2", "--shard '2' must be i/n, counted from 0: --shard 0/4."),
        ("--out x --shard 2/2", "--shard 2/2: shares are counted from 0, the last of n is n-1."),
        ("--style mindformers --conversations y", "--conversations takes one file of Alpaca records: name it alone."),
    ],
)
def test_options_that_do_not_go_together(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, sentence: str
):
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "a.txt", "text")
    code, out, err = run(capsys, "a.txt", *options.split())
    assert (code, out) == (2, "")
    assert sentence in err
    assert os.listdir() == ["a.txt"]


def test_bad_records_are_named_and_the_rest_counted(capsys: pytest.CaptureFixture[str], tmp_path: Path, v1: Tokenizer):
    path = flawed(tmp_path)
    # <s> and what is asked, then the answer and </s>, each turn encoded by itself.
    asked = [1 + len(v1.encode("[INST] Hi [/INST]")), 1 + len(v1.encode("[INST] a [/INST]"))]
    learned = [len(v1.encode("Hello <s> [INST] there")) + 1, len(v1.encode("b c d")) + 1]
    first, second = (a + b for a, b in zip(asked, learned, strict=True))
    tokens, share = 2 * first + second, (2 * learned[0] + learned[1]) / (2 * first + second)
    options = ("--seq-length", first - 1, "--tokens-per-second", 2)
    code, out, err = run(capsys, path, "--check", *options, "--out", tmp_path / "data")
    assert code == 3
    assert err == "ostro: 6 records are bad: mend them, or take the good ones with --fix FILE."
    said = out.splitlines()
    assert len(said) == len(BAD) + 2
    for line, (number, (_, what)) in zip(said, BAD.items(), strict=False):  # in the order of the file
        assert line.startswith(f"{path} line {number}: ")
        assert what in line
    assert first > second
    assert said[-2] == (
        f"3 good records, {tokens} tokens, the longest {first}; 2 are longer than {first - 1}; {share:.1%} of the "
        "tokens are learned; 1 repeat an earlier one; 6 are bad"
    )
    rows = -(-tokens // (first - 1))
    assert f"an epoch is about {rows} rows of {first - 1} tokens, 1 steps of 32 rows, " in said[-1]
    assert f", 0:{round(tokens / 2):02} at 2 tokens/s; read in " in said[-1]
    assert os.listdir(tmp_path) == ["talks.jsonl"]  # and nothing is written


def test_many_bad_records_are_cut_with_a_count(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    path = lines(tmp_path / "a.jsonl", {"text": "good"}, *["{oops"] * 23)
    code, out, err = run(capsys, path, "--check")
    assert code == 3
    named = re.findall(r"a\.jsonl line (\d+): ", out)
    assert named == [str(number) for number in range(2, 22)]
    assert "… and 3 more bad records\n" in out
    assert "23 records are bad" in err


def test_the_good_ones_pass_and_are_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    path, good = flawed(tmp_path), tmp_path / "good.jsonl"
    code, out, _ = run(capsys, path, "--fix", good)
    assert code == 3
    assert f"wrote the good ones to {good}, {log.size(good.stat().st_size)}" in out
    before = [item for unit in sources.units([path]) for item in sources.attempts(unit)]
    after = [as_json(record) for unit in sources.units([good]) for record in sources.read(unit)]
    kept = [as_json(item) for item in before if not isinstance(item, Exception) and item.where[-1] != "5"]
    assert after == kept
    assert len(after) == 3
    code, out, err = run(capsys, good, "--check")
    assert (code, err) == (0, "")
    assert out.startswith("3 good records, ")
    assert "; 0 are bad\n" in out
    content = good.read_bytes()
    code, _, err = run(capsys, path, "--fix", good)
    assert code == 3
    assert f"{good} exists already: choose another name, or remove it first." in err
    assert good.read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["good.jsonl", "talks.jsonl"]


def test_a_preview_shows_what_is_learned(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = lines(tmp_path / "a.jsonl", talk("Why [b]?", "Hello </s> you"), talk("c", "d"), talk("e", "f"))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(rich, "_console", None)  # which has looked at the environment once
    code, out, _ = run(capsys, path, "--preview", 2)
    assert code == 0
    dim, green, bold, off = "\x1b[2m", "\x1b[32m", "\x1b[1m", "\x1b[0m"
    shown = f"{dim}<s>{off}{dim}[INST] Why [b]? [/INST]{off}{green}Hello </s> you{off}{green}</s>{off}\n\n"
    assert out.startswith(f"{bold}{path} line 1{off}\n{shown}")
    assert f"{path} line 2" in out
    assert f"{path} line 3" not in out


def test_duplicates_are_left_out(capsys: pytest.CaptureFixture[str], tmp_path: Path, v1: Tokenizer):
    path = lines(tmp_path / "a.jsonl", *({"text": text} for text in ("one", "two", "one", "one", "three")))
    code, out, _ = run(capsys, path, "--out", tmp_path / "data", "--dedup")
    assert code == 0
    assert "3 documents, " in out
    assert "2 records that equal an earlier one were left out" in out
    assert texts_of(tmp_path / "data", v1) == ["one", "two", "three"]


def test_the_same_command_again_and_another_one(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    path, data = lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": "one"}), tmp_path / "data"
    assert "prepared before" not in run(capsys, path, "--out", data)[1]
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in data.iterdir()}
    code, out, err = run(capsys, path, "--out", data)
    assert (code, err) == (0, "")
    assert out.endswith("bytes, prepared before, unchanged\n")
    for options in (["--dedup"], ["--tokenizer", "v3"], ["--kind", "text"]):
        code, out, err = run(capsys, path, "--out", data, *options)
        assert (code, out) == (3, "")
        assert f"{data} already holds prepared data, of other or changed sources, tokenizer or settings" in err
    lines(path, {"text": "another"})
    assert run(capsys, path, "--out", data)[0] == 3
    assert {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in data.iterdir()} == before


def test_shares_make_what_one_process_makes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ostro.data.prepare.TASK_BYTES", 1)
    paths = [lines(tmp_path / f"{at}.txt", f"text {at}") for at in range(3)]
    assert run(capsys, *paths, "--out", tmp_path / "one")[0] == 0
    code, out, _ = run(capsys, *paths, "--out", tmp_path / "two", "--shard", "0/2")
    assert code == 0
    assert out == f"{tmp_path / 'two'}: share 0/2 is done; the last share to end puts the folder together\n"
    assert not (tmp_path / "two").exists()
    code, out, _ = run(capsys, *paths, "--out", tmp_path / "two", "--shard", "1/2")
    assert code == 0
    assert "3 documents, " in out
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert len([name for name in one if name.startswith("tokens-")]) == 3


def test_megatron_s_files_hold_the_same_tokens(capsys: pytest.CaptureFixture[str], tmp_path: Path, v1: Tokenizer):
    texts = ["The wind rose.", "</s> is text", "风"]
    path = lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    code, out, _ = run(capsys, path, "--to", "megatron", "--out", tmp_path / "m")
    assert code == 0
    rows = [v1.encode(text, bos=True, eos=True) for text in texts]
    assert out == (f"{tmp_path / 'm'}.bin and {tmp_path / 'm'}.idx: 3 documents, {sum(map(len, rows))} tokens\n")
    read = [record.ids.tolist() for record in read_megatron(tmp_path / "m")]
    assert read == rows
    assert {(row[0], row[-1]) for row in read} == {(1, 2)}
    assert read[1].count(2) == 1
    code, out, _ = run(capsys, lines(tmp_path / "b.jsonl", talk("a", "b")), "--to", "megatron", "--out", tmp_path / "n")
    assert code == 0
    assert "Megatron's files have no place for which tokens are learned: all of them will be" in out
    code, _, err = run(capsys, path, "--to", "megatron", "--out", tmp_path / "m")
    assert code == 3
    assert "m.bin exists already: choose another name" in err


def test_mindformers_texts_are_the_recorded_ones(shared: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    golden = np.load(shared / "golden" / "preprocess" / "wikitext2_valid_seq4096.npz")["input_ids"]
    path, out_path = shared / "data" / "wikitext2_valid.txt", tmp_path / "wiki.mindrecord"
    style = ("--style", "mindformers", "--to", "mindrecord", "--seq-length", 4096)
    code, out, _ = run(capsys, path, *style, "--out", out_path, "--partitions", 3, "--repeat", 2)
    assert code == 0
    made = sorted(file.name for file in tmp_path.iterdir())
    assert made == [f"wiki.mindrecord{part}{end}" for part in range(3) for end in ("", ".db")]
    records = np.stack([record.ids for record in read_mindrecord(tmp_path / "wiki.mindrecord0")])
    assert out == f"{out_path}: {len(records)} records of 4097 tokens\n"
    np.testing.assert_array_equal(records[: len(golden)], golden)
    # The text once more follows, in the middle of a record: at the same place of the stream as in the first round.
    stream, once = records.ravel(), golden.ravel()
    again = [at for at in range(once.size, once.size + 4097) if (stream[at : at + 1000] == once[:1000]).all()]
    assert len(again) == 1
    assert 2 * len(golden) <= len(records) <= 2 * len(golden) + 1
    rest = stream[again[0] :]
    assert rest.size >= once.size - 4097
    np.testing.assert_array_equal(rest[: once.size], once[: rest.size])


def test_mindformers_conversations_are_the_recorded_ones(
    shared: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    golden = np.load(shared / "golden" / "preprocess" / "apache2_alpaca_seq2048.npz")
    path, talks = shared / "data" / "apache2_alpaca_format.json", tmp_path / "talks.json"
    code, out, _ = run(capsys, path, "--style", "mindformers", "--conversations", talks)
    assert code == 0
    assert out == f"{talks}: 427 conversations, as alpaca_converter.py writes them\n"
    assert talks.read_bytes() == converted(json.loads(path.read_text("utf-8"))).encode()
    style = ("--style", "mindformers", "--to", "mindrecord", "--seq-length", 2048)
    for source in (talks, path):  # what the converter wrote, and what it would
        target = tmp_path / f"{source.stem}.mindrecord"
        code, out, _ = run(capsys, source, *style, "--out", target)
        assert code == 0
        assert out == f"{target}: 427 records of 2049 tokens\n"
        records = list(read_mindrecord(target))
        np.testing.assert_array_equal([record.ids for record in records], golden["input_ids"])
        labels = [np.where(np.asarray(record.trained, bool), record.ids, -100) for record in records]
        np.testing.assert_array_equal(labels, golden["labels"])


def converted(records: list[dict[str, str]]) -> str:
    """Return what alpaca_converter.py writes of Alpaca records: Alpaca's two prompts, json.dump with indent 2."""
    request = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
    plain = "Below is an instruction that describes a task. " + request
    paired = "Below is an instruction that describes a task, paired with an input that provides further context. "
    rows = []
    for number, record in enumerate(records, start=1):
        asked = plain + record["instruction"]
        if record.get("input", "") != "":
            asked = f"{paired}{request}{record['instruction']}\n\n### Input:\n{record['input']}"
        turns = [("human", f"{asked}\n\n### Response:"), ("gpt", record["output"])]
        rows.append({"id": str(number), "conversations": [{"from": who, "value": what} for who, what in turns]})
    return json.dumps(rows, ensure_ascii=False, indent=2)


def test_a_weight_is_for_training(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    path = lines(tmp_path / "a.txt", "text")
    code, out, err = run(capsys, f"{path}@0.3", "--out", tmp_path / "data")
    assert (code, out) == (3, "")
    assert f"{path}@0.3 says a weight, which counts where data is trained on: prepare each source by itself" in err


def test_a_data_set_of_the_hub_is_fetched_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, v1: Tokenizer
):
    asked = []

    def load_dataset(*names: object, **options: object) -> list[dict[str, str]]:
        asked.append(names)
        return [{"text": "from afar"}, {"text": "and near"}]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for name in ("one", "two"):
        assert run(capsys, "hf://owner/name", "--out", tmp_path / name)[0] == 0
        assert texts_of(tmp_path / name, v1) == ["from afar", "and near"]
    assert "prepared before, unchanged" in run(capsys, "hf://owner/name", "--out", tmp_path / "two")[1]
    assert asked == [("owner/name", None)]
    assert len(list((tmp_path / "cache").rglob("*.jsonl"))) == 1

    monkeypatch.setitem(sys.modules, "datasets", None)
    code, out, err = run(capsys, "hf://owner/other", "--out", tmp_path / "three")
    assert (code, out) == (3, "")
    assert "hf://owner/other is fetched with the package datasets: pip install 'ostro[datasets]'." in err
    assert sorted(os.listdir(tmp_path)) == ["cache", "one", "two"]


@pytest.mark.parametrize(
    ("suffix", "documents", "expected"),
    [
        ("", "file", ["one\ntwo\n\nthree\n"]),
        ("", "line", ["one", "two", "three"]),
        ("", "blank", ["one\ntwo", "three"]),
        (".gz", "blank", ["one\ntwo", "three"]),
        (".zst", "line", ["one", "two", "three"]),
    ],
)
def test_what_a_document_is_of_plain_and_packed_text(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    v1: Tokenizer,
    suffix: str,
    documents: str,
    expected: list[str],
):
    content = b"one\ntwo\n\nthree\n"
    if suffix == ".gz":
        content = gzip.compress(content)
    elif suffix == ".zst":
        content = pytest.importorskip("zstandard").ZstdCompressor().compress(content)
    (tmp_path / f"a.txt{suffix}").write_bytes(content)
    code, out, _ = run(capsys, tmp_path / f"a.txt{suffix}", "--documents", documents, "--out", tmp_path / "data")
    assert code == 0
    assert f"{len(expected)} documents, " in out
    assert texts_of(tmp_path / "data", v1) == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), ["30 B of 30 B read"]),
        (("--check",), ["10 B of 30 B read", "20 B of 30 B read", "30 B of 30 B read"]),
        (("--to", "megatron"), ["10 B of 30 B read", "20 B of 30 B read", "30 B of 30 B read"]),
        (("--style", "mindformers", "--to", "mindrecord", "--seq-length", 3), ["16 B written", "32 B written"]),
    ],
)
def test_what_takes_long_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[object, ...],
    said: list[str],
):
    monkeypatch.setattr(log, "_PLAIN_SECONDS", 0.0)
    for at in range(3):
        (tmp_path / f"{at}.txt").write_text("one two 3\n")
    code, out, _ = run(capsys, *(tmp_path / f"{at}.txt" for at in range(3)), *options, "--out", tmp_path / "data")
    assert code == 0
    shown = re.findall(r"^(.*(?:read|written))  .*/s", out, re.MULTILINE)
    assert [line for line in shown if not line.startswith("0 B")][: len(said)] == said
    assert "\x1b" not in out  # not the line of a terminal
    monkeypatch.setattr(log, "_PLAIN_SECONDS", 1000.0)
    quiet = run(capsys, tmp_path / "0.txt", *options, "--out", tmp_path / "other")[1]
    assert "/s  " not in quiet


def test_interrupted_it_stops_and_goes_on(tmp_path: Path):
    """Ctrl-C in the middle of 100 MB: nobody works on, and the same command makes the same bytes of what is left."""
    rng = np.random.default_rng(0)
    words = " ".join("".join(map(chr, rng.integers(97, 123, size))) for size in rng.integers(1, 9, 10_000))
    with (tmp_path / "a.jsonl").open("w") as file:  # some 25 tasks of 4 MB
        for at in range(2_000):
            file.write(json.dumps({"text": f"{at} {words}"}) + "\n")
    assert (tmp_path / "a.jsonl").stat().st_size > 100_000_000
    partial = tmp_path / ".data.partial"
    command = [sys.executable, "-m", "ostro", "prepare", "a.jsonl", "--workers", "2", "--out", "data"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # At the lowest priority, so that this process sees the first task done before the last one is.
    with subprocess.Popen(["nice", "-n", "19", *command], cwd=tmp_path, start_new_session=True, **pipes) as process:
        while process.poll() is None and not any(partial.glob("task-*.json")):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all of them are told
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == "data: interrupted; the same command goes on with what is left\n"
    assert "Traceback" not in err
    end = time.monotonic() + 5
    while (left := living(process.pid)) and time.monotonic() < end:  # the last to go is multiprocessing's own watch
        time.sleep(0.05)
    assert not left
    assert not (tmp_path / "data").exists()
    notes = len(list(partial.glob("task-*.json")))
    assert 0 < notes < json.loads((partial / "plan.json").read_text())["num_tasks"]
    kept = next(partial.glob("task-*.json")).name.replace("task", "tokens").replace("json", "npy")
    finished = (partial / kept).stat()

    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    subprocess.run([*command[:-1], "whole"], cwd=tmp_path, check=True, capture_output=True)
    again = (tmp_path / "data" / kept).stat()
    assert (again.st_ino, again.st_mtime_ns) == (finished.st_ino, finished.st_mtime_ns)  # not written once more
    assert hashes(tmp_path / "data") == hashes(tmp_path / "whole")
    assert set(hashes(tmp_path / "data")) >= {"manifest.json", "documents.npy", "tokens-00000.npy", "tokens-00001.npy"}


def living(group: int) -> list[str]:
    """Return the processes of a group, but for those that have ended and that nobody has asked about."""
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [" ".join(row) for row in rows if row[0] == str(group) and not row[1].startswith("Z")]


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
