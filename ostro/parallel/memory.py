"""What a run will hold on its fullest device, from arithmetic alone, and what to change where that does not fit.

The terms are those of a dry run (`plan`), which the tests hold this against: within 15 % in all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

from ostro.config import Config
from ostro.degrees import stage_layers
from ostro.errors import Error
from ostro.model import layout
from ostro.optim import eight_bits
from ostro.parallel.schedule import SCHEDULES

# Of a value in 4 bits: the code, and its share of the scale of 64 and of that of 256 such scales.
_NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)

# By so much an estimate may be too high or too low.
UNCERTAIN = 0.15


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on a device: parameters as held, their gradients (reduced and not), optimizer, copies, activations.

    gathered are parameters in the dtype of the activations: gathered from their shards, or cast.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / 1e9:,.2f}" for name, value in dataclasses.asdict(self).items())
        return f"about {self.total / 1e9:,.2f} GB a device ({parts})"


def estimate(config: Config) -> Estimate:
    """Return what the fullest device holds at its peak; LayoutError for a layout that does not divide."""
    degrees = config.parallel.degrees()
    degrees.check(config.model, for_run=True)
    ends = (0, degrees.pp - 1) if degrees.pp > 1 else (0,)
    return max((_stage(config, pp_rank) for pp_rank in ends), key=lambda found: found.total)


def _stage(config: Config, pp_rank: int) -> Estimate:
    """Take the fuller of two moments: all activations are kept, or the last of them is done with."""
    sizes = _Sizes(config, pp_rank)
    small = sizes.held - sizes.large
    own = sizes.master_bytes * sizes.large + 4 * (small + sizes.low) + int(_NF4_BYTES * sizes.quantized)
    averages = _average_bytes(config) * sizes.low if config.lora else _average_bytes(config) * sizes.large + 8 * small
    kept, working = sizes.activations()
    full = Estimate(own, sizes.gradients(before_last=True), int(averages), sizes.gathered(), kept + working)
    done = Estimate(own, sizes.gradients(before_last=False), int(averages), sizes.gathered(), working)
    return max(full, done, key=lambda found: found.total)


def _average_bytes(config: Config) -> float:
    """Return the bytes on the device of a large parameter's two averages, a value."""
    if config.optim.offload:
        return 0.0
    return 2 * (1 + 4 / eight_bits.BLOCK) if config.optim.state_dtype == "int8" else 8.0


class _Sizes:
    """What one stage's estimate is made of; numbers of values unless they say bytes."""

    def __init__(self, config: Config, pp_rank: int) -> None:
        self.config, self.pp_rank = config, pp_rank
        self.degrees, self.model, parallel = config.parallel.degrees(), config.model, config.parallel
        self.chunks = parallel.virtual_stages
        runs = stage_layers(self.model.num_hidden_layers, self.degrees.pp * self.chunks, parallel.stage_layers)
        self.runs = [len(runs[chunk * self.degrees.pp + pp_rank]) for chunk in range(self.chunks)]
        self.layers = {layer for chunk in range(self.chunks) for layer in runs[chunk * self.degrees.pp + pp_rank]}
        self.is_last = pp_rank == self.degrees.pp - 1
        self.dtype_bytes = 4 if config.train.dtype == "fp32" else 2
        self.master_bytes = 2 if config.train.master_dtype == "bf16" else 4
        if config.lora is not None:  # what it leaves is held as it is computed with
            self.master_bytes = self.dtype_bytes
        rows = config.train.global_batch_sequences // (self.degrees.dp * self.degrees.fsdp)
        self.num_rows = max(1, min(config.train.micro_batch_sequences, rows))
        self.num_micro = -(-max(1, rows) // self.num_rows)
        self.held = self.large = 0  # of all parameters and of all but norms and routers, on this rank
        self.sharded = self.whole = 0  # large ones, as tp and ep leave them: cut further by fsdp, or not
        self.group = self.root = 0  # of one layer's, sharded; of embedding and head, sharded
        self.layer_experts = 0
        self.quantized = 0  # in 4 bits: cut by tp and ep alone
        self._add_parameters(pp_rank * (self.degrees.num_ranks // self.degrees.pp))
        adapters = layout.adapter_table(self.model, config.lora and config.lora.settings()).values()
        self.low = sum(prod(self.degrees.part(p.kind.dims, p.shape)) for p in adapters if self._is_here(p))

    def _add_parameters(self, rank: int) -> None:
        lora = self.config.lora
        for p in layout.parameters(self.model):
            if not self._is_here(p):
                continue
            part = prod(self.degrees.part(p.kind.dims, p.shape))
            if lora and lora.quantize and p.kind in layout.QUANTIZED:
                self.quantized += part
                continue
            box = self.degrees.box(rank, p.kind.dims, p.shape, None)
            held = prod(box[1]) if box else 0
            self.held += held
            if p.kind.is_small:
                continue
            self.large += held
            self.sharded += part * (held < part)
            self.whole += part * (held == part)
            if p.layer is None:
                self.root += part * (held < part)
            elif p.layer == min(self.layers):
                self.group += part * (held < part)
                self.layer_experts += part * (p.kind in (layout.W13, layout.W2))

    def _is_here(self, p: layout.Parameter) -> bool:
        if p.layer is not None:
            return p.layer in self.layers
        is_embedding = p.name.startswith(layout.EMBEDDING.name.removesuffix("weight"))
        return (is_embedding and self.pp_rank == 0) or (
            self.is_last and (not is_embedding or self.model.tie_word_embeddings)
        )

    @property
    def accumulates(self) -> bool:
        return self.num_micro > 1 and not self.config.parallel.gradient_accumulation_shard

    def gradients(self, before_last: bool) -> int:
        """Unreduced ones (all of a step's, or one group's), and reduced ones.

        The last micro-batch's backward pass reduces them, or makes them first where there is one only.
        """
        if self.config.lora is not None:  # they are whole, and summed beside autograd
            return 4 * self.low * (not before_last or self.num_micro > 1)
        shards, own = self.held - self.whole, self.master_bytes
        waiting = 4 * self.sharded if self.accumulates else self.dtype_bytes * 2 * self.group
        if before_last:
            return waiting + own * (self.held if not self.accumulates else self.whole) * (self.num_micro > 1)
        # Reduced one after another, while as much that waited is freed.
        return max(waiting, own * shards) + own * self.whole + (0 if self.accumulates else 6 * self.group)

    def gathered(self) -> int:
        """Gathered parameters, and casts of whole ones."""
        together = self.config.parallel.gradient_aggregation_group
        if self.degrees.pp > 1:
            in_use = self.sharded + self.group
        else:
            in_use = self.root + 2 * together * self.group if self.sharded else 0
        cast = self.whole if self.num_micro > 1 or self.config.train.recompute == "none" else self.layer_experts
        if self.dtype_bytes >= self.master_bytes:
            cast = self.low if self.dtype_bytes < 4 else 0
        return self.dtype_bytes * (in_use + cast)

    def activations(self) -> tuple[int, int]:
        """What is kept for backward passes, and what one layer's or the loss's backward takes beside it."""
        kept, again = self._kept_bytes(), self._layer_bytes()
        working = self._working_bytes() + (again - kept if self.config.train.recompute != "none" else 0)
        return self._layers_in_flight() * kept, max(working, self._loss_bytes() if self.is_last else 0)

    @property
    def _tokens(self) -> tuple[int, int, int]:
        """Tokens attention sees here, tokens between blocks, rows the experts see."""
        seen = self.num_rows * self.config.data.seq_length // self.degrees.cp
        between = seen // self.degrees.tp
        return seen, between, between * self.model.num_experts_per_tok * self.degrees.etp

    def _layer_bytes(self) -> int:
        """What autograd keeps of a layer."""
        model, (seen, between, rows) = self.model, self._tokens
        width = model.head_dim
        heads, kv_heads = model.num_attention_heads // self.degrees.tp, model.num_key_value_heads // self.degrees.tp
        attention = seen * (model.hidden_size + (2 * heads + 2 * kv_heads * self.degrees.cp) * width)
        residual = 2 * between * model.hidden_size
        experts = rows * (2 * model.hidden_size + 2 * model.intermediate_size // self.degrees.etp)
        router = 4 * between * (model.hidden_size + 8 * model.num_local_experts)
        return self.dtype_bytes * (attention + residual + experts) + router

    def _kept_bytes(self) -> int:
        model, (_, between, rows) = self.model, self._tokens
        recompute = self.config.train.recompute
        if recompute == "full":
            return self.dtype_bytes * between * model.hidden_size
        if recompute == "none":
            return self._layer_bytes()
        experts = rows * (2 * model.hidden_size + 2 * model.intermediate_size // self.degrees.etp)
        arrived = rows * model.hidden_size if self.degrees.ep > 1 else between * model.hidden_size
        return self._layer_bytes() - self.dtype_bytes * (experts - arrived)

    def _working_bytes(self) -> int:
        """One layer's backward: gradients of rows on their way, and of its experts before they are handed on."""
        model, (_, between, rows) = self.model, self._tokens
        of_expert = rows * self.degrees.ep // model.num_local_experts
        on_the_way = 2 * rows * model.hidden_size + 6 * of_expert * model.intermediate_size
        rows_bytes = self.dtype_bytes * (on_the_way + 4 * between * model.hidden_size)
        if self.config.lora is not None:  # no gradients of theirs; of those in 4 bits one is made at a time
            one = 2 * model.intermediate_size // self.degrees.etp * model.hidden_size
            return rows_bytes + self.dtype_bytes * one * (self.quantized > 0)
        return rows_bytes + self.layer_experts * (
            self.dtype_bytes + (4 if self.dtype_bytes < 4 and not self.group else 0)
        )

    def _loss_bytes(self) -> int:
        model, (seen, between, _) = self.model, self._tokens
        cut = 1 if self.degrees.vocab_emb_dp else self.degrees.tp
        tokens, words = (between if self.degrees.vocab_emb_dp else seen), model.vocab_size // cut
        chunk = min(tokens, 2048) * words
        head = words * model.hidden_size * (self.config.lora is None)
        return chunk * (2 * self.dtype_bytes + 4) + 4 * head + 2 * tokens * model.hidden_size * self.dtype_bytes

    def _layers_in_flight(self) -> int:
        """The most layers, each of one micro-batch, whose activations this rank keeps at one time."""
        schedule = self.config.parallel.schedule
        actions = SCHEDULES[schedule](self.degrees.pp, self.pp_rank, self.chunks, self.num_micro)
        frees = "weights" if schedule == "zero_bubble" else "backward"
        now = most = 0
        for action in actions:
            now += self.runs[action.chunk] * ((action.kind == "forward") - (action.kind == frees))
            most = max(most, now)
        return most


def changes(config: Config, fits: Callable[[Config], bool]) -> list[str]:
    """Return three changes, each of which alone makes a config fit, as `fits` says of the changed one; or fewer."""
    found = _fitting(config, fits)
    if len(found) < 3:  # then two together
        for candidates in reversed(list(_candidates(config))):
            text, changed = candidates[-1]
            found += [f"{text} {second}" for second in _fitting(changed, fits)[:1]]
    return found[:3]


def _fitting(config: Config, fits: Callable[[Config], bool]) -> list[str]:
    """Return of each kind of change the smallest that fits."""
    firsts = (
        next((text for text, changed in candidates if _is_fine(changed, fits)), None)
        for candidates in _candidates(config)
    )
    return [text for text in firsts if text is not None]


def _is_fine(config: Config, fits: Callable[[Config], bool]) -> bool:
    try:
        return fits(config)
    except Error:  # a layout that divides nothing
        return False


def _candidates(config: Config) -> Iterator[list[tuple[str, Config]]]:
    """Yield kinds of change, the smallest change of each first."""
    train, parallel, data, model = config.train, config.parallel, config.data, config.model

    def changed(section: str, name: str, value: Any, more: str = "") -> tuple[str, Config]:
        old = getattr(config, section)
        new = dataclasses.replace(old, **{name: value}) if section == "model" else old.model_copy(update={name: value})
        return f"{section}.{name}={value}{more}", config.model_copy(update={section: new})

    if train.recompute != "full":
        yield [changed("train", "recompute", "full")]
    if train.micro_batch_sequences > 1:
        yield [changed("train", "micro_batch_sequences", n) for n in _halves(train.micro_batch_sequences)]
    for name in ("fsdp", "pp"):
        degree = getattr(parallel, name)
        num_ranks = parallel.degrees().num_ranks // degree
        degrees = [
            n
            for n in (degree * 2**i for i in range(1, 12))
            if name == "pp" or train.global_batch_sequences % (n * parallel.dp) == 0
        ]
        yield from _some([changed("parallel", name, n, f" (on {num_ranks * n} devices)") for n in degrees])
    yield from _some([changed("data", "seq_length", n) for n in _halves(data.seq_length) if n >= 256])
    yield from _some([changed("model", "num_hidden_layers", n) for n in range(model.num_hidden_layers - 1, 0, -1)])
    fewer = [n for n in _halves(model.num_local_experts) if n >= model.num_experts_per_tok]
    yield from _some([changed("model", "num_local_experts", n) for n in fewer])
    yield from _some([changed("model", "intermediate_size", n) for n in _halves(model.intermediate_size) if n >= 64])


def _some(candidates: list[tuple[str, Config]]) -> Iterator[list[tuple[str, Config]]]:
    if candidates:
        yield candidates


def _halves(value: int) -> list[int]:
    return [value // 2**i for i in range(1, value.bit_length()) if value % 2**i == 0]
