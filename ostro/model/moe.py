"""The feed-forward layer: eight experts, two per token.

`dispatch` is the seam: expert parallel replaces it, nothing else in the model knows. Where a sequence is cut over
ranks, `sum_counts` adds up what is counted of it and `limit` finds who is within capacity. `dispatch` sorts the
N = T·A routed rows by expert, so that each expert multiplies one contiguous slice, and gathers the results back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ostro import device
from ostro.model import corrected, kernels, layout, ops
from ostro.model.balance import SumCounts, alone, batch_balance, sequence_balance, z_loss
from ostro.model.capacity import within_capacity
from ostro.model.corrected import Corrected, Stack, slices
from ostro.model.kernels.grouped import run_ordered
from ostro.model.kernels.order import balanced_ends, order_by_expert
from ostro.model.lora import Correction
from ostro.model.quant import NF4
from ostro.model.routing import ROUTERS, Routing, count, jitter
from ostro.model.settings import ROUTERS_WITH_BIAS, Kernels, LoraConfig, ModelConfig, MoeConfig
from ostro.model.spans import Spans

Dispatch = Callable[[Tensor, Routing, Stack, Stack], Tensor]
Limit = Callable[[Routing, Spans, MoeConfig], Routing]


def dispatch_loop(x_TD: Tensor, routing: Routing, w13: Stack, w2: Stack) -> Tensor:
    """The oracle: each expert picks its tokens, multiplies, weighs and adds (as transformers' eager path does)."""
    out_TD = torch.zeros_like(x_TD)
    for expert in range(len(w2)):
        token_n, choice_n = torch.where(routing.experts_TA == expert)
        gate, up = (corrected.expert_linear(x_TD[token_n], w13, expert, (half,)) for half in (0, 1))
        y_nD = corrected.expert_linear(ops.swiglu(gate, up), w2, expert)
        weighted = y_nD * routing.weights_TA[token_n, choice_n, None]
        out_TD = out_TD.index_add(0, token_n, weighted.to(x_TD.dtype))
    return out_TD


def dispatch(
    x_TD: Tensor, routing: Routing, w13: Stack, w2: Stack, kernels_named: Kernels = "auto", use_fp8: bool = False
) -> Tensor:
    """Send each token to its experts and return the weighted sum of their answers, [T, D].

    Rows are sorted stably, so the same routing gives the same bits; dropped choices are not computed. `kernels_named`
    and `use_fp8` concern accelerators with grouped products alone: which passes lie between them (`kernels.choose`),
    and whether the products' operands are rounded to fp8.
    """
    if device.is_cuda(x_TD.device) and _can_group(x_TD, w13, w2) and len(x_TD):
        return dispatch_grouped(x_TD, routing, w13, w2, kernels_named, use_fp8)
    order = order_by_expert(routing.experts_TA, routing.kept_TA, len(w2))
    x_ND = x_TD[order.order_N // order.num_choices]
    ends = order.ends_E.tolist() if ops.has_values() else balanced_ends(len(x_ND), len(w2))
    y_ND = run_experts(x_ND, ends, w13, w2)
    y_TAD = y_ND[order.place_TA]
    return (y_TAD * routing.weights_TA[..., None].to(x_TD.dtype)).sum(dim=1)


def dispatch_grouped(
    x_TD: Tensor, routing: Routing, w13: Stack, w2: Stack, kernels_named: Kernels = "auto", use_fp8: bool = False
) -> Tensor:
    """As `dispatch`, with one grouped product per projection: the host never waits, dropped choices cost nothing."""
    order = order_by_expert(routing.experts_TA, routing.kept_TA, len(w2))
    w13, w2 = (w.cast(x_TD.dtype) if isinstance(w, Corrected) else ops.cast(w, x_TD.dtype) for w in (w13, w2))
    passes = kernels.choose(kernels_named, x_TD.device)
    return run_ordered(x_TD, routing.weights_TA, order, w13, w2, passes, use_fp8)


def run_experts(x_ND: Tensor, ends: list[int], w13: Stack, w2: Stack) -> Tensor:
    """Run each expert on its slice of sorted rows, one product after another; returns [N, D].

    `ends` are the ends of each expert's rows; rows past the last are nobody's and give 0, as do their gradients. The
    backward pass writes each expert's gradient straight into its place of the stacked ones: indexing a stacked
    parameter instead would have autograd add up E tensors of the full size.
    """
    if isinstance(w13, Corrected) and isinstance(w2, Corrected):
        return corrected.run_experts(x_ND, ends, w13, w2)
    assert isinstance(w13, Tensor)
    assert isinstance(w2, Tensor)
    if not ops.splits_backward():  # which adds to the weights themselves
        w13, w2 = ops.cast(w13, x_ND.dtype), ops.cast(w2, x_ND.dtype)
    return _SlicedExperts.apply(x_ND, ends, w13, w2)  # type: ignore[return-value]


def _can_group(x_ND: Tensor, w13: Stack, w2: Stack) -> bool:
    # torch wants every stride of a grouped product to be a multiple of 16 bytes.
    ranks = [w.b.shape[-1] for w in (w13, w2) if isinstance(w, Corrected) and w.b is not None]
    return x_ND.dtype == torch.bfloat16 and not any(size % 8 for size in (*w13.shape[-2:], *ranks))


class _SlicedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, ends: list[int], w13: Tensor, w2: Tensor) -> Tensor:
        ctx.ends, ctx.weights = ends, (w13, w2)
        w13, w2 = ops.cast(w13, x_ND.dtype), ops.cast(w2, x_ND.dtype)
        ffn = w13.shape[2]
        h_N2F = x_ND.new_empty(len(x_ND), 2 * ffn)
        y_ND = torch.empty_like(x_ND)
        for expert, rows in slices(ends):
            h = h_N2F[rows]
            ops.mm(x_ND[rows], w13[expert].flatten(0, 1).t(), h)
            ops.mm(ops.swiglu(h[:, :ffn], h[:, ffn:]), w2[expert].t(), y_ND[rows])
        y_ND[ends[-1] :] = 0
        ctx.save_for_backward(x_ND, h_N2F, w13, w2)
        return y_ND

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:  # type: ignore[override]
        x_ND, h_N2F, w13, w2 = ctx.saved_tensors
        ends, grad_y = ctx.ends, grad_y.contiguous()
        grad_x = torch.empty_like(x_ND)
        if ops.splits_backward():
            grad_h_N2F = torch.empty_like(h_N2F)
            for expert, rows in slices(ends):
                _input_gradients(grad_y[rows], h_N2F[rows], w13[expert], w2[expert], grad_h_N2F[rows], grad_x[rows])
            ops.leave_for_later(ctx.weights, lambda: _weight_gradients(grad_y, x_ND, h_N2F, grad_h_N2F, ends, w13, w2))
            grad_x[ends[-1] :] = 0
            return grad_x, None, None, None
        grad_w13, grad_w2 = torch.empty_like(w13), torch.empty_like(w2)
        for expert, rows in slices(ends):
            if rows.start == rows.stop:
                grad_w13[expert].zero_()
                grad_w2[expert].zero_()
                continue
            h, dy = h_N2F[rows], grad_y[rows]
            grad_h = torch.empty_like(h)
            activation = _input_gradients(dy, h, w13[expert], w2[expert], grad_h, grad_x[rows])
            ops.mm(dy.t(), activation, grad_w2[expert])
            ops.mm(grad_h.t(), x_ND[rows], grad_w13[expert].flatten(0, 1))
        grad_x[ends[-1] :] = 0
        return grad_x, None, grad_w13, grad_w2


def _input_gradients(
    dy_ND: Tensor, h_N2F: Tensor, w13: Tensor, w2: Tensor, grad_h_N2F: Tensor, grad_x_ND: Tensor
) -> Tensor:
    """Write one expert's gradients of gate and up and of its input; return its activation, made again."""
    gate, up = h_N2F.chunk(2, dim=1)
    silu = F.silu(gate)  # again: it is in the cache anyway
    grad_a = torch.empty_like(silu)
    ops.mm(dy_ND, w2, grad_a)
    grad_gate, grad_up = grad_h_N2F.chunk(2, dim=1)
    torch.mul(grad_a, silu, out=grad_up)
    grad_a *= up
    torch.ops.aten.silu_backward.grad_input(grad_a, gate, grad_input=grad_gate)
    ops.mm(grad_h_N2F, w13.flatten(0, 1), grad_x_ND)
    return silu.mul_(up)


def _weight_gradients(
    grad_y: Tensor, x_ND: Tensor, h_N2F: Tensor, grad_h_N2F: Tensor, ends: list[int], w13: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor]:
    grad_w13, grad_w2 = torch.zeros_like(w13), torch.zeros_like(w2)
    for expert, rows in slices(ends):
        gate, up = h_N2F[rows].chunk(2, dim=1)
        ops.mm(grad_y[rows].t(), ops.swiglu(gate, up), grad_w2[expert])
        ops.mm(grad_h_N2F[rows].t(), x_ND[rows], grad_w13[expert].flatten(0, 1))
    return grad_w13, grad_w2


class Experts(nn.Module):
    """The stacked weights of a layer's experts, w13 [E, 2, F, D] (gate, up) and w2 [E, D, F], and who asks them.

    With `lora` they are frozen, and corrected where they are targets.
    """

    w13: nn.Parameter | NF4
    w2: nn.Parameter | NF4
    lora: LoraConfig | None = None

    def __init__(self, config: ModelConfig, moe: MoeConfig) -> None:
        super().__init__()
        num, ffn, hidden = config.num_local_experts, config.intermediate_size, config.hidden_size
        self.w13 = nn.Parameter(torch.empty(num, 2, ffn, hidden))
        self.w2 = nn.Parameter(torch.empty(num, hidden, ffn))
        self.dispatch: Dispatch = functools.partial(dispatch, kernels_named=moe.kernels, use_fp8=moe.fp8)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        return self.dispatch(x_TD, routing, self._stack("w13"), self._stack("w2"))

    def _stack(self, name: str) -> Stack:
        weight = getattr(self, name)
        if self.lora is None:
            return Corrected(weight, None, None, 1.0) if isinstance(weight, NF4) else weight
        a, b = (getattr(self, f"{name}_{part}", None) for part in (layout.LORA_A, layout.LORA_B))
        return Corrected(weight, a, b, self.lora.scale)


class Gate(nn.Module):
    """The router's weight [E, D] and, where the router has one, the selection bias [E], which no gradient reaches."""

    correction: Correction | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))
        self.selection_bias: nn.Parameter | None = None
        if config.router in ROUTERS_WITH_BIAS:
            self.selection_bias = nn.Parameter(torch.zeros(config.num_local_experts), requires_grad=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD.float()
        logits_TE = F.linear(x_TD, self.weight.float())
        return logits_TE if self.correction is None else self.correction(self, x_TD, logits_TE, None)


class MoE(nn.Module):
    """Route, dispatch, and let the balancing losses ride on the output; `layer` is its number in the whole model.

    Jitter and capacity are for training: in `eval()` every choice is served.
    """

    def __init__(self, config: ModelConfig, moe: MoeConfig, layer: int = 0) -> None:
        super().__init__()
        self.config, self.moe, self.layer = config, moe, layer
        self.gate = Gate(config)
        self.experts = Experts(config, moe)
        self.sum_counts: SumCounts = alone
        self.sum_batch_counts: SumCounts = alone
        self.limit: Limit = within_capacity

    def forward(self, x_TD: Tensor, spans: Spans) -> tuple[Tensor, Routing, Tensor]:
        """Return the output [T, D], the routing, and this layer's statistics."""
        chosen = self._chosen(x_TD, spans)
        is_limited = self.training and self.moe.capacity_factor is not None
        routing = self.limit(chosen, spans, self.moe) if is_limited else chosen
        out_TD = self.experts(x_TD, routing)
        # Losses and loads are of what the router asked for, dropped or not.
        balance, z = sequence_balance(chosen, spans, self.sum_counts), z_loss(chosen, spans)
        if spans.balance_scale and torch.is_grad_enabled():
            scale = spans.balance_scale / self.config.num_hidden_layers
            loss = self.moe.z_loss_coef * z
            if self.moe.balance == "sequence":
                loss = loss + self.moe.router_aux_loss_coef * balance
            elif self.moe.balance == "batch":
                loss = loss + self.moe.router_aux_loss_coef * batch_balance(chosen, spans, self.sum_batch_counts)
            out_TD = ops.attach_loss(out_TD, scale * loss)
        counted = dataclasses.replace(chosen, kept_TA=routing.kept_TA)
        return out_TD, routing, count(counted, spans, balance, z)

    def _chosen(self, x_TD: Tensor, spans: Spans) -> Routing:
        noise = self.moe.router_jitter_noise
        if noise and self.training and spans.draws_T is not None:
            x_TD = jitter(x_TD, spans.draws_T, self.layer, noise)
        return ROUTERS[self.config.router](self.gate(x_TD), self.config.num_experts_per_tok, self.gate.selection_bias)
