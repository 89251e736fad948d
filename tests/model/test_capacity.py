"""Capacity: against MindFormers' own numbers, the slow rule, and what must not depend on what."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import SMALL
from torch import Tensor

from ostro.model import routing
from ostro.model.capacity import capacities, places, places_loop, within_capacity
from ostro.model.mixtral import Mixtral
from ostro.model.moe import dispatch, dispatch_loop
from ostro.model.routing import ROUTERS, Routing
from ostro.model.settings import Drop, ModelConfig, MoeConfig
from ostro.model.spans import spans_of
from ostro.weights import Hints, RandomReader, load_into, open_reader

DROPS: tuple[Drop, ...] = ("token", "choice", "probability")
SEED_NAMES: dict[str, Drop] = {"sdrop": "token", "kdrop": "choice"}


def routed(tokens: int, experts: int, choices: int, seed: int, router: str = "softmax") -> Routing:
    torch.manual_seed(seed)
    # Rounded, so that equal weights occur.
    logits = (torch.randn(tokens, experts) * 2).round()
    logits[:, 0] += 1.0
    return ROUTERS[router](logits, min(choices, experts), None)


# MindFormers


@pytest.mark.parametrize("name", ["sdrop_cf1", "kdrop_cf1", "sdrop_cf0"])
def test_the_router_is_that_of_mindformers(shared: Path, name: str) -> None:
    golden = json.loads((shared / "golden" / "router.json").read_text())
    wanted = golden[name]
    chosen = ROUTERS["softmax"](torch.tensor(golden["logits"]), golden["k"], None)
    # Their factor 0 means that nothing is dropped, in a buffer as large as it takes; ours is null.
    moe = MoeConfig(capacity_factor=1.0, drop=SEED_NAMES[name[:5]], capacity_group="rank")
    found = within_capacity(chosen, spans_of([6]), moe) if name.endswith("1") else chosen
    torch.testing.assert_close(found.weights_TA, torch.tensor(wanted["coef"]), atol=6e-5, rtol=0)
    size = wanted["capacity"]
    if name.endswith("1"):
        assert capacities(torch.tensor([6]), golden["E"], golden["k"], moe).tolist() == [size]
    place_TA = places(chosen.experts_TA, chosen.weights_TA, torch.zeros(6).long(), golden["E"], moe.drop)
    slot_TA = torch.where(place_TA < size, place_TA + 1, 0)
    assert (found.experts_TA * (size + 1) + slot_TA).tolist() == wanted["combine"]
    buffer = torch.zeros(golden["E"], size + 1, dtype=torch.long)
    buffer[chosen.experts_TA, slot_TA] = torch.arange(1, 7)[:, None].expand(6, 2)
    assert buffer[:, 1:].tolist() == wanted["dispatch"]


@pytest.mark.parametrize("factor", ["1.0", "0.5"])
@pytest.mark.parametrize("order", ["sdrop", "kdrop"])
def test_the_whole_model_is_that_of_mindformers(shared: Path, factor: str, order: str) -> None:
    golden = shared / "golden" / "mindformers"
    config = ModelConfig.from_hf({"model_type": "mixtral", **json.loads((golden / "config.json").read_text())})
    expected = np.load(golden / "expected.npz")
    moe = MoeConfig(capacity_factor=float(factor), drop=SEED_NAMES[order], capacity_group="rank")
    model = Mixtral(config, moe)
    load_into(model, open_reader(golden / "model.ckpt", Hints(model=config)))
    tokens = torch.from_numpy(expected["x"]).long()
    with torch.no_grad():
        spans = spans_of([tokens.shape[1]] * len(tokens))
        logits = model.logits(model(tokens.flatten(), spans)).view(*tokens.shape, -1)
        torch.testing.assert_close(logits, torch.from_numpy(expected[f"logits_cf{factor}_{order}"]), atol=1e-5, rtol=0)
        # In eval() nothing is dropped.
        model.eval()
        logits = model.logits(model(tokens.flatten(), spans)).view(*tokens.shape, -1)
        torch.testing.assert_close(logits, torch.from_numpy(expected["logits"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("tokens", "factor", "multiple", "least", "wanted"),
    [
        (1024, 1.1, 1, 0, 282),  # MindFormers' shipped YAML: dp 2, mp 4, sequence parallel, 4,096 tokens
        (4096, 1.1, 1, 0, 1127),
        (4096, 1.1, 8, 0, 1128),
        (6, 8.0, 1, 0, 6),  # never more than all tokens …
        (6, 8.0, 4, 0, 8),  # … unless the multiple rounds up from there
        (100, 0.001, 1, 0, 1),
        (100, 0.001, 1, 4, 4),
        (3, 0.001, 1, 4, 3),
        (100, 0.001, 16, 4, 16),
        (0, 1.0, 4, 4, 0),
    ],
)
def test_capacities(tokens: int, factor: float, multiple: int, least: int, wanted: int) -> None:
    moe = MoeConfig(capacity_factor=factor, capacity_multiple=multiple, min_capacity=least)
    assert capacities(torch.tensor([tokens, tokens]), 8, 2, moe).tolist() == [wanted, wanted]


# The rule, slow and fast


@pytest.mark.parametrize("drop", DROPS)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    experts=st.integers(1, 6),
    choices=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_places_equal_the_oracle(drop: Drop, lengths: list[int], experts: int, choices: int, seed: int) -> None:
    found = routed(sum(lengths), experts, choices, seed)
    groups = spans_of(lengths).sequence_ids_T
    arguments = (found.experts_TA, found.weights_TA, groups, experts, drop)
    assert torch.equal(places(*arguments), places_loop(*arguments))


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("router", ROUTERS)
@given(
    tokens=st.integers(1, 30),
    experts=st.integers(1, 6),
    choices=st.integers(1, 3),
    factor=st.sampled_from([0.1, 0.5, 1.0, 1.25, 9.0]),
    seed=st.integers(0, 999),
)
def test_an_expert_serves_its_capacity_and_no_choice_more(
    drop: Drop, router: str, tokens: int, experts: int, choices: int, factor: float, seed: int
) -> None:
    chosen = routed(tokens, experts, choices, seed, router)
    choices = chosen.experts_TA.shape[1]
    moe = MoeConfig(capacity_factor=factor, drop=drop)
    found = within_capacity(chosen, spans_of([tokens]), moe)
    size = int(capacities(torch.tensor([tokens]), experts, choices, moe))
    kept = found.kept_TA
    assert kept is not None
    asked, served = (
        torch.bincount(e.flatten(), minlength=experts) for e in (chosen.experts_TA, chosen.experts_TA[kept])
    )
    assert torch.equal(served, asked.clamp(max=size))
    # The others keep their weights: nothing is shared out among them.
    assert torch.equal(found.weights_TA, torch.where(kept, chosen.weights_TA, 0.0))
    if factor >= experts:
        assert kept.all()
    if drop == "probability":
        for expert in range(experts):
            here = chosen.experts_TA == expert
            if (here & ~kept).any() and (here & kept).any():
                assert chosen.weights_TA[here & ~kept].max() <= chosen.weights_TA[here & kept].min()


@pytest.mark.parametrize("drop", DROPS)
def test_sequences_do_not_disturb_each_other_and_padding_takes_no_place(drop: Drop) -> None:
    found = routed(30, 4, 2, 0)
    moe = MoeConfig(capacity_factor=0.7, drop=drop)
    valid = torch.ones(30, dtype=torch.bool)
    valid[[0, 1, 2, 14]] = False

    def kept(piece: Tensor, lengths: list[int], valid: Tensor | None = None) -> Tensor:
        part = Routing(*(t[piece] for t in (found.experts_TA, found.weights_TA, found.probs_TE, found.logits_TE)))
        out = within_capacity(part, spans_of(lengths, valid_T=valid), moe).kept_TA
        assert out is not None
        return out

    every = torch.arange(30)
    whole = kept(every, [18, 12])
    assert not whole.all()
    assert torch.equal(whole, torch.cat([kept(every[:18], [18]), kept(every[18:], [12])]))
    padded = kept(every, [18, 12], valid)
    assert torch.equal(padded[valid], kept(every[valid], [14, 12]))
    assert not padded[~valid].any()
    if drop == "token":  # in a rank's one group padding comes first like any other, as in MindFormers
        rank = MoeConfig(capacity_factor=0.7, drop=drop, capacity_group="rank")
        spans = spans_of([18, 12], valid_T=valid)
        both = [within_capacity(found, s, rank).kept_TA for s in (spans, spans_of([30]))]
        assert torch.equal(*both)  # type: ignore[arg-type]
        assert both[0] is not None
        assert both[0][0].all()


@pytest.mark.parametrize("drop", DROPS)
def test_dropped_choices_add_nothing_forwards_or_backwards(drop: Drop) -> None:
    torch.manual_seed(0)
    logits = torch.randn(12, 3, requires_grad=True)
    x, w13, w2 = (torch.randn(s, requires_grad=True) for s in ((12, 6), (3, 2, 5, 6), (3, 6, 5)))
    chosen = ROUTERS["softmax"](logits, 2, None)
    found = within_capacity(chosen, spans_of([12]), MoeConfig(capacity_factor=0.5, drop=drop))
    kept = found.kept_TA
    assert kept is not None
    assert not kept.any(dim=1).all()  # some tokens lose both choices
    outs = [run(x, found, w13, w2) for run in (dispatch, dispatch_loop)]
    assert (outs[0][~kept.any(dim=1)] == 0).all()
    direction = torch.randn(12, 6)
    grads = [torch.autograd.grad((out * direction).sum(), (x, w13, w2, logits), retain_graph=True) for out in outs]
    assert (grads[0][0][~kept.any(dim=1)] == 0).all()
    for fast, slow in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_drops_are_counted_over_valid_tokens_and_loads_before_dropping() -> None:
    valid = torch.arange(20) < 17

    def counted(factor: float | None) -> tuple[Tensor, list[int]]:
        model, dropped = Mixtral(SMALL, MoeConfig(capacity_factor=factor)), []
        load_into(model, RandomReader(SMALL))
        stats = torch.zeros(2, routing.num_stats(4), dtype=torch.float64)

        def note(_: object, inputs: object, outputs: tuple[Tensor, Routing, Tensor]) -> None:
            kept = outputs[1].kept_TA
            dropped.append(0 if kept is None else int((~kept[valid]).sum()))

        for block in model.blocks.values():
            block.block_sparse_moe.register_forward_hook(note)
        with torch.no_grad():
            model(torch.arange(20), spans_of([20], valid_T=valid, stats_LS=stats))
        return stats, dropped

    free, half, ample = (counted(factor) for factor in (None, 0.5, 4.0))
    for stats, dropped in (free, half, ample):
        assert stats[:, -1].tolist() == dropped
        assert stats[:, :4].sum(dim=1).tolist() == [34, 34]
    assert min(half[1]) > 0
    assert torch.equal(ample[0], free[0])
    assert torch.equal(half[0][0, :-1], free[0][0, :-1])


def test_a_huge_factor_drops_nothing() -> None:
    assert capacities(torch.tensor([100]), 8, 2, MoeConfig(capacity_factor=1e18)).tolist() == [100]
