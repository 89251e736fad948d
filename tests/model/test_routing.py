"""What every router promises; jitter; the balancing losses against their definitions, transformers and MindFormers."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import SMALL
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ostro.errors import ConfigError
from ostro.model import balance, layout, routing
from ostro.model.capacity import within_capacity
from ostro.model.mixtral import Mixtral
from ostro.model.routing import ROUTERS, Routing, jitter
from ostro.model.settings import ROUTERS_WITH_BIAS, Balance, CapacityGroup, Drop, MoeConfig
from ostro.model.spans import Spans, spans_of
from ostro.weights import RandomReader, load_into

BIASES = [
    (router, has_bias) for router in ROUTERS for has_bias in ([False, True] if router in ROUTERS_WITH_BIAS else [False])
]


@pytest.mark.parametrize(("router", "has_bias"), BIASES)
@given(
    tokens=st.integers(1, 30),
    experts=st.integers(1, 16),
    choices=st.integers(1, 4),
    scale=st.sampled_from([0.0, 1.0, 200.0]),
    seed=st.integers(0, 999),
)
def test_contract(router: str, has_bias: bool, tokens: int, experts: int, choices: int, scale: float, seed: int):
    torch.manual_seed(seed)
    choices = min(choices, experts)
    logits = torch.randn(tokens, experts) * scale
    bias = torch.randn(experts) if has_bias else None
    found = ROUTERS[router](logits, choices, bias)
    assert found.experts_TA.dtype == torch.int64
    assert found.experts_TA.shape == found.weights_TA.shape == (tokens, choices)
    assert ((found.experts_TA >= 0) & (found.experts_TA < experts)).all()
    assert all(len(set(row)) == choices for row in found.experts_TA.tolist())
    for tensor in (found.weights_TA, found.probs_TE):
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.sum(dim=1), torch.ones(tokens))
        assert (tensor >= 0).all()
    assert (found.weights_TA.diff(dim=1) <= 0).all()
    assert found.kept_TA is None
    again = ROUTERS[router](logits, choices, bias)
    assert torch.equal(again.experts_TA, found.experts_TA)
    assert torch.equal(again.weights_TA, found.weights_TA)


@pytest.mark.parametrize(("router", "has_bias"), BIASES)
@pytest.mark.parametrize("choices", [1, 2, 3])
def test_gradients_by_finite_differences(router: str, has_bias: bool, choices: int) -> None:
    torch.manual_seed(choices)
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([0.3, -0.2, 0.0, 0.1], dtype=torch.float64) if has_bias else None
    spans = spans_of([2, 4], valid_T=torch.tensor([True, True, True, True, True, False]))

    def outputs(logits: Tensor) -> tuple[Tensor, ...]:
        found = ROUTERS[router](logits, choices, bias)
        losses = (balance.sequence_balance, balance.batch_balance, balance.z_loss)
        return found.weights_TA, *(loss(found, spans) for loss in losses), balance.hf_balance([found], spans)

    assert torch.autograd.gradcheck(outputs, logits)


@given(experts=st.integers(1, 8), choices=st.integers(1, 4), seed=st.integers(0, 999))
def test_the_sigmoid_router_is_its_definition(experts: int, choices: int, seed: int) -> None:
    torch.manual_seed(seed)
    choices = min(choices, experts)
    logits, bias = torch.randn(20, experts), torch.randn(experts) * 0.2
    found = ROUTERS["sigmoid"](logits, choices, bias)
    for t, scores in enumerate(logits.sigmoid().tolist()):
        chosen = sorted(range(experts), key=lambda e: -(scores[e] + bias[e].item()))[:choices]
        chosen.sort(key=lambda e: -scores[e])
        assert found.experts_TA[t].tolist() == chosen
        weights = torch.tensor([scores[e] for e in chosen])
        torch.testing.assert_close(found.weights_TA[t], weights / weights.sum())
        torch.testing.assert_close(found.probs_TE[t], torch.tensor(scores) / sum(scores))


def test_a_bias_moves_choices_and_no_weight() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    plain = ROUTERS["sigmoid"](logits, 2, torch.zeros(4))
    moved = ROUTERS["sigmoid"](logits, 2, torch.tensor([0.0, 0.0, 0.0, 0.9]))
    assert (plain.experts_TA.tolist(), moved.experts_TA.tolist()) == ([[0, 1]], [[0, 3]])
    scores = logits[0, [0, 3]].sigmoid()
    torch.testing.assert_close(moved.weights_TA[0], scores / scores.sum())


def test_a_bias_moves_by_the_sign_of_the_load() -> None:
    bias = torch.tensor([0.5, 0.0, 0.0, 0.0])
    balance.update_bias(bias, torch.tensor([9, 5, 6, 4], dtype=torch.float64), 0.125)
    assert bias.tolist() == [0.375, 0.125, 0.0, 0.125]


# Jitter


def test_jitter_is_uniform_and_a_function_of_token_layer_and_channel() -> None:
    draws = torch.arange(5, 405)
    factors = jitter(torch.ones(400, 50), draws, 3, 0.1)
    assert factors.dtype == torch.float32
    assert 0.9 <= factors.min() < 0.901
    assert 1.099 < factors.max() <= 1.1
    assert factors.mean().item() == pytest.approx(1.0, abs=0.002)
    assert factors.std().item() == pytest.approx(0.2 / 12**0.5, rel=0.01)
    columns = (factors - 1) / factors.std()
    assert (columns.T @ columns / 400).triu(1).abs().max() < 0.25  # channels know nothing of each other
    assert (columns[:-1] * columns[1:]).mean().abs() < 0.02  # nor neighbouring tokens
    assert torch.equal(jitter(torch.ones(400, 50), draws, 3, 0.1)[7:9], jitter(torch.ones(2, 50), draws[7:9], 3, 0.1))
    assert len(jitter(torch.ones(400, 50), draws, 3, 0.1).unique()) > 19_000
    for other in (jitter(torch.ones(400, 50), draws, 4, 0.1), jitter(torch.ones(400, 50), draws + 400, 3, 0.1)):
        assert ((other - 1) * (factors - 1)).mean().abs() < 1e-4


def model(moe: MoeConfig, router: str = "softmax") -> Mixtral:
    config = dataclasses.replace(SMALL, router=router)
    built = Mixtral(config, moe)
    load_into(built, RandomReader(config, 1))
    return built


def test_jitter_is_for_training_and_does_not_depend_on_micro_batches() -> None:
    tokens = torch.arange(24) % 40
    draws = torch.arange(1000, 1024)
    jittered = model(MoeConfig(router_jitter_noise=0.3))

    def run(piece: slice, draws_T: Tensor | None) -> Tensor:
        return jittered(tokens[piece], spans_of([12] * (len(tokens[piece]) // 12), draws_T=draws_T))

    whole = run(slice(0, 24), draws)
    plain = run(slice(0, 24), None)
    assert (whole - plain).abs().max() > 1e-3
    parts = torch.cat([run(piece, draws[piece]) for piece in (slice(0, 12), slice(12, 24))])
    torch.testing.assert_close(parts, whole)
    assert [block.block_sparse_moe.layer for block in jittered.blocks.values()] == [0, 1]
    jittered.eval()
    assert torch.equal(run(slice(0, 24), draws), plain)


# Losses


def routings(num_layers: int, spans: Spans, seed: int = 0) -> list[Routing]:
    torch.manual_seed(seed)
    found = [torch.randn(len(spans.valid_T), 5, requires_grad=True) for _ in range(num_layers)]
    return [ROUTERS["softmax"](logits, 2, None) for logits in found]


@pytest.mark.parametrize("num_valid", [12, 9])
def test_hf_balance_is_that_of_transformers(num_valid: int) -> None:
    valid = torch.arange(12) < num_valid
    spans = spans_of([12], valid_T=valid)
    ours = routings(3, spans)
    logits = tuple(r.logits_TE for r in ours)
    mask = None if num_valid == 12 else valid[None].long()
    theirs = load_balancing_loss_func(logits, 5, 2, mask)
    assert isinstance(theirs, Tensor)
    loss = balance.hf_balance(ours, spans)
    torch.testing.assert_close(loss, theirs)
    for mine, other in zip(torch.autograd.grad(loss, logits), torch.autograd.grad(theirs, logits), strict=True):
        torch.testing.assert_close(mine, other)


def test_losses_are_those_of_mindformers(shared: Path) -> None:
    golden = json.loads((shared / "golden" / "router.json").read_text())
    found = ROUTERS["softmax"](torch.tensor(golden["logits"]), 2, None)
    spans = spans_of([6])
    # Their f is a share of all choices, ours of the tokens: half as large for two choices a token.
    auxiliary = 0.05 / 2 * balance.sequence_balance(found, spans) / 6
    assert auxiliary.item() == pytest.approx(golden["aux_expert_alpha_0.05"], rel=1e-6)
    assert 0.001 * balance.z_loss(found, spans).item() / 6 == pytest.approx(golden["z_loss_0.001"], rel=1e-5)


def test_batch_balance_counts_over_the_whole_micro_batch() -> None:
    valid = torch.arange(12) != 5
    whole = routings(1, spans_of([12]))[0]
    spans = spans_of([4, 8], valid_T=valid)
    kept = Routing(*(t[valid] for t in (whole.experts_TA, whole.weights_TA, whole.probs_TE, whole.logits_TE)))
    found = balance.batch_balance(whole, spans)
    torch.testing.assert_close(found, balance.sequence_balance(kept, spans_of([11])))
    # Two ranks that share a micro-batch add their counts, and their losses add up to the whole.
    counts: list[Tensor] = []
    halves = [slice(0, 4), slice(4, 12)]
    parts = [Routing(whole.experts_TA[h], whole.weights_TA[h], whole.probs_TE[h], whole.logits_TE[h]) for h in halves]
    cut = [spans_of([h.stop - h.start], valid_T=valid[h]) for h in halves]
    for part, one in zip(parts, cut, strict=True):
        balance.batch_balance(part, one, lambda c: counts.append(c) or c)
    total = sum(counts)
    assert isinstance(total, Tensor)
    losses = [balance.batch_balance(part, one, lambda c: total) for part, one in zip(parts, cut, strict=True)]
    torch.testing.assert_close(losses[0] + losses[1], found)


def gate_gradients(moe: MoeConfig, num_micro_batches: int, router: str = "softmax") -> tuple[Tensor, Tensor]:
    """Return the gates' gradients from the riding losses alone, and the reported sums, of four sequences."""
    torch.manual_seed(2)
    tokens, built = torch.randint(40, (24,)), model(moe, router)
    stats = torch.zeros(2, routing.num_stats(4), dtype=torch.float64)
    for part in tokens.chunk(num_micro_batches):
        spans = spans_of([6] * (len(part) // 6), balance_scale=1 / 24, stats_LS=stats)
        built.loss(part, spans, part, torch.zeros(len(part))).backward()
    gates = [block.block_sparse_moe.gate.weight.grad for block in built.blocks.values()]
    return torch.stack([gate for gate in gates if gate is not None]), stats


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(
    "moe", [MoeConfig(z_loss_coef=0.1), MoeConfig(capacity_factor=0.7), MoeConfig(router_aux_loss_coef=0)]
)
def test_sequence_losses_do_not_change_with_micro_batches(router: str, moe: MoeConfig) -> None:
    whole, stats = gate_gradients(moe, 1, router)
    assert (whole.abs().max() > 1e-6) == (moe.router_aux_loss_coef > 0)
    for parts in (2, 4):
        grads, counted = gate_gradients(moe, parts, router)
        torch.testing.assert_close(grads, whole, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(counted, stats, rtol=1e-6, atol=0)


def test_batch_losses_do_change_with_micro_batches() -> None:
    moe = MoeConfig(balance="batch")
    whole, parts = gate_gradients(moe, 1)[0], gate_gradients(moe, 4)[0]
    assert whole.abs().max() > 1e-6
    assert (whole - parts).abs().max() > 1e-2 * whole.abs().max()
    # One sequence alone is its whole micro-batch.
    torch.testing.assert_close(parts, gate_gradients(MoeConfig(), 4)[0], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("router", ROUTERS)
def test_recomputing_a_block_counts_and_trains_as_without(router: str) -> None:
    moe = MoeConfig(z_loss_coef=0.1, capacity_factor=0.7, router_jitter_noise=0.2)
    torch.manual_seed(2)
    tokens = torch.randint(40, (24,))
    found = []
    for recompute in (False, True):
        built = model(moe, router)
        if recompute:
            for block in built.blocks.values():
                plain = block.forward
                block.forward = lambda *args, plain=plain: torch.utils.checkpoint.checkpoint(  # type: ignore[method-assign]
                    plain, *args, use_reentrant=False
                )
        stats = torch.zeros(2, routing.num_stats(4), dtype=torch.float64)
        spans = spans_of([12, 12], balance_scale=1 / 24, stats_LS=stats, draws_T=torch.arange(24))
        built.loss(tokens, spans, tokens.roll(-1), torch.ones(24)).backward()
        found.append((stats, *(p.grad for p in built.parameters() if p.grad is not None)))
    assert found[0][0][:, -1].min() > 0  # something was dropped
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_the_selection_bias_is_in_the_table_and_has_no_gradient() -> None:
    built = model(MoeConfig(), "sigmoid")
    assert {name for name, _ in built.named_parameters()} == set(layout.table(built.config))
    bias = built.blocks[1].block_sparse_moe.gate.selection_bias
    assert bias is not None
    assert (bias.requires_grad, bias.abs().max().item()) == (False, 0.0)
    assert not any("bias" in name for name in layout.table(SMALL))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"drop": "tokens"}, r"moe.drop='tokens' is not one of token, choice, probability. Did you mean 'token'"),
        ({"balance": "none"}, r"moe.balance='none' is not one of sequence, batch, hf"),
        ({"capacity_factor": 0}, r"moe.capacity_factor=0 must be a number above 0, or null: null drops nothing"),
        ({"min_capacity": 4}, r"moe.min_capacity=4 means nothing while moe.capacity_factor is null"),
        ({"capacity_factor": 1.0, "capacity_multiple": 0}, r"moe.capacity_multiple=0 must be a whole number of at"),
        ({"router_jitter_noise": 1.0}, r"moe.router_jitter_noise=1.0 would turn the router's input around"),
        ({"z_loss_coef": -1}, r"moe.z_loss_coef=-1 must be a number of at least 0"),
        ({"bias_update_rate": float("nan")}, r"moe.bias_update_rate=nan must be a number"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        MoeConfig(**fields)


@pytest.mark.parametrize("group", ["sequence", "rank"])
@pytest.mark.parametrize("drop", ["token", "choice", "probability"])
@pytest.mark.parametrize("router", ROUTERS)
def test_no_number_is_asked_of_the_device(router: str, drop: Drop, group: CapacityGroup) -> None:
    # The meta device has shapes alone: whatever needs a value on the host fails there.
    moe = MoeConfig(capacity_factor=0.5, drop=drop, capacity_group=group)
    spans = spans_of([5, 7], valid_T=torch.ones(12, dtype=torch.bool), draws_T=torch.arange(12), device="meta")
    logits = jitter(torch.empty(12, 6, device="meta"), torch.empty(12, dtype=torch.long, device="meta"), 0, 0.1)
    chosen = ROUTERS[router](logits, 2, None)
    found = within_capacity(chosen, spans, moe)
    losses = [loss(chosen, spans) for loss in (balance.sequence_balance, balance.batch_balance, balance.z_loss)]
    stats = routing.count(found, spans, losses[0], losses[2])
    assert (found.weights_TA.shape, stats.shape) == ((12, 2), (routing.num_stats(6),))
    balance.update_bias(torch.empty(6, device="meta"), stats[:6], 0.1)
    with pytest.raises((RuntimeError, NotImplementedError)):
        stats.nonzero()


def test_every_choice_of_settings_computes() -> None:
    tokens = torch.arange(16)
    groups: tuple[CapacityGroup, ...] = ("sequence", "rank")
    drops: tuple[Drop, ...] = ("token", "choice", "probability")
    kinds: tuple[Balance, ...] = ("sequence", "batch", "hf")
    for drop, group, kind in itertools.product(drops, groups, kinds):
        moe = MoeConfig(balance=kind, capacity_factor=0.5, drop=drop, capacity_group=group)
        built = model(moe)
        spans = spans_of([8, 8], balance_scale=1 / 16)
        loss = built.loss(tokens, spans, tokens, torch.ones(16))
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in built.parameters())
