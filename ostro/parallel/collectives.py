"""The collectives that a model's forward and backward passes need, as functions autograd knows."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup

# Newer torch has other names for these two, and warns of the old ones.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def gather(x: Tensor, group: Group) -> Tensor:
    """Return every rank's x, one after another along dim 0; backward sums the gradients of each rank's part."""
    return _Gather.apply(x, group)  # type: ignore[return-value]


def scatter_sum(x: Tensor, group: Group) -> Tensor:
    """Return this rank's part (along dim 0) of the sum of every rank's x; backward gathers."""
    return _ScatterSum.apply(x, group)  # type: ignore[return-value]


def exchange(x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    """Send rows [sum(sent), …] to the ranks of the group, `sent[r]` to rank r; return what came, sum(received) rows."""
    return _Exchange.apply(x, sent, received, group)  # type: ignore[return-value]


def summed(x: Tensor, group: Group) -> Tensor:
    """Return the sum of every rank's x, which has no gradient."""
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def gathered(x: Tensor, group: Group) -> Tensor:
    """Return every rank's x, one after another along dim 0, without a gradient."""
    out = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
    _all_gather(out, x.detach().contiguous(), group=group)
    return out


def _scattered(x: Tensor, group: Group) -> Tensor:
    out = x.new_empty(len(x) // dist.get_world_size(group), *x.shape[1:])
    _reduce_scatter(out, x.contiguous(), group=group)
    return out


def _exchanged(x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return _scattered(grad, ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _scattered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return gathered(grad, ctx.group), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchanged(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return _exchanged(grad, ctx.received, ctx.sent, ctx.group), None, None, None
