"""The loop beside its steps: fp16's loss scale, spikes, the best evaluation and early stopping, samples."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel.parity import SETTINGS, Rows
from worlds import run_in_world

from ostro import resume, spikes, step, train
from ostro.config import Config, load_config
from ostro.data.prepare import prepare
from ostro.data.shards import open_shards
from ostro.data.tokenizer import load_tokenizer
from ostro.errors import ConfigError, LayoutError, TrainError
from ostro.evaluate import evaluate as real_evaluate
from ostro.log import read_metrics
from ostro.optim import Place, build_optimizer
from ostro.optim.loss_scale import LossScale
from ostro.parallel.apply import local, mesh_of, parallelize
from ostro.sections import Optim, Train
from ostro.stopping import Evaluations
from ostro.weights import NO_HINTS, dcp, digest, open_reader
from ostro.weights.parts import load_weights
from ostro.weights.store import RandomReader


def test_the_loss_scale_goes_as_in_mindformers() -> None:
    scale, found = LossScale(65535.0), []
    for call in range(1, 12):
        scale = scale.after(call == 6, window=4)
        found.append(scale.value)
    assert found == [65535] * 3 + [131070] * 2 + [65535] * 4 + [131070] * 2
    assert LossScale(1.0).after(True, 4).value == 1.0


def begun(dtype: torch.dtype, **more: Any) -> train.Run:
    """Return a small run over random rows, in this process's world."""
    config = load_config("tiny", [f"{key}={value}" for key, value in {**SETTINGS, **more}.items()])
    device = torch.device("cpu")
    world = parallelize(config, mesh_of(config, device), dtype)
    load_weights(RandomReader(config.model, 1), world.held_parameters())
    optimizer = build_optimizer(world.parameters(), config.model, config.optim, places=world.places())
    loader: Any = Rows(config.model.vocab_size, config.data.seq_length)
    nothing: Any = None
    return train.Run(config, Path(), device, nothing, loader, [], world, optimizer, 8, {}, nothing)


FP16 = {"train.dtype": "fp16", "optim.learning_rate": 1e-3, "train.micro_batch_sequences": 8}


def test_fp16_is_close_to_fp32_whatever_the_scale() -> None:
    exact = begun(torch.float32, **{**FP16, "train.dtype": "fp32"})
    of_exact = [train.train_step(exact) for _ in range(3)]
    for scale in (65535.0, 256.0):
        run = begun(torch.float16, **FP16, **{"train.loss_scale": scale})
        for one, other in zip([train.train_step(run) for _ in range(3)], of_exact, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=2e-3)
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-2)
            assert (one.skipped, one.loss_scale) == (None, scale)


def _overflowing() -> tuple[list[Any], bool]:
    run = begun(torch.float16, **FP16, **{"train.loss_scale": 2.0**24, "parallel.fsdp": 2, "parallel.ep": 2})
    before = {name: local(p).detach().clone() for name, p in run.world.parameters().items()}
    first = train.train_step(run)
    same = all(torch.equal(before[name], local(p)) for name, p in run.world.parameters().items())
    rows = [first, *(train.train_step(run) for _ in range(11))]
    return [(row.skipped, row.loss_scale, row.learning_rate, run.num_skipped) for row in rows], same


def test_all_ranks_skip_an_overflow_together_and_the_schedule_waits() -> None:
    (one, one_kept), (other, other_kept) = run_in_world(2, _overflowing)
    assert one == other
    assert one_kept
    assert other_kept
    skipped = [row[0] for row in one]
    count = skipped.count("overflow")
    assert 1 <= count < 12
    assert skipped == ["overflow"] * count + [None] * (12 - count)
    assert [row[1] for row in one] == [2.0**24 / 2 ** min(at, count) for at in range(12)]


def test_an_overflow_that_no_scale_mends_ends_the_run() -> None:
    run = begun(torch.float16, **FP16, **{"train.loss_scale": 2.0})
    with torch.no_grad():
        run.model.model.norm.weight.fill_(float("inf"))
    assert train.train_step(run).skipped == "overflow"
    with pytest.raises(TrainError, match="nothing was updated"):
        train.train_step(run)


def test_a_spike_is_far_above_the_median_of_recent_norms() -> None:
    wanted = Train(skip_spikes=4)
    assert spikes.limit([1.0] * 15, wanted, Optim()) == float("inf")
    assert spikes.limit([1.0] * 9 + [100.0] * 7, wanted, Optim()) == 4.0
    assert spikes.limit([1.0] * 16, wanted, Optim(skip_grad_norm=2.0)) == 2.0
    assert spikes.limit([1.0] * 16, Train(), Optim()) == float("inf")
    norms: list[float] = []
    for norm in range(200):
        norms = spikes.remembered(norms, norm)
    assert norms == list(range(72, 200))


def test_patience_counts_evaluations_without_a_better_one() -> None:
    found = Evaluations()
    for at, loss in enumerate((3.0, 2.0, 2.0, 2.5), start=1):
        found = found.after(loss, at)
    assert found == Evaluations(2.0, 2, 2)
    assert found.is_over(2)
    assert not found.is_over(3)
    assert not found.is_over(0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in ("string", "abc"):
        (folder / f"{name}.py").write_text(Path(__import__(name).__file__ or "").read_text(encoding="utf-8"))
    prepare([folder / "string.py", folder / "abc.py"], folder / "shards", tokenizer=load_tokenizer("v1"))
    (folder / "prompts.txt").write_text("import string\n\n    def \n")
    return folder


def words(data: Path, run_dir: Path, **more: Any) -> list[str]:
    fields = {
        "model.hidden_size": 32,
        "model.intermediate_size": 16,
        "model.num_hidden_layers": 1,
        "model.num_local_experts": 2,
        "data.path": data / "shards",
        "data.seq_length": 32,
        "train.dtype": "fp32",
        "train.steps": 8,
        "train.global_batch_sequences": 2,
        "optim.schedule": "constant",
        "checkpoint.every": 2,
        "run.dir": run_dir,
        **more,
    }
    return [f"{key}={value}" for key, value in fields.items()]


def config(data: Path, run_dir: Path, **more: Any) -> Config:
    return load_config("tiny", words(data, run_dir, **more))


def evaluated(data: Path, run_dir: Path, **more: Any) -> Config:
    fields = {
        "data.eval_path": data / "shards",
        "train.eval_every": 2,
        "train.samples": data / "prompts.txt",
        "train.sample_tokens": 3,
        "checkpoint.best": True,
        "checkpoint.keep": 1,
        "checkpoint.every": 0,
    }
    return config(data, run_dir, **{**fields, **more})


def in_the_run(data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, losses: list[float], **more: Any) -> Any:
    """Train with these losses for the evaluations'."""
    told = iter(losses)

    def evaluate(*arguments: Any) -> Any:
        return dataclasses.replace(real_evaluate(*arguments), loss=next(told))

    monkeypatch.setattr(train, "evaluate", evaluate)
    return train.train(evaluated(data, folder, **more))


def test_the_best_is_kept_and_patience_ends_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"train.early_stop": 2, "train.steps": 20}
    outcome = in_the_run(data, tmp_path, monkeypatch, [3.0, 2.0, 2.5, 2.0], **more)
    assert (outcome.step, outcome.evaluations, outcome.has_best) == (8, Evaluations(2.0, 4, 2), True)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best", "step-00000004", "step-00000008"]
    assert dcp.best(folder) == folder / "step-00000004"
    assert digest(open_reader(folder / "best")) == digest(open_reader(tmp_path, dataclasses.replace(NO_HINTS, step=4)))
    assert digest(open_reader(tmp_path)) == digest(open_reader(folder / "step-00000008"))
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in samples] == [
        (at, prompt) for at in (2, 4, 6, 8) for prompt in ("import string", "    def ")
    ]
    again = in_the_run(data, tmp_path, monkeypatch, [], **more)  # a run that was ended stays so
    assert (again.step, again.evaluations) == (8, outcome.evaluations)
    longer = in_the_run(data, tmp_path, monkeypatch, [1.0], **{"train.early_stop": 3, "train.steps": 10})
    assert (longer.step, longer.evaluations) == (10, Evaluations(1.0, 10, 0))
    assert dcp.best(folder) == folder / "step-00000010"


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"train.early_stop": 3}, r"train.early_stop=3 waits for evaluations: set train.eval_every too"),
        ({"checkpoint.best": True}, r"checkpoint.best=True waits for evaluations"),
        ({"train.skip_spikes": 0.5}, r"train.skip_spikes=0.5 is refused"),
    ],
)
def test_what_would_wait_for_ever_is_refused(data: Path, tmp_path: Path, more: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        train.set_up(config(data, tmp_path, **more))


def test_a_spike_names_its_documents_and_a_resumed_run_knows_what_came_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spikes, "FEWEST", 3)
    more = {"train.skip_spikes": 1.0001, "train.micro_batch_sequences": 2}
    train.train(config(data, tmp_path / "straight", **more))
    rows = read_metrics(tmp_path / "straight" / "metrics.jsonl")
    skipped = [row["step"] for row in rows if "skipped" in row]
    assert skipped
    assert skipped[0] > 3
    noted = [json.loads(line) for line in (tmp_path / "straight" / spikes.FILE).read_text().splitlines()]
    assert [row["step"] for row in noted] == skipped
    shards = open_shards(data / "shards")
    for row in noted:
        assert row["grad_norm"] > row["limit"]
        ((folder, documents),) = row["documents"].items()
        assert folder == str(shards.path)
        assert set(documents) <= {1, 2}
    halfway = skipped[0] if skipped[0] < 8 else 4
    train.train(config(data, tmp_path / "broken", **more, **{"train.steps": halfway}))
    train.train(config(data, tmp_path / "broken", **more))
    assert digest(open_reader(tmp_path / "broken")) == digest(open_reader(tmp_path / "straight"))
    assert (tmp_path / "broken" / spikes.FILE).read_text() == (tmp_path / "straight" / spikes.FILE).read_text()


def test_the_loss_scale_is_resumed(data: Path, tmp_path: Path) -> None:
    more = {"train.dtype": "fp16", "train.loss_scale": 2.0**26, "train.loss_scale_window": 3}
    train.train(config(data, tmp_path / "straight", **more))
    train.train(config(data, tmp_path / "broken", **more, **{"train.steps": 5}))
    train.train(config(data, tmp_path / "broken", **more))
    rows = read_metrics(tmp_path / "straight" / "metrics.jsonl")
    told = [(row["loss_scale"], row["overflow"]) for row in rows]
    assert any(overflow for _, overflow in told)
    assert not all(overflow for _, overflow in told)
    again = read_metrics(tmp_path / "broken" / "metrics.jsonl")
    assert told == [(row["loss_scale"], row["overflow"]) for row in again]
    assert [row["learning_rate"] for row in rows] == [row["learning_rate"] for row in again]
    assert digest(open_reader(tmp_path / "broken")) == digest(open_reader(tmp_path / "straight"))


def _sampled(words: list[str]) -> Any:
    run = train.set_up(load_config("tiny", words))
    step.train_step(run)
    return train.samples.complete(run.world, run.tokenizer, ["import string", "x"], 4), step.train_step(run).loss


def test_many_ranks_say_what_one_says(data: Path, tmp_path: Path) -> None:
    one, two = (words(data, tmp_path / name, **{"train.micro_batch_sequences": 1}) for name in ("one", "two"))
    texts, loss = _sampled(one)
    assert all(texts)
    for many, their_loss in run_in_world(2, _sampled, [*two, *FSDP_EP]):
        assert many == texts
        assert their_loss == pytest.approx(loss, rel=1e-5)


FSDP_EP = ("parallel.fsdp=2", "parallel.ep=2")
FEW_BITS = {
    "train.master_dtype": "bf16",
    "optim.state_dtype": "int8",
    "optim.eps": 1e-4,
    "train.micro_batch_sequences": 1,
    "train.steps": 4,
}


def _trained(words: list[str]) -> dict[str, Any]:
    run = train.set_up(load_config("tiny", words))
    for _ in range(2):
        train.train_step(run)
    state = resume.state_of(run.config, run.data, step=run.step, num_tokens=run.num_tokens, loop=run.remembered())
    run.saver.save(run.step, run.held(), state)
    run.saver.finish()
    return {name: (piece.box.where, piece.tensor.clone()) for name, piece in run.held().items()}


def test_bf16_and_8_bits_are_resumed_to_the_bit_by_any_layout(data: Path, tmp_path: Path) -> None:
    many = run_in_world(2, _trained, [*words(data, tmp_path / "many", **FEW_BITS), *FSDP_EP])
    resumed = train.set_up(config(data, tmp_path / "many", **FEW_BITS))
    assert resumed.step == 2
    alone = resumed.held()
    kinds = {alone[name].tensor.dtype for name in alone}
    assert kinds == {torch.float32, torch.bfloat16, torch.uint8}
    for rank in many:
        for name, (where, values) in rank.items():
            assert torch.equal(alone[name].tensor[where], values), name
    # One process adds up gradients in bf16, FSDP in fp32; but for that they do the same, draws included.
    straight = train.set_up(config(data, tmp_path / "one", **FEW_BITS))
    for _ in range(2):
        train.train_step(straight)
    differing = [
        piece.tensor.ne(straight.held()[name].tensor).float().mean().item()
        for name, piece in alone.items()
        if piece.tensor.dtype == torch.bfloat16
    ]
    assert max(differing) < 0.08
    losses = [[train.train_step(run).loss for _ in range(2)] for run in (resumed, straight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][1] != losses[0][0]


def test_8_bits_are_refused_where_a_layout_cuts_blocks() -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    parameters = {name: torch.nn.Parameter(torch.zeros(64, 128))}
    places = {name: Place((0, 128), (64, 384))}
    with pytest.raises(LayoutError, match=r"keeps blocks of 256 values, and this layout cuts .*o_proj"):
        build_optimizer(parameters, load_config("tiny").model, Optim(state_dtype="int8"), places=places)
