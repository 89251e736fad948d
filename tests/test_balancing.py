"""What balancing is for: a router that sends nearly everything to one expert is brought to share, and not otherwise.

And runs that use it: they resume to the same bits, keep the selection bias, and never export it where it would be
lost.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ostro import log, train
from ostro import step as steps
from ostro.batch import batch_of
from ostro.config import Config, load_config
from ostro.data.prepare import prepare
from ostro.data.shards import open_shards
from ostro.data.tokenizer import load_tokenizer
from ostro.errors import ConfigError, WeightsError
from ostro.evaluate import evaluate
from ostro.model import routing
from ostro.model.balance import update_bias
from ostro.model.mixtral import Mixtral
from ostro.model.routing import ROUTERS
from ostro.model.settings import Balance, ModelConfig, MoeConfig
from ostro.model.spans import spans_of
from ostro.serve.load import load_model
from ostro.weights import FORMATS, RandomReader, convert, dcp, digest, load_into, open_reader
from ostro.weights.dcp_file import infos_of, read_metadata

SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_local_experts=8,
    initializer_range=0.1,
)
STEPS, TOKENS = 200, 256


def collapsed(moe: MoeConfig, router: str) -> Mixtral:
    """Return a model whose every token has a direction in common, which one expert is told to look for."""
    config = dataclasses.replace(SMALL, router=router)
    model = Mixtral(config, moe)
    load_into(model, RandomReader(config, 0))
    common = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.6 * common
        for block in model.blocks.values():
            block.block_sparse_moe.gate.weight[0] += 0.2 * common
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return tokens and labels with something to learn: each token mostly says which one follows."""
    generator = torch.Generator().manual_seed(step)
    tokens = [torch.randint(64, (4,), generator=generator)]
    for _ in range(TOKENS // 4):
        stray = torch.randint(64, (4,), generator=generator)
        follows = (tokens[-1] * 5 + 7) % 64
        tokens.append(torch.where(torch.rand(4, generator=generator) < 0.8, follows, stray))
    rows = torch.stack(tokens, dim=1)
    return rows[:, :-1].flatten(), rows[:, 1:].flatten()


@functools.cache
def loads(moe: MoeConfig, router: str = "softmax") -> tuple[Tensor, Tensor, float, float]:
    """Train; return the expert loads [layers, experts] of the first step and, as means, of the last ten, and losses."""
    model = collapsed(moe, router)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    history, losses = [], []
    for step in range(STEPS):
        stats = torch.zeros(2, routing.num_stats(8), dtype=torch.float64)
        tokens, labels = batch(step)
        spans = spans_of([TOKENS // 4] * 4, balance_scale=1 / TOKENS, stats_LS=stats)
        loss = model.loss(tokens, spans, labels, torch.full((TOKENS,), 1 / TOKENS))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer, block in model.blocks.items():
            bias = block.block_sparse_moe.gate.selection_bias
            if bias is not None:
                update_bias(bias, stats[layer, :8], moe.bias_update_rate)
        history.append(stats[:, :8])
        losses.append(loss.item())
    return history[0], torch.stack(history[-10:]).mean(dim=0), losses[0], losses[-1]


def skews(load: Tensor) -> list[float]:
    """Return, for each layer, the busiest expert's load over an even share."""
    return (load.max(dim=1).values / load.mean(dim=1)).tolist()


OFF = MoeConfig(router_aux_loss_coef=0, bias_update_rate=0)
SEEDS_UNIT = 0.05 / 2  # MindFormers' aux_loss_factor, which it never uses, in our unit


@pytest.mark.parametrize("router", ROUTERS)
def test_without_balancing_a_collapsed_router_stays_collapsed(router: str) -> None:
    first, last, before, after = loads(OFF, router)
    assert (first[:, 0] >= 0.9 * TOKENS).all()
    assert min(skews(last)) >= 3
    assert after < before - 2  # it learned all the same


# Not hf: it averages f over the layers, so that a collapsed layer is hardly pushed while the others make up for it.
@pytest.mark.parametrize("kind", ["sequence", "batch"])
def test_the_loss_brings_a_collapsed_router_to_share(kind: Balance) -> None:
    moe = MoeConfig(router_aux_loss_coef=SEEDS_UNIT, balance=kind)
    first, last, before, after = loads(moe)
    assert (first[:, 0] >= 0.9 * TOKENS).all()
    assert max(skews(last)) <= 1.5
    assert after < before - 2


def test_the_selection_bias_does_it_without_a_loss() -> None:
    # 200 steps, not 200,000: a tenfold of the default rate.
    first, last, before, after = loads(MoeConfig(router_aux_loss_coef=0, bias_update_rate=0.01), "sigmoid")
    assert (first[:, 0] >= 0.9 * TOKENS).all()
    assert max(skews(last)) <= 1.5
    assert after < before - 2


# Runs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    shutil.copy(json.__file__, folder / "text" / "json.py")
    prepare([folder / "text"], folder / "shards", tokenizer=load_tokenizer("v1"))
    return folder / "shards"


def config(data: Path, run_dir: Path, *overrides: str) -> Config:
    settings = {
        "model.hidden_size": 32,
        "model.intermediate_size": 24,
        "model.num_hidden_layers": 2,
        "model.num_local_experts": 4,
        "data.seq_length": 64,
        "train.dtype": "fp32",  # auto is bf16 on some machines
        "train.global_batch_sequences": 4,
        "train.micro_batch_sequences": 2,
        "train.steps": 6,
        "checkpoint.every": 3,
        "optim.weight_decay": 0.1,
        "moe.router": "sigmoid",
        "moe.router_jitter_noise": 0.1,
        "moe.capacity_factor": 0.9,
        "moe.drop": "probability",
        "data.path": data,
        "run.dir": run_dir,
    }
    return load_config("tiny", [*(f"{key}={value}" for key, value in settings.items()), *overrides])


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    train.train(config(data, run_dir))
    return run_dir


def told(run_dir: Path) -> list[dict[str, Any]]:
    clock = {"tokens_per_second", "mfu", "seconds"}
    return [{k: v for k, v in row.items() if k not in clock} for row in log.read_metrics(run_dir / "metrics.jsonl")]


def test_a_run_counts_drops_and_moves_the_bias_by_its_rate_alone(whole: Path) -> None:
    for row in told(whole):
        assert 0 < row["drop_rate"] < 0.5
        assert 0 < row["router_entropy"] <= 1.387
        assert 0.5 <= row["router_confidence"] <= 1
    reader = open_reader(whole)
    assert reader.model.router == "sigmoid"
    for layer in range(2):
        bias = reader.read(f"model.layers.{layer}.block_sparse_moe.gate.selection_bias")
        steps = bias / 0.001
        torch.testing.assert_close(steps, steps.round())
        assert 0 < steps.abs().max() <= 6
    assert not any("selection_bias" in name and name.startswith("optim.") for name in _tensors(whole))


def _tensors(run_dir: Path) -> list[str]:
    newest = dcp.latest(run_dir / "checkpoints")
    assert newest is not None
    return list(infos_of(read_metadata(newest)))


def test_jitter_and_bias_resume_to_the_same_bits(data: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    assert train.train(config(data, tmp_path / "run", "checkpoint.resume=must")).step == 6
    assert told(tmp_path / "run") == told(whole)
    assert digest(open_reader(tmp_path / "run")) == digest(open_reader(whole))


def test_jitter_is_the_same_in_other_micro_batches(data: Path, whole: Path, tmp_path: Path) -> None:
    first = told(whole)[0]
    train.train(config(data, tmp_path / "parts", "train.micro_batch_sequences=1", "train.steps=1"))
    assert told(tmp_path / "parts")[0]["loss"] == pytest.approx(first["loss"], rel=1e-6)
    train.train(config(data, tmp_path / "none", "moe.router_jitter_noise=0", "train.steps=1"))
    assert abs(told(tmp_path / "none")[0]["loss"] - first["loss"]) > 1e-6


def test_no_two_tokens_of_a_training_draw_the_same_number(data: Path, whole: Path) -> None:
    drawn = set()
    for seed in (0, 1, 2**63 - 1):
        run = train.set_up(config(data, whole.with_name(f"seed-{seed}"), f"train.seed={seed}", "train.steps=3"))
        batches = []

        def note(rows: Any, *rest: Any, batches: list[Any] = batches, **more: Any) -> Any:
            batches.append(batch_of(rows, *rest, **more))
            return batches[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(steps, "batch_of", note)
            for _ in range(3):
                train.train_step(run)
        draws = torch.cat([one.spans.draws_T for one in batches]).tolist()
        assert len(draws) == 3 * 4 * 64
        assert drawn.isdisjoint(draws)
        drawn |= set(draws)
    assert len(drawn) == 3 * 3 * 4 * 64


def test_a_run_with_a_bias_is_evaluated_as_it_was_trained(data: Path, whole: Path, tmp_path: Path) -> None:
    run = train.set_up(config(data, whole))
    assert run.step == 6
    shards = [open_shards(data)]
    inside = evaluate(run.model, shards, 64)
    assert run.model.training
    assert evaluate(load_model(whole), shards, 64).loss == inside.loss
    for block in run.model.blocks.values():
        bias = block.block_sparse_moe.gate.selection_bias
        assert bias is not None
        bias[0] += 1.0
    assert evaluate(run.model, shards, 64).loss != inside.loss
    convert(whole, tmp_path / "copy", to="dcp")
    assert digest(open_reader(tmp_path / "copy")) == digest(open_reader(whole))


@pytest.mark.parametrize("to", [name for name, format in FORMATS.items() if format.write and name != "dcp"])
def test_formats_without_a_place_for_the_bias_refuse_it(whole: Path, tmp_path: Path, to: str) -> None:
    with pytest.raises(WeightsError, match=r"router is 'sigmoid' with a selection bias, and the format .* softmax rou"):
        convert(whole, tmp_path / "out", to=to)
    assert not list(tmp_path.iterdir())


def test_another_router_does_not_go_on_with_these_weights(data: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"was trained with moe.router='sigmoid' and the config says 'softmax'"):
        train.train(config(data, whole, "moe.router=softmax"))
    with pytest.raises(ConfigError, match=r"has router=sigmoid and the config says moe.router=softmax"):
        train.train(config(data, tmp_path / "run", f"weights.path={whole}", "moe.router=softmax"))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("moe.router=softmax moe.bias_update_rate=0.1", r"moe.bias_update_rate=0.1 means nothing with moe.router=soft"),
        ("moe.capacity_factor=null", r"moe.drop=probability means nothing while moe.capacity_factor is null"),
        ("moe.capacity_factor=-1", r"moe.capacity_factor=-1.0 must be a number above 0"),
        ("moe.router=top2", r"moe.router='top2' is refused: input should be 'softmax' or 'sigmoid'"),
        ("moe.drop=sdrop", r"moe.drop='sdrop' is refused: input should be 'token', 'choice' or 'probability'"),
        ("moe.capacity=2", r"moe.capacity is not a key of section moe; .* Did you mean 'min_capacity'|'capacity_"),
        ("model.router=sigmoid", r"model.router='sigmoid' is set in section moe: write moe.router"),
    ],
)
def test_settings_are_refused_by_name(data: Path, tmp_path: Path, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config(data, tmp_path, *override.split())


def test_the_router_is_part_of_the_model_and_survives_yaml(data: Path, tmp_path: Path) -> None:
    loaded = config(data, tmp_path)
    assert loaded.model.router == "sigmoid"
    (tmp_path / "recipe.yaml").write_text(loaded.as_yaml())
    assert load_config(tmp_path / "recipe.yaml") == loaded


def test_the_console_names_the_busiest_expert_and_what_is_dropped(whole: Path, capsys: pytest.CaptureFixture) -> None:
    row = log.read_metrics(whole / "metrics.jsonl")[-1]
    log.Progress(6, 1).show(row)
    busiest = max(share * 4 for loads in row["expert_load"] for share in loads)
    said = capsys.readouterr().out
    assert f"busiest expert {busiest:.1f}×  " in said
    assert f"dropped {row['drop_rate']:.1%}" in said
    log.Progress(6, 1).show(row | {"drop_rate": 0.0})
    assert "dropped" not in capsys.readouterr().out
