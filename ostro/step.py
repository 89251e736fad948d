"""One step of training: a batch's gradients, and the update; and everything that a step needs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ostro import spikes
from ostro.batch import Batch, batch_of, require_known, why_none
from ostro.config import Config
from ostro.data.loader import Loader
from ostro.data.shards import Shards
from ostro.data.tokenizer import Tokenizer
from ostro.errors import Error, TrainError
from ostro.model import layout, routing
from ostro.model.mixtral import Mixtral
from ostro.optim import AdamW, Optimizer, clip_factor, learning_rate, set_learning_rate, state_tensors
from ostro.optim.loss_scale import LossScale
from ostro.parallel.apply import World
from ostro.stopping import Evaluations
from ostro.weights.parts import Held
from ostro.weights.saver import Saver

Skipped = Literal["overflow", "spike"]


@dataclasses.dataclass(eq=False)
class Run:
    """Everything a step needs; `step` counts the batches seen, `data` says which tokens they are of.

    `num_skipped` of them brought no update: the schedule and the optimizer do not count them. `recent_norms` are those
    of gradients (`spikes`). `saved_step` is that of the newest checkpoint, `not_saved` why there is none, where that
    ends the run.
    """

    config: Config
    run_dir: Path
    device: torch.device
    tokenizer: Tokenizer
    loader: Loader
    eval_shards: list[Shards]
    world: World
    optimizer: AdamW
    total_steps: int
    data: dict[str, Any]
    saver: Saver
    step: int = 0
    num_tokens: int = 0
    saved_step: int | None = None
    not_saved: Error | None = None
    num_skipped: int = 0
    recent_norms: Sequence[float] = ()
    evaluations: Evaluations = dataclasses.field(default_factory=Evaluations)
    prompts: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.loss_scale = LossScale(self.config.train.loss_scale if self.scales_loss else 1.0)

    @property
    def scales_loss(self) -> bool:
        """Whether gradients may overflow: in fp16."""
        return self.config.train.dtype == "fp16"

    @property
    def model(self) -> Mixtral:
        """The model, or this rank's first stage of it."""
        return self.world.pipeline.stages[0].model

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def remembered(self) -> dict[str, Any]:
        """Return what a checkpoint says of the loop, for `remember`."""
        return {
            "num_skipped": self.num_skipped,
            "loss_scale": dataclasses.asdict(self.loss_scale),
            "recent_norms": list(self.recent_norms),
            "evaluations": dataclasses.asdict(self.evaluations),
        }

    def remember(self, loop: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint says; an older one says nothing."""
        if loop:
            self.num_skipped, self.recent_norms = loop["num_skipped"], loop["recent_norms"]
            self.evaluations = Evaluations(**loop["evaluations"])
            if self.scales_loss:
                self.loss_scale = LossScale(**loop["loss_scale"])

    def held(self) -> dict[str, Held]:
        """What this rank has of the weights and the optimizer's state."""
        return self.world.held(state_tensors(self.world.saved_parameters(), self.optimizer))


@dataclasses.dataclass(frozen=True)
class StepStats:
    """What one step did: the mean loss in nats per label, the gradient's norm, and summed routing statistics.

    `skipped` says why nothing was updated, if so; `loss_scale` is what the loss was multiplied by.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    flops: float
    stats_LS: Tensor
    loss_scale: float = 1.0
    skipped: Skipped | None = None


def train_step(run: Run) -> StepStats:
    """Do one update: accumulate over micro-batches weighted by valid tokens, clip, and step.

    Every rank of the run does so at the same time; all of them return the same. A gradient that overflows in fp16, or
    is a spike, updates nothing; a loss or gradient that is not finite otherwise raises TrainError.
    """
    config, world, device = run.config, run.world, run.device
    mesh, train = world.mesh, config.train
    rows = run.loader.rows(run.step, train.global_batch_sequences, mesh.data_rank, mesh.num_data_ranks)
    require_known(rows, config.model.vocab_size, f"step {run.step + 1}")
    counted = rows if world.counts_data else []
    lengths = [n for row in counted for n in row.document_lengths]
    flops = layout.training_flops(config.model, lengths, world.lora)
    totals = [sum(float(row.weights_L.sum()) for row in counted), sum(len(row.tokens_L) for row in counted), flops]
    totals_3 = torch.tensor(totals, dtype=torch.float64, device=device)
    num_labels, num_tokens, flops = world.sum_over_ranks(totals_3).tolist()
    if num_labels == 0:
        raise TrainError(f"step {run.step + 1}: no token of this batch has a label that is learned: {why_none(rows)}.")
    num_stats = routing.num_stats(config.model.num_local_experts)
    stats_LS = torch.zeros(config.model.num_hidden_layers, num_stats, dtype=torch.float64, device=device)
    scale = run.loss_scale.value
    batches = [
        batch_of(
            rows[first : first + train.micro_batch_sequences],
            device,
            balance_scale=scale / num_tokens,
            stats_LS=stats_LS,
            draws_from=_draws_from(run, first, len(rows)) if config.draws else None,
            multiple=world.multiple,
        )
        for first in range(0, len(rows), train.micro_batch_sequences)
    ]
    sums = add_gradients(world, batches, scale / num_labels, stats_LS)
    loss, grad_norm = sums[0].item() / scale, math.sqrt(sums[1].item()) / scale
    skipped = _why_skipped(run, loss, grad_norm)
    rate = learning_rate(config.optim, run.step - run.num_skipped, run.total_steps)
    if skipped is None:
        set_learning_rate(run.optimizer, rate)
        update(world, run.optimizer, clip_factor(grad_norm, config.optim.max_grad_norm) / scale)
        world.update_biases(stats_LS, config.moe.bias_update_rate)
    else:
        run.optimizer.zero_grad(set_to_none=True)
        run.num_skipped += 1
    if run.scales_loss:
        run.loss_scale = run.loss_scale.after(skipped == "overflow", train.loss_scale_window)
    run.step += 1
    run.num_tokens += int(num_tokens)
    return StepStats(loss, grad_norm, rate, int(num_tokens), flops, stats_LS, scale, skipped)


def _why_skipped(run: Run, loss: float, grad_norm: float) -> Skipped | None:
    """Return why nothing is to be updated, if so; all ranks have the same numbers. TrainError if it cannot go on."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        if run.scales_loss and run.loss_scale.value > 1:
            return "overflow"
        raise TrainError(
            f"step {run.step + 1}: the loss is {loss} and the gradient's norm {grad_norm}; nothing was updated. "
            "Lower optim.learning_rate, or look at this step's data."
        )
    train, optim = run.config.train, run.config.optim
    if train.skip_spikes is None and optim.skip_grad_norm is None:
        return None
    most = spikes.limit(run.recent_norms, train, optim)
    run.recent_norms = spikes.remembered(run.recent_norms, grad_norm)
    if grad_norm <= most:
        return None
    documents = run.loader.documents(run.step, train.global_batch_sequences)
    step = run.step + 1
    spikes.note(
        run.run_dir, {"step": step, "loss": loss, "grad_norm": grad_norm, "limit": most, "documents": documents}
    )
    return "spike"


def add_gradients(world: World, batches: Sequence[Batch], scale: float, stats_LS: Tensor) -> Tensor:
    """Add up a step's gradients; return the loss and the gradient's squared norm of all ranks [2], fp64.

    Statistics, which the batches add to, are summed over the ranks as well. Nothing is waited for.
    """
    part = world.forward_backward(batches, scale)
    sums = torch.stack([part.double(), world.squared_grad_norm()])
    for each in (sums, stats_LS):
        world.sum_over_ranks(each)
    return sums


def update(world: World, optimizer: Optimizer, factor: float) -> None:
    """Update the parameters by their gradients times `factor`, and drop the gradients."""
    world.scale_gradients(factor)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _draws_from(run: Run, first: int, num_rows: int) -> list[int]:
    """Return the numbers jitter is drawn from for a micro-batch of this rank's rows, other seeds far away."""
    train, mesh = run.config.train, run.world.mesh
    count = train.global_batch_sequences
    row = run.step * count + mesh.data_rank * (count // mesh.num_data_ranks) + first
    numbers = range(row, row + min(train.micro_batch_sequences, num_rows - first))
    return [(train.seed * 0x9E3779B97F4A7C15 + number * run.config.data.seq_length) % (1 << 62) for number in numbers]
