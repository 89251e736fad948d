"""Dispatch against the oracle; the losses that balance the router; what is counted."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import SMALL
from torch import Tensor

from ostro.model import routing
from ostro.model.balance import sequence_balance
from ostro.model.mixtral import Mixtral
from ostro.model.moe import dispatch, dispatch_loop, run_experts
from ostro.model.routing import ROUTERS
from ostro.model.settings import MoeConfig
from ostro.model.spans import spans_of


@pytest.mark.parametrize("router", ROUTERS)
@given(tokens=st.integers(1, 40), experts=st.integers(1, 9), choices=st.integers(1, 4), seed=st.integers(0, 999))
def test_dispatch_equals_the_oracle(router: str, tokens: int, experts: int, choices: int, seed: int) -> None:
    torch.manual_seed(seed)
    choices = min(choices, experts)
    logits = torch.randn(tokens, experts, requires_grad=True)
    x, w13, w2 = (
        torch.randn(shape, requires_grad=True) for shape in ((tokens, 6), (experts, 2, 5, 6), (experts, 6, 5))
    )
    chosen = ROUTERS[router](logits, choices)
    outs = [run(x, chosen, w13, w2) for run in (dispatch, dispatch_loop)]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(x)
    inputs = (x, w13, w2, logits)
    grads = [torch.autograd.grad((out * direction).sum(), inputs, retain_graph=True) for out in outs]
    for fast, slow in zip(*grads, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
@given(experts=st.integers(1, 9), choices=st.integers(1, 4), seed=st.integers(0, 999))
def test_routers_choose_distinct_experts_with_weights_of_sum_one(
    router: str, experts: int, choices: int, seed: int
) -> None:
    torch.manual_seed(seed)
    choices = min(choices, experts)
    chosen = ROUTERS[router](torch.randn(30, experts), choices)
    assert all(len(set(row)) == choices for row in chosen.experts_TA.tolist())
    torch.testing.assert_close(chosen.weights_TA.sum(dim=1), torch.ones(30))
    assert (chosen.weights_TA.diff(dim=1) <= 0).all()


def test_a_dropped_choice_is_not_computed() -> None:
    torch.manual_seed(0)
    x, w13, w2 = (torch.randn(shape, requires_grad=True) for shape in ((9, 6), (3, 2, 5, 6), (3, 6, 5)))
    routing = ROUTERS["softmax"](torch.randn(9, 3), 2)
    kept = routing.experts_TA != 1
    dropping = dataclasses.replace(routing, kept_TA=kept, weights_TA=routing.weights_TA * kept)
    direction = torch.randn(9, 6)
    exact = dispatch_loop(x, dropping, w13, w2)
    oracle = torch.autograd.grad((exact * direction).sum(), (x, w13, w2))
    with torch.no_grad():
        w2[1] = torch.inf  # which 0 times would be NaN
    out = dispatch(x, dropping, w13, w2)
    ours = torch.autograd.grad((out * direction).sum(), (x, w13, w2))
    for one, other in zip((out, *ours), (exact, *oracle), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_experts_in_bf16_stay_close_to_fp32() -> None:
    torch.manual_seed(0)
    ends = torch.tensor([6, 8])
    x, w13, w2 = (torch.randn(s) * 0.5 for s in ((8, 16), (2, 2, 8, 16), (2, 16, 8)))
    exact = run_experts(x, ends.tolist(), w13, w2)
    rounded = run_experts(x.bfloat16(), ends.tolist(), w13.bfloat16(), w2.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert 0 < (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()


def _balance(logits: Tensor, lengths: list[int], valid: Tensor | None = None) -> Tensor:
    spans = spans_of(lengths, valid_T=valid)
    return sequence_balance(routing.route_softmax(logits, 2), spans)


def test_balance_is_top_k_when_perfect_and_experts_when_collapsed() -> None:
    even = torch.eye(4).repeat(10, 1) * 1e-6
    even = even + torch.eye(4).roll(1, 0).repeat(10, 1) * 1e-6
    assert _balance(even, [40]).item() / 40 == pytest.approx(2.0, abs=1e-4)
    collapsed = torch.tensor([[50.0, 25.0, 0.0, 0.0]]).repeat(40, 1)
    assert _balance(collapsed, [40]).item() / 40 == pytest.approx(4.0, abs=1e-4)


def test_balance_adds_up_over_sequences_and_ignores_padding() -> None:
    torch.manual_seed(0)
    logits = torch.randn(30, 4)
    parts = _balance(logits[:12], [12]) + _balance(logits[12:], [18])
    torch.testing.assert_close(_balance(logits, [12, 18]), parts)
    valid = torch.ones(30, dtype=torch.bool)
    valid[7:12] = False
    kept = torch.cat([logits[:7], logits[12:]])
    torch.testing.assert_close(_balance(logits, [12, 18], valid), _balance(kept, [7, 18]))


def test_balance_equals_its_definition() -> None:
    torch.manual_seed(0)
    logits = torch.randn(12, 4)
    probs = logits.softmax(-1)
    chosen = probs.topk(2).indices
    share = torch.stack([(chosen == e).sum() / 12 for e in range(4)])
    torch.testing.assert_close(_balance(logits, [12]), 12 * 4 * (share * probs.mean(0)).sum())


def _model(moe: MoeConfig) -> Mixtral:
    torch.manual_seed(1)
    model = Mixtral(SMALL, moe)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def _gate_gradient(moe: MoeConfig, pieces: list[slice]) -> Tensor:
    torch.manual_seed(2)
    tokens = torch.randint(40, (24,))
    model = _model(moe)
    for piece in pieces:
        part = tokens[piece]
        spans = spans_of([6] * (len(part) // 6), balance_scale=1 / 24)
        # No label counts: whatever gradient there is comes from the losses that ride on the activations.
        model.loss(part, spans, part, torch.zeros(len(part))).backward()
    grad = model.model.layers["0"].block_sparse_moe.gate.weight.grad
    assert grad is not None
    return grad


@pytest.mark.parametrize("moe", [MoeConfig(), MoeConfig(router_aux_loss_coef=0, z_loss_coef=0.1)])
def test_balancing_losses_reach_the_gate_and_do_not_depend_on_micro_batches(moe: MoeConfig) -> None:
    whole = _gate_gradient(moe, [slice(0, 24)])
    assert whole.abs().max() > 1e-6
    parts = _gate_gradient(moe, [slice(0, 6), slice(6, 18), slice(18, 24)])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-8)
    off = _gate_gradient(MoeConfig(router_aux_loss_coef=0), [slice(0, 24)])
    assert off.abs().max() == 0


def test_statistics_count_valid_tokens_of_every_layer_once() -> None:
    model = _model(MoeConfig())
    stats = torch.zeros(2, routing.num_stats(4), dtype=torch.float64)
    valid = torch.ones(12, dtype=torch.bool)
    valid[10:] = False
    spans = spans_of([12], valid_T=valid, stats_LS=stats)
    model(torch.arange(12), spans)
    model(torch.arange(12), spans)
    assert stats[:, :4].sum(dim=1).tolist() == [40.0, 40.0]
    entropy, confidence = stats[:, 6] / 20, stats[:, 7] / 20
    assert ((entropy > 0) & (entropy <= torch.log(torch.tensor(4.0)))).all()
    assert ((confidence >= 0.5) & (confidence <= 1)).all()
