"""The order in which experts see their rows, made without the host knowing a single count."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """order_N: int64, the flat choice (token · A + choice) in each sorted row. place_TA: int64, its inverse.

    ends_E: int32, where each expert's rows end. Dropped choices lie past the last end.
    """

    order_N: Tensor
    place_TA: Tensor
    ends_E: Tensor

    @property
    def num_choices(self) -> int:
        """Experts per token."""
        return self.place_TA.shape[1]

    @property
    def used_N(self) -> Tensor:  # noqa: N802
        """Which rows are somebody's, bool."""
        return torch.arange(len(self.order_N), device=self.order_N.device) < self.ends_E[-1]


def balanced_ends(num_rows: int, num_experts: int) -> list[int]:
    """Return where each expert's rows end if all experts have equally many, as nearly as that can be."""
    return [num_rows * (expert + 1) // num_experts for expert in range(num_experts)]


def order_by_expert(experts_TA: Tensor, kept_TA: Tensor | None, num_experts: int) -> Order:
    """Sort the choices by expert, stably, so that the same routing gives the same bits; dropped ones come last."""
    if kept_TA is not None:
        experts_TA = torch.where(kept_TA, experts_TA, num_experts)
    # Two bytes a key: a radix sort passes over the keys once for every few bits.
    sorted_N, order_N = experts_TA.flatten().to(torch.int16).sort(stable=True)
    each_E = torch.arange(num_experts, dtype=torch.int16, device=sorted_N.device)
    # bincount would make the host wait for the largest key.
    ends_E = torch.searchsorted(sorted_N, each_E, right=True, out_int32=True)
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return Order(order_N, place_N.view_as(experts_TA), ends_E)
