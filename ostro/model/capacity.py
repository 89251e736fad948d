"""How many choices an expert takes, and whose are dropped where more are made.

In each group (a sequence, or everything on a rank) the choices of an expert form a queue, and those past its capacity
are dropped: they add nothing, and the weights of a token's other choices stay what they were. The order of the queue
is `drop`'s:

- token: earlier tokens first, all their choices before any of a later token (MindFormers' sdrop);
- choice: all first choices in token order, then all second choices (MindFormers' kdrop);
- probability: heavier choices first, of equal ones the earlier token's (Megatron's `probs`).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ostro.model.routing import Routing
from ostro.model.settings import Drop, MoeConfig
from ostro.model.spans import Spans


def within_capacity(routing: Routing, spans: Spans, moe: MoeConfig) -> Routing:
    """Return the routing with what exceeds `moe`'s capacity dropped.

    With `capacity_group` sequence only valid tokens count and only they are served, so that padding changes nothing.
    With rank all tokens of the micro-batch are one group and padding takes its place in the queues like any other,
    as in MindFormers: what is dropped then depends on the micro-batches and the layout.
    """
    num_tokens, num_choices = routing.experts_TA.shape
    num_experts = routing.probs_TE.shape[1]
    if moe.capacity_group == "sequence":
        groups_T, served_T = spans.sequence_ids_T, spans.valid_T
        sizes_G = groups_T.new_zeros(spans.num_sequences).index_add(0, groups_T, served_T.to(groups_T.dtype))
    else:
        groups_T, served_T = torch.zeros_like(spans.sequence_ids_T), torch.ones_like(spans.valid_T)
        sizes_G = torch.full((1,), num_tokens, dtype=groups_T.dtype, device=groups_T.device)
    capacity_G = capacities(sizes_G, num_experts, num_choices, moe)
    # Tokens that are not served form a group of their own, of capacity 0.
    groups_T = torch.where(served_T, groups_T, len(sizes_G))
    capacity_G = torch.cat([capacity_G, torch.zeros_like(capacity_G[:1])])
    places_TA = places(routing.experts_TA, routing.weights_TA, groups_T, num_experts, moe.drop)
    kept_TA = places_TA < capacity_G[groups_T][:, None]
    return dataclasses.replace(routing, weights_TA=routing.weights_TA * kept_TA, kept_TA=kept_TA)


def capacities(sizes_G: Tensor, num_experts: int, num_choices: int, moe: MoeConfig) -> Tensor:
    """Return how many choices an expert takes of each group, int64, given the groups' numbers of tokens.

    ⌈choices · tokens · factor / experts⌉, at least `min_capacity`, at most all tokens, then rounded up to
    `capacity_multiple`, beyond all tokens perhaps: MindFormers' order (r1.7.0, TopkRouterV2).
    """
    assert moe.capacity_factor is not None
    share_G = (num_choices * sizes_G.double() * moe.capacity_factor / num_experts).ceil()
    wanted_G = share_G.clamp(min=moe.min_capacity).minimum(sizes_G.double()).long()  # a huge factor fits no int64
    multiple = moe.capacity_multiple
    return (wanted_G + multiple - 1).div(multiple, rounding_mode="floor") * multiple


def places(experts_TA: Tensor, weights_TA: Tensor, groups_T: Tensor, num_experts: int, drop: Drop) -> Tensor:
    """Return each choice's place, from 0, in the queue of its expert and group; int64 [T, A], nothing is waited for."""
    num_tokens, num_choices = experts_TA.shape
    queues_N = (groups_T[:, None] * num_experts + experts_TA).flatten()
    first_N = torch.arange(num_tokens * num_choices, device=queues_N.device)
    if drop == "choice":
        first_N = first_N.view(num_tokens, num_choices).t().flatten()
    elif drop == "probability":
        first_N = weights_TA.flatten().argsort(descending=True, stable=True)
    # Stable: within a queue the order is that of before.
    order_N = first_N[queues_N[first_N].argsort(stable=True)]
    sorted_N = queues_N[order_N]
    places_N = torch.arange(len(sorted_N), device=sorted_N.device) - torch.searchsorted(sorted_N, sorted_N)
    return torch.empty_like(places_N).scatter_(0, order_N, places_N).view(num_tokens, num_choices)


def places_loop(experts_TA: Tensor, weights_TA: Tensor, groups_T: Tensor, num_experts: int, drop: Drop) -> Tensor:
    """The oracle of `places`: walk through the choices in their order and number them, queue by queue."""
    num_tokens, num_choices = experts_TA.shape
    walks = {
        "token": [(t, a) for t in range(num_tokens) for a in range(num_choices)],
        "choice": [(t, a) for a in range(num_choices) for t in range(num_tokens)],
    }
    walks["probability"] = sorted(walks["token"], key=lambda at: -weights_TA[at].item())
    lengths: dict[tuple[int, int], int] = {}
    out_TA = torch.empty_like(experts_TA)
    for at in walks[drop]:
        queue = (int(groups_T[at[0]]), int(experts_TA[at]))
        out_TA[at] = lengths.get(queue, 0)
        lengths[queue] = int(out_TA[at]) + 1
    return out_TA
