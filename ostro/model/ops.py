"""The arithmetic of a Mixtral block as pure functions: products, norm, rotary positions, SwiGLU, the loss.

Shapes everywhere in `model`: T tokens, D hidden, H query heads, K kv heads, C head dim, E experts, A experts per
token, F ffn, V vocab, N = T·A routed rows. A suffix names the logical dims of a tensor, never a rank's share of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ostro import device


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T` in x's dtype; the weight (an fp32 master, perhaps) is cast to it."""
    weight = weight.to(x.dtype)
    if _products_in_fp32(x):
        return F.linear(x.float(), weight.float()).to(x.dtype)
    return F.linear(x, weight)


def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write `a @ b` into `out`, for the hand-written backward passes; all three share a dtype."""
    if _products_in_fp32(a):
        out.copy_(a.float() @ b.float())
    else:
        torch.mm(a, b, out=out)


def _products_in_fp32(x: Tensor) -> bool:
    # A CPU without 16-bit units multiplies bf16 matrices hundreds of times slower than fp32 ones. The product of the
    # rounded operands, accumulated in fp32 and rounded once, is what a 16-bit unit would give.
    return x.dtype != torch.float32 and x.device.type == "cpu" and x.dtype.itemsize < 4 and not device.bf16_is_fast()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dim, computed in fp32 (arXiv 1910.07467)."""
    return F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype) * weight.to(x.dtype)


def rope_tables(positions_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each [T, 1, C/2], of the rotary angles `position · theta^(-2i/C)` (arXiv 2104.09864)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device) / head_dim
    angles = positions_T[:, None].float() * (1.0 / theta**exponents)
    return angles.cos().to(dtype)[:, None, :], angles.sin().to(dtype)[:, None, :]


def apply_rope(x_TGC: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate every head's pairs (i, i + C/2): Hugging Face's half-rotation order."""
    cos, sin = rope
    first, second = x_TGC.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) · up` (arXiv 2002.05202)."""
    return F.silu(gate) * up


def cross_entropy(logits_TV: Tensor, labels_T: Tensor, weights_T: Tensor) -> Tensor:
    """Return `Σ weight · −log p(label)`, from whole logits: the oracle of `linear_cross_entropy`."""
    return (F.cross_entropy(logits_TV.float(), labels_T, reduction="none") * weights_T).sum()


def linear_cross_entropy(
    x_TD: Tensor, head_VD: Tensor, labels_T: Tensor, weights_T: Tensor, chunk_tokens: int = 0
) -> Tensor:
    """Return `Σ weight · −log p(label)` with logits `x @ head.T`, never holding more than a chunk of them.

    The gradients are made beside the loss, chunk by chunk, while the logits are at hand (arXiv 2410.10989). Softmax
    may overwrite the logits, so labels too unlikely for a probability in fp32 get theirs computed again.
    """
    if not chunk_tokens:
        # Measured on two cores at V = 32,000, D = 128: 256 tokens beat 128 and 512 by a fifth. GPUs want tall products.
        chunk_tokens = 256 if x_TD.device.type == "cpu" else 2048
    head_VD = head_VD.to(x_TD.dtype)
    needs_grad = torch.is_grad_enabled() and (x_TD.requires_grad or head_VD.requires_grad)
    return _LinearCrossEntropy.apply(x_TD, head_VD, labels_T, weights_T, chunk_tokens, needs_grad)  # type: ignore[return-value]


# Below this a probability loses the digits of its logarithm.
_RARE = 1e-30


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        head_VD: Tensor,
        labels_T: Tensor,
        weights_T: Tensor,
        chunk_tokens: int,
        needs_grad: bool,
    ) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=x_TD.device)
        grad_x = torch.empty_like(x_TD) if needs_grad else None
        grad_head = torch.zeros_like(head_VD, dtype=torch.float32) if needs_grad else None
        logits_buffer = torch.empty(min(chunk_tokens, len(x_TD)), len(head_VD), dtype=x_TD.dtype, device=x_TD.device)
        for start in range(0, len(x_TD), chunk_tokens):
            x, labels, weights = (t[start : start + chunk_tokens] for t in (x_TD, labels_T, weights_T))
            logits = logits_buffer[: len(x)]
            mm(x, head_VD.t(), logits)
            # Softmax over the logits themselves where they are fp32 already: the chunk stays in the cache.
            in_place = logits if logits.dtype == torch.float32 else None
            probs = torch.softmax(logits, dim=-1, dtype=torch.float32, out=in_place)
            label_probs = probs.gather(1, labels[:, None]).squeeze(1)
            log_probs = label_probs.clamp(min=_RARE).log()
            rare = label_probs < _RARE
            if rare.any():
                again = linear(x[rare], head_VD).float()
                log_probs[rare] = again.gather(1, labels[rare, None]).squeeze(1) - again.logsumexp(dim=-1)
            loss -= (log_probs * weights).sum()
            if grad_x is None or grad_head is None:
                continue
            # d loss / d logits = weight · (softmax − one-hot); the weight goes onto the narrow side of each product.
            grad = probs
            grad[torch.arange(len(x), device=x.device), labels] -= 1.0
            grad = grad.to(x.dtype)
            weights = weights[:, None].to(x.dtype)
            mm(grad, head_VD, grad_x[start : start + len(x)])
            grad_x[start : start + len(x)] *= weights
            if grad.dtype == torch.float32:
                grad_head.addmm_(grad.t(), x * weights)
            else:
                part = torch.empty_like(head_VD)
                mm(grad.t(), x * weights, part)
                grad_head += part
        if grad_x is not None and grad_head is not None:
            ctx.save_for_backward(grad_x, grad_head.to(head_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:  # type: ignore[override]
        grad_x, grad_head = ctx.saved_tensors
        # In place: they are this backward's alone, and the head's is one of the largest tensors of a step.
        return grad_x.mul_(grad_loss), grad_head.mul_(grad_loss), None, None, None, None


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """Return x unchanged, so that its backward pass also gives `loss` the gradient 1.

    A loss that rides on an activation reaches the parameters from any pipeline stage, under recompute and under
    accumulation, without anybody passing it along.
    """
    return _AttachLoss.apply(x, loss)  # type: ignore[return-value]


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.shape, ctx.options = loss.shape, {"dtype": loss.dtype, "device": loss.device}
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad, torch.ones(ctx.shape, **ctx.options)
