"""The engine makes the same bytes however the work is shared or cut short, and refuses what would mix two corpora."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from preparations import (
    TALKS,
    TEXTS,
    contents,
    left_behind,
    load,
    own_template,
    stamps,
    write_talks,
)

from ostro.data import chat, sources, tasks
from ostro.data import prepare as room
from ostro.data.arrays import ArrayFile
from ostro.data.megatron import MegatronWriter
from ostro.data.mindrecord import MindRecordWriter
from ostro.data.prepare import Hands, prepare, prepared
from ostro.data.records import Chat, Unit
from ostro.data.shards import FORMAT, Manifest, is_prepared, open_shards
from ostro.data.tasks import Settings, Tokenize, Words
from ostro.data.tokenizer import Tokenizer
from ostro.data.workers import Crew
from ostro.errors import DataError, OutOfMemory


def test_documents_become_bos_ids_eos(tmp_path: Path, corpus: Path, v1: Tokenizer):
    said: list[tuple[int, int, int]] = []
    out = tmp_path / "data"
    manifest = prepare([corpus], out, tokenizer=v1, report=lambda *done: said.append(done))
    rows = [v1.encode(text, bos=True, eos=True) for text in TEXTS]
    stream = [token for ids in rows for token in ids]
    shards = open_shards(out)
    assert shards.tokens(0, shards.num_tokens).tolist() == stream
    assert shards.trained(0, 5) is None
    assert shards.document_ends.tolist() == np.cumsum([len(ids) for ids in rows]).tolist()
    sizes = [len(text.encode()) for text in TEXTS]
    assert np.load(out / "documents.npy")[:, 1].tolist() == sizes
    assert manifest == shards.manifest
    assert dataclasses.asdict(shards.manifest) | {"encoder": "", "settings": {}, "key": ""} == {
        "format": FORMAT,
        "key": "",
        "tokenizer": "v1",
        "tokenizer_sha256": v1.sha256,
        "vocab_size": 32000,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unk_token_id": 0,
        "dtype": "uint16",
        "num_tokens": len(stream),
        "num_documents": 3,
        "num_bytes": sum(sizes),
        "num_trained": len(stream),
        "num_unlearned": 0,
        "num_repeats": 0,
        "encoder": "",
        "settings": {},
        "files": [{"name": "tokens-00000.npy", "num_tokens": len(stream), "num_trained": len(stream)}],
        "sources": [
            {
                "path": str(corpus),
                "kind": "jsonl",
                "num_bytes": corpus.stat().st_size,
                "sha256": hashlib.sha256(corpus.read_bytes()).hexdigest(),
            }
        ],
    }
    size = corpus.stat().st_size
    assert said == [(0, 0, size), (len(stream), size, size)]
    assert sorted(contents(out)) == ["documents.npy", "manifest.json", "tokens-00000.npy"]
    assert left_behind(tmp_path) == []
    (tmp_path / "fresh").mkdir()
    assert out.stat().st_mode == (tmp_path / "fresh").stat().st_mode


def test_batches_of_any_size_give_the_same(tmp_path: Path, many: Path, v1: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    prepare([many], tmp_path / "one", tokenizer=v1, hands=Hands(1))
    monkeypatch.setattr(tasks, "_BATCH_RECORDS", 2)
    monkeypatch.setattr(tasks, "_BATCH_CHARS", 50)
    prepare([many], tmp_path / "two", tokenizer=v1, hands=Hands(1))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_processes_and_shares_give_the_same_bytes(tmp_path: Path, many: Path, v1: Tokenizer):
    whole = prepare([many], tmp_path / "one", tokenizer=v1, hands=Hands(1))
    assert whole is not None
    assert len(whole.files) == 6
    assert prepare([many], tmp_path / "two", tokenizer=v1, hands=Hands(2)) == whole
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    for _ in range(2):  # the second time nothing is left of it
        assert prepare([many], tmp_path / "shared", tokenizer=v1, hands=Hands(1, (1, 2))) is None
    assert not is_prepared(tmp_path / "shared")
    assert prepare([many], tmp_path / "shared", tokenizer=v1, hands=Hands(1, (0, 2))) == whole
    assert contents(tmp_path / "shared") == contents(tmp_path / "one")
    assert left_behind(tmp_path) == []


def test_shares_that_start_and_end_together(tmp_path: Path, many: Path, v1: Tokenizer):
    expected = prepare([many], tmp_path / "one", tokenizer=v1, hands=Hands(1))
    for turn in range(5):
        out, found, errors = tmp_path / f"out{turn}", [], []

        def run(share: int, out: Path = out, found: list = found, errors: list = errors) -> None:
            try:
                found.append(prepare([many], out, tokenizer=load("v1"), hands=Hands(1, (share, 3))))
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(share,)) for share in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert expected in found
        assert [manifest for manifest in found if manifest not in (None, expected)] == []
        assert contents(out) == contents(tmp_path / "one")
    assert left_behind(tmp_path) == []


def test_another_share_was_faster(tmp_path: Path, corpus: Path, v1: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    real, out = room.write_manifest, tmp_path / "data"

    def write_manifest(path: Path, manifest: Manifest) -> None:
        real(path, manifest)
        os.replace(path, out)  # as the other does

    monkeypatch.setattr(room, "write_manifest", write_manifest)
    assert prepare([corpus], out, tokenizer=v1) == open_shards(out).manifest


KILLED = """
import os, signal, sys
from ostro.data import prepare as room, tasks
from ostro.data.tokenizer import load_tokenizer
room.TASK_BYTES, tasks._BATCH_RECORDS, left = 1, 1, [int(sys.argv[3])]
where = tasks if hasattr(tasks, "{name}") else room
real = where.{name}
def dies(*arguments):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
where.{name} = dies
room.prepare([sys.argv[1]], sys.argv[2], tokenizer=load_tokenizer(), hands=room.Hands(1))
"""


@pytest.mark.parametrize(("name", "calls"), [("encoded", 0), ("encoded", 14), ("_put_together", 0), ("_clear_up", 0)])
def test_what_was_killed_is_gone_on_with(tmp_path: Path, many: Path, v1: Tokenizer, name: str, calls: int):
    prepare([many], tmp_path / "one", tokenizer=v1, hands=Hands(1))
    out, partial = tmp_path / "data", tmp_path / ".data.partial"
    command = [sys.executable, "-c", KILLED.format(name=name), str(many), str(out), str(calls)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    if name == "_clear_up":  # whole, with more in it than need be
        assert contents(tmp_path / "one").items() < contents(out).items()
        assert open_shards(out).num_tokens
        prepare([many], out, tokenizer=v1, hands=Hands(1))
        assert contents(out) == contents(tmp_path / "one")
        assert not [path for path in out.iterdir() if path.is_dir()]
        return
    assert not is_prepared(out)
    finished = stamps(partial)
    assert bool(finished) == ((name, calls) != ("encoded", 0))
    assert bool(list(partial.glob("*.writing"))) == (name == "encoded")  # it was in the middle of a task
    prepare([many], out, tokenizer=v1, hands=Hands(1))
    assert contents(out) == contents(tmp_path / "one")
    kept = stamps(out)
    assert {name: kept[name] for name in finished if name in kept} == {
        name: stamp
        for name, stamp in finished.items()
        if not name.startswith("tokens-00001")  # that of no token
    }
    assert left_behind(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a task that does not end by itself needs a pipe")
def test_a_worker_that_is_killed_is_an_error_and_no_wait(tmp_path: Path, corpus: Path, v1: Tokenizer):
    partial, pipe = tmp_path / "partial", tmp_path / "pipe"
    partial.mkdir()
    words = Words(partial / "tokenizer", "v1")
    words.keep(v1)
    os.mkfifo(pipe)
    todo = [(0, [Unit(str(corpus), "jsonl")]), (1, [Unit(str(pipe), "text")])]
    before = set(multiprocessing.active_children())
    with Crew(2, num_bytes=0, warm=words.warm) as crew:
        work = crew.done(Tokenize(partial, words, Settings()), todo)
        assert next(work)[1]["num_documents"] == 3
        for child in set(multiprocessing.active_children()) - before:
            child.kill()
        with pytest.raises(OutOfMemory, match=r"ended from outside.*give the same command again.*fewer --workers"):
            next(work)
    assert (partial / "task-00000.json").exists()


def test_another_plan_is_not_gone_on_with(tmp_path: Path, many: Path, v1: Tokenizer):
    prepare([many], tmp_path / "data", tokenizer=v1, hands=Hands(1, (0, 2)))
    before = contents(tmp_path / ".data.partial")
    match = r"\.data\.partial holds the beginning of another preparation .*: remove it, or finish that one first"
    others: list[Callable[[], object]] = [
        lambda: prepare([many], tmp_path / "data", tokenizer=load("v3"), hands=Hands(1)),
        lambda: prepare([many / "9.txt"], tmp_path / "data", tokenizer=v1),
        lambda: prepare([many], tmp_path / "data", tokenizer=v1, settings=Settings(documents="line")),
        lambda: prepare([many], tmp_path / "data", tokenizer=v1, settings=Settings(template="vicuna")),
    ]
    for other in others:
        with pytest.raises(DataError, match=match):
            other()
    for settings in (Settings(kind="nope"), Settings(template="nope")):
        with pytest.raises(DataError, match="'nope' is unknown"):
            prepare([many], tmp_path / "data", tokenizer=v1, settings=settings, hands=Hands(1))
        assert contents(tmp_path / ".data.partial") == before
    os.utime(many / "9.txt", ns=(1, 1))
    with pytest.raises(DataError, match=match):
        prepare([many], tmp_path / "data", tokenizer=v1, hands=Hands(1))
    assert contents(tmp_path / ".data.partial") == before
    shutil.rmtree(tmp_path / ".data.partial")
    assert prepare([many], tmp_path / "data", tokenizer=v1, hands=Hands(1))


def test_another_template_of_the_tokenizers_own_is_another_plan(tmp_path: Path, v1: Tokenizer):
    one = own_template(tmp_path / "one", "{{ eos_token }}", v1)
    two = own_template(tmp_path / "two", "!{{ eos_token }}", v1)
    assert one.sha256 == two.sha256
    talks, settings = write_talks(tmp_path / "talks.jsonl"), Settings(template="tokenizer")
    folders = {prepared([talks], tmp_path / "cache", tokenizer=each, settings=settings) for each in (one, two, one)}
    assert len({open_shards(folder).manifest.settings["template_sha256"] for folder in folders}) == len(folders) == 2


def test_a_template_that_cannot_be_used_stops_no_texts(tmp_path: Path, corpus: Path, v1: Tokenizer):
    broken = own_template(tmp_path / "broken", "{% if %}", v1)
    assert prepare([corpus], tmp_path / "data", tokenizer=broken, settings=Settings(template="auto"))
    with pytest.raises(DataError, match="chat template 'nope' is unknown"):
        prepare([corpus], tmp_path / "other", tokenizer=v1, settings=Settings(template="nope"))
    assert not (tmp_path / ".other.partial").exists()


@pytest.mark.parametrize(("version", "template"), [("v1", "mistral-v1"), ("v3", "auto"), ("v1", "vicuna")])
def test_masks_are_the_templates(tmp_path: Path, version: str, template: str):
    tokenizer, talks, out = load(version), write_talks(tmp_path / "talks.jsonl"), tmp_path / "data"
    prepare([talks], out, tokenizer=tokenizer, settings=Settings(template=template))
    chats = [record for unit in sources.units([talks]) for record in sources.read(unit)]
    named = chat.load_template(template, tokenizer)
    rendered = [chat.render(record, named, tokenizer) for record in chats if isinstance(record, Chat)]
    mask = np.concatenate([one.trained for one in rendered])
    shards = open_shards(out)
    trained = shards.trained(0, shards.num_tokens)
    assert len(rendered) == 3
    assert shards.tokens(0, shards.num_tokens).tolist() == np.concatenate([one.ids for one in rendered]).tolist()
    assert trained is not None
    assert trained.tolist() == mask.tolist()
    assert shards.document_ends.tolist() == np.cumsum([len(one.ids) for one in rendered]).tolist()
    assert 0 < shards.manifest.num_trained == int(mask.sum()) < shards.num_tokens
    sizes = [sum(len(said.encode()) for _, said in talk) for talk in TALKS]
    assert np.load(out / "documents.npy")[:, 1].tolist() == sizes


def test_sources_of_every_kind_mix(tmp_path: Path, many: Path, corpus: Path, v1: Tokenizer):
    """Texts, conversations and tokens in one folder; only files that need one have a mask."""
    ids = np.array([1, 5, 6, 7, 2], np.int32)
    with MegatronWriter(tmp_path / "m") as megatron:
        for row in (ids[:3], [], ids):
            megatron.append(row)
    with MindRecordWriter(tmp_path / "q.mindrecord", ("input_ids", "labels"), "qa") as rows:
        rows.append({"input_ids": ids, "labels": np.where(ids > 5, ids, -100).astype(np.int32)})
    paths = [corpus, many / "2-talks.jsonl", tmp_path / "m.idx", tmp_path / "q.mindrecord"]
    prepare(paths, tmp_path / "data", tokenizer=v1, hands=Hands(1))
    shards = open_shards(tmp_path / "data")
    files = shards.manifest.files
    assert shards.manifest.num_documents == 3 + 3 + 2 + 1
    assert [file["num_tokens"] == file["num_trained"] for file in files] == [True, False, True, False]
    assert [(tmp_path / "data" / f"trained-{at:05d}.npy").exists() for at in range(4)] == [False, True, False, True]
    assert shards.tokens(shards.num_tokens - 13, shards.num_tokens).tolist() == [1, 5, 6, *ids, *ids]
    trained = shards.trained(shards.num_tokens - 13, shards.num_tokens)
    assert trained is not None
    assert trained.tolist() == [True] * 8 + [False, False, True, True, False]


def test_records_that_teach_nothing_are_counted(tmp_path: Path, v1: Tokenizer):
    with MindRecordWriter(tmp_path / "q.mindrecord", ("input_ids", "labels"), "qa") as rows:
        for learned in ([5, 6, 7], [-100, -100, 7], [5, -100, -100], [-100, -100, -100]):  # the first is no label
            rows.append({"input_ids": np.array([5, 6, 7], np.int32), "labels": np.array(learned, np.int32)})
    manifest = prepare([tmp_path / "q.mindrecord"], tmp_path / "data", tokenizer=v1)
    assert manifest is not None
    assert (manifest.num_documents, manifest.num_unlearned) == (4, 2)


def test_tokens_of_another_vocabulary_are_refused(tmp_path: Path, v1: Tokenizer):
    with MegatronWriter(tmp_path / "m") as megatron:
        megatron.append([1, 2])
        megatron.append([1, 70_000, 2])
    with pytest.raises(DataError, match=r"m\.bin record 2: its tokens go .* to 70000, and tokenizer v1 has 0 to 31999"):
        prepare([tmp_path / "m"], tmp_path / "data", tokenizer=v1)


def test_a_large_vocabulary_takes_wider_tokens(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch):
    class Large:
        """The real tokenizer with every id moved up, as one of 128,000 pieces would have them."""

        name, sha256, fingerprint, vocab_size, spec, is_fast = "large", "0", "0", 128_000, b"", False
        bos_token_id, eos_token_id, unk_token_id = 100_001, 100_002, None

        def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
            return [ids + 90_000 for ids in load("v1").encode_arrays(texts)]

        def unproved(self) -> object:
            return self

    large: Tokenizer = Large()  # type: ignore[assignment]
    monkeypatch.setattr(Words, "keep", lambda *_: None)
    monkeypatch.setattr(Words, "load", lambda _: large)
    monkeypatch.setattr(room, "_settled", lambda *_: {})
    prepare([corpus], tmp_path / "data", tokenizer=large)
    shards = open_shards(tmp_path / "data")
    assert shards.manifest.dtype == str(shards.tokens(0, 1).dtype) == "uint32"
    plain = load("v1").encode(TEXTS[0])
    assert shards.tokens(0, len(plain) + 2).tolist() == [100_001, *(token + 90_000 for token in plain), 100_002]


def test_the_same_again_is_left_as_it_is(tmp_path: Path, many: Path, v1: Tokenizer):
    out = tmp_path / "data"
    first = prepare([many], out, tokenizer=v1, hands=Hands(1))
    before = stamps(out)
    assert prepare([many], out, tokenizer=v1) == first
    assert stamps(out) == before
    os.utime(many / "9.txt", ns=(1, 1))
    with pytest.raises(DataError, match="already holds prepared data, of other or changed sources"):
        prepare([many], out, tokenizer=v1)


def test_out_must_be_new(tmp_path: Path, corpus: Path, v1: Tokenizer):
    prepare([corpus], tmp_path / "data", tokenizer=v1)
    with pytest.raises(DataError, match="already holds prepared data, of other or changed sources"):
        prepare([corpus], tmp_path / "data", tokenizer=load("v3"))
    for taken in (corpus, tmp_path):
        with pytest.raises(DataError, match="exists and is not an empty folder"):
            prepare([corpus], taken, tokenizer=v1)
    (tmp_path / "empty").mkdir()
    prepare([corpus], tmp_path / "empty", tokenizer=v1)
    assert is_prepared(tmp_path / "empty")
    with pytest.raises(DataError, match=r"inside cannot be written \((File exists|Not a directory)"):
        prepare([corpus], corpus / "inside", tokenizer=v1)


@pytest.mark.parametrize("content", ["", " \n\n", '{"text": ""}\n'])
def test_an_empty_corpus_leaves_nothing(tmp_path: Path, v1: Tokenizer, content: str):
    (tmp_path / "a.txt").write_text(content, "utf-8")
    with pytest.raises(DataError, match=r"a\.txt: there is no text in it"):
        prepare([tmp_path / "a.txt"], tmp_path / "data", tokenizer=v1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_an_error_is_the_same_from_a_worker(tmp_path: Path, many: Path, v1: Tokenizer):
    (many / "3.jsonl").write_text('{"text": "good"}\n{"text": 5}\n')
    messages = set()
    for workers in (1, 2):
        with pytest.raises(DataError, match=r'3\.jsonl line 2: "text" must be a string, and is int') as caught:
            prepare([many], tmp_path / f"data{workers}", tokenizer=v1, hands=Hands(workers))
        messages.add(str(caught.value))
        assert not (tmp_path / f"data{workers}").exists()
    assert len(messages) == 1


def test_a_conversation_that_cannot_be_rendered_names_its_line(tmp_path: Path, v1: Tokenizer):
    path = write_talks(tmp_path / "talks.jsonl")
    with path.open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    with pytest.raises(DataError, match=r"talks\.jsonl line 4: .*assistant"):
        prepare([path], tmp_path / "data", tokenizer=v1)


@pytest.mark.parametrize("writes", [0, 2, 4])
def test_a_full_disk_is_a_sentence_and_gone_on_from(
    tmp_path: Path, many: Path, v1: Tokenizer, monkeypatch: pytest.MonkeyPatch, writes: int
):
    real, left = ArrayFile.append, [writes]

    def append(self: ArrayFile, rows: np.ndarray) -> None:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        real(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(ArrayFile, "append", append)
        with pytest.raises(OutOfMemory, match=r"the disk is full: make room .*same command again"):
            prepare([many], tmp_path / "data", tokenizer=v1, hands=Hands(1))
    assert not list((tmp_path / ".data.partial").glob("*.writing"))
    assert not (tmp_path / "data").exists()
    prepare([many], tmp_path / "data", tokenizer=v1, hands=Hands(1))
    prepare([many], tmp_path / "whole", tokenizer=v1, hands=Hands(1))
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_raw_text_is_prepared_once(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch):
    cache, runs = tmp_path / "cache", []
    real = room.prepare
    monkeypatch.setattr(room, "prepare", lambda *args, **named: (runs.append(1), real(*args, **named))[1])

    def get(version: str = "v1", path: Path = corpus, **settings: str) -> Path:
        return prepared([path], cache, tokenizer=load(version), settings=Settings(**settings))

    first = get()
    assert open_shards(first).manifest.num_documents == 3
    monkeypatch.chdir(tmp_path)
    assert get() == get(path=Path("corpus.jsonl")) == first
    assert len(runs) == 1
    assert len({first, get(kind="text"), get(kind="text", documents="line"), get(template="vicuna"), get("v3")}) == 5
    os.utime(corpus, ns=(1, 1))
    changed = get()
    assert changed != first
    corpus.write_text('{"text": "other"}\n', "utf-8")
    os.utime(corpus, ns=(1, 1))
    assert get() not in (first, changed)
    assert len(runs) == len(list(cache.iterdir())) == 7


def test_prepared_data_is_taken_as_it_is(tmp_path: Path, corpus: Path, v1: Tokenizer):
    data = tmp_path / "data"
    prepare([corpus], data, tokenizer=v1)
    assert prepared([data], tmp_path / "cache", tokenizer=v1, settings=Settings()) == data
    (data / "documents.npy").unlink()  # damaged is still prepared: open_shards says what is wrong
    assert prepared([data], tmp_path / "cache", tokenizer=v1, settings=Settings()) == data
    with pytest.raises(DataError, match="prepared already and cannot be mixed with raw files"):
        prepared([corpus, data], tmp_path / "cache", tokenizer=v1, settings=Settings())
    assert not (tmp_path / "cache").exists()


def test_tasks_are_cut_by_size_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "TASK_BYTES", 10)
    found = room.grouped([Unit("a", "text", 0, size) for size in (4, 6, 1, 30, 2, 2)])
    assert [[unit.stop for unit in task] for task in found] == [[4, 6], [1], [30], [2, 2]]
