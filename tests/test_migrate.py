"""MindFormers' Mixtral YAMLs become recipes: each setting is named once, and each key of the recipe is as it should be.

`migrations/` holds keys and values of the YAMLs of r1.7.0 and of older spellings.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ostro.cli import main
from ostro.config import load_config
from ostro.errors import ConfigError
from ostro.migrate import translate

FILES = Path(__file__).parent / "migrations"
SHIPPED = ("pretrain", "pretrain-32k", "finetune", "predict")
NAMES = sorted(path.stem for path in FILES.glob("*.yaml"))

MODEL = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.01,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PRETRAIN: dict[str, dict[str, Any]] = {
    "model": MODEL,
    "weights": {"path": None, "strategy": None},
    "data": {
        "path": ["/../wikitext-2/wiki4096.mindrecord"],
        "seq_length": 4096,
        "pad_token_id": 0,
        "shuffle": True,
    },
    "train": {
        "epochs": 10,
        "global_batch_sequences": 32,
        "micro_batch_sequences": 1,
        "dtype": "fp16",
        "loss_scale": 65535,
        "loss_scale_window": 1000,
        "seed": 0,
        "recompute": "full",
    },
    "optim": {
        "name": "adamw",
        "learning_rate": 1e-5,
        "min_learning_rate": 1e-6,
        "schedule": "cosine_mindformers",
        "total_steps": -1,
        "warmup_ratio": 0.03,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
    },
    "moe": {"capacity_factor": 1.1, "drop": "token", "capacity_group": "rank", "router_aux_loss_coef": 0.025},
    "parallel": {
        "fsdp": 2,
        "tp": 4,
        "ep": 2,
        "etp": 4,
        "pp": 2,
        "micro_batch_num": 16,
        "vocab_emb_dp": True,
        "gradient_aggregation_group": 4,
        "gradient_accumulation_shard": False,
    },
    "checkpoint": {"every": 1000, "async": False},
    "run": {"dir": "runs/pretrain"},
}


def changed(base: dict[str, dict[str, Any]], changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a recipe with dotted keys set; None as a value of `…` removes them."""
    recipe = {section: dict(fields) for section, fields in base.items()}
    for name, value in changes.items():
        section, _, key = name.partition(".")
        if value is ...:
            del recipe[section][key]
        else:
            recipe[section][key] = value
    return recipe


README_LAYOUT = {
    "parallel.fsdp": 8,
    "parallel.tp": 1,
    "parallel.ep": 8,
    "parallel.etp": ...,
    "train.global_batch_sequences": 128,
}
LONG = {
    "data.path": [],
    "data.seq_length": 32768,
    "train.dtype": "bf16",
    "train.loss_scale": ...,
    "train.loss_scale_window": ...,
    "train.global_batch_sequences": 16,
    "optim.betas": [0.9, 0.999],
    "optim.min_learning_rate": 0.0,
    "parallel.fsdp": ...,
    "parallel.dp": 1,
    "parallel.tp": 8,
    "parallel.etp": 8,
    "parallel.ep": 1,
    "parallel.vocab_emb_dp": False,
    "run.dir": "runs/pretrain-32k",
}
FINETUNE = {
    "data.path": ["/.../alpaca-fastchat4096.mindrecord"],
    "train.epochs": 3,
    "optim.learning_rate": 5e-6,
    "run.dir": "runs/finetune",
    "checkpoint.async": ...,
}
RECIPES = {
    "pretrain": PRETRAIN,
    "pretrain-32k": changed(PRETRAIN, LONG),
    "finetune": changed(PRETRAIN, FINETUNE),
    "predict": {"model": MODEL, "weights": {"path": None, "strategy": None}},
    "r1.1-pretrain": changed(
        PRETRAIN,
        README_LAYOUT
        | {
            "optim.name": "fp32_state_adam_weight_decay",
            "optim.betas": [0.9, 0.999],
            "optim.learning_rate": 1e-4,
            "optim.min_learning_rate": 1e-5,
            "run.dir": "runs/r1.1-pretrain",
        },
    ),
    "r1.1-predict": {"model": MODEL, "weights": {"path": None, "strategy": None}},
}


def settings(value: Any, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield each setting of a YAML; a task's data set that is an alias is one."""
    seen = set() if seen is None else seen
    if isinstance(value, dict) and id(value) in seen and name.endswith(".dataset_config"):
        yield name, value
    elif isinstance(value, dict) and value:
        seen.add(id(value))
        for key, item in value.items():
            yield from settings(item, f"{name}.{key}".lstrip("."), seen)
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from settings(item, f"{name}[{i}]", seen)
    else:
        yield name, value


@functools.cache
def translated(name: str) -> str:
    """Return the recipe of a YAML of `migrations`."""
    return translate(FILES / f"{name}.yaml")


def times_named(name: str, recipe: str) -> int:
    return len(re.findall(rf"(?<![\w.\]]){re.escape(name)} = ", recipe))


def written(tmp_path: Path, name: str, **changes: Any) -> Path:
    """Write a YAML of `migrations` with dotted keys changed; `__` stands for a dot, `...` removes."""
    fields = yaml.safe_load((FILES / f"{name}.yaml").read_text("utf-8"))
    for key, value in changes.items():
        *sections, last = key.split("__")
        inner = fields
        for section in sections:
            inner = inner.setdefault(section, {})
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(fields, sort_keys=False), "utf-8")
    return file


def migrated(tmp_path: Path, name: str = "pretrain", **changes: Any) -> dict[str, Any]:
    return yaml.safe_load(translate(written(tmp_path, name, **changes)))


def refusal(tmp_path: Path, name: str = "pretrain", **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        translate(written(tmp_path, name, **changes))
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_each_setting_is_named_once(name: str):
    found = list(settings(yaml.safe_load((FILES / f"{name}.yaml").read_text("utf-8"))))
    assert len(found) > 120
    recipe = translated(name)
    assert {setting: times_named(setting, recipe) for setting, _ in found} == {setting: 1 for setting, _ in found}
    assert f"Each of its {len(found)} settings" in recipe


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_key_by_key(name: str):
    recipe = yaml.safe_load(translated(name))
    for section in RECIPES[name].keys() | recipe.keys():
        assert recipe.get(section) == RECIPES[name].get(section), section


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_a_recipe(name: str, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(translated(name), "utf-8")
    config = load_config(tmp_path / "mine.yaml")
    assert config.model.num_local_experts == 8
    assert main(["plan", str(tmp_path / "mine.yaml")]) == 0


@pytest.mark.parametrize(
    ("name", "setting", "said"),
    [
        ("pretrain", "moe_config.aux_loss_factor", "never added to the loss"),
        ("pretrain", "moe_config.topk_bias_update_rate", "Has no effect in MindFormers"),
        ("pretrain", "train_dataset.batch_size", "Has no effect in MindFormers"),
        ("pretrain", "parallel.gradients_mean", "Means something else here"),
        ("pretrain", "model.model_config.softmax_compute_type", "Means something else here"),
        ("pretrain", "output_dir", "Means something else here"),
        ("pretrain", "context.max_device_memory", "Has no counterpart here"),
        ("pretrain", "recompute_config.mp_comm_recompute", "Has no counterpart here"),
        ("pretrain", "moe_config.router_dense_type", "Needs no setting here"),
        ("pretrain", "parallel_config.use_seq_parallel", "Needs no setting here"),
        ("pretrain-32k", "runner_wrapper.scale_sense.loss_scale_value", "Needs no setting here"),
        ("pretrain-32k", "model.model_config.param_init_type", "Means something else here"),
        ("predict", "optimizer.type", "Has no effect in MindFormers"),
        ("predict", "parallel_config.model_parallel", "Has no counterpart here"),
        ("predict", "moe_config.capacity_factor", "Needs no setting here"),
        ("predict", "model.model_config.num_blocks", "Has no counterpart here"),
        ("predict", "model.model_config.max_decode_length", "ostro generate MODEL"),
        ("r1.1-pretrain", "optimizer.learning_rate", "Has no effect in MindFormers"),
        ("r1.2-pretrain-32k", "parallel_config.use_seq_parallel", "Means something else here"),
        ("r1.1-predict", "callbacks[2].type", "Has no effect in MindFormers"),
    ],
)
def test_what_is_said_of_a_setting(name: str, setting: str, said: str):
    recipe = translated(name)
    before, _, after = recipe.partition(f"{setting} = ")
    heading = [line for line in before.splitlines() if re.match(r"# \S", line)][-1]
    assert said in heading or said in after.splitlines()[0]


def test_the_command_of_predict():
    recipe = translated("predict")
    assert (
        'ostro generate MODEL "PROMPT" --dtype fp16 --repetition-penalty 1.0 --max-new-tokens 256 --temperature 0\n'
    ) in recipe


def test_sampling_becomes_options(tmp_path: Path):
    file = written(tmp_path, "predict", model__model_config__do_sample=True, load_checkpoint="my folder")
    recipe = translate(file)
    assert "ostro generate 'my folder' \"PROMPT\"" in recipe
    assert "--top-k 3 --top-p 1.0 --temperature 1.0" in recipe


def test_an_evaluation_is_a_command(tmp_path: Path):
    recipe = translate(written(tmp_path, "pretrain", run_mode="eval", eval_dataset__data_loader__dataset_dir="held"))
    assert "# ostro evaluate MODEL held --seq-length 4096 --dtype fp16\n" in recipe
    assert yaml.safe_load(recipe).keys() == {"model", "weights"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"moe_config__capacity_factor": 0}, {"moe.capacity_factor": None, "moe.drop": ..., "moe.capacity_group": ...}),
        ({"moe_config__use_gmm": True}, {"moe.capacity_factor": None, "moe.drop": ..., "moe.capacity_group": ...}),
        ({"moe_config__enable_sdrop": False}, {"moe.drop": "choice"}),
        ({"parallel_config__use_seq_parallel": False}, {"moe.capacity_multiple": 4}),
        (
            {"parallel__enable_parallel_optimizer": False},
            {"parallel.fsdp": 2, "parallel.ep": 2},
        ),
        (
            {"parallel__enable_parallel_optimizer": False, "parallel_config__expert_parallel": 1},
            {"parallel.fsdp": ..., "parallel.dp": 2, "parallel.ep": 1},
        ),
        (
            {"parallel_config__data_parallel": 4}
            | {"parallel__parallel_optimizer_config__optimizer_weight_shard_size": 2},
            {"parallel.fsdp": 2, "parallel.dp": 2, "train.global_batch_sequences": 64},
        ),
        ({"runner_config__batch_size": 2}, {"train.micro_batch_sequences": 2, "train.global_batch_sequences": 64}),
        ({"micro_batch_interleave_num": 2}, {"parallel.micro_batch_num": 32, "train.global_batch_sequences": 64}),
        (
            {"parallel_config__pipeline_stage": 1, "runner_config__gradient_accumulation_steps": 3},
            {"parallel.pp": 1, "parallel.micro_batch_num": ..., "train.global_batch_sequences": 6},
        ),
        ({"recompute_config__recompute": False}, {"train.recompute": "none"}),
        (
            {"recompute_config__recompute": False, "recompute_config__select_recompute": True},
            {"train.recompute": "selective"},
        ),
        ({"model__model_config__offset": [1, -1]}, {"parallel.stage_layers": [17, 15]}),
        ({"lr_schedule__total_steps": 500, "lr_schedule__warmup_ratio": ..., "lr_schedule__warmup_steps": 10},
         {"optim.total_steps": 500, "optim.warmup_ratio": 0.02}),
        ({"lr_schedule__learning_rate": "1e-4"}, {"optim.learning_rate": 1e-4}),
        ({"lr_schedule": {}, "optimizer__learning_rate": 2e-5},
         {"optim.learning_rate": 2e-5, "optim.schedule": "constant", "optim.total_steps": ...,
          "optim.warmup_ratio": 0.0, "optim.min_learning_rate": 0.0}),
        ({"optimizer__weight_decay": 0.1}, {"optim.weight_decay": 0.1}),
        ({"runner_wrapper__use_clip_grad": False}, {"optim.max_grad_norm": 1e9}),
        ({"do_eval": True, "eval_step_interval": 50, "eval_dataset__data_loader__dataset_dir": "held"},
         {"train.eval_every": 50, "data.eval_path": ["held"]}),
        ({"profile": True}, {"profile.steps": "5..10"}),
        ({"processor__tokenizer__vocab_file": "tok/tokenizer.model"}, {"data.tokenizer": "tok/tokenizer.model"}),
        ({"load_checkpoint": "out/checkpoint", "src_strategy_path_or_dir": "out/strategy"},
         {"weights.path": "out/checkpoint", "weights.strategy": "out/strategy"}),
        ({"model__model_config__checkpoint_name_or_path": "a.ckpt"}, {"weights.path": "a.ckpt"}),
        ({"train_dataset__repeat": 2}, {"train.epochs": 20}),
        ({"model__model_config__intermediate_size": ...}, {"model.intermediate_size": 11008}),
        ({"model__model_config__intermediate_size": ..., "model__model_config__ffn_dim_multiplier": 1.3},
         {"model.intermediate_size": 14336}),
    ],
)  # fmt: skip
def test_settings_that_are_not_shipped(changes: dict[str, Any], expected: dict[str, Any], tmp_path: Path):
    recipe = migrated(tmp_path, **changes)
    before = {section: dict(fields) for section, fields in PRETRAIN.items()}
    if any(name.startswith("profile.") for name in expected):
        before["profile"] = {}
    assert recipe == changed(before, expected)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"moe_config__capacity_factr": 1.1}, ["moe_config.capacity_factr", "'moe_config.capacity_factor'", "line"]),
        ({"optimizer__type": "AdamWW"}, ["optimizer.type='AdamWW'", "'AdamW'"]),
        ({"lr_schedule__type": "PolynomialWithWarmUpLR"}, ["lr_schedule.type", "CosineWithWarmUpLR"]),
        ({"moe_config__routing_policy": "TopkRouterV1"}, ["moe_config.routing_policy", "TopkRouterV2"]),
        ({"moe_config__shared_expert_num": 1}, ["moe_config.shared_expert_num=1"]),
        ({"moe_config__expert_num": 1}, ["no Mixtral"]),
        ({"model": {}}, ["no YAML of MindFormers"]),
        ({"model__model_config__extend_method": "NTK"}, ["extend_method='NTK'", "not stretched"]),
        ({"model__model_config__num_layers": "many"}, ["num_layers='many'", "a number"]),
        ({"model__model_config__num_layers": 32.5}, ["num_layers=32.5", "whole number"]),
        ({"moe_config__enable_sdrop": "yes"}, ["enable_sdrop='yes'", "True or False"]),
        ({"lr_schedule__lr_end": 1.0}, ["optim.min_learning_rate=1.0"]),
        ({"parallel_config__model_parallel": 3}, ["tp=3", "num_key_value_heads"]),
        ({"callbacks": [{"type": "LossMonitr"}]}, ["callbacks[0].type='LossMonitr'", "MFLossMonitor"]),
        ({"train_dataset_task__dataset_config": {"drop_remainder": False}}, ["drop_remainder", "disagree"]),
        ({"base_config": "a.yaml"}, ["base_config='a.yaml'", "not understood"]),
        ({"lr_schedule__warmup_ratio": ..., "lr_schedule__warmup_steps": 10}, ["warmup_steps=10", "warmup_ratio"]),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changes: dict[str, Any], parts: list[str], tmp_path: Path):
    told = refusal(tmp_path, **changes)
    assert not [part for part in parts if part not in told], told


def test_a_data_set_written_out_twice_is_named_twice(tmp_path: Path):
    fields = yaml.safe_load((FILES / "pretrain.yaml").read_text("utf-8"))
    fields["train_dataset_task"]["dataset_config"] = {**fields["train_dataset"], "data_loader": {"shuffle": True}}
    (tmp_path / "twice.yaml").write_text(yaml.safe_dump(fields), "utf-8")
    recipe = translate(tmp_path / "twice.yaml")
    for name in ("train_dataset.data_loader.shuffle", "train_dataset_task.dataset_config.data_loader.shuffle"):
        assert times_named(name, recipe) == 1


def test_values_cannot_leave_their_comment(tmp_path: Path):
    name = "a\nevil: 1\u2028b: 2"
    recipe = translate(written(tmp_path, "pretrain", trainer__model_name=name, load_checkpoint="x # y"))
    assert yaml.safe_load(recipe)["weights"]["path"] == "x # y"
    assert "evil" not in yaml.safe_load(recipe)
    command = translate(written(tmp_path, "predict", load_checkpoint=name))
    assert yaml.safe_load(command)["weights"]["path"] == name
    assert "evil" not in yaml.safe_load(command)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: &a {b: *a}", "holds itself"),
        ("seed: 0\nseed: 1", "line 2: seed stands there twice, first on mine.yaml line 1"),
        ("callbacks: [{type: A, type: B}]", "callbacks[0].type stands there twice"),
        ("- a", "holds a list"),
    ],
)
def test_what_is_no_settings_is_told(text: str, told: str, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=re.escape(told)):
        translate(tmp_path / "mine.yaml")


def test_the_verb_prints_writes_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, target = str(FILES / "finetune.yaml"), tmp_path / "mine.yaml"
    assert main(["migrate", source]) == 0
    printed = capsys.readouterr().out
    assert main(["migrate", source, str(target)]) == 0
    assert target.read_text("utf-8") == printed
    assert f"wrote {target}; next: ostro plan {target}" in capsys.readouterr().out.replace("\n", "")
    assert main(["migrate", source, str(target)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["migrate", str(written(tmp_path, "pretrain", sead=1))]) == 2
    assert "Did you mean 'seed'?" in capsys.readouterr().err
