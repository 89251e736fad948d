"""MindFormers' files for the tests: its tensors spelled out, a cluster's output folder, and what opening says."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from small_models import TINY, random
from torch import Tensor

from ostro.errors import ConfigError, WeightsError
from ostro.model.settings import ModelConfig
from ostro.weights import (
    Hints,
    Reader,
    mindspore,
    open_reader,
)
from ostro.weights.ckpt_file import write_ckpt
from ostro.weights.mindspore_layout import MindSporeDegrees
from ostro.weights.mindspore_ranks import open_file
from ostro.weights.safetensors_file import write_file
from ostro.weights.store import TensorInfo, same_bits
from ostro.weights.stored import StoredReader

CLUSTER = dataclasses.replace(TINY, num_local_experts=4)
FOUR = MindSporeDegrees(dp=2, tp=2, ep=2)  # of each part but the experts' two copies, of norms four
SCALARS = {
    "global_step": torch.tensor([7], dtype=torch.int32),
    "learning_rate": torch.tensor(0.25),
    "epoch_num": torch.tensor(3),
}

Named = dict[str, Tensor]


def theirs(reader: Reader, *, is_gmm: bool = False, qkv_concat: bool = False, prefix: str = "") -> Named:
    """Return MindFormers' tensors of a model, spelled out (seed: convert_weight.py; w_qkv of its Llama)."""
    model = reader.model
    found = {"model.tok_embeddings.embedding_weight": reader.read("model.embed_tokens.weight")}
    for i in range(model.num_hidden_layers):
        layer = f"model.layers.{i}."
        found[layer + "attention_norm.weight"] = reader.read(layer + "input_layernorm.weight")
        q, k, v, o = (reader.read(f"{layer}self_attn.{letter}_proj.weight") for letter in "qkvo")
        if qkv_concat:
            rows: list[Tensor] = []
            for head in range(model.num_key_value_heads):
                for one in (q, k, v):
                    rows += one.chunk(model.num_key_value_heads)[head]
            found[layer + "attention.w_qkv.weight"] = torch.stack(rows)
        else:
            found |= {f"{layer}attention.wq.weight": q, f"{layer}attention.wk.weight": k}
            found[layer + "attention.wv.weight"] = v
        found[layer + "attention.wo.weight"] = o
        found[layer + "ffn_norm.weight"] = reader.read(layer + "post_attention_layernorm.weight")
        found[layer + "feed_forward.router.dense.weight"] = reader.read(layer + "block_sparse_moe.gate.weight")
        gate, up = reader.read(layer + "block_sparse_moe.experts.w13").unbind(1)
        down = reader.read(layer + "block_sparse_moe.experts.w2")
        for name, stack in (("w1", gate), ("w3", up), ("w2", down)):
            found[f"{layer}feed_forward.ffn.{name}.weight"] = stack.transpose(1, 2) if is_gmm else stack
    found["model.norm_out.weight"] = reader.read("model.norm.weight")
    if not model.tie_word_embeddings:
        found["lm_head.weight"] = reader.read("lm_head.weight")
    return {prefix + name: tensor.contiguous() for name, tensor in found.items()}


def moments(config: ModelConfig = CLUSTER, **settings: bool) -> Named:
    return theirs(random(config, 1), prefix="adam_m.", **settings) | theirs(
        random(config, 2), prefix="adam_v.", **settings
    )


def held(path: Path) -> Named:
    file = open_file(path)
    return {name: file.tensor(name) for name in file.infos}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def save(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write a file by its suffix, whatever was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    kept = {name: tensor.clone() for name, tensor in tensors.items()}  # they may be views of the same file
    if path.suffix == ".ckpt":
        write_ckpt(path, infos, lambda name: [kept[name]])
    else:
        write_file(path, infos, lambda name: [kept[name]], {"format": "ms"})
    return path


def opened(path: Path, config: ModelConfig = CLUSTER, **hints: object) -> StoredReader:
    """Open as `convert` does, and read what proves it sound."""
    reader = open_reader(path, dataclasses.replace(Hints(model=config), **hints))
    assert isinstance(reader, StoredReader)
    reader.certify()
    return reader


def refusal(path: Path, config: ModelConfig | None = CLUSTER, **hints: object) -> str:
    def enter() -> None:
        reader = open_reader(path, dataclasses.replace(Hints(model=config), **hints))
        assert isinstance(reader, StoredReader)
        reader.certify()

    with pytest.raises((WeightsError, ConfigError)) as caught:
        enter()
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def run(root: Path, *steps: str, degrees: MindSporeDegrees = FOUR) -> Path:
    """Write a cluster's output folder with a checkpoint a step; the n-th has the weights of seed n."""
    for seed, step in enumerate(steps):
        made = root.with_name(f"{root.name}.{seed}")
        mindspore.write(random(CLUSTER, seed), made, degrees=degrees)
        for file in sorted(made.glob("checkpoint/rank_*/*")):
            rank = file.parent.name
            target = root / "checkpoint" / rank / f"mixtral-8x7b_{rank}-{step}.ckpt"
            target.parent.mkdir(parents=True, exist_ok=True)
            file.rename(target)
            os.utime(target, (seed, seed))
        if not (root / "strategy").exists():
            shutil.copytree(made / "strategy", root / "strategy")
        shutil.rmtree(made)
    return root


def rank_file(root: Path, rank: int) -> Path:
    return sorted((root / "checkpoint" / f"rank_{rank}").iterdir())[-1]
