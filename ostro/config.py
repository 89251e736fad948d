"""Every setting of a run: frozen pydantic models, read from YAML and dotted overrides.

A recipe is a YAML file with the sections below; everything has a default. `a.b=c`, `--a.b c` and `--a.b=c` override
it. The model's settings have Hugging Face's names. A key nobody knows is refused with the nearest name and its line.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ostro.degrees import Degrees, num_micro_batches, stage_layers
from ostro.errors import ConfigError, nearest
from ostro.model.settings import Balance, CapacityGroup, Drop, Kernels, ModelConfig, MoeConfig, Router
from ostro.overrides import parse_overrides, read_yaml, set_key

RECIPES = Path(__file__).parent / "recipes"
PRESETS = RECIPES / "models"


class Section(BaseModel):
    """A section of the config: immutable, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


class Weights(Section):
    """Where training starts from: `path` is a checkpoint of any format or a run; null draws random weights.

    `strategy` are the strategy files of MindSpore's rank folders, where they do not lie beside them.
    """

    path: str | None = None
    strategy: str | None = None
    upcycle: Literal[False] = False


class Data(Section):
    """What is trained on: prepared token shards, or raw data that is prepared first and cached.

    `path@0.3` gives a source a share of the tokens (or, `weights_by: epochs`, so many times an epoch); then each has
    one; all sources have such a share, or none has. `packing` auto is `bestfit` where only some tokens are learned, as
    in conversations, `records` for MindRecord's, else `concat`; `records` trains MindFormers' records as it does.
    `overlong` says what becomes of a document that is longer than a row (of `concat` none is). `pad_token_id` is the
    id after which nothing is learned (−1: none).
    """

    path: tuple[str, ...] = ()
    kind: str = "auto"
    documents: Literal["file", "line", "blank"] = "file"
    template: str = "auto"
    dedup: bool = False
    seq_length: int = Field(default=4096, ge=2)
    packing: Literal["auto", "concat", "bestfit", "none", "records"] = "auto"
    overlong: Literal["split", "drop", "truncate", "error"] = "split"
    weights_by: Literal["tokens", "epochs"] = "tokens"
    tokenizer: str = "v1"
    eval_path: tuple[str, ...] = ()
    pad_token_id: int = Field(default=-1, ge=-1)
    shuffle: bool = True

    @field_validator("path", "eval_path", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if value is None:
            return ()
        return (value,) if isinstance(value, str) else value


class Train(Section):
    """How long and how: `steps` −1 means `epochs` over the data. Batches are counted in sequences.

    `exact` computes as the oracles of the tests do, expert by expert and from whole logits: slower, and in fp32 the
    same bits as these oracles give.
    """

    steps: int = Field(default=-1, ge=-1)
    epochs: float = Field(default=1.0, gt=0)
    global_batch_sequences: int = Field(default=32, ge=1)
    micro_batch_sequences: int = Field(default=1, ge=1)
    dtype: Literal["auto", "bf16", "fp32"] = "bf16"
    master_dtype: Literal["fp32"] = "fp32"
    seed: int = Field(default=0, ge=0, lt=2**63)
    exact: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    eval_every: int = Field(default=0, ge=0)


class Optim(Section):
    """AdamW and its schedule; weight decay touches matrices only."""

    name: Literal["adamw"] = "adamw"
    learning_rate: float = Field(default=1e-5, ge=0)
    min_learning_rate: float = Field(default=1e-6, ge=0)
    schedule: Literal["cosine", "cosine_mindformers", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _falls(self) -> Optim:
        if self.schedule != "constant" and self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}, so the rate "
                "would rise: lower it too"
            )
        return self


class Moe(Section):
    """The router and how it is trained; rules and units are `model.settings.MoeConfig`'s.

    `router` sigmoid has a selection bias, which only training checkpoints have a place for.
    """

    router: Router = "softmax"
    router_jitter_noise: float = 0.0
    bias_update_rate: float = 0.001
    capacity_factor: float | None = None
    drop: Drop = "token"
    capacity_group: CapacityGroup = "sequence"
    min_capacity: int = 0
    capacity_multiple: int = 1
    balance: Balance = "sequence"
    router_aux_loss_coef: float = 0.02
    z_loss_coef: float = 0.0
    kernels: Kernels = "auto"
    fp8: bool = False

    def settings(self) -> MoeConfig:
        """Return how the model's router is trained; ConfigError for what means nothing."""
        if self.router == "softmax" and self.bias_update_rate != MoeConfig.bias_update_rate:
            raise ConfigError(
                f"moe.bias_update_rate={self.bias_update_rate} means nothing with moe.router=softmax, which has no "
                "selection bias: set moe.router=sigmoid, or leave this out."
            )
        return MoeConfig(**self.model_dump(exclude={"router"}))


class Parallel(Section):
    """Degrees of parallelism (`degrees.Degrees`), whose product is the number of processes, and how they work.

    `tp` comes with sequence parallel. `etp` cuts the experts' inner dim: 1, or the same as tp. `micro_batch_num` is the
    global batch over (dp·fsdp·micro-batch): given for a pipeline, it must be that. `schedule` 1f1b and zero_bubble have
    one stage a rank, interleaved has `virtual_stages`; `stage_layers` says how many layers each stage has (null:
    equally many).
    `vocab_emb_dp` leaves embedding and head uncut by tp; `gradient_aggregation_group` blocks are gathered and reduced
    together; `gradient_accumulation_shard` reduces gradients with every micro-batch instead of once a step.

    MindFormers' words are taken for these: data_parallel (which with its parallel optimizer shards: our fsdp),
    model_parallel (tp and etp), expert_parallel, pipeline_stage, context_parallel, use_seq_parallel.
    """

    dp: int = Field(default=1, ge=1)
    fsdp: int = Field(default=1, ge=1)
    tp: int = Field(default=1, ge=1)
    ep: int = Field(default=1, ge=1)
    etp: int = Field(default=1, ge=1)
    pp: int = Field(default=1, ge=1)
    cp: int = Field(default=1, ge=1)
    micro_batch_num: int | None = Field(default=None, ge=1)
    schedule: Literal["1f1b", "interleaved", "zero_bubble"] = "1f1b"
    virtual_stages: int = Field(default=1, ge=1)
    stage_layers: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    vocab_emb_dp: bool = False
    gradient_aggregation_group: int = Field(default=1, ge=1)
    gradient_accumulation_shard: bool = False

    @model_validator(mode="before")
    @classmethod
    def _mindformers(cls, fields: Any) -> Any:
        return _translated(fields) if isinstance(fields, dict) else fields

    def degrees(self) -> Degrees:
        """Return the degrees alone."""
        return Degrees(
            self.dp, self.fsdp, self.tp, self.ep, self.pp, self.cp, self.etp, vocab_emb_dp=int(self.vocab_emb_dp)
        )


# MindFormers' words for degrees; its tensor parallel cuts the experts too.
_MINDFORMERS = {
    "data_parallel": ("fsdp",),
    "model_parallel": ("tp", "etp"),
    "expert_parallel": ("ep",),
    "pipeline_stage": ("pp",),
    "context_parallel": ("cp",),
}


def _translated(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a parallel section in Ostro's words; ValueError where it says a thing in both, or what would be untrue."""
    ours = {key: value for key, value in fields.items() if key not in _MINDFORMERS}
    for word, names in _MINDFORMERS.items():
        if word in fields:
            twice = [name for name in names if name in ours]
            if twice:
                raise ValueError(f"{word} and {twice[0]} say the same: leave one of them out")
            ours |= dict.fromkeys(names, fields[word])
    sequence = ours.pop("use_seq_parallel", None)
    if sequence is False and ours.get("tp", 1) != 1:
        raise ValueError(
            f"use_seq_parallel=false with tp={ours['tp']}: Ostro's tensor parallel always cuts the sequence between "
            "blocks too, which sends as much and keeps less: leave it out"
        )
    return ours


class Checkpoint(Section):
    """A checkpoint every `every` steps (0: only at the end), the last `keep` kept; `resume` auto goes on from one.

    `async` writes while training goes on, from a copy in host memory.
    """

    every: int = Field(default=1000, ge=0)
    keep: int = Field(default=5, ge=1)
    asynchronous: bool = Field(default=True, alias="async")
    resume: Literal["auto", "must", "never"] = "auto"


class Run(Section):
    """Where a run writes, and how often it prints a line."""

    dir: str = "runs/run"
    log_every: int = Field(default=1, ge=1)


class Profile(Section):
    """`steps: 5..10` profiles those steps: a trace and a table of the slowest operations in the run directory."""

    steps: str | None = None

    @field_validator("steps", mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        if value is not None:
            first, dots, last = str(value).partition("..")
            if not (dots and first.isdigit() and last.isdigit() and int(first) <= int(last)):
                raise ValueError("must look like 5..10")
        return value

    def range(self) -> tuple[int, int] | None:
        """Return the first and last step to profile, or None."""
        if self.steps is None:
            return None
        first, last = self.steps.split("..")
        return int(first), int(last)


class Config(Section):
    """A whole run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)

    model: ModelConfig = Field(default_factory=lambda: preset("mixtral-8x7b"))
    weights: Weights = Weights()
    data: Data = Data()
    train: Train = Train()
    optim: Optim = Optim()
    moe: Moe = Moe()
    lora: None = None
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    run: Run = Run()
    profile: Profile = Profile()

    @model_validator(mode="after")
    def _agree(self) -> Config:
        train = self.train
        if self.model.router not in ("softmax", self.moe.router):
            raise ValueError(
                f"model.router={self.model.router} and moe.router={self.moe.router} disagree: set moe.router"
            )
        if self.model.router != self.moe.router:
            object.__setattr__(self, "model", dataclasses.replace(self.model, router=self.moe.router))
        self.moe.settings()
        if train.exact and (self.moe.fp8 or self.moe.kernels == "triton"):
            raise ValueError(
                "train.exact computes without moe.kernels and moe.fp8, so asking for them means nothing: leave them out"
            )
        self._require_layout()
        if self.moe.balance == "hf" and train.micro_batch_sequences < train.global_batch_sequences:
            raise ValueError(
                "moe.balance=hf does not add up over micro-batches: set train.micro_batch_sequences="
                f"{train.global_batch_sequences}, or balance per sequence"
            )
        if self.data.seq_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.seq_length={self.data.seq_length} is more than the model's "
                f"max_position_embeddings={self.model.max_position_embeddings}: lower the one or raise the other"
            )
        return self

    def _require_layout(self) -> None:
        """Refuse, with LayoutError or ValueError, what the layout cannot do or would silently not mean."""
        parallel, train, degrees = self.parallel, self.train, self.parallel.degrees()
        degrees.check(self.model, for_run=True)
        num_stages = parallel.pp * parallel.virtual_stages
        stage_layers(self.model.num_hidden_layers, num_stages, parallel.stage_layers)
        batch, micro = train.global_batch_sequences, train.micro_batch_sequences
        count = num_micro_batches(degrees, batch, micro, parallel.micro_batch_num)
        if parallel.pp == 1 and (parallel.schedule != "1f1b" or parallel.virtual_stages > 1 or parallel.stage_layers):
            raise ValueError(
                "parallel.schedule, virtual_stages and stage_layers mean nothing with pp=1: leave them out"
            )
        if (parallel.virtual_stages > 1) != (parallel.schedule == "interleaved"):
            raise ValueError(
                f"parallel.virtual_stages={parallel.virtual_stages} and schedule={parallel.schedule}: interleaved is "
                "what has 2 stages a rank or more; change one of them"
            )
        if parallel.schedule == "interleaved" and count % parallel.pp:
            more = -(-count // parallel.pp) * parallel.pp * batch // count
            raise ValueError(
                f"parallel.schedule=interleaved takes micro-batches pp={parallel.pp} at a time and there are {count}: "
                f"use a multiple (train.global_batch_sequences={more}), or 1f1b"
            )
        if train.exact and degrees.tp * degrees.cp * degrees.ep > 1:
            raise ValueError("train.exact is the path of one process: set tp, cp and ep to 1, or exact to false")
        if train.exact and parallel.schedule == "zero_bubble":
            raise ValueError("train.exact cannot split backward passes as zero_bubble does: take another schedule")
        if self.moe.balance == "hf" and degrees.num_ranks > 1:
            raise ValueError("moe.balance=hf is a formula over one process's layers and tokens: balance per sequence")
        if train.compile and parallel.schedule == "zero_bubble":
            raise ValueError("train.compile cannot split backward passes as zero_bubble does: take another schedule")

    def as_yaml(self) -> str:
        """Return the config as a recipe that gives it back."""
        fields = self.model_dump(mode="json", by_alias=True)
        fields["model"] = self.model.as_fields()
        fields["model"].pop("router", None)  # which section moe says
        return yaml.safe_dump(fields, sort_keys=False)


# What a key can become in a later version; asking for it now is answered with what is true now.
_NOT_YET = {
    "weights.upcycle": "upcycling a dense model is not there yet",
    "train.dtype": "this version computes in bf16 or fp32",
    "train.master_dtype": "this version keeps fp32 master weights",
    "lora": "LoRA is not there yet",
}


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.glob("*.yaml"))


def preset_names() -> list[str]:
    """Return the names of the shipped model presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset(name: str) -> ModelConfig:
    """Return a shipped model preset; an unknown name raises ConfigError with the nearest."""
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"model {name!r} is neither a preset nor a folder with config.json; presets: "
            f"{', '.join(preset_names())}.{nearest(name, preset_names())}"
        )
    return ModelConfig.from_fields(yaml.safe_load(path.read_text(encoding="utf-8")))


def recipe_path(name: str | Path) -> Path:
    """Return the file of a shipped recipe or of a YAML path; neither raises ConfigError with the nearest name."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = RECIPES / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    raise ConfigError(
        f"{str(name)!r} is neither a file nor a shipped recipe; recipes: {', '.join(recipe_names())}."
        f"{nearest(str(name), recipe_names())}"
    )


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe (a shipped name or a YAML file), apply overrides, and return the config; or raise ConfigError."""
    path = recipe_path(name)
    fields, lines = read_yaml(path)
    for key, value in parse_overrides(overrides):
        set_key(fields, key, value)
        lines[key] = "the command line"
    return _build(fields, lines)


def _build(fields: dict[str, Any], lines: Mapping[str, str]) -> Config:
    fields = dict(fields)
    where = {key: f"{line}: " for key, line in lines.items() if line != "the command line"}
    try:
        if "model" in fields:
            fields["model"] = model_config(fields["model"])
    except ConfigError as error:
        key = next((k for k in where if k.startswith("model.") and f"{k} " in str(error)), "model")
        raise ConfigError(f"{where.get(key, '')}{error}") from None
    try:
        return Config(**fields)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        raise ConfigError(where.get(key, "") + _sentence(key, first)) from None


def _sentence(key: str, problem: Any) -> str:
    for name, fact in _NOT_YET.items():
        if key == name or key.startswith(f"{name}."):
            return f"{key}={problem['input']!r} cannot be had: {fact}."
    if problem["type"] == "extra_forbidden":
        known = _known(key)
        section = key.rpartition(".")[0]
        place = f"section {section}" if section else "a recipe"
        return f"{key} is not a key of {place}; known: {', '.join(known)}.{nearest(key.rpartition('.')[2], known)}"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], dict) and problem["type"] == "value_error":  # of the section as a whole
        return f"{key}.{message}." if key else f"{message}."
    return f"{key}={problem['input']!r} is refused: {message[0].lower()}{message[1:]}."


def _known(key: str) -> list[str]:
    model: type[BaseModel] = Config
    for name in key.split(".")[:-1]:
        annotation = model.model_fields[name].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        model = annotation
    return [field.alias or name for name, field in model.model_fields.items()]


def model_config(value: Any) -> ModelConfig:
    """Return the model a recipe names: a preset, a folder with config.json, fields, or a preset with some changed."""
    if isinstance(value, ModelConfig):
        return value
    if isinstance(value, str):
        return _named(value)
    if not isinstance(value, dict):
        raise ConfigError(f"model={value!r} must be a preset, a folder with config.json, or fields.")
    fields = dict(value)
    if "router" in fields:
        raise ConfigError(f"model.router={fields['router']!r} is set in section moe: write moe.router.")
    base = _named(str(fields.pop("preset"))) if "preset" in fields else None
    fields = {name: _number(name, field) for name, field in fields.items()}
    if base is None:
        return ModelConfig.from_fields(fields)
    merged = base.as_fields()
    if ("hidden_size" in fields or "num_attention_heads" in fields) and "head_dim" not in fields:
        merged["head_dim"] = 0
    return ModelConfig.from_fields({**merged, **fields})


def _named(name: str) -> ModelConfig:
    file = Path(name) if name.endswith(".json") else Path(name) / "config.json"
    if not file.is_file():
        return preset(name)
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}.") from None
    try:
        is_bare = isinstance(fields, dict) and "model_type" not in fields  # sizes alone, in the same names
        return ModelConfig.from_fields(fields) if is_bare else ModelConfig.from_hf(fields)
    except (ConfigError, AttributeError) as error:
        raise ConfigError(f"{file}: {error}") from None


_FLOATS = {field.name for field in dataclasses.fields(ModelConfig) if field.type == "float"}


def _number(name: str, value: Any) -> Any:
    # YAML 1.1 reads 1e6 as text.
    if name in _FLOATS and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"model.{name}={value!r} must be a number.") from None
    return value
