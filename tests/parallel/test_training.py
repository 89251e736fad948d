"""Whole runs of several processes: saved in one layout, gone on with in another, evaluated, stopped, refused."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.utils.tensorboard
from parity import SETTINGS
from worlds import run_in_world

from ostro.config import load_config
from ostro.data.prepare import prepare
from ostro.data.shards import open_shards
from ostro.data.tokenizer import load_tokenizer
from ostro.errors import DataError, LayoutError, TrainError
from ostro.evaluate import evaluate
from ostro.log import read_metrics
from ostro.parallel.apply import local
from ostro.serve.load import load_model
from ostro.train import set_up, train, train_step
from ostro.weights import convert, dcp, open_reader, saver
from ostro.weights.store import compare, digest

FSDP_EP = {"parallel.fsdp": 2, "parallel.ep": 2}
LAYOUTS: list[dict[str, Any]] = [
    {},
    FSDP_EP,
    {"parallel.tp": 2, "parallel.etp": 2},
    {"parallel.cp": 2, "parallel.dp": 2},
    {"parallel.pp": 2, "parallel.schedule": "interleaved", "parallel.virtual_stages": 2, "parallel.fsdp": 2},
    {"parallel.pp": 4, "parallel.schedule": "zero_bubble"},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    (folder / "text" / "json.py").write_text(Path(json.__file__).read_text())
    prepare([folder / "text"], folder / "shards", tokenizer=load_tokenizer("v1"))
    return folder / "shards"


def overrides(data: Path, run_dir: Path, **more: Any) -> list[str]:
    settings = {
        **SETTINGS,
        "model.vocab_size": 32000,
        "model.initializer_range": 0.05,
        "model.max_position_embeddings": 64,
        "train.global_batch_sequences": 8,
        "train.micro_batch_sequences": 1,
        "train.steps": 6,
        "optim.learning_rate": 1e-3,
        "optim.min_learning_rate": 0,
        "optim.eps": 1e-4,  # below it Adam turns the noise of summing in another order into steps of its own
        "optim.schedule": "cosine",
        "checkpoint.every": 3,
        "data.path": data,
        "run.dir": run_dir,
    }
    return [f"{key}={value}" for key, value in {**settings, **more}.items()]


def _run(words: list[str]) -> tuple[int, int | None]:
    outcome = train(load_config("tiny", words))
    return outcome.step, outcome.signal


def run(data: Path, run_dir: Path, layout: dict[str, Any], **more: Any) -> None:
    words = overrides(data, run_dir, **layout, **more)
    size = load_config("tiny", words).parallel.degrees().num_ranks
    for step, caught in run_in_world(size, _run, words) if size > 1 else [_run(words)]:
        assert (step, caught) == (more.get("train.steps", 6), None)


def told(run_dir: Path) -> list[dict[str, Any]]:
    clock = {"tokens_per_second", "mfu", "seconds"}
    return [{k: v for k, v in row.items() if k not in clock} for row in read_metrics(run_dir / "metrics.jsonl")]


def furthest(one: Path, other: Path) -> float:
    return max(row.max_relative for row in compare(open_reader(one), open_reader(other)))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    run(data, run_dir, {})
    return run_dir


@pytest.fixture(scope="module")
def many(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run of two processes."""
    run_dir = tmp_path_factory.mktemp("runs") / "many"
    run(data, run_dir, FSDP_EP)
    return run_dir


def test_a_run_of_many_is_a_run_of_one(whole: Path, many: Path) -> None:
    assert furthest(whole, many) < 1e-6
    for one, other in zip(told(whole), told(many), strict=True):
        assert one["expert_load"] == other["expert_load"]
        for key in ("loss", "aux_loss", "z_loss", "grad_norm", "router_entropy", "tokens", "learning_rate"):
            assert one[key] == pytest.approx(other[key], rel=1e-5)


STEADY = {"train.steps": 5, "optim.schedule": "constant"}  # a rate that does not depend on where the end is
BROKEN_OFF = {**STEADY, "train.steps": 3}


@pytest.fixture(scope="module")
def steady(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five undisturbed steps of one process."""
    run_dir = tmp_path_factory.mktemp("runs") / "steady"
    run(data, run_dir, {}, **STEADY)
    return run_dir


def test_the_same_layout_goes_on_to_the_same_bits(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "run", FSDP_EP, **BROKEN_OFF)
    first = digest(open_reader(tmp_path / "run"))
    run(data, tmp_path / "run", FSDP_EP, **STEADY)
    run(data, tmp_path / "straight", FSDP_EP, **STEADY)
    assert first != digest(open_reader(tmp_path / "run")) == digest(open_reader(tmp_path / "straight"))
    assert told(tmp_path / "run") == told(tmp_path / "straight")


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [*zip(LAYOUTS, LAYOUTS[1:] + LAYOUTS[:1], strict=True)],
    ids=lambda case: "-".join(f"{k[9:]}{v}" for k, v in case.items()) or "one",
)
def test_any_layout_goes_on_in_any_other(
    data: Path, steady: Path, tmp_path: Path, saved: dict[str, Any], resumed: dict[str, Any]
) -> None:
    run(data, tmp_path / "run", saved, **BROKEN_OFF)
    run(data, tmp_path / "run", resumed, **STEADY)
    assert furthest(tmp_path / "run", steady) < 1e-6


def _evaluated(words: list[str], where: str) -> tuple[float, int, list[list[float]], bool]:
    found = set_up(load_config("tiny", words))
    held_out = evaluate(found.world, [open_shards(where)], 48)
    return held_out.loss, held_out.num_tokens, held_out.expert_load, found.world.is_training


def test_many_evaluate_as_one_does(data: Path, whole: Path) -> None:
    alone = evaluate(load_model(whole), [open_shards(data)], 48)
    words = overrides(data, whole, **{"parallel.dp": 2, "parallel.tp": 2, "parallel.pp": 2})
    for loss, num_tokens, load, is_training in run_in_world(8, _evaluated, words, str(data)):
        assert loss == pytest.approx(alone.loss, rel=1e-6)
        assert (num_tokens, load, is_training) == (alone.num_tokens, alone.expert_load, True)


def _started(words: list[str]) -> dict[str, Any]:
    held = set_up(load_config("tiny", words)).world.held_parameters()
    return {name: (piece.box.where, piece.tensor.clone()) for name, piece in held.items()}


@pytest.mark.parametrize("form", ["hf", "mistral", "mindspore"])
def test_every_rank_starts_from_its_own_slices_of_any_format(
    data: Path, whole: Path, tmp_path: Path, form: str
) -> None:
    convert(whole, tmp_path / "start.ckpt" if form == "mindspore" else tmp_path / "start", to=form)
    path = next(tmp_path.glob("start*"))
    words = overrides(data, tmp_path / "run", **{"parallel.tp": 2, "parallel.etp": 2, "weights.path": path})
    reader, seen = open_reader(whole), 0
    for rank in run_in_world(2, _started, words):
        for name, (where, values) in rank.items():
            assert torch.equal(values, reader.read(name, where)), name
            seen += values.numel()
    assert seen > sum(math.prod(info.shape) for info in reader.names().values())


def _interrupted(words: list[str]) -> tuple[int, int | None, float]:
    config = load_config("tiny", words)
    sent = [0.0]

    def interrupt() -> None:
        metrics = Path(config.run.dir) / "metrics.jsonl"
        while not metrics.exists() or not metrics.stat().st_size:  # both ranks are in the loop then
            time.sleep(0.01)
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        sent[0] = time.monotonic()

    threading.Thread(target=interrupt).start()
    outcome = train(config)
    return outcome.saved_step, outcome.signal, time.monotonic() - sent[0]


def test_a_signal_to_one_rank_saves_and_ends_all(data: Path, tmp_path: Path) -> None:
    words = overrides(data, tmp_path / "run", **FSDP_EP, **{"train.steps": 100_000, "checkpoint.every": 0})
    (step, caught, seconds), other = run_in_world(2, _interrupted, words)
    assert step == other[0] > 0
    assert caught == other[1] == signal.SIGTERM
    assert seconds < 10
    assert dcp.latest(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / f"step-{step:08d}"


COMMAND = (sys.executable, "-m", "ostro", "train", "tiny")


def _launched(words: list[str], run_dir: Path, first_step: int) -> tuple[int, str, float]:
    """Start the command, and send its launcher SIGTERM when that step is done; return code, output, seconds of it."""
    metrics = run_dir / "metrics.jsonl"
    launcher = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 100
    while launcher.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and any(row["step"] >= first_step for row in read_metrics(metrics)):
            break
        time.sleep(0.02)
    launcher.terminate()
    sent = time.monotonic()
    output = launcher.communicate(timeout=60)[0]
    return launcher.returncode, output, time.monotonic() - sent


def test_sigterm_to_the_launcher_saves_and_the_same_command_goes_on(data: Path, tmp_path: Path) -> None:
    words = overrides(data, tmp_path, **FSDP_EP, **{"train.steps": 100_000, "checkpoint.every": 0})
    words += ["--nproc-per-node", "2", "--log-dir", str(tmp_path / "logs")]
    code, output, seconds = _launched(words, tmp_path, 1)
    assert code == 143, output
    assert seconds < 10
    saved = dcp.steps(tmp_path / "checkpoints")
    assert f"the same command goes on from step {max(saved)}" in output
    code, output, seconds = _launched(words, tmp_path, max(saved) + 1)
    assert code == 143, output
    assert seconds < 10
    assert f"resuming {tmp_path} at step {max(saved)}" in output
    assert "Traceback" not in output
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, max(dcp.steps(tmp_path / "checkpoints")) + 1))


def _short_of_disk(words: list[str]) -> int:
    """Train; the system refuses rank 1 the file of step 4."""
    real, limit = saver.write_boxes, resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_boxes(path: Path, boxes: Any) -> Any:
        is_full = dist.get_rank() == 1 and path.parent.name.startswith("step-00000004")
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000 if is_full else limit[0], limit[1]))
        try:
            return real(path, boxes)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    saver.write_boxes = write_boxes
    return train(load_config("tiny", words)).saved_step


def test_one_ranks_full_disk_costs_a_checkpoint_and_not_the_run(
    data: Path, many: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = overrides(data, tmp_path, **FSDP_EP, **{"checkpoint.every": 2, "checkpoint.async": True})
    assert run_in_world(2, _short_of_disk, words) == [6, 6]
    told_lines = " ".join(capfd.readouterr().out.split())
    assert "rank 1: " in told_lines
    assert "step-00000004 could not be written whole (File too large) and nothing of it was kept" in told_lines
    assert "step-00000002 is kept" in told_lines
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000006"]
    assert digest(open_reader(tmp_path)) == digest(open_reader(many))


def test_a_token_the_model_does_not_have_is_told(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    tokens = np.load(tmp_path / "data" / "tokens-00000.npy", mmap_mode="r+")
    tokens[:] = 32000
    tokens.flush()
    with pytest.raises(DataError, match=r"^step 1: the data hold token id 32000 and the model has vocab_size=32000"):
        train(load_config("tiny", overrides(tmp_path / "data", tmp_path / "run")))


def _poisoned(words: list[str]) -> tuple[str, bool]:
    found = set_up(load_config("tiny", words))
    before = {name: piece.tensor.clone() for name, piece in found.held().items()}
    if dist.get_rank() == 1:
        experts = next(p for name, p in found.world.parameters().items() if name.endswith("w2"))
        with torch.no_grad():
            local(experts)[0, 0, 0] = float("nan")
            before["model." + next(n for n in found.world.parameters() if n.endswith("w2"))][0, 0, 0] = float("nan")
    with pytest.raises(TrainError) as caught:
        train_step(found)
    after = {name: piece.tensor for name, piece in found.held().items()}
    return str(caught.value), all(torch.equal(after[n].nan_to_num(), before[n].nan_to_num()) for n in before)


def test_a_rank_with_nan_stops_all_and_no_rank_updates(data: Path, tmp_path: Path) -> None:
    for sentence, is_untouched in run_in_world(2, _poisoned, overrides(data, tmp_path / "run", **FSDP_EP)):
        assert sentence.startswith("step 1: the loss is nan")
        assert "nothing was updated" in sentence
        assert is_untouched


def test_a_layout_for_other_ranks_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"is for 2 ranks and 1 were started"):
        train(load_config("tiny", overrides(data, tmp_path / "run", **FSDP_EP)))
