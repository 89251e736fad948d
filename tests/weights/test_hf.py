"""Hugging Face folders: parity with transformers both ways, and everything that can be wrong with one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import on_a_full_disk
from safetensors.torch import load_file, save_file
from small_models import (
    TINY,
    Altered,
    logits_of,
    mixtral,
    our_logits,
    random,
    their_logits,
    transformers_model,
)

from ostro.config import preset
from ostro.errors import OutOfMemory, WeightsError
from ostro.weights import Hints, convert, detect, digest, hf, open_reader
from ostro.weights.hf_config import read_config

MODELS = {
    "plain": TINY,
    "tied": dataclasses.replace(TINY, tie_word_embeddings=True, pad_token_id=0),
    "window": dataclasses.replace(TINY, sliding_window=4, head_dim=6, rope_theta=1e4, rms_norm_eps=1e-6),
}


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ABSENT}))


ABSENT = object()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded folder of ours, to be copied before it is damaged."""
    path = tmp_path_factory.mktemp("written") / "model"
    hf.write(random(), path, max_shard_bytes=4000)
    return path


@pytest.fixture
def sharded(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "sharded"))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    hf.write(random(), tmp_path / "single")
    return tmp_path / "single"


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        open_reader(path)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


# Parity with transformers


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard", ["5GB", "6KB"])
def test_we_read_what_transformers_writes(tmp_path: Path, name: str, shard: str) -> None:
    theirs = transformers_model(MODELS[name])
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "6KB")
    reader = open_reader(tmp_path)
    assert dataclasses.replace(reader.model, initializer_range=0.3) == MODELS[name]
    ours = our_logits(mixtral(reader))
    torch.testing.assert_close(ours, logits_of(theirs), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 4000])
def test_transformers_reads_what_we_write(tmp_path: Path, name: str, max_shard_bytes: int) -> None:
    theirs = transformers_model(MODELS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    hf.write(open_reader(tmp_path / "theirs"), tmp_path / "ours", max_shard_bytes=max_shard_bytes)
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1) == (max_shard_bytes == 4000)
    assert torch.equal(their_logits(tmp_path / "ours"), logits_of(theirs))


def test_half_precision_goes_both_ways(tmp_path: Path) -> None:
    theirs = transformers_model().to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    reader = open_reader(tmp_path / "theirs")
    assert {info.dtype for info in reader.names().values()} == {torch.bfloat16}
    hf.write(reader, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(their_logits(tmp_path / "ours"), logits_of(theirs))
    assert digest(open_reader(tmp_path / "ours")) == digest(reader)


def test_what_we_write_is_what_transformers_writes(tmp_path: Path) -> None:
    theirs = transformers_model()
    theirs.save_pretrained(tmp_path / "theirs")
    hf.write(open_reader(tmp_path / "theirs"), tmp_path / "ours")
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    found = load_file(tmp_path / "ours" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    for key, value in json.loads((tmp_path / "theirs" / "config.json").read_text()).items():
        if key in ours and key != "head_dim":  # theirs is null; ours is the number it stands for
            assert ours[key] == value, key


def test_the_index_is_complete(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    held = {name: tensor for file in sharded.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert index["weight_map"].keys() == held.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held.values())
    assert max(file.stat().st_size for file in sharded.glob("*.safetensors")) < 6000


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    hf.write(random(), tmp_path / "x", max_shard_bytes=1)
    files = sorted(tmp_path.glob("x/*.safetensors"))
    assert [len(load_file(file)) for file in files] == [1] * 35
    assert files[-1].name == "model-00035-of-00035.safetensors"
    assert digest(open_reader(tmp_path / "x")) == digest(random())


def test_generation_config_has_the_special_ids(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    config = dataclasses.replace(TINY, bos_token_id=3, eos_token_id=4, pad_token_id=5)
    hf.write(random(config), tmp_path / "x")
    found = GenerationConfig.from_pretrained(tmp_path / "x")
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (3, 4, 5)


def test_the_names_of_a_transformers_5_module_are_read(tmp_path: Path) -> None:
    theirs = transformers_model()
    theirs.save_pretrained(tmp_path / "names4")
    (tmp_path / "names5").mkdir()
    shutil.copy(tmp_path / "names4" / "config.json", tmp_path / "names5")
    save_file(theirs.state_dict(), tmp_path / "names5" / "model.safetensors")
    assert any("gate_up_proj" in name for name in load_file(tmp_path / "names5" / "model.safetensors"))
    assert digest(open_reader(tmp_path / "names5")) == digest(open_reader(tmp_path / "names4"))


@pytest.mark.parametrize("stacked", [False, True])
def test_a_piece_is_a_view_of_the_file(single: Path, stacked: bool) -> None:
    if stacked:
        held = load_file(single / "model.safetensors")
        theirs = {name: tensor for name, tensor in held.items() if "block_sparse_moe" not in name}
        for layer in range(2):
            moe = f"model.layers.{layer}.block_sparse_moe"
            w13, w2 = (random().read(f"{moe}.experts.{name}") for name in ("w13", "w2"))
            mlp = f"model.layers.{layer}.mlp"
            theirs |= {f"{mlp}.experts.gate_up_proj": w13.flatten(1, 2), f"{mlp}.experts.down_proj": w2}
            theirs[f"{mlp}.gate.weight"] = held[f"{moe}.gate.weight"]
        save_file(theirs, single / "model.safetensors")
    reader = open_reader(single)
    assert digest(reader) == digest(random())
    name = "model.layers.1.block_sparse_moe.experts.w13"
    piece = reader.read(name, (2, 1))
    assert piece.data_ptr() == reader.read(name, (2, 1)).data_ptr()
    assert torch.equal(piece, random().read(name, (2, 1)))
    assert torch.equal(reader.read(name, (slice(1, 3), 0, slice(2, 5))), random().read(name)[1:3, 0, 2:5])


def test_a_single_file_beside_its_config(single: Path, tmp_path: Path) -> None:
    (single / "model.safetensors").rename(single / "renamed.safetensors")
    for path in (single, single / "renamed.safetensors"):
        assert digest(open_reader(path)) == digest(random())
    (single / "config.json").rename(tmp_path / "config.json")
    for path in (single, single / "renamed.safetensors"):
        assert "comes without a configuration and fits no preset (2 layers; its first tensor is model.e" in refusal(
            path
        )
        model = read_config(tmp_path / "config.json")
        assert digest(open_reader(path, Hints(model=model))) == digest(random())


def test_one_giant_file_without_metadata_or_config_is_of_the_preset_that_fits(tmp_path: Path) -> None:
    # What MindFormers' convert_reversed.py left behind: no __metadata__, no index, no config.json.
    hf.write(random(preset("tiny")), tmp_path / "x")
    held = load_file(tmp_path / "x" / "model.safetensors")
    save_file(held, tmp_path / "mixtral8_7b.safetensors")
    reader = open_reader(tmp_path / "mixtral8_7b.safetensors")
    assert reader.model == preset("tiny")
    assert "the sizes are those of tiny" in reader.notes[0]
    assert digest(reader) == digest(open_reader(tmp_path / "x"))


# config.json


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"rope_parameters": ABSENT, "rope_theta": 5e5}, "rope_theta", 5e5),
        (
            {"rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}, "rope_theta": ABSENT},
            "rope_theta",
            7e5,
        ),
        ({"rope_parameters": ABSENT, "rope_theta": ABSENT, "rope_scaling": None}, "rope_theta", 1e6),
        ({"eos_token_id": [7, 8]}, "eos_token_id", 7),
        ({"head_dim": None}, "head_dim", 4),
        ({"head_dim": ABSENT}, "head_dim", 4),
        ({"max_position_embeddings": ABSENT}, "max_position_embeddings", 131072),
        ({"sliding_window": 9}, "sliding_window", 9),
        ({"future_setting": {"a": 1}}, "vocab_size", 48),
    ],
)
def test_config_dialects(single: Path, changes: dict, field: str, value: object) -> None:
    edit_json(single / "config.json", **changes)
    assert getattr(read_config(single / "config.json"), field) == value


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "llama"}, "model_type 'llama': Ostro reads 'mixtral'"),
        ({"model_type": ABSENT}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rotary positions of type 'yarn'"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rotary positions of type 'linear' in rope_scaling",
        ),
        ({"rope_parameters": 3}, "rope_parameters=3 where an object or null belongs"),
        ({"quantization_config": {"quant_method": "awq"}}, "the weights are quantised"),
        ({"num_attention_heads": "four"}, "num_attention_heads='four' must be a whole number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide"),
        ({"eos_token_id": []}, r"eos_token_id=[] must be a whole number"),
        ({"eos_token_id": 48}, "eos_token_id=48 lies outside vocab_size=48"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
        ({"sliding_window": "wide"}, "sliding_window='wide'"),
        ({"num_hidden_layers": 3}, "holds 2 layers, its configuration says num_hidden_layers=3"),
        ({"num_hidden_layers": 10**12}, "holds 2 layers, its configuration says num_hidden_layers=10000000"),
        (
            {"num_local_experts": 10**12},
            "num_local_experts=1000000000000, model.layers.0.block_sparse_moe.gate",
        ),
        (
            {"num_local_experts": 2},
            "gate.weight has the shape 3×16: it belongs to another model",
        ),
        (
            {"vocab_size": 32000},
            "embed_tokens.weight with shape 48×16 where the model has 32000×16 (2 tensors",
        ),
        (
            {"intermediate_size": 11},
            "experts.0.w1.weight with shape 10×16 where the model has 11×16 (18 tensors",
        ),
        ({"tie_word_embeddings": True}, "lm_head.weight that differs from model.embed_tokens.weight"),
    ],
)
def test_a_config_that_contradicts(single: Path, changes: dict, sentence: str) -> None:
    edit_json(single / "config.json", **changes)
    assert sentence in refusal(single)


def test_a_tied_head_that_equals_the_embedding_may_come_along(tmp_path: Path) -> None:
    hf.write(random(MODELS["tied"]), tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    held = load_file(file)
    save_file(held | {"lm_head.weight": held["model.embed_tokens.weight"].clone()}, file)
    assert digest(open_reader(tmp_path / "x")) == digest(random(MODELS["tied"]))
    edit_json(tmp_path / "x" / "config.json", tie_word_embeddings=False)
    assert "lm_head.weight" in open_reader(tmp_path / "x").names()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"rope_theta": NaN}', b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_none(sharded: Path, name: str, content: bytes) -> None:
    (sharded / name).write_bytes(content)
    assert str(sharded / name) in refusal(sharded)


# Files that are missing, cut, renamed, or of something else


def test_an_index_that_names_absent_files(sharded: Path) -> None:
    weight_map = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    last = max(weight_map.values())
    absent = [name for name, file in weight_map.items() if file == last]
    (sharded / last).unlink()
    verb = "are" if len(absent) > 1 else "is"
    message = refusal(sharded)
    assert f"names {len(weight_map)} tensors; {len(absent)} {verb} missing, first {absent[0]} in {last}: " in message


def test_shards_with_each_others_names(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    first.rename(sharded / "aside")
    second.rename(first)
    (sharded / "aside").rename(second)
    message = refusal(sharded)
    assert "into files that do not hold them, first" in message
    assert "renamed or belong to another checkpoint" in message


@pytest.mark.parametrize(
    ("weight_map", "sentence"),
    [
        (ABSENT, "has no weight_map"),
        ({}, "has no weight_map"),
        ({"a": "../x.safetensors"}, "puts a into '../x.safetensors'"),
        ({"a": 1}, "puts a into 1"),
    ],
)
def test_an_index_without_sense(sharded: Path, weight_map: object, sentence: str) -> None:
    edit_json(sharded / "model.safetensors.index.json", weight_map=weight_map)
    assert sentence in refusal(sharded)


def test_a_truncated_file(single: Path) -> None:
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors is truncated" in refusal(single)


def test_something_else_under_the_right_name(single: Path) -> None:
    torch.save({"a": torch.ones(3)}, single / "model.safetensors")
    assert "model.safetensors announces a header of" in refusal(single)


def test_a_folder_with_a_pickle_only(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    assert "pytorch_model.bin is not an archive as PyTorch writes it" in refusal(single)
    torch.save({"a": print}, single / "pytorch_model.bin")
    assert "pytorch_model.bin cannot be read as tensors alone" in refusal(single)
    (single / "pytorch_model.bin").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json: the download" in refusal(single)


def rewritten(path: Path, **changes: Any) -> None:
    held = load_file(path / "model.safetensors")
    held.update({name.replace("__", "."): tensor for name, tensor in changes.items()})
    save_file({name: tensor for name, tensor in held.items() if tensor is not ABSENT}, path / "model.safetensors")


def test_tensors_that_do_not_belong(single: Path) -> None:
    rewritten(single, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(2))
    assert digest(open_reader(single)) == digest(random())  # old checkpoints carry these; they say nothing
    rewritten(single, model__layers__0__self_attn__q_proj__bias=torch.ones(16))
    assert "holds 1 tensor that the model does not have, first model.layers.0.self_attn.q_proj.bias" in refusal(single)


def test_tensors_that_are_missing(single: Path) -> None:
    rewritten(single, model__layers__1__block_sparse_moe__experts__2__w3__weight=ABSENT, model__norm__weight=ABSENT)
    assert "lacks 2 of the model's 35 tensors, first model.layers.1.block_sparse_moe.experts.2.w3" in refusal(single)


def test_types_that_are_not_weights(single: Path) -> None:
    rewritten(single, model__norm__weight=torch.ones(16, dtype=torch.int8))
    assert "model.norm.weight as int8: every tensor must have one floating-point type" in refusal(single)
    rewritten(single, model__norm__weight=torch.ones(16, dtype=torch.float64))
    rewritten(single, model__layers__0__block_sparse_moe__experts__1__w2__weight=torch.ones(16, 10).half())
    assert "experts.w2 as float16, float32" in refusal(single)


def test_nan_in_a_file_stops_the_load(tmp_path: Path) -> None:
    def spoil(name, where, tensor):
        return tensor.fill_(float("nan")) if name.endswith("layers.1.self_attn.k_proj.weight") else tensor

    hf.write(Altered(random(), spoil), tmp_path / "x")
    with pytest.raises(WeightsError, match=r"k_proj\.weight holds NaN in 128 of 128 values"):
        mixtral(open_reader(tmp_path / "x"))


# Writing


def assert_nothing_left(folder: Path, *expected: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)


def test_a_target_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    hf.write(random(), tmp_path / "empty")
    with pytest.raises(WeightsError, match="exists and is not empty"):
        hf.write(random(seed=1), tmp_path / "empty")
    assert digest(open_reader(tmp_path / "empty")) == digest(random())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WeightsError, match="is a file where a folder is to be written"):
        hf.write(random(), tmp_path / "file")
    with pytest.raises(WeightsError, match="cannot be written"):
        hf.write(random(), tmp_path / "file" / "below")
    assert_nothing_left(tmp_path, "empty", "file")


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutOfMemory, match=r"needs 1\.1 MB, its disk has 1\.0 kB free"):
        hf.write(random(), tmp_path / "new" / "deep" / "x")
    assert_nothing_left(tmp_path)


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    kind, message = on_a_full_disk(20_000, hf.write, random(), tmp_path / "new" / "x")
    assert kind == "OutOfMemory"
    assert "x could not be written whole (File too large) and nothing of it was kept" in message
    assert_nothing_left(tmp_path)


def test_a_reader_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(name, where, tensor):
        if name == "model.norm.weight":
            raise KeyboardInterrupt
        return tensor

    with pytest.raises(KeyboardInterrupt):
        hf.write(Altered(random(), fail), tmp_path / "x")
    assert_nothing_left(tmp_path)


def test_values_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    def enlarge(name, where, tensor):
        return tensor.fill_(1e6) if name == "model.norm.weight" else tensor

    with pytest.raises(WeightsError, match=r"model\.norm\.weight has 16 of 16 values that float16 cannot hold"):
        convert(Altered(random(), enlarge), tmp_path / "x", to="hf", dtype=torch.float16)
    assert_nothing_left(tmp_path)


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    hf.write(
        random(),
        tmp_path / "a",
        tokenizer=lambda folder: (folder / "tokenizer.json").write_text("{}") and None,
    )
    hf.write(random(), tmp_path / "b", tokenizer=tmp_path / "a")
    convert(tmp_path / "b", tmp_path / "c", to="hf")
    assert (tmp_path / "c" / "tokenizer.json").read_text() == "{}"
    convert(tmp_path / "b", tmp_path / "d", to="hf", tokenizer=None)
    assert not (tmp_path / "d" / "tokenizer.json").exists()
    (tmp_path / "none").mkdir()
    with pytest.raises(WeightsError, match="none holds no tokenizer file"):
        hf.write(random(), tmp_path / "e", tokenizer=tmp_path / "none")
    assert_nothing_left(tmp_path, "a", "b", "c", "d", "none")


def test_detection_does_not_ask_whether_the_folder_is_sound(sharded: Path) -> None:
    for file in sharded.glob("*.safetensors"):
        file.unlink()
    assert detect(sharded) == "hf"
    assert "are missing, first" in refusal(sharded)
