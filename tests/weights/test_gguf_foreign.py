"""GGUF files that Ostro did not write: of other programs, of old ones, of other models, and split ones."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from small_models import TINY, random

from ostro.errors import WeightsError
from ostro.model.settings import ModelConfig
from ostro.weights import gguf
from ostro.weights.store import same_bits
from ostro.weights.stored import StoredReader


def opened(path: Path) -> StoredReader:
    reader = gguf.open_reader(path)
    reader.check()
    return reader


# Files of others


def other(path: Path, *, without: tuple[str, ...] = (), changes: dict[str, Any] | None = None, **settings: Any) -> Path:
    """Write TINY with the package, by hand: experts apart, as before April 2024, unless `stacked`; no keys of ours."""
    reader, stacked = random(), settings.pop("stacked", False)
    writer = GGUFWriter(path, settings.pop("architecture", "llama"), **settings)
    keys: dict[str, Any] = {
        "llama.context_length": 64,
        "llama.embedding_length": 16,
        "llama.block_count": 2,
        "llama.feed_forward_length": 10,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 1e6,
        "llama.expert_count": 3,
        "llama.expert_used_count": 2,
    }
    for key, value in (keys | (changes or {})).items():
        if key in without:
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)

    def tensor(name: str, value: torch.Tensor) -> None:
        if name not in without:
            writer.add_tensor(name, value.half().float().numpy() if value.ndim == 1 else value.half().numpy())

    def paired(weight: torch.Tensor) -> torch.Tensor:
        return weight.reshape(-1, 2, 2, 16).swapaxes(1, 2).reshape(weight.shape)

    tensor("token_embd.weight", reader.read("model.embed_tokens.weight"))
    for i in range(2):
        layer = f"model.layers.{i}."
        read: Callable[[str], torch.Tensor] = lambda name, layer=layer: reader.read(layer + name)  # noqa: E731
        tensor(f"blk.{i}.attn_norm.weight", read("input_layernorm.weight"))
        tensor(f"blk.{i}.attn_q.weight", paired(read("self_attn.q_proj.weight")))
        tensor(f"blk.{i}.attn_k.weight", paired(read("self_attn.k_proj.weight")))
        tensor(f"blk.{i}.attn_v.weight", read("self_attn.v_proj.weight"))
        tensor(f"blk.{i}.attn_output.weight", read("self_attn.o_proj.weight"))
        tensor(f"blk.{i}.ffn_norm.weight", read("post_attention_layernorm.weight"))
        tensor(f"blk.{i}.ffn_gate_inp.weight", read("block_sparse_moe.gate.weight"))
        stacks = dict(zip(("gate", "up"), read("block_sparse_moe.experts.w13").unbind(1), strict=True))
        stacks["down"] = read("block_sparse_moe.experts.w2")
        for word, stack in stacks.items():
            if stacked:
                tensor(f"blk.{i}.ffn_{word}_exps.weight", stack)
            else:
                for e in range(3):
                    tensor(f"blk.{i}.ffn_{word}.{e}.weight", stack[e])
    tensor("output_norm.weight", reader.read("model.norm.weight"))
    tensor("output.weight", reader.read("lm_head.weight"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


FOREIGN = dataclasses.replace(TINY, initializer_range=ModelConfig().initializer_range)


@pytest.mark.parametrize("stacked", [False, True])
def test_files_of_others_and_of_old(tmp_path: Path, stacked: bool) -> None:
    reader = opened(other(tmp_path / "x.gguf", stacked=stacked))
    assert reader.model == FOREIGN
    for name, info in reader.names().items():
        expected = torch.float32 if "norm" in name else torch.float16
        assert info.dtype == expected
        assert same_bits(reader.read(name), random().read(name).to(expected))


def test_what_a_file_leaves_out_is_what_llama_cpp_takes(tmp_path: Path) -> None:
    path = other(tmp_path / "x.gguf", without=("llama.rope.freq_base", "output.weight"))
    assert opened(path).model == dataclasses.replace(FOREIGN, rope_theta=1e4, tie_word_embeddings=True)
    ids = {"tokenizer.ggml.bos_token_id": 5, "tokenizer.ggml.eos_token_id": 6, "tokenizer.ggml.padding_token_id": 0}
    found = opened(other(tmp_path / "y.gguf", changes=ids)).model
    assert found == dataclasses.replace(FOREIGN, bos_token_id=5, eos_token_id=6, pad_token_id=0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"architecture": "qwen2"}, "is of architecture 'qwen2' with 0 experts; Ostro reads Mixtral"),
        ({"changes": {"llama.expert_count": 0}}, "is of architecture 'llama' with 0 experts"),
        ({"without": ("llama.expert_used_count",)}, "lacks the key llama.expert_used_count"),
        ({"changes": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type='yarn'.*has 'none' alone"),
        ({"changes": {"llama.rope.scaling.factor": 4.0}}, "llama.rope.scaling.factor=4.0"),
        ({"changes": {"llama.rope.dimension_count": 2}}, "llama.rope.dimension_count=2 and heads of 4"),
        ({"changes": {"llama.attention.head_count": [4, 4]}}, "one llama.attention.head_count a layer"),
        ({"changes": {"llama.expert_used_count": 4}}, "num_experts_per_tok=4 is more than num_local_experts=3"),
        ({"changes": {"llama.embedding_length": "16"}}, "hidden_size='16' must be a whole number"),
        ({"changes": {"llama.expert_count": 1 << 31}}, "num_local_experts=2147483648, blk.0.ffn_gate_inp.weight has"),
        ({"changes": {"llama.block_count": 1 << 31}}, "holds 2 layers, its configuration says num_hidden_layers"),
        ({"changes": {"llama.vocab_size": 50}}, "token_embd.weight with shape 48×16 where the model has 50×16"),
        ({"without": ("blk.1.attn_v.weight",)}, "lacks 1 of the model's .* tensors, first blk.1.attn_v.weight"),
        ({"without": ("blk.0.ffn_gate_inp.weight",)}, "has no matrix blk.0.ffn_gate_inp.weight"),
        ({"changes": {"ostro.config": "[]"}}, "no JSON object under ostro.config"),
        ({"changes": {"ostro.config": '{"sliding_window": "x"}'}}, "sliding_window='x' must be"),
        ({"changes": {"ostro.dtypes": '{"output.weight": "int8"}'}}, "records a output.weight that was 'int8'"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    path = other(tmp_path / "x.gguf", **settings)
    with pytest.raises(WeightsError, match=sentence) as caught:
        opened(path)
    assert str(path) in str(caught.value)


# Several files


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    other(folder / "m.gguf", stacked=True, split_max_tensors=8)
    assert len(list(folder.iterdir())) == 3
    return folder


def test_a_split_model_is_read_whole(split: Path) -> None:
    for path in (split, split / "m-00001-of-00003.gguf", split / "m-00003-of-00003.gguf"):
        assert gguf.detect(path)
        reader = opened(path)
        assert reader.model == FOREIGN
        assert all(torch.equal(reader.read(n).float(), random().read(n).half().float()) for n in reader.names())


def test_a_split_model_that_is_not_whole(split: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(split, folder)
    first, second, third = (folder / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3))
    second.rename(tmp_path / "away")
    with pytest.raises(WeightsError, match=r"is one of 3 files; 1 is missing, first m-00002-of-00003.gguf"):
        opened(first)
    shutil.copy(third, second)
    with pytest.raises(WeightsError, match=r"m-00002-of-00003.gguf says it is part 2 of 3 .from 0., its name says 1"):
        opened(folder)
    (tmp_path / "away").rename(second)
    assert opened(folder).model == FOREIGN
    first.rename(folder / "m.gguf")
    with pytest.raises(WeightsError, match=r"m.gguf says it is part 0 of 3"):
        opened(folder / "m.gguf")
