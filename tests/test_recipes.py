"""Every shipped recipe: what its first lines say is so, and with a small model it trains a step, or generates."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
from safetensors.torch import save_file
from worlds import run_in_world

from ostro.cli import main
from ostro.config import Config, build_config, load_config, preset_names, recipe_names, recipe_path
from ostro.data.prepare import prepare
from ostro.data.tokenizer import load_tokenizer
from ostro.errors import ConfigError
from ostro.model import layout
from ostro.model.settings import ModelConfig
from ostro.overrides import read_yaml
from ostro.parallel.memory import UNCERTAIN, estimate
from ostro.serve.load import checkpoint_of
from ostro.train import train
from ostro.weights import RandomReader, hf

TRAINING = [name for name in recipe_names() if not name.endswith("/predict")]
tokenizer = functools.cache(load_tokenizer)
SIZES: dict[str, int] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def test_names_are_families_and_jobs_without_presets() -> None:
    assert {"tiny", "mixtral-8x7b/qlora", "mixtral-8x22b/lora-8"} <= set(recipe_names())
    assert not [name for name in recipe_names() if name.startswith("models/")]
    assert not {name.partition("/")[0] for name in recipe_names() if "/" in name} - set(preset_names())
    with pytest.raises(ConfigError, match="Did you mean 'mixtral-8x7b/qlora'"):
        load_config("mixtral-8x7b/qlorra")


@pytest.mark.parametrize("name", TRAINING)
def test_its_first_lines_say_what_it_needs(name: str) -> None:
    config = load_config(name)
    needs, expect, *_ = recipe_path(name).read_text("utf-8").splitlines()
    said = re.fullmatch(
        r"# Needs: (\d+) (?:devices? of (\d+) GB, of which|process on two CPU cores, of whose memory) a dry run fills "
        r"([\d.]+) GB; .*(text|chats|documents).*",
        needs,
    )
    assert said is not None, needs
    assert expect.startswith("# Expect: ")
    assert int(said[1]) == config.parallel.degrees().num_ranks
    assert float(said[3]) * 1e9 == pytest.approx(estimate(config).total, rel=UNCERTAIN)
    assert float(said[3]) <= 0.92 * int(said[2] or 2)
    assert bool(re.search(r"; (weights|a run of tiny)", needs)) == (config.weights.path is not None)


def test_what_predict_needs_is_the_weights() -> None:
    said = re.match(r"# Needs: 1 device .* weights fill ([\d.]+) GB", recipe_path("mixtral-8x7b/predict").read_text())
    assert said is not None
    model = load_config("mixtral-8x7b/predict").model
    assert float(said[1]) * 1e9 == pytest.approx(2 * layout.num_parameters(model), rel=0.001)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small weights where the recipes look for large ones, and with chats to learn."""
    folder = tmp_path_factory.mktemp("recipes")
    small, of_tiny = (ModelConfig(vocab_size=32000, rope_theta=theta, **SIZES) for theta in (1e6, 1e4))
    hf.write(RandomReader(small, 0), folder / "Mixtral-8x7B-v0.1", tokenizer=tokenizer("v1").save)
    hf.write(RandomReader(small, 0), folder / "Mixtral-8x7B-Instruct-v0.1")
    (folder / "Mixtral-8x22B-v0.1").symlink_to(folder / "Mixtral-8x7B-Instruct-v0.1")
    hf.write(RandomReader(of_tiny, 0), folder / "runs" / "tiny")
    write_dense(RandomReader(of_tiny, 0), folder / "Mistral-7B-v0.1")
    turns = [{"role": "user", "content": "What glitters?"}, {"role": "assistant", "content": "Not only gold. " * 9}]
    (folder / "chat.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 8)
    prepare([folder / "chat.jsonl"], folder / "chats", tokenizer=tokenizer("v1"))
    return folder


def write_dense(mixtral: RandomReader, folder: Path) -> None:
    """Write a dense Mistral: the Mixtral with its first expert alone."""
    tensors = {}
    for name, parameter in layout.table(mixtral.model).items():
        tensor = mixtral.read(name)
        mlp = name.partition("block_sparse_moe")[0] + "mlp."
        if parameter.kind is layout.W13:
            tensors |= {f"{mlp}{part}_proj.weight": tensor[0, i].clone() for i, part in enumerate(("gate", "up"))}
        elif parameter.kind is layout.W2:
            tensors[f"{mlp}down_proj.weight"] = tensor[0].clone()
        elif parameter.kind is not layout.GATE:
            tensors[name] = tensor
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    fields = {**SIZES, "vocab_size": 32000, "rope_theta": 1e4, "rms_norm_eps": 1e-5, "sliding_window": 4096}
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", **fields}))


def shrunken(name: str, run_dir: Path, **parallel: int) -> Config:
    """Return a recipe with another model's sizes, one short step, and other degrees; all else is its own."""
    fields, lines = read_yaml(recipe_path(name))
    model = fields["model"] if isinstance(fields["model"], dict) else {"preset": fields["model"]}
    fields["model"] = model | SIZES
    fields["parallel"] = parallel
    fields["data"] |= {"path": ["chats"], "seq_length": 32}
    fields["train"] |= {"steps": 1, "global_batch_sequences": 2, "micro_batch_sequences": 1}
    fields["run"] |= {"dir": str(run_dir)}
    return build_config(fields, lines)


def step_of(config: Config) -> tuple[float, float]:
    outcome = train(config)
    assert outcome.step == outcome.saved_step == 1
    return outcome.last["loss"], outcome.last["grad_norm"]


@pytest.mark.parametrize("name", TRAINING)
def test_it_trains_a_step(name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("ostro.train.load_tokenizer", tokenizer)
    config = shrunken(name, tmp_path / "run")
    loss, grad_norm = step_of(config)
    assert 5 < loss < 15
    assert 0 < grad_norm < 100
    assert (tmp_path / "run" / "adapter").is_dir() == (config.lora is not None)


def test_two_ranks_train_what_one_does(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("ostro.train.load_tokenizer", tokenizer)
    name = "mixtral-8x7b/lora-2"
    degrees = load_config(name).parallel
    alone = step_of(shrunken(name, tmp_path / "one"))
    both = run_in_world(2, step_of, shrunken(name, tmp_path / "two", fsdp=degrees.fsdp, ep=degrees.ep))
    assert both[0] == pytest.approx(both[1])
    assert both[0] == pytest.approx(alone, rel=2e-2)  # bf16


def test_predict_generates(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place)
    for dtype in ("auto", "nf4"):
        arguments = ["mixtral-8x7b/predict", "I love Beijing, because", "--max-new-tokens", "3", "--dtype", dtype]
        assert main(["generate", *arguments]) == 0
        assert capsys.readouterr().out.startswith("I love Beijing, because")


def test_a_recipe_stands_for_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert checkpoint_of("mixtral-8x7b/predict") == "mistralai/Mixtral-8x7B-v0.1"
    assert checkpoint_of("runs/some") == "runs/some"
    Path("mine.yaml").write_text("weights: {path: there}\n")
    assert checkpoint_of("mine.yaml") == "there"
    with pytest.raises(ConfigError, match=r"recipe tiny has no weights\.path"):
        checkpoint_of("tiny")
    Path("tiny").mkdir()  # a folder of that name is what is meant
    assert checkpoint_of("tiny") == "tiny"
