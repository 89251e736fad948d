"""SwiGLU with the routing weight in Triton: forward, and a backward that makes the activation once more."""

# A launch of a Triton kernel has no types, and Triton is not installed everywhere.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ostro.model.kernels.order import Order

_COLUMNS = 2048


def swiglu(h_N2F: Tensor, weights_TA: Tensor | None, order: Order) -> Tensor:
    """`plain.swiglu`, without autograd: `grouped.py` calls `swiglu_backward` itself."""
    h_N2F = h_N2F.contiguous()
    num_rows, ffn = len(h_N2F), h_N2F.shape[1] // 2
    a_NF = h_N2F.new_empty(num_rows, ffn)
    if a_NF.numel():
        block = min(_COLUMNS, triton.next_power_of_2(ffn))
        weights = order.order_N if weights_TA is None else weights_TA.contiguous()
        _swiglu_kernel[(num_rows, triton.cdiv(ffn, block))](
            h_N2F, weights, order.order_N, order.ends_E, a_NF, ffn, len(order.ends_E),
            WEIGHTED=weights_TA is not None, BLOCK=block,
        )  # fmt: skip
    return a_NF


def swiglu_backward(
    grad_a_NF: Tensor, h_N2F: Tensor, weights_TA: Tensor | None, order: Order
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`plain.swiglu_backward`: gate and up are read once for the gradients and for the activation."""
    grad_a_NF, h_N2F = grad_a_NF.contiguous(), h_N2F.contiguous()
    num_rows, ffn = grad_a_NF.shape
    grad_h_N2F, a_NF = torch.empty_like(h_N2F), torch.empty_like(grad_a_NF)
    grad_weights_TA = None if weights_TA is None else torch.zeros_like(weights_TA).contiguous()
    if a_NF.numel():
        weights = order.order_N if weights_TA is None else weights_TA.contiguous()
        _swiglu_backward_kernel[(num_rows,)](
            grad_a_NF, h_N2F, weights, order.order_N, order.ends_E, grad_h_N2F, a_NF,
            order.order_N if grad_weights_TA is None else grad_weights_TA, ffn, len(order.ends_E),
            WEIGHTED=weights_TA is not None, BLOCK=min(_COLUMNS, triton.next_power_of_2(ffn)),
        )  # fmt: skip
    return grad_h_N2F, a_NF, grad_weights_TA


@triton.jit
def _swiglu_kernel(
    h_ptr, weights_ptr, order_ptr, ends_ptr, a_ptr, ffn, num_experts, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Nothing is read of a row that is nobody's.
    mask = columns < tl.where(row < tl.load(ends_ptr + num_experts - 1), ffn, 0)
    gate = tl.load(h_ptr + row * 2 * ffn + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + row * 2 * ffn + ffn + columns, mask=mask, other=0.0).to(tl.float32)
    a = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        a *= tl.load(weights_ptr + tl.load(order_ptr + row)).to(tl.float32)
    tl.store(a_ptr + row * ffn + columns, a.to(a_ptr.dtype.element_ty), mask=columns < ffn)


@triton.jit
def _swiglu_backward_kernel(
    grad_ptr, h_ptr, weights_ptr, order_ptr, ends_ptr, grad_h_ptr, a_ptr, grad_weights_ptr, ffn, num_experts,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    limit = tl.where(row < tl.load(ends_ptr + num_experts - 1), ffn, 0)
    choice = tl.load(order_ptr + row)
    h_ptr += row * 2 * ffn
    grad_h_ptr += row * 2 * ffn
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weights_ptr + choice).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, ffn, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside, mask = columns < ffn, columns < limit
        gate = tl.load(h_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + ffn + columns, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * ffn + columns, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += grad * silu * up
        grad *= weight
        grad_gate = grad * up * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(grad_h_ptr + columns, grad_gate.to(grad_h_ptr.dtype.element_ty), mask=inside)
        tl.store(grad_h_ptr + ffn + columns, (grad * silu).to(grad_h_ptr.dtype.element_ty), mask=inside)
        tl.store(a_ptr + row * ffn + columns, (silu * up * weight).to(a_ptr.dtype.element_ty), mask=inside)
    if WEIGHTED:
        tl.store(grad_weights_ptr + choice, tl.sum(total, axis=0).to(grad_weights_ptr.dtype.element_ty))
