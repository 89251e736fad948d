"""The passes spelt out in torch: what runs without Triton, and what Triton's are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ostro.model.kernels.order import Order


def permute(x_TD: Tensor, order: Order) -> Tensor:
    """Return each row's token, [N, D]; unused rows are 0."""
    x_ND = x_TD[order.order_N // order.num_choices]
    return torch.where(order.used_N[:, None], x_ND, 0)


def unpermute(y_ND: Tensor, weights_TA: Tensor | None, order: Order) -> Tensor:
    """Return the sum, in fp32 and rounded once, of each token's rows times their weights, [T, D]."""
    is_used = order.place_TA < order.ends_E[-1]
    # Poison is taken out before it is weighed: 0 · NaN is NaN, also in a gradient.
    y_TAD = torch.where(order.used_N[:, None], y_ND, 0)[order.place_TA].float()
    if weights_TA is not None:
        y_TAD = y_TAD * torch.where(is_used, weights_TA, 0)[..., None]
    return y_TAD.sum(dim=1).to(y_ND.dtype)


def swiglu(h_N2F: Tensor, weights_TA: Tensor | None, order: Order) -> Tensor:
    """Return `silu(gate) · up · weight`, computed in fp32 and rounded once, [N, F]; unused rows are 0."""
    gate, up = torch.where(order.used_N[:, None], h_N2F, 0).float().chunk(2, dim=-1)
    a_NF = F.silu(gate) * up
    if weights_TA is not None:
        a_NF = a_NF * weights_TA.flatten()[order.order_N][:, None]
    return a_NF.to(h_N2F.dtype)


def swiglu_backward(
    grad_a_NF: Tensor, h_N2F: Tensor, weights_TA: Tensor | None, order: Order
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradient of h [N, 2F], `swiglu` once more, and the gradient of the weights [T, A] if there are any."""
    used = order.used_N[:, None]
    gate, up = torch.where(used, h_N2F, 0).float().chunk(2, dim=-1)
    grad_a_NF = torch.where(used, grad_a_NF, 0).float()
    sigmoid = gate.sigmoid()
    silu, product = gate * sigmoid, gate * sigmoid * up
    grad_weights_TA = None
    if weights_TA is not None:
        weight_N1 = weights_TA.flatten()[order.order_N][:, None]
        grad_N = (grad_a_NF * product).sum(dim=1)
        grad_weights_TA = torch.zeros_like(weights_TA).flatten().index_copy(0, order.order_N, grad_N)
        grad_weights_TA = grad_weights_TA.view_as(weights_TA)
        grad_a_NF, product = grad_a_NF * weight_N1, product * weight_N1
    grad_gate = grad_a_NF * up * (sigmoid + silu * (1 - sigmoid))
    grad_h_N2F = torch.cat([grad_gate, grad_a_NF * silu], dim=-1).to(h_N2F.dtype)
    return grad_h_N2F, product.to(h_N2F.dtype), grad_weights_TA
