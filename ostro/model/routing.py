"""Which experts a token goes to, the losses that keep them balanced, and what is counted about it; all in fp32."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ostro.model.spans import Spans


@dataclasses.dataclass(frozen=True, eq=False)
class Routing:
    """One layer's choice: experts_TA (int64, best first), weights_TA (fp32, sum 1), probs_TE and logits_TE (fp32)."""

    experts_TA: Tensor
    weights_TA: Tensor
    probs_TE: Tensor
    logits_TE: Tensor


def route_softmax(logits_TE: Tensor, num_experts_per_tok: int) -> Routing:
    """Softmax over all experts, take the best, renormalise their probabilities (Mixtral: arXiv 2401.04088 §2.1)."""
    probs_TE = logits_TE.softmax(dim=-1)
    weights_TA, experts_TA = probs_TE.topk(num_experts_per_tok, dim=-1)
    return Routing(experts_TA, weights_TA / weights_TA.sum(dim=-1, keepdim=True), probs_TE, logits_TE)


ROUTERS: dict[str, Callable[[Tensor, int], Routing]] = {"softmax": route_softmax}


def sequence_balance(routing: Routing, spans: Spans) -> Tensor:
    """Return `Σ over sequences of valid tokens · E · Σ_e f_e · P_e`, a scalar.

    In each sequence, over its valid tokens, f_e is the mean number of choices that fell on expert e and P_e the mean
    probability of e, as in the Switch Transformer (arXiv 2101.03961 eq. 4–6) with its f summed over the choices.
    Divided by all valid tokens, a perfectly balanced router gives `num_experts_per_tok`. Sums over sequences are
    additive: the same whatever the micro-batches or ranks.
    """
    num_experts = routing.probs_TE.shape[1]
    valid_T1 = spans.valid_T[:, None].float()
    zeros_SE = routing.probs_TE.new_zeros(spans.num_sequences, num_experts)
    chosen_TE = torch.zeros_like(routing.probs_TE).scatter_(1, routing.experts_TA, 1.0)
    chosen_SE = zeros_SE.index_add(0, spans.sequence_ids_T, chosen_TE * valid_T1)
    probs_SE = zeros_SE.index_add(0, spans.sequence_ids_T, routing.probs_TE * valid_T1)
    tokens_S = zeros_SE[:, 0].index_add(0, spans.sequence_ids_T, valid_T1[:, 0])
    return num_experts * ((chosen_SE * probs_SE).sum(dim=-1) / tokens_S.clamp(min=1)).sum()


def hf_balance(routings: list[Routing], spans: Spans) -> Tensor:
    """Return Hugging Face's balancing loss: f and P over the valid tokens of *all* layers at once.

    It is not additive over micro-batches, so it is for parity only (transformers, `load_balancing_loss_func`).
    """
    valid_T1 = spans.valid_T[:, None].float()
    num_rows = valid_T1.sum() * len(routings)
    chosen_E = sum(
        (torch.zeros_like(r.probs_TE).scatter_(1, r.experts_TA, 1.0) * valid_T1).sum(dim=0) for r in routings
    )
    probs_E = sum((r.probs_TE * valid_T1).sum(dim=0) for r in routings)
    return routings[0].probs_TE.shape[1] * ((chosen_E / num_rows) * (probs_E / num_rows)).sum()


def z_loss(routing: Routing, spans: Spans) -> Tensor:
    """Return `Σ over valid tokens of (log Σ_e exp logit_e)²` (ST-MoE, arXiv 2202.08906 eq. 5, before the mean)."""
    return (routing.logits_TE.logsumexp(dim=-1).square() * spans.valid_T).sum()


# Columns of a layer's statistics after its expert loads, each a sum over valid tokens.
STATS = ("balance", "z", "entropy", "confidence")


def num_stats(num_experts: int) -> int:
    """Return the number of columns of `Spans.stats_LS`: choices per expert, then STATS."""
    return num_experts + len(STATS)


@torch.no_grad()
def count(routing: Routing, spans: Spans, balance: Tensor, z: Tensor) -> Tensor:
    """Return one layer's statistics [num_stats], float64, of this micro-batch's valid tokens."""
    num_experts = routing.probs_TE.shape[1]
    valid_T = spans.valid_T
    chosen = routing.experts_TA[valid_T].flatten()
    load_E = torch.bincount(chosen, minlength=num_experts).double()
    probs = routing.probs_TE[valid_T]
    entropy = -(probs * probs.clamp(min=1e-30).log()).sum()
    confidence = routing.weights_TA[valid_T][:, 0].sum()
    rest = torch.stack([balance.double(), z.double(), entropy.double(), confidence.double()])
    return torch.cat([load_E, rest])
