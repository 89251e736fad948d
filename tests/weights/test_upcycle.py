"""Sparse upcycling: a dense Mistral of transformers, read as a Mixtral, computes the same and trains."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from small_models import TINY, logits_of, mixtral, our_logits
from transformers import MistralConfig, MistralForCausalLM

from ostro.config import load_config
from ostro.data.prepare import prepare
from ostro.data.tokenizer import load_tokenizer
from ostro.errors import ConfigError, WeightsError
from ostro.log import read_metrics
from ostro.model import layout
from ostro.train import train
from ostro.weights import RandomReader, convert, digest, open_reader
from ostro.weights.upcycle import open_upcycled


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("dense") / "model", vocab_size=48, sliding_window=5, rope_theta=500.0)


def saved(path: Path, **settings: object) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "head_dim": 8}
    MistralForCausalLM(MistralConfig(**{**sizes, **heads, **settings})).save_pretrained(path)
    return path


def test_it_computes_what_the_dense_one_does(dense: Path) -> None:
    theirs = logits_of(MistralForCausalLM.from_pretrained(dense, attn_implementation="eager").eval())
    ours = our_logits(mixtral(open_upcycled(dense)))
    assert theirs.abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_experts_are_copies_and_routers_are_drawn(dense: Path) -> None:
    model = dataclasses.replace(TINY, num_local_experts=5, num_experts_per_tok=3)
    reader = open_upcycled(dense, model, seed=3)
    assert (reader.model.num_local_experts, reader.model.num_experts_per_tok) == (5, 3)
    w13, gate = "model.layers.1.block_sparse_moe.experts.w13", layout.GATE.name.format(layer=1)
    whole = reader.read(w13)
    assert whole.shape == (5, 2, 24, 32)
    assert all(torch.equal(whole[expert], whole[0]) for expert in range(5))
    assert not torch.equal(whole[0, 0], whole[0, 1])
    assert torch.equal(reader.read(w13, (3, 1, slice(4, 9))), whole[3, 1, 4:9])
    assert torch.equal(reader.read(gate), RandomReader(reader.model, seed=3).read(gate))
    assert not torch.equal(reader.read(gate), open_upcycled(dense, model, seed=4).read(gate))


def test_it_converts_like_any_other(dense: Path, tmp_path: Path) -> None:
    reader = open_upcycled(dense)
    convert(reader, tmp_path / "mixtral", to="hf", verify=True)
    assert digest(open_reader(tmp_path / "mixtral")) == digest(reader)


def test_what_is_no_whole_dense_mistral_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"'mistral' is a dense model: weights.upcycle=true"):
        open_reader(dense)
    convert(open_upcycled(dense), tmp_path / "mixtral", to="hf")
    with pytest.raises(WeightsError, match=r"is a Mixtral and has its experts: leave out upcycle"):
        open_upcycled(tmp_path / "mixtral")
    with pytest.raises(WeightsError, match=r"has no config.json: what is upcycled is a Hugging Face folder"):
        open_upcycled(tmp_path)
    for changes, sentence in (
        ({"model_type": "llama"}, r"is of model_type 'llama'"),
        ({"intermediate_size": 20}, r"gate_proj.weight with shape 24×32 where the model has 20×32"),
        ({"num_hidden_layers": 10**9}, r"holds 2 layers, its configuration says num_hidden_layers=1000000000"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu'"),
    ):
        folder = Path(shutil.copytree(dense, tmp_path / str(len(list(tmp_path.iterdir())))))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(WeightsError, match=sentence):
            open_upcycled(folder)


def test_training_starts_from_it(tmp_path: Path) -> None:
    (tmp_path / "text.py").write_text(Path(json.__file__).read_text())
    prepare([tmp_path / "text.py"], tmp_path / "data", tokenizer=load_tokenizer("v1"))
    path = saved(tmp_path / "dense", vocab_size=32000, sliding_window=None, initializer_range=0.05)
    overrides = [
        *("model.hidden_size=32", "model.intermediate_size=24", "model.num_hidden_layers=2", "model.head_dim=8"),
        *("model.num_local_experts=4", "model.num_attention_heads=4", "model.num_key_value_heads=2"),
        *("model.rope_theta=10000.0", "model.rms_norm_eps=1e-6", "data.seq_length=64"),
        *("train.global_batch_sequences=2", "train.micro_batch_sequences=2", "train.steps=1"),
        *(f"data.path={tmp_path / 'data'}", f"weights.path={path}", "weights.upcycle=true"),
    ]
    train(load_config("tiny", [*overrides, f"run.dir={tmp_path / 'run'}"]))
    [row] = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert row["grad_norm"] > 0
    trained, start = open_reader(tmp_path / "run"), open_upcycled(path, open_reader(tmp_path / "run").model)
    name = "model.layers.0.block_sparse_moe.experts.w2"
    assert 0 < (trained.read(name) - start.read(name)).abs().max() < 0.01
    with pytest.raises(ConfigError, match=r"has vocab_size=32000 and the config says model.vocab_size=32001"):
        train(load_config("tiny", [*overrides, f"run.dir={tmp_path / 'other'}", "model.vocab_size=32001"]))
