"""Recipes, overrides, presets, and what is said about a setting that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ostro import config
from ostro.config import load_config, parse_overrides
from ostro.errors import ConfigError, LayoutError
from ostro.model import layout
from ostro.model.settings import ModelConfig


def recipe(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("name", config.recipe_names())
def test_shipped_recipes_load_and_give_themselves_back(name: str, tmp_path: Path) -> None:
    loaded = load_config(name)
    assert load_config(recipe(tmp_path, loaded.as_yaml())) == loaded


def test_presets_have_the_published_sizes() -> None:
    # 46.7 B parameters, 12.9 B of them active (arXiv 2401.04088 §1); the embedding is read, not multiplied.
    small, large = config.preset("mixtral-8x7b"), config.preset("mixtral-8x22b")
    assert layout.num_parameters(small) == 46_702_792_704
    assert layout.num_active_parameters(small) + small.vocab_size * small.hidden_size == 12_879_925_248
    assert layout.num_parameters(large) == 140_620_634_112
    assert config.preset("mixtral-8x7b-instruct") == small
    instruct = config.preset("mixtral-8x22b-instruct")
    assert instruct == ModelConfig(**{**large.as_fields(), "vocab_size": 32768})
    assert (large.hidden_size, large.num_hidden_layers, large.intermediate_size) == (6144, 56, 16384)
    assert (large.num_attention_heads, large.num_key_value_heads) == (48, 8)
    assert large.max_position_embeddings == 65536


def test_defaults_are_mixtral_8x7b(tmp_path: Path) -> None:
    loaded = load_config(recipe(tmp_path, ""))
    assert loaded.model == config.preset("mixtral-8x7b")
    assert loaded.train.dtype == "bf16"
    assert loaded.optim.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    "arguments",
    [
        ["optim.learning_rate=2e-3", "model.hidden_size=64", "train.seed=7"],
        ["--optim.learning_rate", "2e-3", "--model.hidden_size", "64", "--train.seed", "7"],
        ["--optim.learning_rate=2e-3", "--model.hidden_size=64", "--train.seed=7"],
    ],
)
def test_overrides_of_all_three_spellings(arguments: list[str]) -> None:
    loaded = load_config("tiny", arguments)
    assert loaded.optim.learning_rate == 2e-3
    assert loaded.model.hidden_size == 64
    assert loaded.model.head_dim == 16  # follows hidden_size
    assert loaded.model.num_local_experts == 8  # the rest of the preset stays
    assert loaded.train.seed == 7


def test_overrides_read_values_as_yaml() -> None:
    pairs = parse_overrides(["a.b=[1, 2]", "c=null", "d=", "e=x=y", "f=true"])
    assert pairs == [("a.b", [1, 2]), ("c", None), ("d", None), ("e", "x=y"), ("f", True)]


def test_numbers_that_yaml_takes_for_text() -> None:
    assert load_config("tiny", ["model.rope_theta=1e6"]).model.rope_theta == 1e6


def test_one_path_or_several() -> None:
    assert load_config("tiny", ["data.path=a.txt"]).data.path == ("a.txt",)
    assert load_config("tiny", ["data.path=[a.txt, b.txt]"]).data.path == ("a.txt", "b.txt")


def test_a_folder_with_config_json_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "mixtral", "vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4,'
        ' "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}'
    )
    model = load_config("tiny", [f"model={tmp_path}"]).model
    assert (model.vocab_size, model.rope_theta) == (99, 5000.0)


REFUSED = {
    "trian.steps=3": r"trian is not a key of a recipe.* Did you mean 'train'\?",
    "train.stesp=3": r"train.stesp is not a key of section train.* Did you mean 'steps'\?",
    "model.hiden_size=3": r"model.hiden_size is not a setting of the model\. Did you mean 'hidden_size'\?",
    "model=mixtral-8x7": r"'mixtral-8x7' is neither a preset.*Did you mean 'mixtral-8x7b'\?",
    "model.num_attention_heads=5": r"num_attention_heads=5 does not divide hidden_size=96",
    "model.num_key_value_heads=3": r"num_key_value_heads=3 does not divide num_attention_heads=4",
    "model.num_experts_per_tok=9": r"num_experts_per_tok=9 is more than num_local_experts=8",
    "model.sliding_window=0": r"sliding_window=0 must be a whole number of at least 1",
    "model.hidden_size=big": r"model.hidden_size='big' must be a whole number",
    "model.rope_theta=big": r"model.rope_theta='big' must be a number",
    "model.bos_token_id=40000": r"bos_token_id=40000 lies outside vocab_size=32000",
    "train.steps=many": r"train.steps='many' is refused: input should be a valid integer",
    "optim.schedule=cosin": r"optim.schedule='cosin' is refused: input should be 'cosine'",
    "train.micro_batch_sequences=0": r"micro_batch_sequences=0 is refused: input should be greater than or equal to 1",
    "parallel.tp=3": r"tp=3 does not divide num_key_value_heads=2: use tp 1, 2",
    "train.recompute=some": r"train.recompute='some' is refused: input should be 'none', 'selective' or 'full'",
    "weights.upcycle=true": r"weights.upcycle=true says what to make of weights.path",
    "optim.learning_rate=1e-5": r"optim.min_learning_rate=0.0012 is above learning_rate=1e-05, so the rate would rise",
    "optim.learning_rate=.inf": r"optim.learning_rate=inf is refused: input should be a finite number",
    "optim.betas=[2, 3]": r"optim.betas=2 is refused: input should be less than 1",
    "model.rms_norm_eps=.nan": r"model.rms_norm_eps=nan must be a number",
    "train.seed=99999999999999999999": r"train.seed=99999999999999999999 is refused",
    "data.seq_length=8192": r"data.seq_length=8192 is more than the model's max_position_embeddings=4096",
    "parallel.schedule=zb": r"parallel.schedule='zb' is refused: input should be '1f1b', 'interleaved' or",
    "profile.steps=5": r"profile.steps=5 is refused: must look like 5..10",
    "data.path.x=1": r"data.path.x cannot be set: data.path is \[\], not a section",
    "train": r"'train' is not an override; write section.key=value",
}


def test_hf_balance_is_refused_with_accumulation() -> None:
    load_config("tiny", ["moe.balance=hf"])
    with pytest.raises(ConfigError, match=r"moe.balance=hf does not add up over micro-batches"):
        load_config("tiny", ["moe.balance=hf", "train.micro_batch_sequences=1"])


def test_keys_of_later_versions_are_accepted_at_what_is_true_now(tmp_path: Path) -> None:
    text = """
model: tiny
weights: {path: null, strategy: null, upcycle: false}
data: {seq_length: 64, packing: concat, tokenizer: v1, pad_token_id: -1, eval_path: null}
train: {steps: -1, master_dtype: fp32, recompute: none, compile: false}
moe: {router: softmax, capacity_factor: null, drop: token, capacity_group: sequence, balance: sequence}
lora: null
parallel: {dp: 1, fsdp: 1, tp: 1, ep: 1, pp: 1, cp: 1, micro_batch_num: 1, schedule: 1f1b}
checkpoint: {every: 1000, keep: 5, async: false, resume: auto}
"""
    assert load_config(recipe(tmp_path, text)).data.seq_length == 64
    with pytest.raises(ConfigError, match="has the key 1; the keys of a recipe are names"):
        load_config(recipe(tmp_path, "1: 2\n"))


@pytest.mark.parametrize("override", REFUSED)
def test_refusals_say_what_is_wrong(override: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[override]):
        load_config("tiny", [override])


def test_a_wrong_key_in_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = recipe(tmp_path, "model: tiny\ntrain:\n  steps: 3\n  sede: 1\n")
    with pytest.raises(ConfigError, match=r"^recipe.yaml line 4: train.sede is not a key .* Did you mean 'seed'\?$"):
        load_config(file)
    file = recipe(tmp_path, "train: {steps: 3}\nmodel:\n  preset: tiny\n  hiden_size: 64\n")
    with pytest.raises(ConfigError, match=r"^recipe.yaml line 4: model.hiden_size "):
        load_config(file)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: [", r"recipe.yaml line 1 is not YAML|recipe.yaml line 2 is not YAML"),
        ("- 1\n- 2\n", r"holds a list; a recipe is a mapping"),
        ("model: 3\n", r"model=3 must be a preset"),
        ("train: 3\n", r"train=3 is refused"),
    ],
)
def test_files_that_are_no_recipe(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_config(recipe(tmp_path, text))


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'tinny' is neither a file nor a shipped recipe.*Did you mean 'tiny'\?"):
        load_config("tinny")


def test_the_config_is_frozen_and_errors_form_one_tree() -> None:
    loaded = load_config("tiny")
    with pytest.raises(ValueError, match="frozen"):
        loaded.train.steps = 3  # type: ignore[misc]
    assert issubclass(LayoutError, ConfigError)


def test_every_key_of_a_recipe_survives_yaml() -> None:
    fields = yaml.safe_load(load_config("tiny").as_yaml())
    assert set(fields) == set(config.Config.model_fields)
    assert "async" in fields["checkpoint"]
