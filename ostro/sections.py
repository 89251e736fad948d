"""The sections of a recipe, one class each: every key, its default, and what it means."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ostro.degrees import Degrees
from ostro.errors import ConfigError
from ostro.model.settings import Balance, CapacityGroup, Drop, Kernels, LoraConfig, MoeConfig, Router


class Section(BaseModel):
    """A section of the config: immutable, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


class Weights(Section):
    """Where training starts from: `path` is a checkpoint of any format or a run; null draws random weights.

    `strategy` are the strategy files of MindSpore's rank folders, where they do not lie beside them. With `upcycle`,
    `path` is a dense Mistral, whose feed-forward layers become those of every expert (arXiv 2212.05055).
    """

    path: str | None = None
    strategy: str | None = None
    upcycle: bool = False

    @model_validator(mode="after")
    def _upcycles_something(self) -> Weights:
        if self.upcycle and self.path is None:
            raise ValueError("upcycle=true says what to make of weights.path, and there is none: name one")
        return self


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
    same bits as these oracles give. `dtype` is that of the activations; fp16 multiplies the loss by a number that
    starts at `loss_scale`, halves when a gradient overflows, which skips the update, and doubles after
    `loss_scale_window` updates without. `master_dtype` is what the parameters are held in: bf16 rounds updates
    stochastically, and leaves norms and routers in fp32; a rank that shares no gradients adds them up in bf16 as well.

    After `early_stop` evaluations (every `eval_every` steps) without a better one the run ends; 0 never does. Each of
    them completes the prompts of the file `samples`, one a line, by `sample_tokens`. `skip_spikes` updates nothing
    where the gradient's norm is more than so many times the median of the last 128 (null: never).
    """

    steps: int = Field(default=-1, ge=-1)
    epochs: float = Field(default=1.0, gt=0)
    global_batch_sequences: int = Field(default=32, ge=1)
    micro_batch_sequences: int = Field(default=1, ge=1)
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "bf16"
    loss_scale: float = Field(default=65535.0, ge=1)
    loss_scale_window: int = Field(default=1000, ge=1)
    master_dtype: Literal["fp32", "bf16"] = "fp32"
    seed: int = Field(default=0, ge=0, lt=2**63)
    exact: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    eval_every: int = Field(default=0, ge=0)
    early_stop: int = Field(default=0, ge=0)
    samples: str | None = None
    sample_tokens: int = Field(default=64, ge=1)
    skip_spikes: float | None = Field(default=None, gt=1)


class Optim(Section):
    """AdamW and its schedule; weight decay touches matrices only.

    fp32_state_adam_weight_decay is MindFormers': averages are not corrected for their start from 0, eps is 1e-6 unless
    set. `state_dtype` int8 holds averages in 8 bits, 256 at a time; `offload` keeps them in host memory. Warm-up and,
    of wsd, the decay are shares of `total_steps`, which are the run's own where it is −1. A gradient norm above
    `skip_grad_norm` (null: none is) skips the update.
    """

    name: Literal["adamw", "fp32_state_adam_weight_decay"] = "adamw"
    implementation: Literal["auto", "fused", "foreach"] = "auto"
    state_dtype: Literal["fp32", "int8"] = "fp32"
    offload: bool = False
    learning_rate: float = Field(default=1e-5, ge=0)
    min_learning_rate: float = Field(default=1e-6, ge=0)
    schedule: Literal["cosine", "cosine_mindformers", "linear", "wsd", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    decay_ratio: float = Field(default=0.1, ge=0, le=1)
    total_steps: int = Field(default=-1, ge=-1)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    skip_grad_norm: float | None = Field(default=None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _eps(cls, fields: Any) -> Any:
        is_mindformers = isinstance(fields, dict) and fields.get("name") == "fp32_state_adam_weight_decay"
        return {"eps": 1e-6, **fields} if is_mindformers else fields

    @field_validator("total_steps")
    @classmethod
    def _some(cls, value: int) -> int:
        if value == 0:
            raise ValueError("must be at least 1, or −1 for the run's own")
        return value

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


class Lora(Section):
    """Train a low-rank correction of some matrices and leave the model as it is; null trains the model itself.

    Rules are `model.settings.LoraConfig`'s; `quantize` nf4 holds the model's own matrices in 4 bits.
    """

    targets: tuple[str, ...] = ("attention", "experts")
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    rslora: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    dora: bool = False
    quantize: Literal["nf4"] | None = None

    @field_validator("targets", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def settings(self) -> LoraConfig:
        """Return what is corrected and how; ConfigError for what means nothing or no adapter can say."""
        return LoraConfig(**self.model_dump())


class Checkpoint(Section):
    """A checkpoint every `every` steps (0: only at the end), the last `keep` kept; `resume` auto goes on from one.

    `async` writes while training goes on, from a copy in host memory. `best` saves after each evaluation that is the
    best so far, and keeps that one beside the last: `checkpoints/best`.
    """

    every: int = Field(default=1000, ge=0)
    keep: int = Field(default=5, ge=1)
    asynchronous: bool = Field(default=True, alias="async")
    resume: Literal["auto", "must", "never"] = "auto"
    best: bool = False


class Run(Section):
    """Where a run writes, how often it prints a line, and who else keeps its numbers.

    `trackers` null is TensorBoard where it is installed; the others are extras, and read their own environment.
    """

    dir: str = "runs/run"
    log_every: int = Field(default=1, ge=1)
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] | None = None


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
