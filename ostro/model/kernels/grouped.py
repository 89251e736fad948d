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

from ostro.model.corrected import Corrected, Stack, matrix
from ostro.model.kernels import Passes, fp8
from ostro.model.kernels.order import Order


def run_ordered(
    x_TD: Tensor, weights_TA: Tensor, order: Order, w13: Stack, w2: Stack, passes: Passes, use_fp8: bool = False
) -> Tensor:
    """Return each token's weighted sum of its experts' answers, [T, D]; all products in the dtype of x.

    w13 [E, 2, F, D] and w2 [E, D, F] have the dtype of x, weights_TA is fp32. Of both, or of neither, LoRA is trained.
    """
    x_ND = passes.permute(x_TD, order)
    if isinstance(w13, Corrected) and isinstance(w2, Corrected):
        h_N2F = _CorrectedUp.apply(x_ND, w13, w13.a, w13.b, order.ends_E)
        y_ND = _CorrectedDown.apply(h_N2F, weights_TA, w2, w2.a, w2.b, order, passes)
        return passes.unpermute(y_ND, None, order)  # type: ignore[arg-type]
    assert isinstance(w13, Tensor)
    assert isinstance(w2, Tensor)
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


# With LoRA the matrices are frozen: no gradient of theirs is computed, and of one in 4 bits nothing is kept but these.
# F.grouped_mm leaves rows past the last end as they were, so what is added to them is nobody's either.


class _CorrectedUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, w13: Corrected, a: Tensor | None, b: Tensor | None, ends_E: Tensor) -> Tensor:
        ctx.w13 = w13
        ctx.save_for_backward(x_ND, a, b, ends_E)
        h_N2F = _grouped_mm(x_ND, matrix(w13.weight, (), x_ND.dtype).flatten(1, 2), ends_E, False)
        return h_N2F if a is None or b is None else h_N2F + _low_rank(x_ND, a, b.flatten(1, -2), ends_E, w13.scale)

    @staticmethod
    def backward(ctx: Any, grad_N2F: Tensor) -> Any:  # type: ignore[override]
        x_ND, a, b, ends_E = ctx.saved_tensors
        w_EMD = matrix(ctx.w13.weight, (), grad_N2F.dtype).flatten(1, 2)
        grad_x = F.grouped_mm(grad_N2F, w_EMD, offs=ends_E)
        if a is None:
            return grad_x, None, None, None, None
        grad_NR = F.grouped_mm(grad_N2F, b.flatten(1, -2), offs=ends_E) * ctx.w13.scale
        grad_a, grad_b = _low_rank_gradients(grad_N2F, grad_NR, x_ND, a, ends_E, ctx.w13.scale)
        return grad_x + F.grouped_mm(grad_NR, a, offs=ends_E), None, grad_a, grad_b.view_as(b), None


class _CorrectedDown(torch.autograd.Function):
    """SwiGLU and the second product, as `_SwigluDown`."""

    @staticmethod
    def forward(
        ctx: Any,
        h_N2F: Tensor,
        weights_TA: Tensor,
        w2: Corrected,
        a: Tensor | None,
        b: Tensor | None,
        order: Order,
        passes: Passes,
    ) -> Tensor:
        ctx.w2, ctx.order, ctx.passes = w2, order, passes
        ctx.save_for_backward(h_N2F, weights_TA, a, b)
        a_NF = passes.swiglu(h_N2F, weights_TA, order)
        y_ND = _grouped_mm(a_NF, matrix(w2.weight, (), h_N2F.dtype), order.ends_E, False)
        return y_ND if a is None or b is None else y_ND + _low_rank(a_NF, a, b, order.ends_E, w2.scale)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> Any:  # type: ignore[override]
        h_N2F, weights_TA, a, b = ctx.saved_tensors
        ends_E, grad_ND = ctx.order.ends_E, grad_ND.contiguous()
        grad_a_NF = F.grouped_mm(grad_ND, matrix(ctx.w2.weight, (), grad_ND.dtype), offs=ends_E)
        if a is None:
            grad_h, _, grad_weights = ctx.passes.swiglu_backward(grad_a_NF, h_N2F, weights_TA, ctx.order)
            return grad_h, grad_weights, None, None, None, None, None
        grad_NR = F.grouped_mm(grad_ND, b, offs=ends_E) * ctx.w2.scale
        grad_a_NF = grad_a_NF + F.grouped_mm(grad_NR, a, offs=ends_E)
        grad_h, a_NF, grad_weights = ctx.passes.swiglu_backward(grad_a_NF, h_N2F, weights_TA, ctx.order)
        grad_a, grad_b = _low_rank_gradients(grad_ND, grad_NR, a_NF, a, ends_E, ctx.w2.scale)
        return grad_h, grad_weights, None, grad_a, grad_b, None, None


def _low_rank(x_NK: Tensor, a_ERK: Tensor, b_EMR: Tensor, ends_E: Tensor, scale: float) -> Tensor:
    """Return scale·B·A·x of each row's expert."""
    down_NR = F.grouped_mm(x_NK, a_ERK.transpose(1, 2), offs=ends_E)
    return F.grouped_mm(down_NR, b_EMR.transpose(1, 2), offs=ends_E) * scale


def _low_rank_gradients(
    grad_NM: Tensor, grad_NR: Tensor, x_NK: Tensor, a_ERK: Tensor, ends_E: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of A and B; grad_NR is that of A·x."""
    down_NR = F.grouped_mm(x_NK, a_ERK.transpose(1, 2), offs=ends_E) * scale
    return F.grouped_mm(grad_NR.t(), x_NK, offs=ends_E), F.grouped_mm(grad_NM.t(), down_NR, offs=ends_E)
