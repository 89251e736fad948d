"""Every setting of a run: frozen pydantic models, read from YAML and dotted overrides.

A recipe is a YAML file with the sections below; everything has a default. `a.b=c`, `--a.b c` and `--a.b=c` override
it. The model's settings have Hugging Face's names. A key nobody knows is refused with the nearest name and its line.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ostro.degrees import num_micro_batches, stage_layers
from ostro.errors import ConfigError, nearest
from ostro.model.settings import ModelConfig
from ostro.overrides import parse_overrides, read_yaml, set_key
from ostro.sections import Checkpoint, Data, Lora, Moe, Optim, Parallel, Profile, Run, Section, Train, Weights

RECIPES = Path(__file__).parent / "recipes"
PRESETS = RECIPES / "models"


class Config(Section):
    """A whole run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)

    model: ModelConfig = Field(default_factory=lambda: preset("mixtral-8x7b"))
    weights: Weights = Weights()
    data: Data = Data()
    train: Train = Train()
    optim: Optim = Optim()
    moe: Moe = Moe()
    lora: Lora | None = None
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
        self._require_lora()
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

    def _require_lora(self) -> None:
        """Refuse what LoRA cannot do, or would silently not do."""
        if self.lora is None:
            return
        lora = self.lora.settings()
        if self.model.tie_word_embeddings and {"lm_head", "embed_tokens"} & set(lora.matrices):
            raise ValueError("lora.targets names the embedding or the head, which are one matrix in this model")
        if self.moe.fp8:
            raise ValueError("moe.fp8 is for training the experts themselves: leave it out, or lora")
        if self.train.master_dtype != "fp32":
            raise ValueError("train.master_dtype is of weights that are trained, and lora trains its own in fp32")
        if lora.quantize and self.train.exact:
            raise ValueError("train.exact computes from whole matrices: leave it out, or lora.quantize")
        sizes = {name: getattr(self.model, name) for name in ("hidden_size", "intermediate_size")}
        sizes |= {"num_attention_heads·head_dim": self.model.num_attention_heads * self.model.head_dim}
        sizes["intermediate_size over etp"] = self.model.intermediate_size // self.parallel.etp
        sizes["num_attention_heads·head_dim over tp"] = sizes["num_attention_heads·head_dim"] // self.parallel.tp
        for name, size in sizes.items():
            if lora.quantize and size % 64:
                raise ValueError(
                    f"lora.quantize=nf4 scales 64 values of a row together, and {name}={size} is no multiple of that: "
                    "leave quantize out, or change the layout"
                )

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

    @property
    def draws(self) -> bool:
        """Whether something is drawn for each token: the router's jitter, or LoRA's dropout."""
        return bool(self.moe.router_jitter_noise or (self.lora and self.lora.dropout))

    def as_yaml(self) -> str:
        """Return the config as a recipe that gives it back."""
        fields = self.model_dump(mode="json", by_alias=True)
        fields["model"] = self.model.as_fields()
        fields["model"].pop("router", None)  # which section moe says
        return yaml.safe_dump(fields, sort_keys=False)


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes: those of a model's family as family/job."""
    files = [path for path in RECIPES.rglob("*.yaml") if PRESETS not in path.parents]
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in files)


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
    if str(name) in recipe_names():
        return RECIPES / f"{name}.yaml"
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
    return build_config(fields, lines)


def build_config(fields: Mapping[str, Any], lines: Mapping[str, str]) -> Config:
    """Return the config of a recipe's fields; ConfigError for what is refused, after what `lines` has for its key."""
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
    if problem["type"] == "extra_forbidden":
        known = known_keys(key)
        section = key.rpartition(".")[0]
        place = f"section {section}" if section else "a recipe"
        return f"{key} is not a key of {place}; known: {', '.join(known)}.{nearest(key.rpartition('.')[2], known)}"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], dict) and problem["type"] == "value_error":  # of the section as a whole
        return f"{key}.{message}." if key else f"{message}."
    return f"{key}={problem['input']!r} is refused: {message[0].lower()}{message[1:]}."


def known_keys(key: str) -> list[str]:
    """Return the keys of the section that a dotted key lies in, in their order."""
    if key.startswith("model."):
        return [field.name for field in dataclasses.fields(ModelConfig)]
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
