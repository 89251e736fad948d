"""Which experts a token goes to, and what is counted about it; all in fp32."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ostro.model.spans import Spans


@dataclasses.dataclass(frozen=True, eq=False)
class Routing:
    """One layer's choice: experts_TA (int64, heaviest first), weights_TA (sum 1), probs_TE and logits_TE, all fp32.

    probs_TE sums to 1 over the experts. Where a capacity drops choices kept_TA (bool) says which are left, and
    weights_TA is 0 at the others.
    """

    experts_TA: Tensor
    weights_TA: Tensor
    probs_TE: Tensor
    logits_TE: Tensor
    kept_TA: Tensor | None = None


def route_softmax(logits_TE: Tensor, num_experts_per_tok: int, bias_E: Tensor | None = None) -> Routing:
    """Softmax over all experts, take the best, renormalise their probabilities (Mixtral: arXiv 2401.04088 §2.1).

    It has no selection bias: bias_E is None.
    """
    assert bias_E is None
    probs_TE = logits_TE.softmax(dim=-1)
    weights_TA, experts_TA = probs_TE.topk(num_experts_per_tok, dim=-1)
    return Routing(experts_TA, weights_TA / weights_TA.sum(dim=-1, keepdim=True), probs_TE, logits_TE)


def route_sigmoid(logits_TE: Tensor, num_experts_per_tok: int, bias_E: Tensor | None = None) -> Routing:
    """Take the best of `sigmoid(logit) + bias`, weigh them by `sigmoid(logit)` over the sum of the chosen.

    The bias decides who is chosen and nothing else (arXiv 2408.15664 eq. 3; DeepSeek-V3, arXiv 2412.19437 eq. 12–16).
    Quotients are taken in logarithms, where they stay defined for logits whose sigmoid is 0 in fp32.
    """
    scores_TE = logsigmoid(logits_TE)
    with torch.no_grad():
        selection_TE = scores_TE.exp() if bias_E is None else scores_TE.exp() + bias_E
        chosen_TA = selection_TE.topk(num_experts_per_tok, dim=-1).indices
        order_TA = scores_TE.gather(1, chosen_TA).argsort(dim=-1, descending=True, stable=True)
        experts_TA = chosen_TA.gather(1, order_TA)
    weights_TA = scores_TE.gather(1, experts_TA).softmax(dim=-1)
    return Routing(experts_TA, weights_TA, scores_TE.softmax(dim=-1), logits_TE)


# logits_TE, experts per token, and the selection bias of `settings.ROUTERS_WITH_BIAS`.
ROUTERS: dict[str, Callable[[Tensor, int, Tensor | None], Routing]] = {
    "softmax": route_softmax,
    "sigmoid": route_sigmoid,
}


def jitter(x_TD: Tensor, draws_T: Tensor, layer: int, noise: float) -> Tensor:
    """Return x times uniform(1 − noise, 1 + noise), fp32: `router_jitter_noise` (arXiv 2101.03961 appendix C).

    Every factor is a pure function of (draw of the token, layer, channel): the same when a layer is recomputed, when a
    run is resumed, and whatever the micro-batches. Unlike in transformers, which multiplies in place, only the router
    sees it.
    """
    return x_TD.float() * (1.0 + noise * (2.0 * uniform(draws_T, layer, x_TD.shape[1]) - 1.0))


def uniform(draws_T: Tensor, salt: int, num_channels: int, first_channel: int = 0) -> Tensor:
    """Return numbers between 0 and 1 [T, channels], fp32: a pure function of (draw of the token, salt, channel)."""
    key_T = mixed(mixed(draws_T) + salt)
    channels_D = torch.arange(first_channel + 1, first_channel + num_channels + 1, device=draws_T.device) * GOLDEN
    bits_TD = (mixed(key_T[:, None] + channels_D) >> 40) & 0xFFFFFF
    return (bits_TD.float() + 0.5) * 2.0**-24


GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio, as an int64


def mixed(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al., OOPSLA'14) on int64, whose products wrap around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))  # the mask makes it a logical shift
        bits = bits * (factor - (1 << 64))
    return bits ^ ((bits >> 31) & ((1 << 33) - 1))


# Columns of a layer's statistics after its expert loads, each a sum over valid tokens.
STATS = ("balance", "z", "entropy", "confidence", "dropped")


def num_stats(num_experts: int) -> int:
    """Return the number of columns of `Spans.stats_LS`: choices per expert, then STATS."""
    return num_experts + len(STATS)


def choices(routing: Routing, valid_T: Tensor) -> Tensor:
    """Return how many valid choices each token made of each expert [T, E], 0 or 1, in the dtype of the probabilities.

    Dropped choices are among them: the load is what the router asks for, as MindFormers counts it.
    """
    valid_TA = valid_T[:, None].to(routing.probs_TE.dtype).expand_as(routing.experts_TA)
    return torch.zeros_like(routing.probs_TE).scatter_(1, routing.experts_TA, valid_TA)


@torch.no_grad()
def count(routing: Routing, spans: Spans, balance: Tensor, z: Tensor) -> Tensor:
    """Return one layer's statistics [num_stats], float64, of this micro-batch's valid tokens; nothing is waited for.

    `routing` has the weights from before anything was dropped.
    """
    valid_T = spans.valid_T
    load_E = choices(routing, valid_T).sum(dim=0, dtype=torch.float64)
    probs_TE = routing.probs_TE
    entropy_T = -(probs_TE * probs_TE.clamp(min=1e-30).log()).sum(dim=-1)
    entropy, confidence = (
        torch.where(valid_T, each_T, 0.0).sum(dtype=torch.float64) for each_T in (entropy_T, routing.weights_TA[:, 0])
    )
    dropped = torch.zeros_like(entropy)
    if routing.kept_TA is not None:
        dropped = (~routing.kept_TA & valid_T[:, None]).sum().double()
    rest = torch.stack([balance.double(), z.double(), entropy, confidence, dropped])
    return torch.cat([load_E, rest])
