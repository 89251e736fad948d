"""Frozen matrices, whole or in 4 bits, and the experts' products over them with low-rank corrections.

Nothing here computes the gradient of a frozen matrix, nor keeps a matrix that was made out of 4 bits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ostro.model import ops
from ostro.model.quant import NF4


def matrix(weight: Tensor | NF4, stack: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return one matrix of a stack, in `dtype`, for a product at once: of one in 4 bits the next is written over it."""
    is_nf4 = isinstance(weight, NF4)
    return weight.dequantize(stack, dtype, passing=True) if is_nf4 else ops.cast(weight, dtype)[stack]


def linear(x: Tensor, weight: Tensor | NF4) -> Tensor:
    """Return `x @ weight.T` in x's dtype, whichever way the weight is kept."""
    return _QuantizedLinear.apply(x, weight) if isinstance(weight, NF4) else ops.linear(x, weight)  # type: ignore[return-value]


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4) -> Tensor:
        ctx.weight = weight
        return ops.product(x, matrix(weight, (), x.dtype).t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return ops.product(grad, matrix(ctx.weight, (), grad.dtype)), None


@dataclasses.dataclass(frozen=True, eq=False)
class Corrected:
    """A layer's stack of frozen experts' matrices, and what is added to each: scale·B·A, or nothing (None).

    weight [E, 2, F, D] or [E, D, F]; a [E, rank, in]; b [E, 2, F, rank] or [E, D, rank].
    """

    weight: Tensor | NF4
    a: Tensor | None
    b: Tensor | None
    scale: float

    def __len__(self) -> int:
        return self.weight.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the stack."""
        return tuple(self.weight.shape)

    def cast(self, dtype: torch.dtype) -> Corrected:
        """Return it with all that is not in 4 bits in `dtype`."""
        weight = self.weight if isinstance(self.weight, NF4) else ops.cast(self.weight, dtype)
        a, b = (None if low is None else ops.cast(low, dtype) for low in (self.a, self.b))
        return Corrected(weight, a, b, self.scale)


Stack = Tensor | Corrected


def low_rank(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return `scale · (x @ a.T) @ b.T` in x's dtype."""
    return ops.linear(ops.linear(x, a) * scale, b)


def expert_linear(x_ND: Tensor, stack: Stack, expert: int, half: tuple[int, ...] = ()) -> Tensor:
    """Return one expert's product as the oracle has it: W·x, then scale·B·A·x."""
    if isinstance(stack, Tensor):
        return ops.linear(x_ND, stack[(expert, *half)])
    weight, where = stack.weight, (expert, *half)
    # Not a passing one: autograd keeps it.
    kept = weight.dequantize(where, x_ND.dtype) if isinstance(weight, NF4) else ops.cast(weight, x_ND.dtype)[where]
    y = linear(x_ND, kept)
    if stack.a is None or stack.b is None:
        return y
    return y + low_rank(x_ND, stack.a[expert], stack.b[(expert, *half)], stack.scale)


def run_experts(x_ND: Tensor, ends: list[int], w13: Corrected, w2: Corrected) -> Tensor:
    """Run each expert on its slice of sorted rows, [N, D], as `moe.run_experts`; only A and B get gradients."""
    w13, w2 = w13.cast(x_ND.dtype), w2.cast(x_ND.dtype)
    return _CorrectedExperts.apply(x_ND, ends, w13, w2, w13.a, w13.b, w2.a, w2.b)  # type: ignore[return-value]


class _CorrectedExperts(torch.autograd.Function):
    """Two products an expert, each with its correction; of what lies between, gate and up alone are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        ends: list[int],
        w13: Corrected,
        w2: Corrected,
        a13: Tensor | None,
        b13: Tensor | None,
        a2: Tensor | None,
        b2: Tensor | None,
    ) -> Tensor:
        ffn = w13.shape[2]
        h_N2F, y_ND = x_ND.new_empty(len(x_ND), 2 * ffn), torch.empty_like(x_ND)
        for expert, rows in slices(ends):
            x, h, y = x_ND[rows], h_N2F[rows], y_ND[rows]
            ops.mm(x, matrix(w13.weight, (expert,), x.dtype).flatten(0, 1).t(), h)
            _add_low_rank(h, x, _of(a13, expert), _of(b13, expert), w13.scale)
            activation = ops.swiglu(h[:, :ffn], h[:, ffn:])
            ops.mm(activation, matrix(w2.weight, (expert,), x.dtype).t(), y)
            _add_low_rank(y, activation, _of(a2, expert), _of(b2, expert), w2.scale)
        y_ND[ends[-1] :] = 0
        ctx.ends, ctx.stacks = ends, (w13, w2)
        ctx.save_for_backward(x_ND, h_N2F, a13, b13, a2, b2)
        return y_ND

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:  # type: ignore[override]
        x_ND, h_N2F, a13, b13, a2, b2 = ctx.saved_tensors
        (w13, w2), grad_y = ctx.stacks, grad_y.contiguous()
        grad_x = torch.empty_like(x_ND)
        grads = [None if p is None else torch.zeros_like(p) for p in (a13, b13, a2, b2)]
        for expert, rows in slices(ctx.ends):
            if rows.start == rows.stop:
                continue
            x, h, dy, dx = x_ND[rows], h_N2F[rows], grad_y[rows], grad_x[rows]
            gate, up = h.chunk(2, dim=1)
            silu = F.silu(gate)
            activation = silu * up
            grad_a = torch.empty_like(silu)
            ops.mm(dy, matrix(w2.weight, (expert,), dy.dtype), grad_a)
            _add_gradients(grad_a, dy, activation, (a2, b2), grads[2:], expert, w2.scale)
            grad_h = torch.empty_like(h)
            grad_gate, grad_up = grad_h.chunk(2, dim=1)
            torch.mul(grad_a, silu, out=grad_up)
            torch.ops.aten.silu_backward.grad_input(grad_a.mul_(up), gate, grad_input=grad_gate)
            ops.mm(grad_h, matrix(w13.weight, (expert,), dy.dtype).flatten(0, 1), dx)
            _add_gradients(dx, grad_h, x, (a13, b13), grads[:2], expert, w13.scale)
        grad_x[ctx.ends[-1] :] = 0
        return grad_x, None, None, None, *grads


def slices(ends: list[int]) -> list[tuple[int, slice]]:
    """Return each expert and its rows."""
    return [(expert, slice(start, end)) for expert, (start, end) in enumerate(zip([0, *ends], ends))]


def _of(low: Tensor | None, expert: int) -> Tensor | None:
    """Return one expert's A or B as a matrix; of gate and up, whose B are two, one below the other."""
    return None if low is None else low[expert].flatten(0, -2)


def _add_low_rank(y: Tensor, x: Tensor, a: Tensor | None, b: Tensor | None, scale: float) -> None:
    if a is not None and b is not None:
        ops.add_scaled_product(y, ops.product(x, a.t()), b.t(), scale)


def _add_gradients(
    grad_x: Tensor,
    grad_y: Tensor,
    x: Tensor,
    low: tuple[Tensor | None, Tensor | None],
    grads: list[Tensor | None],
    expert: int,
    scale: float,
) -> None:
    """Add what flows back through one expert's correction to x's gradient, and write those of its A and B."""
    a, b = (_of(p, expert) for p in low)
    grad_a, grad_b = (_of(g, expert) for g in grads)
    if a is None or b is None or grad_a is None or grad_b is None:
        return
    down = ops.product(grad_y, b)
    ops.add_scaled_product(grad_a, down.t(), x, scale)
    ops.add_scaled_product(grad_b, grad_y.t(), ops.product(x, a.t()), scale)
    ops.add_scaled_product(grad_x, down, a, scale)
