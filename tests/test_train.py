"""The loop: it learns, it resumes bit for bit after SIGKILL, it refuses what contradicts, it updates nothing on NaN."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ostro import weights
from ostro.config import Config, load_config
from ostro.data.prepare import prepare
from ostro.data.tokenizer import load_tokenizer
from ostro.errors import ConfigError, DataError, OutOfMemory, TrainError
from ostro.log import read_metrics
from ostro.train import set_up, train, train_step
from ostro.weights import dcp, saver

SMALL = [
    "model.hidden_size=32",
    "model.intermediate_size=24",
    "model.num_hidden_layers=2",
    "model.num_local_experts=4",
    "data.seq_length=64",
    "train.global_batch_sequences=4",
    "train.micro_batch_sequences=2",
    "train.steps=12",
    "checkpoint.every=4",
]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name in ("os", "json", "random", "string"):
        source = Path(__import__(name).__file__ or "")
        (folder / f"{name}.py").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def data(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "shards"
    prepare([text], out, tokenizer=load_tokenizer("v1"))
    return out


def config(data: Path, run_dir: Path, *overrides: str) -> Config:
    return load_config("tiny", [*SMALL, f"data.path={data}", f"run.dir={run_dir}", *overrides])


def compared(run_dir: Path) -> list[dict]:
    """Return what must not depend on an interruption; the clock's readings may."""
    clock = {"tokens_per_second", "mfu", "seconds"}
    return [{k: v for k, v in row.items() if k not in clock} for row in read_metrics(run_dir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    outcome = train(config(data, run_dir))
    assert (outcome.step, outcome.signal) == (12, None)
    return run_dir


def digest(run_dir: Path) -> str:
    return weights.digest(weights.open_reader(run_dir))


def test_metrics_have_the_agreed_keys_and_the_loss_falls(undisturbed: Path) -> None:
    rows = read_metrics(undisturbed / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    agreed = "step loss aux_loss z_loss grad_norm learning_rate tokens tokens_per_second mfu expert_load"
    for row in rows:
        assert set(agreed.split()) <= set(row)
        assert all(sum(loads) == pytest.approx(1.0) for loads in row["expert_load"])
        assert row["aux_loss"] >= 1.99
    assert rows[-1]["tokens"] == 12 * 4 * 64
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5


def test_a_run_directory_is_self_contained(undisturbed: Path) -> None:
    assert load_config(undisturbed / "config.yaml").train.steps == 12
    assert json.loads((undisturbed / "versions.json").read_text())["torch"] == torch.__version__
    assert load_tokenizer(undisturbed / "tokenizer").sha256 == load_tokenizer("v1").sha256
    assert list((undisturbed / "tensorboard").glob("events*"))
    kept = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000008", "step-00000012"]


def launch(data: Path, run_dir: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "ostro", "train", "tiny", *SMALL, f"data.path={data}", f"run.dir={run_dir}"]
    # As many threads as this process has: another number may round differently.
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [*command, *overrides], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    file = run_dir / "metrics.jsonl"
    while process.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") >= step):
        time.sleep(0.005)


@pytest.mark.parametrize(("step", "pause"), [(5, 0.0), (7, 0.02), (8, 0.004)])
def test_killed_at_any_moment_and_resumed_gives_the_same_bits(
    data: Path, undisturbed: Path, tmp_path: Path, step: int, pause: float
) -> None:
    # 8 with a short pause falls into the writing of a checkpoint.
    first = launch(data, tmp_path)
    wait_for_step(first, tmp_path, step)
    while first.poll() is None and not (tmp_path / "checkpoints" / "step-00000004").exists():
        time.sleep(0.005)  # it is written beside the steps
    time.sleep(pause)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert not (tmp_path / "checkpoints" / "step-00000012").exists()
    outcome = train(config(data, tmp_path, "checkpoint.resume=must"))
    assert outcome.step == 12
    assert compared(tmp_path) == compared(undisturbed)
    assert digest(tmp_path) == digest(undisturbed)
    assert not list((tmp_path / "checkpoints").glob("*.partial*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(data: Path, undisturbed: Path, tmp_path: Path, number: int) -> None:
    process = launch(data, tmp_path)
    wait_for_step(process, tmp_path, 5)
    process.send_signal(number)
    time.sleep(0.02)
    process.send_signal(number)  # impatience must not tear the save
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number, output
    assert "the same command goes on from step" in output
    step = len(compared(tmp_path))
    newest = dcp.latest(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == f"step-{step:08}"
    train(config(data, tmp_path))
    assert compared(tmp_path) == compared(undisturbed)
    assert digest(tmp_path) == digest(undisturbed)


def test_accumulation_does_not_change_the_result(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    train(config(data, tmp_path, "train.micro_batch_sequences=4", "train.steps=3"))
    whole, parts = compared(tmp_path), compared(undisturbed)[:3]
    # Another number of total steps gives other learning rates, so only the first step is the same computation.
    assert whole[0]["loss"] == pytest.approx(parts[0]["loss"], rel=1e-6)
    assert whole[0]["grad_norm"] == pytest.approx(parts[0]["grad_norm"], rel=1e-5)
    assert whole[0]["expert_load"] == parts[0]["expert_load"]


def test_a_loss_that_is_not_finite_updates_nothing(data: Path, tmp_path: Path) -> None:
    run = set_up(config(data, tmp_path))
    with torch.no_grad():
        run.model.model.norm.weight[0] = float("nan")
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    with pytest.raises(TrainError, match=r"step 1: the loss is nan .* nothing was updated"):
        train_step(run)
    assert run.step == 0
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num()), name


def test_bf16_compute_keeps_fp32_masters_and_learns(data: Path, tmp_path: Path) -> None:
    run = set_up(config(data, tmp_path, "train.dtype=bf16"))
    assert run.model.compute_dtype == torch.bfloat16
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    losses = [train_step(run).loss for _ in range(6)]
    assert losses[-1] < losses[0] - 0.3


def test_raw_text_is_prepared_once_and_cached(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train(config(text, tmp_path / "a", "train.steps=1"))
    [made] = (tmp_path / "cache" / "ostro" / "prepared").iterdir()
    stamp = (made / "manifest.json").stat().st_mtime_ns
    train(config(text, tmp_path / "b", "train.steps=1"))
    [kept] = (tmp_path / "cache" / "ostro" / "prepared").iterdir()
    assert (kept / "manifest.json").stat().st_mtime_ns == stamp
    assert compared(tmp_path / "a") == compared(tmp_path / "b")


def test_evaluation_and_start_weights(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    overrides = [f"weights.path={undisturbed}", f"data.eval_path={data}", "train.eval_every=2", "train.steps=2"]
    train(config(data, tmp_path, *overrides, "optim.learning_rate=0", "optim.min_learning_rate=0"))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert "eval_loss" not in rows[0]
    assert rows[1]["eval_loss"] < read_metrics(undisturbed / "metrics.jsonl")[0]["loss"] - 0.5
    assert digest(tmp_path) == digest(undisturbed)


def test_start_weights_of_another_model_or_tokenizer_are_refused(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has rope_theta=10000.0 and the config says model.rope_theta=500.0"):
        train(config(data, tmp_path / "a", f"weights.path={undisturbed}", "model.rope_theta=500.0"))
    weights.convert(undisturbed, tmp_path / "hf", to="hf", tokenizer=load_tokenizer("v3").save)
    with pytest.raises(DataError, match=r"comes with tokenizer .* and data.tokenizer is 'v1'"):
        train(config(data, tmp_path / "b", f"weights.path={tmp_path / 'hf'}"))


def test_other_rates_are_told_on_resume(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(data, tmp_path, "train.steps=1"))
    train(config(data, tmp_path, "train.steps=2", "optim.learning_rate=5e-3"))
    told = " ".join(capsys.readouterr().out.split())
    assert "from step 1 on, optim.learning_rate is 0.005 instead of 0.004" in told


def test_a_profile_is_a_trace_and_a_table(data: Path, tmp_path: Path) -> None:
    train(config(data, tmp_path, "train.steps=3", "profile.steps=2..2"))
    assert "traceEvents" in json.loads((tmp_path / "profile" / "trace.json").read_text())
    assert "aten::mm" in (tmp_path / "profile" / "slowest.txt").read_text()


@pytest.mark.parametrize(
    ("override", "error", "sentence"),
    [
        ("data.tokenizer=v3", DataError, r"was prepared with tokenizer .* set data.tokenizer to it"),
        ("model.vocab_size=31999", DataError, r"token ids up to 31999 and the model vocab_size=31999"),
        ("model.eos_token_id=5", DataError, r"has eos_token_id=2 and the model 5"),
        (
            "data.seq_length=900000 model.max_position_embeddings=900000",
            DataError,
            r"data.seq_length=900000 asks for more than the",
        ),
        ("data.path=nowhere", DataError, r"nowhere"),
        ("data.path=", ConfigError, r"data.path is empty"),
        ("train.eval_every=2", ConfigError, r"train.eval_every=2 needs data.eval_path"),
        (
            "model=mixtral-8x7b",
            OutOfMemory,
            r"needs about [\d,.]+ GB a device .*would fit: (.*; ){2}model",
        ),
        ("checkpoint.resume=must", ConfigError, r"holds no whole checkpoint to resume from"),
        ("profile.steps=20..22", ConfigError, r"profile.steps=20..22 begins outside steps 1..12 of this run"),
        ("weights.path=nowhere", Exception, r"nowhere does not exist"),
    ],
)
def test_refusals(data: Path, tmp_path: Path, override: str, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        train(config(data, tmp_path / "run", *override.split()))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.seed=9", r"train.seed=0 and the config says 9: change it back to resume"),
        ("data.path=OTHER", r"data.path \(sha256\)="),
        ("model.num_hidden_layers=3", r"model.num_hidden_layers=2 and the config says 3"),
        ("checkpoint.resume=never", r"already holds step-00000012 and checkpoint.resume=never"),
    ],
)
def test_a_changed_config_does_not_resume(
    data: Path, text: Path, undisturbed: Path, tmp_path: Path, override: str, sentence: str
) -> None:
    prepare([text / "os.py"], tmp_path / "other", tokenizer=load_tokenizer("v1"))
    override = override.replace("OTHER", str(tmp_path / "other"))
    with pytest.raises(ConfigError, match=sentence):
        train(config(data, undisturbed, override))


def test_a_run_is_not_mixed_into_another_folder(data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty and not an earlier run: choose another folder"):
        train(config(data, tmp_path))
    with pytest.raises(ConfigError, match="is a file: choose a folder"):
        train(config(data, tmp_path / "thesis.tex"))
    with pytest.raises(ConfigError, match="cannot be made"):
        train(config(data, tmp_path / "thesis.tex" / "x"))


def test_a_finished_run_has_nothing_left_to_do(
    data: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digest(undisturbed)
    assert train(config(data, undisturbed)).step == 12
    assert "at step 12 of 12: there is nothing left to do" in " ".join(capsys.readouterr().out.split())
    assert digest(undisturbed) == before


def test_an_empty_batch_of_labels_is_said(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n' * 200)
    prepare([tmp_path / "one.jsonl"], tmp_path / "data", tokenizer=load_tokenizer("v1"))
    run = set_up(config(tmp_path / "data", tmp_path / "run"))
    monkey = run.loader.rows
    run.loader.rows = lambda *a, **k: [  # type: ignore[method-assign]
        type(row)(row.tokens_L, row.labels_L, row.weights_L * 0, row.document_lengths) for row in monkey(*a, **k)
    ]
    with pytest.raises(TrainError, match="no token of this batch has a label"):
        train_step(run)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    data: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asynchronous: bool,
) -> None:
    real = saver.written_beside

    def written_beside(folder: Path, **rest: Any) -> Any:
        if folder.name == "step-00000008":
            raise OutOfMemory(f"{folder} could not be written whole.")
        return real(folder, **rest)

    monkeypatch.setattr(saver, "written_beside", written_beside)
    train(config(data, tmp_path, f"checkpoint.async={asynchronous}"))
    assert "step-00000004 is kept" in " ".join(capsys.readouterr().out.split())
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000004", "step-00000012"]
    assert digest(tmp_path) == digest(undisturbed)


def test_the_exact_path_is_chosen_by_config(data: Path, tmp_path: Path) -> None:
    runs = [
        set_up(config(data, tmp_path / str(exact), f"train.exact={exact}", "train.dtype=fp32"))
        for exact in (True, False)
    ]
    assert [run.model.exact for run in runs] == [True, False]
    stats = [train_step(run) for run in runs]
    assert stats[0].loss == pytest.approx(stats[1].loss, rel=1e-5)
    assert stats[0].grad_norm == pytest.approx(stats[1].grad_norm, rel=1e-4)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("moe.kernels=triton", r"moe\.kernels=triton needs .*: .*set moe\.kernels=auto\."),
        ("moe.fp8=true", r"moe\.fp8=true needs .*leave it out\."),
        ("moe.router=sigmoid train.exact=true moe.fp8=true", r"train\.exact computes without"),
        ("moe.kernels=cuda", r"moe\.kernels='cuda' is refused"),
    ],
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="of a machine without an accelerator")
def test_what_only_a_gpu_has_is_refused(setting: str, sentence: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        set_up(config(data, tmp_path / "run", *setting.split()))
