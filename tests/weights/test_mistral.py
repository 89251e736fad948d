"""Mistral's checkpoints: its names, its arithmetic, both layouts of the experts, and all that can be wrong."""

from __future__ import annotations

import dataclasses
import json
import random as dice
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import on_a_full_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.sentencepiece import is_sentencepiece
from safetensors.torch import load_file, save_file
from small_models import TINY, TOKENS, mixtral, models, our_logits, random
from torch import Tensor

from ostro.config import preset
from ostro.data.tokenizer import load_tokenizer
from ostro.errors import WeightsError
from ostro.model.settings import ModelConfig
from ostro.weights import Hints, convert, detect, digest, mistral, open_reader
from ostro.weights.hf_config import write_json

MODELS = {
    "plain": TINY,
    "tied": dataclasses.replace(TINY, tie_word_embeddings=True, pad_token_id=0),
    "six rows a head": dataclasses.replace(TINY, head_dim=6, rope_theta=1e4, rms_norm_eps=1e-6),
    "window": dataclasses.replace(TINY, sliding_window=4, num_experts_per_tok=1),
}
TENSORS = {
    "tok_embeddings.weight": (48, 16),
    **{
        f"layers.{layer}.{name}": shape
        for layer in (0, 1)
        for name, shape in {
            "attention_norm.weight": (16,),
            "attention.wq.weight": (16, 16),
            "attention.wk.weight": (8, 16),
            "attention.wv.weight": (8, 16),
            "attention.wo.weight": (16, 16),
            "ffn_norm.weight": (16,),
            "feed_forward.gate.weight": (3, 16),
            **{f"feed_forward.experts.{e}.{w}.weight": (10, 16) for e in (0, 1, 2) for w in ("w1", "w3")},
            **{f"feed_forward.experts.{e}.w2.weight": (16, 10) for e in (0, 1, 2)},
        }.items()
    },
    "norm.weight": (16,),
    "output.weight": (48, 16),
}
PARAMS: dict[str, Any] = json.loads("""{
    "dim": 16, "n_layers": 2, "head_dim": 4, "hidden_dim": 10, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-05,
    "vocab_size": 48, "rope_theta": 1000000.0, "max_position_embeddings": 64,
    "moe": {"num_experts": 3, "num_experts_per_tok": 2}
}""")
ABSENT = object()
SINGLE = "consolidated.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    mistral.write(random(), tmp_path / "written")
    return tmp_path / "written"


def edit_params(path: Path, **changes: Any) -> None:
    content = json.loads((path / "params.json").read_text()) | changes
    (path / "params.json").write_text(json.dumps({k: v for k, v in content.items() if v is not ABSENT}))


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        open_reader(path)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def stacked(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors as the first release had them: a layer's experts below one another, w2 transposed."""
    out = {k.replace("feed_forward.gate", "block_sparse_moe.gate"): v for k, v in state.items() if "experts" not in k}
    for layer in range(config.num_hidden_layers):
        for weight in ("w1", "w2", "w3"):
            names = [
                f"layers.{layer}.feed_forward.experts.{e}.{weight}.weight" for e in range(config.num_local_experts)
            ]
            held = [state[name].T if weight == "w2" else state[name] for name in names]
            out[f"layers.{layer}.block_sparse_moe.{weight}"] = torch.cat(held).contiguous()
    return out


# mistral-inference


def test_names_shapes_and_settings_are_those_of_mistral_inference(folder: Path) -> None:
    held = load_file(folder / SINGLE)
    assert {name: tuple(tensor.shape) for name, tensor in held.items()} == TENSORS
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}
    assert json.loads((folder / "params.json").read_text()) == PARAMS
    assert sorted(file.name for file in folder.iterdir()) == [SINGLE, "params.json"]
    data = (folder / SINGLE).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    del header["__metadata__"]
    assert list(header) == list(TENSORS)  # in this order in the file, too
    assert [header[name]["data_offsets"][0] for name in header] == sorted(header[n]["data_offsets"][0] for n in header)


def test_a_tied_head_is_written_out(tmp_path: Path) -> None:
    mistral.write(random(MODELS["tied"]), tmp_path / "x")
    held = load_file(tmp_path / "x" / SINGLE)
    assert {name: tuple(tensor.shape) for name, tensor in held.items()} == TENSORS
    assert torch.equal(held["output.weight"], held["tok_embeddings.weight"])
    params = json.loads((tmp_path / "x" / "params.json").read_text())
    assert params == PARAMS | {"tied_embeddings": True, "pad_token_id": 0}
    del held["output.weight"]
    save_file(held, tmp_path / "x" / SINGLE)
    assert digest(open_reader(tmp_path / "x")) == digest(random(MODELS["tied"]))


def their_logits(path: Path) -> Tensor:
    """Compute logits from a folder alone as mistral-inference does: pairs of rows are complex numbers that turn, and
    the softmax is over the logits of the chosen experts."""
    params = json.loads((path / "params.json").read_text())
    held = {name: tensor.double() for name, tensor in load_file(path / SINGLE).items()}
    size, heads, kv_heads = params["head_dim"], params["n_heads"], params["n_kv_heads"]
    count = len(TOKENS)
    at = torch.arange(count)
    rates = params["rope_theta"] ** -(torch.arange(0, size, 2).double() / size)
    turns = torch.polar(torch.ones(count, size // 2).double(), torch.outer(at.double(), rates))[:, None]
    distance = at[:, None] - at
    hidden = (distance < 0) | (distance >= params.get("sliding_window", count))

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * held[name]

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(count, -1, size // 2, 2))
        return torch.view_as_real(pairs * turns).flatten(-2)

    x = held["tok_embeddings.weight"][TOKENS]
    for layer in range(params["n_layers"]):
        w = {n.removeprefix(f"layers.{layer}."): t for n, t in held.items() if n.startswith(f"layers.{layer}.")}
        h = norm(x, f"layers.{layer}.attention_norm.weight")
        q, k = turned(h @ w["attention.wq.weight"].T), turned(h @ w["attention.wk.weight"].T)
        v = (h @ w["attention.wv.weight"].T).view(count, kv_heads, size)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = torch.einsum("qhc,khc->hqk", q, k) / size**0.5
        mixed = torch.einsum("hqk,khc->qhc", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        x = x + mixed.reshape(count, -1) @ w["attention.wo.weight"].T
        h = norm(x, f"layers.{layer}.ffn_norm.weight")
        chosen, experts = (h @ w["feed_forward.gate.weight"].T).topk(params["moe"]["num_experts_per_tok"])
        shares = chosen.softmax(-1)
        out = torch.zeros_like(x)
        for token in range(count):
            for share, expert in zip(shares[token], experts[token].tolist()):
                w1, w2, w3 = (w[f"feed_forward.experts.{expert}.w{i}.weight"] for i in (1, 2, 3))
                out[token] += share * (w2 @ (torch.nn.functional.silu(w1 @ h[token]) * (w3 @ h[token])))
        x = x + out
    return (norm(x, "norm.weight") @ held["output.weight"].T).float()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_mistral_inference(tmp_path: Path, name: str) -> None:
    source = random(MODELS[name])
    mistral.write(source, tmp_path / "x")
    theirs = their_logits(tmp_path / "x")
    assert theirs.abs().max() > 1
    torch.testing.assert_close(our_logits(mixtral(source)), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_logits(mixtral(open_reader(tmp_path / "x"))), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("version", "file"), [("v1", "tokenizer.model"), ("v3", "tokenizer.model.v3")])
def test_the_tokenizer_is_found_by_its_name(tmp_path: Path, version: str, file: str) -> None:
    tokenizer = load_tokenizer(version)
    tokenizer.save(tmp_path / "hf")
    mistral.write(random(), tmp_path / "x", tokenizer=tokenizer.save)
    mistral.write(random(), tmp_path / "y", tokenizer=tmp_path / "hf")
    mistral.write(random(), tmp_path / "z", tokenizer=tmp_path / "x")
    for name in "xyz":
        (found,) = [f for f in (tmp_path / name).iterdir() if is_sentencepiece(f)]  # theirs refuses a second one
        assert found.name == file
        theirs = MistralTokenizer.from_file(str(found)).instruct_tokenizer.tokenizer
        assert theirs.version == version
        assert theirs.encode("Eight winds", bos=True, eos=False) == tokenizer.encode("Eight winds", bos=True)
        assert open_reader(tmp_path / name).model == open_reader(tmp_path / "x").model


def test_the_pieces_of_a_folder_of_mistrals_own(tmp_path: Path) -> None:
    load_tokenizer("v3").save(tmp_path / "hf")
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(tmp_path / "hf" / "tokenizer.model", source / "tokenizer.model.v3")
    mistral.write(random(), tmp_path / "x", tokenizer=source)
    assert sorted(f.name for f in (tmp_path / "x").iterdir()) == [SINGLE, "params.json", "tokenizer.model.v3"]
    shutil.copy(tmp_path / "hf" / "tokenizer.model", source)  # a second one, as 8x22B's folder has
    mistral.write(random(), tmp_path / "y", tokenizer=source)
    assert sorted(f.name for f in (tmp_path / "y").iterdir()) == [SINGLE, "params.json", "tokenizer.model.v3"]
    with pytest.raises(WeightsError, match="holds no tokenizer file"):
        mistral.write(random(), tmp_path / "z", tokenizer=tmp_path)
    assert not (tmp_path / "z").exists()


# What is read


@settings(max_examples=25)
@given(
    config=models(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    is_stacked=st.booleans(),
    num_files=st.integers(1, 4),
    suffix=st.sampled_from(["pth", "pt", "safetensors"]),
)
def test_every_layout_reads_the_same(
    config: ModelConfig, dtype: torch.dtype, is_stacked: bool, num_files: int, suffix: str
) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        convert(random(config), path / "x", to="mistral", dtype=dtype)
        expected = digest(open_reader(path / "x"))
        state = load_file(path / "x" / SINGLE)
        (path / "x" / SINGLE).unlink()
        if is_stacked:
            state = stacked(state, config)
        for i in range(num_files):
            part = {tensor: state[tensor] for tensor in list(state)[i::num_files]}
            if suffix == "safetensors":
                save_file(part, path / "x" / f"consolidated-{i + 1:05d}-of-{num_files:05d}.safetensors")
            else:
                torch.save(part, path / "x" / f"consolidated.{i:02d}.{suffix}")
        assert detect(path / "x") == "mistral"
        reader = open_reader(path / "x")
        assert dataclasses.replace(reader.model, initializer_range=config.initializer_range) == config
        assert digest(reader) == expected
        assert {info.dtype for info in reader.names().values()} == {dtype}
        convert(reader, path / "y", to="mistral")
        assert digest(open_reader(path / "y")) == expected


CUT_IN_COLUMNS = ("attention.wo.weight", ".w2.weight", "tok_embeddings.weight")


@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("embedding_dim", [0, 1])
def test_tensors_cut_over_files_are_put_together(folder: Path, is_stacked: bool, embedding_dim: int) -> None:
    state = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    state = stacked(state, TINY) if is_stacked else state
    for i in range(2):
        part = {}
        for name, tensor in state.items():
            dim = embedding_dim if name.startswith("tok") else int(name.endswith(CUT_IN_COLUMNS))
            is_whole = tensor.dim() < 2 or name.endswith("gate.weight")
            part[name] = tensor if is_whole else tensor.chunk(2, dim)[i].clone()
        torch.save(part, folder / f"consolidated.{i:02d}.pth")
    assert digest(open_reader(folder)) == digest(random())
    part["layers.1.attention_norm.weight"] = torch.zeros(16)
    torch.save(part, folder / "consolidated.01.pth")
    assert "holds layers.1.attention_norm.weight in 2 files, not the same in all" in refusal(folder)
    part["layers.0.attention.wo.weight"] = torch.zeros(15, 8)
    torch.save(part, folder / "consolidated.01.pth")
    assert "holds layers.0.attention.wo.weight in 2 files, in parts that do not fit" in refusal(folder)


def test_stacked_experts_are_views(tmp_path: Path) -> None:
    mistral.write(random(), tmp_path / "x")
    torch.save(stacked(load_file(tmp_path / "x" / SINGLE), TINY), tmp_path / "x" / "consolidated.00.pth")
    (tmp_path / "x" / SINGLE).unlink()
    reader = open_reader(tmp_path / "x")
    for name in ("model.layers.0.block_sparse_moe.experts.w13", "model.layers.0.block_sparse_moe.experts.w2"):
        first, second = (reader.read(name, (1, 0) if name.endswith("w13") else (1,)) for _ in range(2))
        assert first.data_ptr() == second.data_ptr()


def test_one_file_of_a_folder(folder: Path) -> None:
    assert detect(folder / SINGLE) == "mistral"
    assert digest(open_reader(folder / SINGLE)) == digest(random())
    (folder / SINGLE).rename(folder / "other.safetensors")
    assert digest(open_reader(folder / "other.safetensors", Hints(format="mistral"))) == digest(random())


def test_beside_weights_of_hugging_face_they_are_not_taken(tmp_path: Path, folder: Path) -> None:
    convert(random(seed=1), tmp_path / "hf", to="hf")
    shutil.copy(folder / SINGLE, tmp_path / "hf")
    shutil.copy(folder / "params.json", tmp_path / "hf")
    assert digest(open_reader(tmp_path / "hf")) == digest(random(seed=1))
    assert digest(open_reader(tmp_path / "hf" / SINGLE)) == digest(random())
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert detect(tmp_path / "hf") == "mistral"


# The settings


def test_without_params_the_sizes_come_from_config_json_or_a_preset(tmp_path: Path) -> None:
    mistral.write(random(preset("tiny")), tmp_path / "x")
    (tmp_path / "x" / "params.json").unlink()
    reader = open_reader(tmp_path / "x")
    assert reader.model == preset("tiny")
    assert reader.notes == ("no configuration beside it: the sizes are those of tiny",)
    assert digest(reader) == digest(random(preset("tiny")))
    convert(random(), tmp_path / "y", to="mistral")
    (tmp_path / "y" / "params.json").unlink()
    assert "comes without a configuration and fits no preset (2 layers; its first tensor is tok_emb" in refusal(
        tmp_path / "y"
    )
    assert digest(open_reader(tmp_path / "y", Hints(model=TINY))) == digest(random())
    convert(random(), tmp_path / "hf", to="hf")
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "y")
    reader = open_reader(tmp_path / "y")
    assert reader.notes == ()
    assert digest(reader) == digest(random())


# As Mixtral 8x7B and 8x22B came: no rope_theta, no length.
RELEASED: dict[str, Any] = json.loads("""{
    "dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
    "norm_eps": 1e-05, "vocab_size": 32000, "moe": {"num_experts_per_tok": 2, "num_experts": 8}
}""")
FIRST = {  # as the conversion script of transformers reads them
    **{name: getattr(ModelConfig(), name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
    **{name: getattr(ModelConfig(), name) for name in ("num_key_value_heads", "intermediate_size", "rms_norm_eps")},
    **{"vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": "4096"},
}
LARGE = RELEASED | {"dim": 6144, "n_layers": 56, "hidden_dim": 16384, "n_heads": 48}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (RELEASED, preset("mixtral-8x7b")),
        (LARGE, preset("mixtral-8x22b")),
        (LARGE | {"vocab_size": 32768}, preset("mixtral-8x22b-instruct")),
        (PARAMS, dataclasses.replace(TINY, initializer_range=0.02)),
        (PARAMS | {"rope_theta": None}, dataclasses.replace(TINY, initializer_range=0.02)),
        (PARAMS | {"lora": {"rank": 4}, "max_batch_size": 3}, dataclasses.replace(TINY, initializer_range=0.02)),
        (RELEASED | {"max_seq_len": 99}, ModelConfig(max_position_embeddings=99)),
        (RELEASED | {"rope_theta": 1e4, "sliding_window": "4096"}, ModelConfig(rope_theta=1e4, sliding_window=4096)),
        (RELEASED | {"_sliding_window": [512, 512]}, ModelConfig(sliding_window=512)),
        (RELEASED | {"sliding_window": [None, None]}, ModelConfig()),
        (RELEASED | {"tied_embeddings": True}, ModelConfig(tie_word_embeddings=True)),
        ({k: v for k, v in RELEASED.items() if k != "n_kv_heads"}, ModelConfig(num_key_value_heads=32)),
        (FIRST, ModelConfig(sliding_window=4096)),
    ],
)
def test_params_that_are_read(tmp_path: Path, params: dict[str, Any], expected: ModelConfig) -> None:
    write_json(tmp_path / "params.json", params)
    assert mistral.read_params(tmp_path / "params.json") == expected


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"moe": ABSENT}, "params.json has no moe: it is of a dense model, and Ostro reads Mixtral"),
        ({"moe": 3}, "params.json has moe=3 where an object belongs"),
        ({"moe": {"num_experts": 3}}, "params.json does not say moe.num_experts_per_tok: fetch it again"),
        ({"moe": PARAMS["moe"] | {"num_shared_experts": 1}}, "has moe.num_shared_experts=1: Mixtral's experts are all"),
        ({"moe": PARAMS["moe"] | {"num_experts_per_tok": 4}}, "num_experts_per_tok=4 is more than num_local_experts=3"),
        ({"dim": ABSENT, "n_heads": None}, "params.json does not say dim, n_heads: fetch it again"),
        ({"dim": "16"}, "params.json: model.hidden_size='16' must be a whole number"),
        ({"n_kv_heads": 3}, "params.json: model.num_key_value_heads=3 does not divide num_attention_heads=4"),
        ({"rope_theta": [1]}, "params.json: model.rope_theta=[1] must be a number"),
        ({"sliding_window": [4, None]}, "has sliding_window=[4, None]: Ostro has one window for all layers"),
        ({"sliding_window": []}, "has sliding_window=[]: Ostro has one window for all layers"),
        ({"sliding_window": "4" * 5000}, "must be a whole number of at least 1, or null"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "has quantization: the weights are quantised"),
        ({"yarn": {"factor": 4}}, "has yarn: its rotary positions are scaled"),
        ({"vision_encoder": {"hidden_size": 8}}, "has vision_encoder: it sees pictures"),
        ({"model_type": "mamba"}, "is of a 'mamba' with 'silu': Ostro reads Mixtral"),
        ({"activation": "gelu"}, "is of a 'transformer' with 'gelu'"),
        (
            {"vocab_size": 49},
            "holds tok_embeddings.weight with shape 48×16 where the model has 49×16 (2 tensors differ)",
        ),
        ({"n_layers": 3}, "holds 2 layers, its configuration says num_hidden_layers=3"),
        ({"n_layers": 10**9}, "holds 2 layers, its configuration says num_hidden_layers=1000000000"),
        (
            {"moe": {"num_experts": 10**9, "num_experts_per_tok": 1}},
            "says num_local_experts=1000000000, layers.0.feed_forward.gate.weight has the shape 3×16",
        ),
        ({"hidden_dim": 12}, "holds layers.0.feed_forward.experts.0.w1.weight with shape 10×16 where the model has 12"),
    ],
)
def test_params_that_are_refused(folder: Path, changes: dict[str, Any], sentence: str) -> None:
    edit_params(folder, **changes)
    assert sentence in refusal(folder)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"dim": NaN}', "\xff"])
def test_params_that_are_no_object(folder: Path, content: str) -> None:
    (folder / "params.json").write_text(content, "latin-1")
    assert "params.json is not" in refusal(folder)


KEYS = [*PARAMS, "sliding_window", "tied_embeddings", "pad_token_id", "quantization", "model_type", "hidden_size"]
VALUES = [None, True, 0, -1, 2, 4, 10**12, 10**30, 1.5, -0.0, "", "4", "x", [], [4, 4], [[1]], {}, {"a": 1}, "\ud800"]


def test_settings_of_any_kind_are_read_or_refused(folder: Path) -> None:
    rolls = dice.Random(0)
    refused = 0
    for _ in range(400):
        target = content = json.loads(json.dumps(PARAMS))
        for _ in range(rolls.choice([1, 1, 2, 3])):
            if rolls.random() < 0.2 and isinstance(content.get("moe"), dict):
                target = content["moe"]
            target[rolls.choice(list(target) if target is not content else KEYS)] = rolls.choice(VALUES)
        (folder / "params.json").write_text(json.dumps(content))
        try:
            reader = open_reader(folder)
            assert all(reader.read(name).shape == info.shape for name, info in reader.names().items())
        except WeightsError:
            refused += 1
    assert 200 < refused < 400


# Tensors that are wrong


def rewritten(path: Path, changes: dict[str, Any]) -> None:
    held: dict[str, Any] = load_file(path / SINGLE) | changes
    save_file({name: tensor for name, tensor in held.items() if tensor is not ABSENT}, path / SINGLE)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"norm.weight": ABSENT}, "lacks 1 of the model's 35 tensors, first norm.weight: the download is incomplete"),
        ({"output.weight": ABSENT}, "lacks 1 of the model's 35 tensors, first output.weight"),
        (
            {"layers.0.attention.wq.bias": torch.ones(16)},
            "holds 1 tensor that the model does not have, first layers.0.at",
        ),
        ({"layers.0.attention.wk.weight": torch.ones(4, 16)}, "layers.0.attention.wk.weight with shape 4×16 where the"),
        ({"norm.weight": torch.ones(16, dtype=torch.int8)}, "as int8: every tensor must have one floating-point type"),
        ({"layers.2.ffn_norm.weight": torch.ones(16)}, "holds 3 layers, its configuration says num_hidden_layers=2"),
    ],
)
def test_tensors_that_are_refused(folder: Path, changes: dict[str, Any], sentence: str) -> None:
    rewritten(folder, changes)
    assert sentence in refusal(folder)


def test_a_head_that_is_not_tied(folder: Path) -> None:
    edit_params(folder, tied_embeddings=True)
    assert "holds a output.weight that differs from tok_embeddings.weight, but its configuration ties" in refusal(
        folder
    )


@pytest.mark.parametrize("layout", ["separate", "stacked"])
def test_shards_that_are_missing(folder: Path, layout: str) -> None:
    state = load_file(folder / SINGLE)
    state = stacked(state, TINY) if layout == "stacked" else state
    (folder / SINGLE).unlink()
    for i in range(3):
        torch.save({name: state[name] for name in list(state)[i::3]}, folder / f"consolidated.{i:02d}.pt")
    assert digest(open_reader(folder)) == digest(random())
    (folder / "consolidated.01.pt").unlink()
    assert f"lacks {len(list(state)[1::3])} of the model's {len(state)} tensors, first " in refusal(folder)
    assert "the download is incomplete, or params.json belongs to another model" in refusal(folder)
    for i in (0, 2):
        (folder / f"consolidated.{i:02d}.pt").unlink()
    assert "has a params.json, but no consolidated.safetensors and no shards of it" in refusal(folder)


def test_files_that_are_damaged(folder: Path) -> None:
    file = folder / SINGLE
    state = load_file(file)
    file.write_bytes(file.read_bytes()[:-50])
    assert "consolidated.safetensors is truncated" in refusal(folder)
    file.unlink()
    torch.save(state, folder / "consolidated.00.pth")
    data = (folder / "consolidated.00.pth").read_bytes()
    (folder / "consolidated.00.pth").write_bytes(data[:-50])
    assert "consolidated.00.pth is not an archive as PyTorch writes it since 1.6" in refusal(folder)
    torch.save({"norm.weight": print}, folder / "consolidated.00.pth")
    assert "consolidated.00.pth cannot be read as tensors alone" in refusal(folder)


# What is written


def test_a_target_is_written_whole_or_not_at_all(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="written exists and is not empty"):
        mistral.write(random(seed=1), folder)
    assert digest(open_reader(folder)) == digest(random())
    kind, message = on_a_full_disk(20_000, mistral.write, random(), tmp_path / "new" / "x")
    assert kind == "OutOfMemory"
    assert "x could not be written whole (File too large) and nothing of it was kept" in message
    assert list(tmp_path.iterdir()) == [folder]
