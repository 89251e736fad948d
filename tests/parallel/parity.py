"""Trains a small model under a layout, on real processes, and holds it against one process.

A case is a few dotted settings on top of SETTINGS. What is trained on are rows of several documents each; nothing but
the layout differs from the reference: same weights (`random`), same rows, fp32, SGD.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from worlds import run_in_world

from ostro import train
from ostro.config import Config, load_config
from ostro.data.loader import Row
from ostro.model import layout
from ostro.parallel.apply import World, local, mesh_of, parallelize
from ostro.weights.parts import load_weights
from ostro.weights.store import RandomReader, TensorInfo, Where, drawn

NUM_STEPS, ROW_TOKENS, NUM_ROWS = 4, 32, 16
TOLERANCE = 1e-5
SETTINGS = {
    "model.vocab_size": 64,
    "model.hidden_size": 32,
    "model.intermediate_size": 16,
    "model.num_hidden_layers": 4,
    "model.num_attention_heads": 16,
    "model.num_key_value_heads": 8,
    "model.head_dim": 4,
    "model.num_local_experts": 8,
    "model.initializer_range": 0.2,
    "data.seq_length": ROW_TOKENS,
    "train.global_batch_sequences": NUM_ROWS,
    "train.dtype": "fp32",
    "moe.router_aux_loss_coef": 0.05,
    "moe.z_loss_coef": 0.001,
    "optim.learning_rate": 0.5,
    "optim.schedule": "constant",
    "optim.warmup_ratio": 0.0,
}
# Settings that change what is computed, not only where: the reference has them too.
_OF_BOTH = ("lora.", "model.", "moe.", "data.", "train.dtype", "train.global_batch_sequences")


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a run did: per step loss, balancing loss, gradient norm and gradients; the weights after all steps."""

    rows: list[tuple[float, float, float]]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]


class Rows:
    """Stands in for the loader: rows of random documents, a pure function of the step."""

    def __init__(self, vocab_size: int, length: int = ROW_TOKENS, documents: int = 3) -> None:
        self.vocab_size, self.length, self.documents = vocab_size, length, documents

    def rows(self, step: int, count: int, rank: int = 0, num_ranks: int = 1) -> list[Row]:
        share = count // num_ranks
        return [self._row(step * count + rank * share + i) for i in range(share)]

    def _row(self, number: int) -> Row:
        draw = np.random.default_rng(number)
        tokens = draw.integers(3, self.vocab_size, self.length)
        cuts = np.sort(draw.choice(np.arange(1, self.length), self.documents - 1, replace=False))
        lengths = np.diff([0, *cuts, self.length])
        labels, weights = np.roll(tokens, -1), np.ones(self.length, np.float32)
        ends = np.cumsum(lengths) - 1
        labels[ends], weights[ends] = 0, 0
        weights[draw.integers(0, self.length, 4)] = 0  # some tokens are not learned
        return Row(tokens, labels, weights, tuple(lengths.tolist()))


class RandomAdapter:
    """A LoRA none of whose parameters is 0, so that all of them have gradients at once."""

    format = "random adapter"
    notes = ()

    def __init__(self, config: Config) -> None:
        self.model = config.model
        self._table = layout.adapter_table(config.model, config.lora and config.lora.settings())

    def names(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(p.shape, torch.float32) for name, p in self._table.items()}

    def read(self, name: str, where: Where = ()) -> Tensor:
        parameter = self._table[name]
        if len(parameter.shape) == 1:
            return torch.linspace(0.5, 1.5, parameter.shape[0])[where]
        return drawn(3, parameter, 0.2, where)


def settings(case: Mapping[str, Any]) -> Config:
    """Return the config of a case."""
    return load_config("tiny", [f"{key}={value}" for key, value in {**SETTINGS, **case}.items()])


def seen(case: Mapping[str, Any], num_steps: int = NUM_STEPS) -> Seen:
    """Train a case in this process's world (or alone), and return this rank's parts, each with its place."""
    torch.manual_seed(0)
    config = settings(case)
    device = torch.device("cpu")
    world = parallelize(config, mesh_of(config, device), torch.float32)
    base = RandomReader(config.model, 1)
    world.load(base)
    load_weights(RandomAdapter(config), world.held_adapters(), layout.adapter_table(config.model, world.lora))
    optimizer = torch.optim.SGD(world.parameters().values(), lr=0.2, foreach=False)
    loader: Any = Rows(config.model.vocab_size, config.data.seq_length)
    nothing: Any = None
    run = train.Run(config, Path(), device, nothing, loader, [], world, optimizer, num_steps, {}, nothing)  # type: ignore[arg-type]
    gradients: list[dict[str, Tensor]] = []

    def note(factor: float) -> None:
        gradients.append(_parts(world, {name: p.grad for name, p in world.parameters().items() if p.grad is not None}))

    world.scale_gradients = note  # before clipping, and instead of it
    rows = []
    for _ in range(num_steps):
        stats = train.train_step(run)
        aux = stats.stats_LS[:, config.model.num_local_experts].sum().item()
        rows.append((stats.loss, aux, stats.grad_norm))
    return Seen(rows, gradients, _parts(world, world.parameters()))


def _parts(world: World, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    places = {**world.held_parameters(), **world.held_adapters()}
    parts = {}
    for name, tensor in tensors.items():
        held = local(tensor).detach().clone()
        if name in places:
            assert held.shape == places[name].tensor.shape
            parts[name] = (dataclasses.astuple(places[name].box), held)
    return parts


def _rank_main(case: Mapping[str, Any], num_steps: int) -> Any:
    return dataclasses.astuple(seen(case, num_steps))


@functools.cache
def _reference(case: tuple[tuple[str, Any], ...], num_steps: int) -> Seen:
    return seen(dict(case), num_steps)


def difference(case: Mapping[str, Any], num_steps: int = NUM_STEPS) -> dict[str, float]:
    """Return the largest relative differences of a case from one process, by what is compared.

    Losses relative to themselves, gradients and weights to each tensor's largest value; every part of every tensor
    that any rank holds is looked at, and together they must be all of it.
    """
    config = settings(case)
    size = config.parallel.degrees().num_ranks
    alone = {key: value for key, value in case.items() if key.startswith(_OF_BOTH)}
    # All rows at once, as the ranks of a step without accumulation have them together: `balance: batch` depends on it.
    alone["train.micro_batch_sequences"] = config.train.global_batch_sequences
    reference = _reference(tuple(sorted(alone.items())), num_steps)
    many = run_in_world(size, _rank_main, dict(case), num_steps) if size > 1 else [_rank_main(case, num_steps)]
    ranks = [Seen(*result) for result in many]
    worst = {"loss": 0.0, "aux loss": 0.0, "grad norm": 0.0, "gradients": 0.0, "weights": 0.0}
    for rank in ranks:
        for row, expected in zip(rank.rows, reference.rows, strict=True):
            for key, value, other in zip(worst, row, expected, strict=False):
                worst[key] = max(worst[key], abs(value - other) / abs(other))
    for step in range(num_steps):
        parts = [rank.gradients[step] for rank in ranks]
        worst["gradients"] = max(worst["gradients"], _furthest(parts, reference.gradients[step]))
    worst["weights"] = _furthest([rank.weights for rank in ranks], reference.weights)
    return worst


def _furthest(ranks: Sequence[dict[str, Any]], whole: dict[str, Any]) -> float:
    furthest = 0.0
    for name, (_, expected) in whole.items():
        covered = torch.zeros(expected.shape, dtype=torch.bool)
        for parts in ranks:
            if name in parts:
                (offsets, sizes), value = parts[name]
                where = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
                covered[where] = True
                gap = (value - expected[where]).abs().max().item() / expected.abs().max().item()
                furthest = max(furthest, float("inf") if math.isnan(gap) else gap)
        assert covered.all(), f"no rank holds all of {name}"
    return furthest
