"""Runs that train LoRA alone: what they leave, what reads it, and that they go on to the same bits on any layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import SETTINGS
from worlds import run_in_world

from ostro.cli import main
from ostro.config import load_config
from ostro.data.prepare import prepare
from ostro.data.shards import open_shards
from ostro.data.tokenizer import load_tokenizer
from ostro.errors import ConfigError, WeightsError
from ostro.evaluate import evaluate
from ostro.log import read_metrics
from ostro.serve.load import load_model
from ostro.train import train
from ostro.weights import Merged, convert, open_reader
from ostro.weights.adapters import open_adapter
from ostro.weights.store import RandomReader, compare, digest

SIZES = {
    **SETTINGS,
    "model.vocab_size": 32000,
    "model.hidden_size": 64,
    "model.intermediate_size": 128,
    "model.num_hidden_layers": 2,
    "model.head_dim": 8,
    "model.initializer_range": 0.05,
    "model.max_position_embeddings": 64,
    "train.global_batch_sequences": 8,
    "train.micro_batch_sequences": 1,
    "train.steps": 4,
    "optim.learning_rate": 1e-2,
    "optim.eps": 1e-4,
    "checkpoint.every": 2,
    "lora.rank": 4,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared text and a model to start from."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "text.py").write_text(Path(json.__file__).read_text()[:4000])
    prepare([folder / "text.py"], folder / "data", tokenizer=load_tokenizer("v1"))
    convert(RandomReader(config(folder).model, 5), folder / "base", to="hf")
    return folder


def config(place: Path, name: str = "run", **more: Any):
    settings = {**SIZES, "data.path": place / "data", "weights.path": place / "base", "run.dir": place / name, **more}
    return load_config("tiny", [f"{key}={value}" for key, value in settings.items()])


def _run(asked: Any) -> int:
    return train(asked).step


def run(place: Path, name: str, **more: Any) -> Path:
    asked = config(place, name, **more)
    size = asked.parallel.degrees().num_ranks
    assert set(run_in_world(size, _run, asked) if size > 1 else [_run(asked)]) == {asked.train.steps}
    return place / name


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """An undisturbed run of one process."""
    return run(place, "whole")


def test_a_lora_run_is_read_as_the_model_that_it_made(place: Path, whole: Path) -> None:
    base, made = open_reader(place / "base"), open_reader(whole)
    changed = {row.kind for row in compare(base, made) if not row.equal_bits}
    assert {kind.rpartition(".")[2] for kind in (name.removesuffix(".weight") for name in changed)} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "w13", "w2")
    }
    files = [path.name for path in (whole / "checkpoints" / "step-00000004").iterdir()]
    assert sum(path.stat().st_size for path in (whole / "checkpoints").rglob("*.distcp")) < 2e6, files
    # The folder in PEFT's format says the same.
    merged = Merged(base, open_adapter(whole / "adapter", base.model))
    assert digest(merged) == digest(made)
    shutil.copytree(whole, place / "no-adapter", ignore=shutil.ignore_patterns("adapter"))
    assert digest(Merged(base, open_adapter(place / "no-adapter", base.model))) == digest(made)
    assert main(["merge-lora", str(place / "base"), str(whole), str(place / "merged"), "--to", "hf"]) == 0
    assert main(["verify", str(place / "merged"), str(whole)]) == 0


def test_it_goes_on_to_the_same_bits(place: Path, whole: Path) -> None:
    constant = {"optim.schedule": "constant", "checkpoint.every": 1}
    undisturbed = run(place, "undisturbed", **constant)
    run(place, "broken", **constant, **{"train.steps": 3})
    broken = run(place, "broken", **constant)
    assert digest(open_reader(broken)) == digest(open_reader(undisturbed))


def test_it_goes_on_in_another_layout(place: Path, whole: Path) -> None:
    name, early = "moved", {"parallel.fsdp": 2, "parallel.ep": 2, "train.steps": 2, "optim.total_steps": 4}
    run(place, name, **early)
    run(place, name, **{"parallel.tp": 2, "parallel.etp": 2})
    assert max(row.max_relative for row in compare(open_reader(place / name), open_reader(whole))) < 1e-5


def test_4_bits_are_kept_where_they_were_trained_over(place: Path) -> None:
    held_out = {"data.eval_path": place / "data", "train.eval_every": 4, "lora.quantize": "nf4"}
    made = run(place, "qlora", **held_out)
    told = read_metrics(made / "metrics.jsonl")[-1]["eval_loss"]
    model = load_model(made, device=torch.device("cpu"))
    model.compute_dtype = torch.float32
    found = evaluate(model, [open_shards(place / "data")], SIZES["data.seq_length"])
    assert found.loss == pytest.approx(told, rel=1e-3)
    merged = load_model(made, "fp32", torch.device("cpu"))
    assert evaluate(merged, [open_shards(place / "data")], SIZES["data.seq_length"]).loss != pytest.approx(
        found.loss, rel=1e-6
    )


def test_what_cannot_be_gone_on_with_is_said(place: Path, whole: Path) -> None:
    with pytest.raises(ConfigError, match=r"was trained with lora=\{.*'rank': 4.*'rank': 8"):
        train(config(place, "whole", **{"lora.rank": 8}))
    plain = {key: value for key, value in SIZES.items() if not key.startswith("lora.")}
    settings = {**plain, "data.path": place / "data", "weights.path": place / "base", "run.dir": whole}
    with pytest.raises(ConfigError, match="was trained with lora="):
        train(load_config("tiny", [f"{key}={value}" for key, value in settings.items()]))
    (place / "base").rename(place / "elsewhere")
    try:
        with pytest.raises(WeightsError, match="which is not there: bring it back"):
            open_reader(whole)
    finally:
        (place / "elsewhere").rename(place / "base")
