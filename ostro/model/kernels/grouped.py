"""The experts on an accelerator: grouped products, with as few passes between them as there can be.

No count ever leaves the device, so the host never waits. The routing weight goes into SwiGLU, where it costs no pass
of its own (Σ w·(W2 a) = Σ W2 (w·a)), and its gradient comes out of SwiGLU's backward. Of what lies between the two
products only gate and up are kept: the activation is made again while they are read for their gradients. Routing is
never computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ostro.model.kernels import Passes, fp8
from ostro.model.kernels.order import Order


def run_ordered(
    x_TD: Tensor, weights_TA: Tensor, order: Order, w13: Tensor, w2: Tensor, passes: Passes, use_fp8: bool = False
) -> Tensor:
    """Return each token's weighted sum of its experts' answers, [T, D]; all products in the dtype of x.

    w13 [E, 2, F, D] and w2 [E, D, F] have the dtype of x, weights_TA is fp32.
    """
    x_ND = passes.permute(x_TD, order)
    h_N2F = _grouped_mm(x_ND, w13.flatten(1, 2), order.ends_E, use_fp8)
    y_ND = _SwigluDown.apply(h_N2F, weights_TA, w2, order, passes, use_fp8)
    return passes.unpermute(y_ND, None, order)  # type: ignore[arg-type]


def run_ordered_output_weighted(
    x_TD: Tensor, weights_TA: Tensor, order: Order, w13: Tensor, w2: Tensor, passes: Passes
) -> Tensor:
    """As `run_ordered`, the weights applied to the answers: y is kept for their gradient, N·D more values a layer."""
    h_N2F = _grouped_mm(passes.permute(x_TD, order), w13.flatten(1, 2), order.ends_E, False)
    y_ND = _SwigluDown.apply(h_N2F, None, w2, order, passes, False)
    return passes.unpermute(y_ND, weights_TA, order)  # type: ignore[arg-type]


def _grouped_mm(x_NK: Tensor, w_EMK: Tensor, ends_E: Tensor, use_fp8: bool) -> Tensor:
    if use_fp8:
        return fp8.grouped_mm_fp8(x_NK, w_EMK, ends_E)
    return F.grouped_mm(x_NK, w_EMK.transpose(-2, -1), offs=ends_E)


class _SwigluDown(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_N2F: Tensor, weights_TA: Tensor | None, w2: Tensor, order: Order, passes: Passes, use_fp8: bool
    ) -> Tensor:
        ctx.save_for_backward(h_N2F, weights_TA, w2)
        ctx.order, ctx.passes, ctx.use_fp8 = order, passes, use_fp8
        return _grouped_mm(passes.swiglu(h_N2F, weights_TA, order), w2, order.ends_E, use_fp8)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> Any:  # type: ignore[override]
        h_N2F, weights_TA, w2 = ctx.saved_tensors
        ends_E, grad_ND = ctx.order.ends_E, grad_ND.contiguous()
        grad_a_NF = _grouped_mm(grad_ND, w2.transpose(1, 2), ends_E, ctx.use_fp8)
        grad_h, a_NF, grad_weights = ctx.passes.swiglu_backward(grad_a_NF, h_N2F, weights_TA, ctx.order)
        grad_w2 = F.grouped_mm(grad_ND.t(), a_NF, offs=ends_E) if ctx.needs_input_grad[2] else None
        return grad_h, grad_weights, grad_w2, None, None, None
