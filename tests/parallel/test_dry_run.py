"""A dry run says what a real one does: the same counters look at both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from matrix import SEEDS
from parity import settings
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from worlds import run_in_world

from ostro import plan, train
from ostro.data.loader import Row
from ostro.model.routing import ROUTERS, Routing
from ostro.optim import build_optimizer
from ostro.parallel.apply import mesh_of, parallelize
from ostro.parallel.counting import Footprint, Traffic
from ostro.weights.parts import load_weights
from ostro.weights.store import RandomReader

Case = dict[str, Any]

LAYOUTS: dict[str, Case] = {
    "fsdp · ep": {"parallel.fsdp": 4, "parallel.ep": 2, "train.micro_batch_sequences": 2},
    "tp · sp · cp": {"parallel.tp": 2, "parallel.cp": 2, "train.micro_batch_sequences": 8},
    "hsdp · selective": {
        "parallel.dp": 2,
        "parallel.fsdp": 2,
        "train.recompute": "selective",
        "train.micro_batch_sequences": 2,
    },
    "interleaved · fsdp": {
        "parallel.fsdp": 2,
        "parallel.pp": 2,
        "parallel.schedule": "interleaved",
        "parallel.virtual_stages": 2,
        "train.micro_batch_sequences": 2,
    },
    "zero bubble · fsdp": {
        "parallel.fsdp": 2,
        "parallel.pp": 2,
        "parallel.schedule": "zero_bubble",
        "train.micro_batch_sequences": 2,
    },
    "the seed's dp2 · mp4 · ep2 · pp2": {**SEEDS["pretrain 4k and finetune"], "train.micro_batch_sequences": 2},
}


class Rows:
    """Stands in for the loader: rows of one document each, as a dry run has them."""

    def __init__(self, length: int) -> None:
        self.length = length

    def rows(self, step: int, count: int, rank: int = 0, num_ranks: int = 1) -> list[Row]:
        tokens = np.arange(self.length) % 61 + 3
        return [Row(tokens, np.roll(tokens, -1), np.ones(self.length, np.float32), (self.length,))] * (
            count // num_ranks
        )


def route_evenly(logits_TE: Tensor, num_experts_per_tok: int, bias_E: Tensor | None = None) -> Routing:
    """Give every expert equally many tokens, whatever the logits."""
    probs_TE = logits_TE.softmax(dim=-1)
    num_tokens, num_experts = logits_TE.shape
    experts_TA = torch.arange(num_tokens * num_experts_per_tok).view(num_tokens, -1) % num_experts
    weights_TA = probs_TE.gather(1, experts_TA)
    return Routing(experts_TA, weights_TA / weights_TA.sum(dim=-1, keepdim=True), probs_TE, logits_TE)


class Taken:
    """A message that has arrived as far as its sender is concerned."""

    def is_completed(self) -> bool:
        return True


def take_messages_at_once(traffic: Traffic) -> list[Any]:
    """Send copies that no counter sees the memory of, as if nobody were ever late in taking a message.

    How long a real sender keeps one depends on how the ranks happen to run. Returns the sends, to be waited for.
    """
    under_way, send = [], dist.isend

    def isend(x: Tensor, *where: Any) -> Taken:
        with _disable_current_modes():
            copy = x.clone()
            with traffic:
                under_way.append(send(copy, *where))
        return Taken()

    dist.isend = isend  # type: ignore[assignment]  # in a process that ends with this
    return under_way


def really(case: Case) -> dict[str, Any]:
    """Train one real step of this rank and return what was counted, in the words of a dry run."""
    ROUTERS["softmax"] = route_evenly  # in a process that ends with this
    config, device = settings(case), torch.device("cpu")
    world = parallelize(config, mesh_of(config, device), torch.float32)
    load_weights(RandomReader(config.model, 1), world.held_parameters())
    optimizer = build_optimizer(world.parameters(), config.model, config.optim)
    loader: Any = Rows(config.data.seq_length)
    nothing: Any = None
    run = train.Run(config, Path(), device, nothing, loader, [], world, optimizer, 4, {}, nothing)
    with Footprint(world, optimizer) as memory, Traffic(world.mesh) as traffic:
        held, gradients = dict(memory.live), []
        scale = world.scale_gradients
        world.scale_gradients = lambda factor: (gradients.append(memory.gradients()), scale(factor))  # type: ignore[method-assign,assignment]
        under_way = take_messages_at_once(traffic)
        train.train_step(run)
    for work in under_way:
        work.wait()
    state = {"parameters": held["parameters"], "optimizer": held["optimizer"], "gradients": gradients[0]}
    return {"state": state, "most": memory.most, "peak": memory.peak, "sent": traffic.sent()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_dry_run_counts_what_a_real_run_counts(name: str) -> None:
    config = settings(LAYOUTS[name])
    ranks = run_in_world(config.parallel.degrees().num_ranks, really, LAYOUTS[name])
    for rank in plan.end_ranks(config):
        dry, real = plan.dry_run(config, rank, as_accelerator=False), ranks[rank]
        assert list(dry.sent) == real["sent"]
        assert {key: getattr(dry, key) for key in real["state"]} == real["state"]
        for key in ("activations", "gradients", "gathered"):
            assert dry.most[key] == pytest.approx(real["most"][key], rel=0.05), key
        assert dry.peak_bytes == pytest.approx(sum(real["peak"].values()), rel=0.05)
