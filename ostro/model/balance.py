"""What keeps the experts evenly busy: losses on the router, and the rule that moves the selection bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ostro.model.routing import Routing, choices
from ostro.model.spans import Spans

SumCounts = Callable[[Tensor], Tensor]
"""Adds up counts over whoever shares a micro-batch; `alone` where one process has all of it."""


def alone(counts: Tensor) -> Tensor:
    """Return the counts as they are: this process has the whole micro-batch."""
    return counts


def sequence_balance(routing: Routing, spans: Spans, sum_counts: SumCounts = alone) -> Tensor:
    """Return `Σ over sequences of valid tokens · E · Σ_e f_e · P_e`, a scalar.

    In each sequence, over its valid tokens, f_e is the mean number of choices that fell on expert e and P_e the mean
    probability of e, as in the Switch Transformer (arXiv 2101.03961 eq. 4–6) with its f summed over the choices.
    Divided by all valid tokens, a perfectly balanced router gives `num_experts_per_tok`. Sums over sequences are
    additive: the same whatever the micro-batches or ranks. `sum_counts` adds the counts, which have no gradient, over
    the ranks that a sequence is cut over; each rank's P then adds its part.
    """
    num_experts = routing.probs_TE.shape[1]
    valid_T = spans.valid_T.to(routing.probs_TE.dtype)
    zeros_SE = routing.probs_TE.new_zeros(spans.num_sequences, num_experts)
    chosen_SE = zeros_SE.index_add(0, spans.sequence_ids_T, choices(routing, spans.valid_T))
    probs_SE = zeros_SE.index_add(0, spans.sequence_ids_T, routing.probs_TE * valid_T[:, None])
    tokens_S = zeros_SE[:, 0].index_add(0, spans.sequence_ids_T, valid_T)
    counts = sum_counts(torch.cat([chosen_SE, tokens_S[:, None]], dim=1).detach())
    chosen_SE, tokens_S = counts[:, :-1].contiguous(), counts[:, -1]
    return num_experts * ((chosen_SE * probs_SE).sum(dim=-1) / tokens_S.clamp(min=1)).sum()


def batch_balance(routing: Routing, spans: Spans, sum_counts: SumCounts = alone) -> Tensor:
    """Return `valid tokens · E · Σ_e f_e · P_e` with f over the whole micro-batch, a scalar.

    Looser than `sequence_balance`, since sequences may specialise (arXiv 2501.11873); it depends on what else is in
    the micro-batch. `sum_counts` adds the counts, which have no gradient, over all ranks that share one; each rank's
    P then adds its part.
    """
    valid_T = spans.valid_T.to(routing.probs_TE.dtype)
    counts = torch.cat([choices(routing, spans.valid_T).sum(dim=0), valid_T.sum()[None]])
    counts = sum_counts(counts.detach())
    share_E = counts[:-1] / counts[-1].clamp(min=1)
    return routing.probs_TE.shape[1] * (share_E * (routing.probs_TE * valid_T[:, None]).sum(dim=0)).sum()


def hf_balance(routings: Sequence[Routing], spans: Spans) -> Tensor:
    """Return Hugging Face's balancing loss: f and P over the valid tokens of *all* layers at once.

    It is not additive over micro-batches, so it is for parity only (transformers, `load_balancing_loss_func`).
    """
    valid_T = spans.valid_T.to(routings[0].probs_TE.dtype)
    num_rows = (valid_T.sum() * len(routings)).clamp(min=1)
    chosen_E = torch.stack([choices(routing, spans.valid_T).sum(dim=0) for routing in routings]).sum(dim=0)
    probs_E = torch.stack([(routing.probs_TE * valid_T[:, None]).sum(dim=0) for routing in routings]).sum(dim=0)
    return routings[0].probs_TE.shape[1] * ((chosen_E / num_rows) * (probs_E / num_rows)).sum()


def z_loss(routing: Routing, spans: Spans) -> Tensor:
    """Return `Σ over valid tokens of (log Σ_e exp logit_e)²` (ST-MoE, arXiv 2202.08906 eq. 5, before the mean)."""
    return (routing.logits_TE.logsumexp(dim=-1).square() * spans.valid_T).sum()


@torch.no_grad()
def update_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> None:
    """Move the selection bias, in place, towards the experts that are asked for too seldom.

    `b += rate · sign(mean load − load)`, once a step, from the load of all its tokens (arXiv 2408.15664, algorithm 1).
    """
    bias_E += (rate * torch.sign(load_E.mean() - load_E)).to(bias_E.dtype)
