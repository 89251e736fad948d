"""Permute and un-permute in Triton, with their backward passes.

Each moves every row once. Block shapes are fixed rather than autotuned: two runs might tune to different ones, and then
the sums of their weights' gradients would differ in the last bit.
"""

# A launch of a Triton kernel has no types, and Triton is not installed everywhere.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ostro.model.kernels.order import Order

_COLUMNS = 2048


def permute(x_TD: Tensor, order: Order) -> Tensor:
    """`plain.permute`, its backward a gather-and-sum without an atomic addition."""
    return _Permute.apply(x_TD, order)  # type: ignore[return-value]


def unpermute(y_ND: Tensor, weights_TA: Tensor | None, order: Order) -> Tensor:
    """`plain.unpermute`; with weights, it keeps y for their gradient."""
    return _Unpermute.apply(y_ND, weights_TA, order)  # type: ignore[return-value]


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return _gather(x_TD, order)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> Any:  # type: ignore[override]
        return _gather_and_sum(grad_ND, None, ctx.order), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weights_TA: Tensor | None, order: Order) -> Tensor:
        ctx.order = order
        if weights_TA is not None:
            ctx.save_for_backward(y_ND, weights_TA)
        return _gather_and_sum(y_ND, weights_TA, order)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> Any:  # type: ignore[override]
        if not ctx.saved_tensors:
            return _gather(grad_TD, ctx.order), None, None
        y_ND, weights_TA = ctx.saved_tensors
        order, grad_TD = ctx.order, grad_TD.contiguous()
        y_ND, weights_TA = y_ND.contiguous(), weights_TA.contiguous()
        grad_ND, grad_weights_TA = torch.empty_like(y_ND), torch.empty_like(weights_TA)
        if y_ND.numel():
            num_rows, hidden = y_ND.shape
            _unpermute_backward_kernel[(num_rows,)](
                grad_TD, y_ND, weights_TA, order.order_N, order.ends_E, grad_ND, grad_weights_TA,
                hidden, len(order.ends_E), order.num_choices, BLOCK=_block(hidden),
            )  # fmt: skip
        return grad_ND, grad_weights_TA, None


def _block(width: int) -> int:
    return min(_COLUMNS, triton.next_power_of_2(width))


def _gather(x_TD: Tensor, order: Order) -> Tensor:
    x_TD = x_TD.contiguous()
    num_rows, hidden = len(order.order_N), x_TD.shape[1]
    out_ND = x_TD.new_empty(num_rows, hidden)
    if out_ND.numel():
        block = _block(hidden)
        _gather_kernel[(num_rows, triton.cdiv(hidden, block))](
            x_TD, order.order_N, order.ends_E, out_ND, hidden, len(order.ends_E), order.num_choices, BLOCK=block
        )
    return out_ND


def _gather_and_sum(y_ND: Tensor, weights_TA: Tensor | None, order: Order) -> Tensor:
    y_ND = y_ND.contiguous()
    num_tokens, hidden = len(order.place_TA), y_ND.shape[1]
    out_TD = y_ND.new_empty(num_tokens, hidden)
    if out_TD.numel():
        block = _block(hidden)
        weights = order.place_TA if weights_TA is None else weights_TA.contiguous()
        _gather_and_sum_kernel[(num_tokens, triton.cdiv(hidden, block))](
            y_ND, weights, order.place_TA, order.ends_E, out_TD, hidden, len(order.ends_E),
            CHOICES=order.num_choices, WEIGHTED=weights_TA is not None, BLOCK=block,
        )  # fmt: skip
    return out_TD


@triton.jit
def _gather_kernel(x_ptr, order_ptr, ends_ptr, out_ptr, hidden, num_experts, num_choices, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Nothing is read of a row that is nobody's.
    limit = tl.where(row < tl.load(ends_ptr + num_experts - 1), hidden, 0)
    token = tl.load(order_ptr + row) // num_choices
    x = tl.load(x_ptr + token * hidden + columns, mask=columns < limit, other=0.0)
    tl.store(out_ptr + row * hidden + columns, x, mask=columns < hidden)


@triton.jit
def _gather_and_sum_kernel(
    y_ptr, weights_ptr, place_ptr, ends_ptr, out_ptr, hidden, num_experts,
    CHOICES: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(ends_ptr + num_experts - 1)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(CHOICES):
        row = tl.load(place_ptr + token * CHOICES + choice)
        limit = tl.where(row < end, hidden, 0)
        y = tl.load(y_ptr + row * hidden + columns, mask=columns < limit, other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weights_ptr + token * CHOICES + choice).to(tl.float32)
        total += y
    tl.store(out_ptr + token * hidden + columns, total.to(out_ptr.dtype.element_ty), mask=columns < hidden)


@triton.jit
def _unpermute_backward_kernel(
    grad_ptr, y_ptr, weights_ptr, order_ptr, ends_ptr, grad_y_ptr, grad_weights_ptr,
    hidden, num_experts, num_choices, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    limit = tl.where(row < tl.load(ends_ptr + num_experts - 1), hidden, 0)
    choice = tl.load(order_ptr + row)
    weight = tl.load(weights_ptr + choice).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, hidden, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < limit
        grad = tl.load(grad_ptr + (choice // num_choices) * hidden + columns, mask=mask, other=0.0).to(tl.float32)
        total += grad * tl.load(y_ptr + row * hidden + columns, mask=mask, other=0.0).to(tl.float32)
        out = tl.where(mask, grad * weight, 0.0)
        tl.store(grad_y_ptr + row * hidden + columns, out.to(grad_y_ptr.dtype.element_ty), mask=columns < hidden)
    tl.store(grad_weights_ptr + choice, tl.sum(total, axis=0).to(grad_weights_ptr.dtype.element_ty))
