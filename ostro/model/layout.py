"""The parameter table: Mixtral's twelve kinds of parameter, each named once, with its logical dims.

Every checkpoint format, placements, LoRA targets, quantisation and the planner read this table. Names are those of a
Hugging Face checkpoint, with the experts of a layer stacked: `w13` holds gate (w1) at half 0 and up (w3) at half 1, so
that a slice of `ffn` holds matching halves and `w13.view(E, 2F, D)` is one grouped product. Rows of q and k are in
Hugging Face's half-rotation order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Literal

from ostro.model.settings import ROUTERS_WITH_BIAS, LoraConfig, ModelConfig

Dim = Literal["vocab", "heads", "kv_heads", "ffn", "expert", "half", "model", "rank"]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of parameter: its name (with `{layer}` where there is one a layer) and its logical dims."""

    name: str
    dims: tuple[Dim, ...]

    @property
    def is_layered(self) -> bool:
        return "{layer}" in self.name

    @property
    def is_matrix(self) -> bool:
        """Whether it has rows and columns: everything but the norms."""
        return len(self.dims) > 1

    @property
    def is_small(self) -> bool:
        """Whether it is a norm or the router's: a few values in 100,000, left in fp32 and whole on every rank."""
        return not self.is_matrix or self is GATE

    @property
    def is_low_rank(self) -> bool:
        """Whether it is LoRA's A, B or magnitude: trained in fp32, and not sharded but cut as its parameter is."""
        return "lora_" in self.name

    @property
    def target(self) -> str:
        """The short name by which LoRA targets it (`settings.TARGETS`): `q_proj`, `w13`, `lm_head`."""
        return self.name.removesuffix(".weight").rpartition(".")[2]


EMBEDDING = Kind("model.embed_tokens.weight", ("vocab", "model"))
INPUT_NORM = Kind("model.layers.{layer}.input_layernorm.weight", ("model",))
Q = Kind("model.layers.{layer}.self_attn.q_proj.weight", ("heads", "model"))
K = Kind("model.layers.{layer}.self_attn.k_proj.weight", ("kv_heads", "model"))
V = Kind("model.layers.{layer}.self_attn.v_proj.weight", ("kv_heads", "model"))
O = Kind("model.layers.{layer}.self_attn.o_proj.weight", ("model", "heads"))
POST_NORM = Kind("model.layers.{layer}.post_attention_layernorm.weight", ("model",))
GATE = Kind("model.layers.{layer}.block_sparse_moe.gate.weight", ("expert", "model"))
SELECTION_BIAS = Kind("model.layers.{layer}.block_sparse_moe.gate.selection_bias", ("expert",))
W13 = Kind("model.layers.{layer}.block_sparse_moe.experts.w13", ("expert", "half", "ffn", "model"))
W2 = Kind("model.layers.{layer}.block_sparse_moe.experts.w2", ("expert", "model", "ffn"))
NORM = Kind("model.norm.weight", ("model",))
HEAD = Kind("lm_head.weight", ("vocab", "model"))

# What LoRA may keep in 4 bits; bitsandbytes and transformers leave embedding, head and router as they are, too.
QUANTIZED = (Q, K, V, O, W13, W2)

LAYER_KINDS = (INPUT_NORM, Q, K, V, O, POST_NORM, GATE, W13, W2)
KINDS = (EMBEDDING, *LAYER_KINDS, NORM, HEAD)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of one model: canonical name, shape, kind, and layer (None outside the layers)."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    layer: int | None


def sizes(config: ModelConfig) -> dict[Dim, int]:
    """Return the size of each logical dim."""
    return {
        "vocab": config.vocab_size,
        "heads": config.num_attention_heads * config.head_dim,
        "kv_heads": config.num_key_value_heads * config.head_dim,
        "ffn": config.intermediate_size,
        "expert": config.num_local_experts,
        "half": 2,
        "model": config.hidden_size,
    }


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Yield every parameter in the model's order.

    With tied embeddings there is no `lm_head.weight`; the sigmoid router has a selection bias, which Mixtral's has not.
    """
    size = sizes(config)

    def parameter(kind: Kind, layer: int | None) -> Parameter:
        return Parameter(kind.name.format(layer=layer), tuple(size[dim] for dim in kind.dims), kind, layer)

    yield parameter(EMBEDDING, None)
    for layer in range(config.num_hidden_layers):
        for kind in LAYER_KINDS:
            yield parameter(kind, layer)
            if kind is GATE and config.router in ROUTERS_WITH_BIAS:
                yield parameter(SELECTION_BIAS, layer)
    yield parameter(NORM, None)
    if not config.tie_word_embeddings:
        yield parameter(HEAD, None)


def table(config: ModelConfig) -> dict[str, Parameter]:
    """Return the parameters of a model by name."""
    return {parameter.name: parameter for parameter in parameters(config)}


# LoRA's tensors for one parameter: PEFT's lora_A and lora_B (for an embedding, lora_embedding_A and _B), and of DoRA
# the magnitude of each row. They stand beside their parameter.
LORA_A, LORA_B, LORA_MAGNITUDE = "lora_A", "lora_B", "lora_magnitude"


def adapter_parameters(config: ModelConfig, lora: LoraConfig) -> Iterator[Parameter]:
    """Yield what LoRA adds to a model, in the model's order: of each target A, B and, with DoRA, the magnitude.

    Of a matrix [out, in] A is [rank, in] and B [out, rank]; of the stacked experts each has its own: w13 has A
    [E, rank, D] and B [E, 2, F, rank], so gate and up share an A; w2 has A [E, rank, F] and B [E, D, rank]. Of the
    embedding [V, D], which is looked up and not multiplied, A is [rank, V] and B [D, rank]. `q_proj.weight` has
    `q_proj.lora_A`; `experts.w13` has `experts.w13_lora_A`.
    """
    for parameter in parameters(config):
        if parameter.kind.target in lora.matrices:
            for kind in adapter_kinds(parameter.kind, lora.dora):
                size: dict[Dim, int] = {**sizes(config), "rank": lora.rank}
                name = kind.name.format(layer=parameter.layer)
                yield Parameter(name, tuple(size[dim] for dim in kind.dims), kind, parameter.layer)


@functools.cache
def adapter_kinds(kind: Kind, dora: bool) -> tuple[Kind, ...]:
    """Return the kinds of A, B and, with DoRA, the magnitude, of one kind of parameter."""
    stack, (out, inner) = kind.dims[:-2], kind.dims[-2:]
    if kind is EMBEDDING:
        out, inner = inner, out
    is_module = kind.name.endswith(".weight")
    prefix = kind.name.removesuffix("weight") if is_module else f"{kind.name}_"
    shared: tuple[Dim, ...] = tuple(dim for dim in stack if dim != "half")
    made = (
        Kind(prefix + LORA_A, (*shared, "rank", inner)),
        Kind(prefix + LORA_B, (*stack, out, "rank")),
        Kind(prefix + LORA_MAGNITUDE, (*stack, out)),
    )
    return made if dora else made[:2]


def adapter_table(config: ModelConfig, lora: LoraConfig | None) -> dict[str, Parameter]:
    """Return LoRA's parameters of a model by name; none without LoRA."""
    return {} if lora is None else {p.name: p for p in adapter_parameters(config, lora)}


def num_parameters(config: ModelConfig) -> int:
    """Return the number of parameters held."""
    return sum(_count(parameter.shape) for parameter in parameters(config))


def num_active_parameters(config: ModelConfig) -> int:
    """Return the number of parameters that multiply one token: its own experts and the head, not the embedding."""
    total = 0
    for parameter in parameters(config):
        if parameter.kind is EMBEDDING:
            continue
        count = _count(parameter.shape)
        if parameter.kind in (W13, W2):
            count = count * config.num_experts_per_tok // config.num_local_experts
        total += count
    if config.tie_word_embeddings:
        total += config.vocab_size * config.hidden_size
    return total


def num_adapter_parameters(config: ModelConfig, lora: LoraConfig | None, active: bool = False) -> int:
    """Return the number of LoRA's parameters; `active` ones multiply one token."""
    total = 0
    for parameter in adapter_table(config, lora).values():
        is_expert = active and len(parameter.shape) > 2
        share = config.num_experts_per_tok / config.num_local_experts if is_expert else 1
        total += int(_count(parameter.shape) * share)
    return total


def training_flops(config: ModelConfig, document_lengths: Iterable[int], lora: LoraConfig | None = None) -> float:
    """Return the floating-point operations of one forward and backward pass, recompute not counted.

    6 per active parameter and token (with LoRA 4, since frozen ones have no gradients, and 6 of its own), and for
    attention 12·H·C·Σn²/2 per layer: causal attention computes half of the n² scores of a document of n tokens (the
    accounting of arXiv 2204.02311, appendix B, with the causal half).
    """
    lengths = list(document_lengths)
    scores = sum(n * n for n in lengths) / 2
    width = config.num_attention_heads * config.head_dim
    products = (4.0 if lora else 6.0) * num_active_parameters(config) + 6.0 * num_adapter_parameters(config, lora, True)
    return products * sum(lengths) + 12.0 * config.num_hidden_layers * width * scores


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
