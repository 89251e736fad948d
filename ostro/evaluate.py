"""How well a model predicts text: loss, perplexity, bits per byte, and how its experts share the work."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Literal

import torch

from ostro.batch import NO_ROW, batch_of, require_known
from ostro.data.loader import Loader, packing_of
from ostro.data.packing import Packing
from ostro.data.shards import Shards
from ostro.errors import DataError, TrainError
from ostro.model import routing
from ostro.model.mixtral import Mixtral
from ostro.parallel.apply import World, alone

# Tokens of one forward pass, whole rows of them.
_BATCH_TOKENS = 8192


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """loss in nats per scored token; bits_per_byte over the UTF-8 bytes of the text; expert_load: a list a layer.

    bits_per_byte is NaN where only some tokens are scored, or where the data was tokens from the start.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    num_tokens: int
    num_bytes: int
    expert_load: list[list[float]]
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Return what a row of metrics.jsonl says of it."""
        bits = self.bits_per_byte
        return {"eval_loss": self.loss} | ({} if math.isnan(bits) else {"eval_bits_per_byte": bits})


@torch.no_grad()
def evaluate(
    model: Mixtral | World,
    shards: Sequence[Shards],
    seq_length: int,
    packing: Packing | Literal["auto"] = "auto",
    pad_token_id: int = -1,
) -> Evaluation:
    """Score every token of the shards that is learned exactly once, each document's first excepted.

    Rows of `seq_length` tokens are scored independently, so a token sees at most the tokens before it in its row.
    They are packed as for training (`packing_of`), but whatever is too long is split; whatever the capacity in
    training, no choice of an expert is dropped. Raises DataError where no token is learned.
    """
    start = time.monotonic()
    loader = Loader(
        shards,
        seq_length=seq_length,
        shuffle=False,
        drop_last=False,
        packing=packing_of(shards, packing),
        pad_token_id=pad_token_id,
    )
    world = model if isinstance(model, World) else alone(model)
    config, device, mesh = world.model, world.mesh.device, world.mesh
    num_stats = routing.num_stats(config.num_local_experts)
    stats_LS = torch.zeros(config.num_hidden_layers, num_stats, dtype=torch.float64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    was_training = world.is_training
    world.train(False)
    rows_at_once = max(1, _BATCH_TOKENS // seq_length)
    for block in range(0, loader.num_rows, mesh.num_data_ranks * rows_at_once):
        first = block + mesh.data_rank * rows_at_once
        rows = [loader.row(i) for i in range(first, min(first + rows_at_once, loader.num_rows))] or [NO_ROW]
        require_known(rows, config.vocab_size, f"{shards[0].path}, rows from {first}")
        batch = batch_of(rows, device, stats_LS=stats_LS, multiple=world.multiple)
        sums[0] += world.score(batch)
        sums[1] += batch.weights_T.sum() if world.counts_data else 0
    world.train(was_training)
    for each in (sums, stats_LS):
        world.sum_over_ranks(each)
    total, weight = sums.tolist()
    if not math.isfinite(total):
        raise TrainError("the loss of the evaluation is not finite: the weights are damaged or have diverged.")
    if not weight:
        raise DataError(f"{shards[0].path}: no token of it is learned, so there is nothing to score: name other data.")
    num_bytes = sum(shard.manifest.num_bytes for shard in shards)
    kinds = {source.get("kind") for part in shards for source in part.manifest.sources}
    is_text = not kinds & {"mindrecord", "megatron"} and pad_token_id < 0 and packing_of(shards) == "concat"
    loss = total / weight
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=total / math.log(2) / num_bytes if is_text else math.nan,
        num_tokens=int(weight),
        num_bytes=num_bytes,
        expert_load=expert_load(stats_LS, config.num_local_experts),
        seconds=time.monotonic() - start,
    )


def expert_load(stats_LS: torch.Tensor, num_experts: int) -> list[list[float]]:
    """Return each layer's share of choices per expert; a layer's shares sum to 1."""
    loads_LE = stats_LS[:, :num_experts]
    return (loads_LE / loads_LE.sum(dim=1, keepdim=True).clamp(min=1)).tolist()
