"""Expert parallel: each rank holds some of a layer's experts, and tokens travel to theirs and back.

A layer exchanges the experts' counts once, then rows with their weights, then the answers; nothing is dropped that the
routing did not drop. The rows that arrive are tokens with a single choice each, so what runs the experts of one
process runs them here too.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ostro.model import ops
from ostro.model.corrected import Stack
from ostro.model.kernels.order import Order, balanced_ends, order_by_expert
from ostro.model.mixtral import Mixtral
from ostro.model.moe import Dispatch
from ostro.model.routing import Routing
from ostro.parallel import collectives
from ostro.parallel.collectives import Group
from ostro.parallel.mesh import Mesh


def apply(model: Mixtral, mesh: Mesh) -> None:
    """Let every layer's experts be asked wherever they lie."""
    tensor = mesh.tp if mesh.degrees.etp > 1 else None
    for block in model.blocks.values():
        experts = block.block_sparse_moe.experts
        if mesh.ep is not None:
            experts.dispatch = across(experts.dispatch, mesh.ep)
        if tensor is not None:
            experts.dispatch = _cut_along_ffn(experts.dispatch, tensor)


def across(local: Dispatch, group: Group) -> Dispatch:
    """Return a dispatch over the experts of all ranks of a group, of which `local` runs this rank's."""

    def dispatch(x_TD: Tensor, routing: Routing, w13: Stack, w2: Stack) -> Tensor:
        num_experts = len(w2) * dist.get_world_size(group)
        order = order_by_expert(routing.experts_TA, routing.kept_TA, num_experts)
        sent, received, rows_of_experts = exchange_counts(order, group)
        rows_N = order.order_N[: sum(sent)]
        weights_N = routing.weights_TA.flatten()[rows_N]
        x_RD = collectives.exchange(x_TD[rows_N // order.num_choices], sent, received, group)
        weights_R = collectives.exchange(weights_N, sent, received, group)
        # Rows come from one rank after another, from each by expert.
        experts_R = torch.arange(len(w2), device=x_TD.device).repeat(len(received))
        experts_R = experts_R.repeat_interleave(rows_of_experts, output_size=sum(received))
        arrived = Routing(experts_R[:, None], weights_R[:, None], routing.probs_TE, routing.logits_TE)
        y_RD = local(x_RD, arrived, w13, w2)
        y_ND = collectives.exchange(y_RD, received, sent, group)
        if len(y_ND) < len(order.order_N):  # the dropped come last, and give nothing
            y_ND = torch.cat([y_ND, y_ND.new_zeros(len(order.order_N) - len(y_ND), y_ND.shape[1])])
        return y_ND[order.place_TA].sum(dim=1)

    return dispatch


def exchange_counts(order: Order, group: Group) -> tuple[list[int], list[int], Tensor]:
    """Tell each rank how many rows each of its experts gets from here; the host waits for this, once a layer.

    Returns the rows sent to each rank, the rows received from each, and those by rank and then local expert.
    """
    ends_E = order.ends_E
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    num_ranks = dist.get_world_size(group)
    received_E = torch.empty_like(counts_E)
    dist.all_to_all_single(received_E, counts_E, group=group)
    if not ops.has_values():
        return _balanced_counts(order, group)
    both = torch.stack([counts_E, received_E]).view(2, num_ranks, -1).cpu()
    sent, received = both.sum(dim=2).tolist()
    return sent, received, received_E


def _balanced_counts(order: Order, group: Group) -> tuple[list[int], list[int], Tensor]:
    num_ranks = dist.get_world_size(group)
    ends = balanced_ends(len(order.order_N), len(order.ends_E))
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    each = len(counts) // num_ranks
    sent = [sum(counts[rank * each : (rank + 1) * each]) for rank in range(num_ranks)]
    mine = dist.get_rank(group)
    return sent, [sent[mine]] * num_ranks, torch.tensor(counts[mine * each : (mine + 1) * each] * num_ranks)


def _cut_along_ffn(local: Dispatch, group: Group) -> Dispatch:
    """Return a dispatch for experts whose inner dim is cut: all ranks see the group's tokens, each adds its part."""

    def dispatch(x_TD: Tensor, routing: Routing, w13: Stack, w2: Stack) -> Tensor:
        kept_TA = routing.kept_TA
        everyone = Routing(
            collectives.gathered(routing.experts_TA, group),
            collectives.gather(routing.weights_TA, group),
            routing.probs_TE,
            routing.logits_TE,
            None if kept_TA is None else collectives.gathered(kept_TA.byte(), group).bool(),
        )
        return collectives.scatter_sum(local(collectives.gather(x_TD, group), everyone, w13, w2), group)

    return dispatch
