"""What `ostro train` trains on: shares of sources, what is said of long documents, what resuming looks at."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from ostro.cli import main
from ostro.config import Config, load_config
from ostro.data.mindrecord import MindRecordWriter
from ostro.data.prepare import prepare
from ostro.data.shards import open_shards
from ostro.data.tasks import Settings
from ostro.data.tokenizer import load_tokenizer
from ostro.errors import ConfigError, DataError, TrainError
from ostro.evaluate import evaluate
from ostro.log import read_metrics
from ostro.serve.chat import trained_with
from ostro.train import set_up, train, train_step

SMALL = [
    "model.hidden_size=32",
    "model.intermediate_size=24",
    "model.num_hidden_layers=1",
    "model.num_local_experts=4",
    "data.seq_length=32",
    "train.global_batch_sequences=4",
    "train.steps=-1",
    "checkpoint.every=0",
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def winds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two texts of one word each: 40 rows of 32 tokens, and 120."""
    folder = tmp_path_factory.mktemp("winds")
    for word, count in (("north", 40), ("south", 120)):
        text = " ".join([word] * 30)  # 30 tokens, and one at either end
        (folder / f"{word}.jsonl").write_text((json.dumps({"text": text}) + "\n") * count, "utf-8")
    return folder / "north.jsonl", folder / "south.jsonl"


def settings(paths: Sequence[object], run_dir: Path, *more: str) -> list[str]:
    return [*SMALL, f"data.path=[{', '.join(map(str, paths))}]", f"run.dir={run_dir}", *more]


def config(paths: Sequence[object], run_dir: Path, *more: str) -> Config:
    return load_config("tiny", settings(paths, run_dir, *more))


def ostro_train(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ostro", "train", "tiny", *overrides]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "400"})


# By tokens: 30 and 70 of each hundred of the 160 rows that there are. By epochs: three times 40, half of 120.
@pytest.mark.parametrize(
    ("by", "shares", "rows"), [("tokens", ("0.3", "0.7"), (48, 112)), ("epochs", ("3", "0.5"), (120, 60))]
)
def test_sources_have_their_shares(
    winds: tuple[Path, Path], tmp_path: Path, by: str, shares: tuple[str, str], rows: tuple[int, int]
) -> None:
    paths = [f"{path}@{share}" for path, share in zip(winds, shares, strict=True)]
    overrides = settings(paths, tmp_path / "run", f"data.weights_by={by}")
    done = ostro_train(*overrides)
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == sum(rows) // 4
    loader = set_up(load_config("tiny", overrides)).loader
    assert loader.num_rows == sum(rows)
    tokenizer = load_tokenizer("v1")
    first = [tokenizer.decode(row.tokens_L.tolist()).split()[0] for row in loader.read(0, loader.num_rows)]
    assert (first.count("north"), first.count("south")) == rows


def test_each_source_has_a_share_or_none_has(winds: tuple[Path, Path], tmp_path: Path) -> None:
    north, south = winds
    done = ostro_train(*settings([f"{north}@0.3", south], tmp_path / "run"))
    assert done.returncode == 2
    assert "data.path gives some sources a share and others none: write path@share for each." in done.stderr
    assert set_up(config(winds, tmp_path / "all")).loader.num_rows == 160
    with pytest.raises(DataError, match="is no source with a weight: write PATH@WEIGHT"):
        set_up(config([f"{north}@0", f"{south}@1"], tmp_path / "none"))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (["data.packing=none"], "data.packing"),
        (["data.overlong=drop"], "data.overlong"),
        (["data.pad_token_id=0"], "data.pad_token_id"),
        (["data.weights_by=epochs"], "data.weights_by"),
        (["PATHS@2,1"], r"data.path \(shares\)"),
        (["data.documents=line", "data.kind=text"], r"data.path \(sha256\)"),
    ],
)
def test_resuming_over_other_rows_is_refused(
    winds: tuple[Path, Path], tmp_path: Path, change: list[str], name: str
) -> None:
    run_dir = tmp_path / "run"
    train(config([f"{path}@1" for path in winds], run_dir, "train.steps=1"))
    shares = change[0].removeprefix("PATHS@").split(",") if change[0].startswith("PATHS") else ("1", "1")
    more = [] if change[0].startswith("PATHS") else change
    paths = [f"{path}@{share}" for path, share in zip(winds, shares, strict=True)]
    with pytest.raises(ConfigError, match=f"was trained with {name}="):
        set_up(config(paths, run_dir, "train.steps=1", *more))


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """Three short ones, and one whose only answer comes after a hundred words."""
    file = tmp_path / "chats.jsonl"
    asked = [("hello", "world")] * 3 + [("word " * 100, "so many")]
    lines = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in asked
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return file


@pytest.mark.parametrize(
    ("overlong", "said"),
    [
        ("truncate", "cut off there (data.overlong=truncate); 1 of these documents has no token that is learned"),
        ("split", "cut into several rows (data.overlong=split); 3 of these parts have no token that is learned"),
        ("drop", "left out (data.overlong=drop)"),
    ],
)
def test_training_says_what_becomes_of_long_documents(
    conversations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overlong: str, said: str
) -> None:
    more = [f"data.overlong={overlong}", "train.steps=1", "train.global_batch_sequences=8"]
    train(config([conversations], tmp_path / "run", *more))
    assert f"1 of 4 documents is longer than data.seq_length=32 and is {said}\n" in capsys.readouterr().out


def test_a_row_of_which_nothing_is_learned_does_no_harm(conversations: Path, tmp_path: Path) -> None:
    """Beside others it counts for nothing; a step of such rows alone is refused before anything is updated."""
    more = ["data.overlong=truncate", "data.packing=none", "data.shuffle=false", "train.steps=2"]
    run = set_up(config([conversations], tmp_path / "a", *more, "train.micro_batch_sequences=1"))
    rows = run.loader.rows(0, 4)
    assert [bool(row.weights_L.any()) for row in rows] == [True, True, True, False]
    alone = set_up(config([conversations], tmp_path / "b", *more, "train.micro_batch_sequences=4"))
    alone.loader.rows = lambda *_, **__: rows[:3]  # type: ignore[method-assign]
    for one in (run, alone):
        for parameter in one.model.parameters():
            parameter.grad = None
    assert train_step(run).loss == pytest.approx(train_step(alone).loss, rel=1e-6)
    run.loader.rows = lambda *_, **__: rows[3:]  # type: ignore[method-assign]
    with pytest.raises(TrainError, match=r"step 2: no token of this batch has a label that is learned: all of it is m"):
        train_step(run)
    assert run.step == 1


def test_single_tokens_are_said_to_be_the_reason_where_they_are(winds: tuple[Path, Path], tmp_path: Path) -> None:
    run = set_up(config(winds, tmp_path / "run", "data.packing=none", "data.overlong=split"))
    row = run.loader.row(0)
    single = type(row)(row.tokens_L[:1], row.labels_L[:1] * 0, row.weights_L[:1] * 0, (1,))
    run.loader.rows = lambda *_, **__: [single]  # type: ignore[method-assign]
    with pytest.raises(TrainError, match=r"has a label that is learned: its documents are single tokens, so look at"):
        train_step(run)


def test_evaluation_scores_what_is_learned(conversations: Path, winds: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer("v1")
    prepare([conversations], tmp_path / "chats", tokenizer=tokenizer)
    prepare([winds[0]], tmp_path / "text", tokenizer=tokenizer)
    model = set_up(config(winds, tmp_path / "run")).model
    chats, text = open_shards(tmp_path / "chats"), open_shards(tmp_path / "text")
    found = evaluate(model, [chats], 64)
    assert found.num_tokens == chats.manifest.num_trained
    assert found.metrics() == {"eval_loss": found.loss}  # of the bytes only some are scored
    whole = evaluate(model, [text], 64)
    assert whole.metrics() == {"eval_loss": whole.loss, "eval_bits_per_byte": whole.bits_per_byte}
    ids = np.arange(3, 20, dtype=np.int32)
    with MindRecordWriter(tmp_path / "ignored.mindrecord", ["input_ids", "labels"], "rows") as writer:
        writer.append({"input_ids": ids, "labels": np.full_like(ids, -100)})
    prepare([tmp_path / "ignored.mindrecord"], tmp_path / "ignored", tokenizer=tokenizer)
    with pytest.raises(DataError, match="ignored: no token of it is learned, so there is nothing to score"):
        evaluate(model, [open_shards(tmp_path / "ignored")], 64)


TALKS = [
    {"messages": [{"role": "user", "content": f"What is {at}?"}, {"role": "assistant", "content": "a number " * at}]}
    for at in range(1, 12)
]


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    path.write_text("".join(json.dumps(talk) + "\n" for talk in TALKS), "utf-8")
    return path


def test_a_folder_of_another_template_is_refused(talks: Path, tmp_path: Path) -> None:
    prepare([talks], tmp_path / "data", tokenizer=load_tokenizer(), settings=Settings(template="vicuna"))
    for same in ("auto", "vicuna"):
        assert set_up(config([tmp_path / "data"], tmp_path / same, f"data.template={same}")).loader.num_rows
    with pytest.raises(DataError, match=r"prepared with the template 'vicuna', not 'mistral-v1': set data.template"):
        set_up(config([tmp_path / "data"], tmp_path / "run", "data.template=mistral-v1"))


def test_the_tokens_of_short_rows_are_counted_as_they_are(talks: Path, tmp_path: Path) -> None:
    """Also where a run goes on: rows of whole conversations are seldom full."""
    more = ("data.packing=none", "train.steps=4", "checkpoint.every=2")
    train(config([talks], tmp_path / "whole", *more))
    run = set_up(config([talks], tmp_path / "other", *more))
    read = [sum(len(row.tokens_L) for row in run.loader.rows(step, 4)) for step in range(4)]
    tokens = [row["tokens"] for row in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert tokens == np.cumsum(read).tolist()
    assert len({*read, 4 * 32}) > 2
    newest = sorted((tmp_path / "whole" / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    train(config([talks], tmp_path / "whole", *more))
    assert [row["tokens"] for row in read_metrics(tmp_path / "whole" / "metrics.jsonl")][-2:] == tokens[-2:]


def test_duplicates_are_left_out_of_raw_data_where_asked(winds: tuple[Path, Path], tmp_path: Path) -> None:
    run = set_up(config([winds[0]], tmp_path / "run", "data.dedup=true", "train.global_batch_sequences=1"))
    assert run.loader.num_tokens == 32


def test_a_run_over_chats_says_what_it_learns_and_which_template_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    talk = {"conversations": [{"from": "human", "value": "Is it so?"}, {"from": "gpt", "value": "Yes."}]}
    Path("chat.jsonl").write_text((json.dumps(talk) + "\n") * 9)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    small = [f"model.{name}={value}" for name, value in {**sizes, "num_hidden_layers": 1}.items()]
    small += ["train.steps=1", "train.global_batch_sequences=1", "data.seq_length=32", "run.dir=run"]
    assert main(["train", "tiny", "data.path=chat.jsonl", *small]) == 0
    said = capsys.readouterr().out
    assert "chat.jsonl: 9 conversations, " in said
    learned = float(said.split("of which ")[1].split("%")[0])
    assert 15 < learned < 40
    assert "template mistral-v1" in said
    assert "ostro chat run" in said
    assert yaml.safe_load(Path("run/config.yaml").read_text())["data"]["template"] == "mistral-v1"
    assert trained_with("run") == "mistral-v1"
    Path("chat.jsonl").write_text('{"messages": [{"role": "usr", "content": "a"}]}\n')
    assert main(["train", "tiny", "data.path=chat.jsonl", *small, "run.dir=other"]) == 3
    error = " ".join(capsys.readouterr().err.split())
    assert "chat.jsonl line 1: message 1: \"role\" is 'usr'" in error
    assert "`ostro prepare chat.jsonl --check` names every bad record" in error
