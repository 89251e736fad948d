"""The estimate of a device's memory agrees with dry runs, and the changes it proposes fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from parity import settings

from ostro import plan
from ostro.cli import main
from ostro.config import load_config
from ostro.errors import LayoutError
from ostro.parallel.memory import UNCERTAIN, changes, estimate

# Layers and micro-batches are few, the sizes of a layer real.
LAYOUTS = {
    "tp · ep · pp · full": "parallel.fsdp=2 parallel.tp=4 parallel.etp=4 parallel.ep=2 parallel.pp=2 "
    "parallel.vocab_emb_dp=true train.recompute=full train.global_batch_sequences=8 model.num_hidden_layers=4",
    "fsdp · ep": "parallel.fsdp=16 parallel.ep=8 train.global_batch_sequences=16 model.num_hidden_layers=4",
    "fsdp · selective · accumulation": "parallel.fsdp=8 train.recompute=selective train.global_batch_sequences=16 "
    "model.num_hidden_layers=4",
    "QLoRA": "lora.quantize=nf4 train.recompute=full train.global_batch_sequences=2 model.num_hidden_layers=2",
    "LoRA · fsdp": "lora.rank=16 parallel.fsdp=2 train.recompute=full train.global_batch_sequences=4 "
    "model.num_hidden_layers=2",
    "LoRA · fsdp · ep · selective": "lora.rank=64 parallel.fsdp=8 parallel.ep=8 train.recompute=selective "
    "train.global_batch_sequences=8 model.num_hidden_layers=2",
    "fsdp · ep · interleaved": "parallel.fsdp=8 parallel.ep=8 parallel.pp=2 parallel.schedule=interleaved "
    "parallel.virtual_stages=2 train.global_batch_sequences=32 model.num_hidden_layers=4",
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: mixtral-8x7b\ntrain: {dtype: bf16}\n")
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_estimate_is_within_its_bounds_of_a_dry_run(name: str, recipe: Path) -> None:
    config = load_config(recipe, LAYOUTS[name].split())
    most = max(plan.dry_run(config, rank).peak_bytes for rank in plan.end_ranks(config))
    assert estimate(config).total == pytest.approx(most, rel=UNCERTAIN)


def test_each_change_makes_it_fit(recipe: Path) -> None:
    overrides = ["parallel.fsdp=8", "parallel.ep=8", "train.global_batch_sequences=256"]
    config, there = load_config(recipe, overrides), 80e9
    assert estimate(config).total > there
    found = changes(config, lambda changed: estimate(changed).total <= there)
    assert len(found) == 3
    for text in found:
        changed = load_config(recipe, [*overrides, *re.sub(r"\(.*\)", "", text).split()])
        assert estimate(changed).total <= there, text


def test_two_changes_together_where_one_is_not_enough(recipe: Path) -> None:
    found = changes(load_config(recipe), lambda changed: estimate(changed).total <= 25e9 / changed.parallel.fsdp)
    assert len(found) == 3
    for text in found:
        assert estimate(load_config(recipe, re.sub(r"\(.*\)", "", text).split())).total <= 25e9, text


def test_ostro_plan_prints_and_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert (
        main(["plan", "tiny", "parallel.fsdp=2", "train.micro_batch_sequences=1", "--dry-run", "--json", str(file)])
        == 0
    )
    shown = capsys.readouterr().out
    assert "2 devices" in shown
    assert "reduce-scatter" in shown
    assert "routing is balanced" in " ".join(shown.split())
    told = json.loads(file.read_text())
    assert told["devices"] == 2
    assert told["ranks"][0]["peak_bytes"] > told["ranks"][0]["parameters"]


def test_a_rank_that_is_not_there_is_refused() -> None:
    with pytest.raises(LayoutError, match="rank 2 is not among this layout's ranks 0 to 1"):
        plan.dry_run(settings({"parallel.fsdp": 2}), 2)
