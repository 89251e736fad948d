"""Grouped products of fp8 operands: one scale a row of either side, sums in fp32, the result in bf16.

The forward product and the gradient to the rows are fp8; the weights' gradient is a bf16 product, since it is the one
that is summed over many steps. Scales map each row's largest magnitude to the format's largest, 448.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ostro.model import kernels

FORMAT = torch.float8_e4m3fn
_LARGEST = torch.finfo(FORMAT).max


def grouped_mm_fp8(x_NK: Tensor, w_EMK: Tensor, ends_E: Tensor) -> Tensor:
    """Return `x @ w[e].T` for each expert's rows, [N, M], as `grouped_mm` does, with both operands rounded to fp8."""
    return _GroupedFp8.apply(x_NK, w_EMK, ends_E)  # type: ignore[return-value]


class _GroupedFp8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, w_EMK: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_NK, w_EMK, ends_E)
        return _product(x_NK, w_EMK, ends_E)

    @staticmethod
    def backward(ctx: Any, grad_NM: Tensor) -> Any:  # type: ignore[override]
        x_NK, w_EMK, ends_E = ctx.saved_tensors
        grad_NM = grad_NM.contiguous()
        grad_x = _product(grad_NM, w_EMK.transpose(1, 2), ends_E) if ctx.needs_input_grad[0] else None
        grad_w = F.grouped_mm(grad_NM.t(), x_NK, offs=ends_E) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w, None


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x in fp8 and the fp32 scale of each of its last dim's rows: `x ≈ fp8 · scale[..., None]`."""
    largest = x.float().abs().amax(dim=-1)
    scale = largest.clamp(min=1e-12) / _LARGEST
    return (x.float() / scale[..., None]).clamp(-_LARGEST, _LARGEST).to(FORMAT), scale


def _product(a_NK: Tensor, b_EMK: Tensor, ends_E: Tensor) -> Tensor:
    (a, scale_a), (b, scale_b) = quantize(a_NK), quantize(b_EMK)
    run = scaled_grouped_mm if _is_offered(a_NK) else scaled_grouped_mm_emulated
    return run(a, b, scale_a, scale_b, ends_E).to(a_NK.dtype)


def _is_offered(x: Tensor) -> bool:
    # torch's kernel is written for SM90 and wants every stride to be a multiple of 16 bytes.
    on_sm90 = x.device.type != "cpu" and kernels.compute_capability() == 90
    return on_sm90 and hasattr(torch, "_scaled_grouped_mm") and x.shape[-1] % 16 == 0


def scaled_grouped_mm(a_NK: Tensor, b_EMK: Tensor, scale_N: Tensor, scale_EM: Tensor, ends_E: Tensor) -> Tensor:
    """The one place that calls torch's private fp8 product."""
    return torch._scaled_grouped_mm(
        a_NK, b_EMK.contiguous().transpose(-2, -1), scale_N, scale_EM, offs=ends_E, out_dtype=torch.bfloat16
    )


def scaled_grouped_mm_emulated(
    a_NK: Tensor, b_EMK: Tensor, scale_N: Tensor, scale_EM: Tensor, ends_E: Tensor
) -> Tensor:
    """What it computes, from bf16 or fp32 products of the rounded operands: the fallback, and the oracle."""
    dtype = torch.float32 if a_NK.device.type == "cpu" else torch.bfloat16
    product = F.grouped_mm(a_NK.to(dtype), b_EMK.to(dtype).transpose(-2, -1), offs=ends_E).float()
    rows_N = torch.arange(len(a_NK), device=a_NK.device)
    expert_N = torch.searchsorted(ends_E, rows_N, right=True).clamp(max=len(b_EMK) - 1)
    return product * scale_N[:, None] * scale_EM[expert_N]
