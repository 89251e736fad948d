"""What a Mixtral is (`ModelConfig`) and how its router is trained (`MoeConfig`): plain dataclasses, no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from ostro.errors import ConfigError, nearest

Router = Literal["softmax", "sigmoid"]
ROUTERS_WITH_BIAS = ("sigmoid",)  # whose choice a bias of each expert moves: one parameter more a layer
Drop = Literal["token", "choice", "probability"]
CapacityGroup = Literal["sequence", "rank"]
Balance = Literal["sequence", "batch", "hf"]
Kernels = Literal["auto", "triton", "torch"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture, in the names of Hugging Face's `MixtralConfig`; the defaults are Mixtral-8x7B's.

    `router` is no setting of theirs, since Mixtral's is `softmax`: `sigmoid` has one more parameter a layer, the
    selection bias, and computes something else from the same weights.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 0  # 0 means hidden_size // num_attention_heads, and is replaced by it
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int | None = None
    router: Router = "softmax"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ConfigError(f"model.{field.name}={value!r} must be a whole number of at least 0.")
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if field.type == "float" and not (is_number and 0 <= value < math.inf):
                raise ConfigError(f"model.{field.name}={value!r} must be a number of at least 0.")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be at least 1.")
        if self.head_dim == 0:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"model.num_attention_heads={self.num_attention_heads} does not divide "
                    f"hidden_size={self.hidden_size}: change one of them or set head_dim."
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim={self.head_dim} is odd; rotary positions need an even one.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"model.num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}: each key head serves a whole group of query heads."
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise ConfigError(
                f"model.num_experts_per_tok={self.num_experts_per_tok} is more than "
                f"num_local_experts={self.num_local_experts}: a token cannot use an expert twice."
            )
        if not isinstance(self.tie_word_embeddings, bool):
            raise ConfigError(f"model.tie_word_embeddings={self.tie_word_embeddings!r} must be true or false.")
        _require_one_of("model.router", self.router, Router)
        for name, least in (("sliding_window", 1), ("pad_token_id", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ConfigError(f"model.{name}={value!r} must be a whole number of at least {least}, or null.")
        for name in ("bos_token_id", "eos_token_id"):
            if getattr(self, name) >= self.vocab_size:
                raise ConfigError(f"model.{name}={getattr(self, name)} lies outside vocab_size={self.vocab_size}.")

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """Build from a mapping; an unknown name raises ConfigError with the nearest known one."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ConfigError(f"model.{name} is not a setting of the model.{nearest(name, known)}")
        return cls(**fields)

    @classmethod
    def from_hf(cls, found: Mapping[str, Any]) -> ModelConfig:
        """Build from the content of a `config.json` as transformers 4 or 5 writes it.

        Keys that say nothing about Mixtral's arithmetic are ignored. Raises ConfigError for another model type,
        another activation, scaled rotary positions, quantised weights, and values that make no model.
        """
        if found.get("model_type") == "mistral":
            raise ConfigError(
                "model_type 'mistral' is a dense model: weights.upcycle=true (or ostro convert --upcycle) makes a "
                "Mixtral of it, and Ostro has no other use for it."
            )
        if found.get("model_type") != "mixtral":
            raise ConfigError(f"model_type {found.get('model_type')!r}: Ostro reads 'mixtral'.")
        if found.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"hidden_act {found['hidden_act']!r}: Mixtral's experts use 'silu'.")
        if found.get("quantization_config"):
            raise ConfigError("the weights are quantised: take the unquantised checkpoint.")
        known = [field.name for field in dataclasses.fields(cls)]
        # Where MixtralConfig's own default is another than ours, an absent key means theirs.
        fields = {"max_position_embeddings": 131072} | {name: found[name] for name in known if name in found}
        fields |= _hf_rope(found)
        if fields.get("head_dim", 0) is None:
            del fields["head_dim"]
        if fields.get("num_key_value_heads", 0) is None:
            fields["num_key_value_heads"] = fields.get("num_attention_heads", 32)
        eos = fields.get("eos_token_id")
        if isinstance(eos, list) and eos:
            fields["eos_token_id"] = eos[0]
        values: dict[str, Any] = fields
        return cls(**values)

    def as_fields(self) -> dict[str, Any]:
        """Return all settings as a plain dict; the router is named only where it is not Mixtral's own."""
        fields = dataclasses.asdict(self)
        if self.router == "softmax":
            del fields["router"]
        return fields


def _hf_rope(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta from wherever it stands: v5 nests it, v4 has it at the top with rope_scaling beside it."""
    fields: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = found.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise ConfigError(f"{key}={rope!r} where an object or null belongs.")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(f"rotary positions of type {kind!r} in {key}: Ostro has the plain ones ('default').")
        if "rope_theta" in rope:
            fields["rope_theta"] = rope["rope_theta"]
    return fields


_AT_LEAST_ONE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
)


def _require_one_of(key: str, value: Any, words: Any) -> None:
    if value not in get_args(words):
        raise ConfigError(
            f"{key}={value!r} is not one of {', '.join(get_args(words))}.{nearest(str(value), get_args(words))}"
        )


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """How the router is trained; none of it changes what a trained model computes.

    `router_aux_loss_coef` is in Hugging Face's unit: the balancing loss of a perfectly balanced layer is
    `num_experts_per_tok`, whatever the number of layers. MindFormers' 0.05 is 0.025 here. Whichever `balance` trains,
    the metrics' `aux_loss` is that of `sequence`: it adds up.

    `capacity_factor` None drops nothing. Otherwise an expert takes, of a sequence or of all tokens of a micro-batch
    (`capacity_group`), `factor` times an even share, at least `min_capacity`, rounded up to `capacity_multiple`; who
    comes first is told by `drop` (see `capacity.py`). `router_jitter_noise` is Hugging Face's: the router's input is
    multiplied by uniform(1 − noise, 1 + noise) in training. `bias_update_rate` moves the sigmoid router's selection
    bias once a step.

    `kernels` says what runs between the experts' products on a GPU: auto takes Triton's kernels where they are
    compiled for it. `fp8` rounds the operands of these products to fp8, where the GPU multiplies them (SM90).
    Raises ConfigError for values and combinations that mean nothing.
    """

    balance: Balance = "sequence"
    router_aux_loss_coef: float = 0.02
    z_loss_coef: float = 0.0
    capacity_factor: float | None = None
    drop: Drop = "token"
    capacity_group: CapacityGroup = "sequence"
    min_capacity: int = 0
    capacity_multiple: int = 1
    router_jitter_noise: float = 0.0
    bias_update_rate: float = 0.001
    kernels: Kernels = "auto"
    fp8: bool = False

    def __post_init__(self) -> None:
        for name, words in _WORDS.items():
            _require_one_of(f"moe.{name}", getattr(self, name), words)
        for name in ("router_aux_loss_coef", "z_loss_coef", "bias_update_rate", "router_jitter_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"moe.{name}={getattr(self, name)} must be a number of at least 0.")
        if self.router_jitter_noise >= 1:
            raise ConfigError(
                f"moe.router_jitter_noise={self.router_jitter_noise} would turn the router's input around: "
                "it must be less than 1, and 0.01 is usual."
            )
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ConfigError(
                f"moe.capacity_factor={self.capacity_factor} must be a number above 0, or null: null drops nothing."
            )
        for name, least in (("min_capacity", 0), ("capacity_multiple", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"moe.{name}={getattr(self, name)} must be a whole number of at least {least}.")
        if self.capacity_factor is None:
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)
                if field.name in _OF_CAPACITY and value != field.default:
                    raise ConfigError(
                        f"moe.{field.name}={value} means nothing while moe.capacity_factor is null, which drops "
                        "nothing: set moe.capacity_factor too, or leave this out."
                    )


_WORDS = {"balance": Balance, "drop": Drop, "capacity_group": CapacityGroup, "kernels": Kernels}
_OF_CAPACITY = ("drop", "capacity_group", "min_capacity", "capacity_multiple")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685): y = W·x + scale·B·A·x, of which A [rank, in] and B [out, rank] are trained.

    `targets` are groups (`TARGET_GROUPS`) or single matrices (`TARGETS`). Each expert has an A and a B of its own; gate
    and up (`w13`) share an A, as in PEFT's format. The scale is alpha/rank, with `rslora` alpha/√rank (arXiv
    2312.03732). `dropout` falls on the input of A, `dora` trains the norm of each row as well (arXiv 2402.09353); both
    are for the matrices of attention and the head alone, since PEFT's format has neither for experts. `quantize` nf4
    holds W of attention and experts in 4 bits (arXiv 2305.14314). Raises ConfigError for anything else.
    """

    targets: tuple[str, ...] = ("attention", "experts")
    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dropout: float = 0.0
    dora: bool = False
    quantize: Literal["nf4"] | None = None

    def __post_init__(self) -> None:
        if not self.targets:
            raise ConfigError(f"lora.targets is empty: name groups ({', '.join(TARGET_GROUPS)}) or matrices.")
        known = (*TARGET_GROUPS, *TARGETS)
        for target in self.targets:
            if target in _HALVES:
                raise ConfigError(
                    f"lora.targets names {target} alone, which PEFT's format cannot say: it has one A for an expert's "
                    "gate and up. Name w13, which is both, or the group experts."
                )
            if target not in known:
                raise ConfigError(f"lora.targets names {target!r}; known: {', '.join(known)}.{nearest(target, known)}")
        plain = [name for name in self.matrices if name in NO_DROPOUT_NO_DORA]
        for setting, is_set in (("dropout", self.dropout > 0), ("dora", self.dora)):
            if is_set and plain:
                raise ConfigError(
                    f"lora.{setting} is for attention and lm_head alone, since PEFT's format has none for "
                    f"{', '.join(plain)}: leave it out, or take these from lora.targets."
                )

        if self.dora and self.quantize:
            raise ConfigError(
                "lora.dora takes the norms of whole rows at every step, and quantize=nf4 keeps none: leave one out."
            )
        if self.dora and self.dropout and "lm_head" in self.matrices:
            raise ConfigError("lora.dora with dropout is not for lm_head: leave out one of the three.")

    @property
    def matrices(self) -> tuple[str, ...]:
        """The matrices that are corrected, by short name, each once, in the model's order."""
        named = {name for target in self.targets for name in TARGET_GROUPS.get(target, (target,))}
        return tuple(name for name in TARGETS if name in named)

    @property
    def scale(self) -> float:
        """What B·A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


# The matrices that LoRA can correct, by the last part of their names (Hugging Face's; the experts' are stacked).
TARGETS = ("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate", "w13", "w2", "lm_head")
TARGET_GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "experts": ("w13", "w2"),
    "router": ("gate",),
    "lm_head": ("lm_head",),
    "embeddings": ("embed_tokens",),
}
NO_DROPOUT_NO_DORA = ("embed_tokens", "gate", "w13", "w2")
_HALVES = ("w1", "w3", "gate_proj", "up_proj")
