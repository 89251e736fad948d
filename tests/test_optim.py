"""Schedules, parameter groups, clipping."""

from __future__ import annotations

import pytest
import torch

from ostro.model.mixtral import Mixtral
from ostro.model.settings import ModelConfig
from ostro.optim import SCHEDULES, build_optimizer, clip_factor, learning_rate, state_tensors
from ostro.sections import Optim

SMALL = ModelConfig(
    vocab_size=20,
    hidden_size=8,
    intermediate_size=6,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_local_experts=2,
)


def test_the_seeds_cosine_has_its_golden_rates() -> None:
    # MindFormers' CosineWithWarmUpLR, 1e-5 to 1e-6, ratio .03, 100 steps: recorded from the real code.
    optim = Optim(schedule="cosine_mindformers", learning_rate=1e-5, min_learning_rate=1e-6, warmup_ratio=0.03)
    golden = {0: 0, 1: 1e-5 / 3, 2: 2e-5 / 3, 3: 1e-5, 4: 9.99764e-6, 50: 5.71853e-6, 99: 1.00236e-6, 100: 1e-6}
    for step, rate in golden.items():
        assert learning_rate(optim, step, 100) == pytest.approx(rate, rel=1e-4), step


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_climb_then_fall_between_their_bounds(schedule: str) -> None:
    optim = Optim(schedule=schedule, learning_rate=1.0, min_learning_rate=0.1, warmup_ratio=0.2)  # type: ignore[arg-type]
    rates = [learning_rate(optim, step, 50) for step in range(51)]
    climb, fall = rates[:11], rates[10:]
    assert climb == sorted(climb)
    assert climb[0] < 1.0
    assert rates[10] == 1.0
    assert fall == sorted(fall, reverse=True)
    assert rates[-1] == (1.0 if schedule == "constant" else 0.1)
    assert (rates[0] == 0) == (schedule == "cosine_mindformers")


def test_linear_is_half_way_in_the_middle() -> None:
    optim = Optim(schedule="linear", learning_rate=1.0, min_learning_rate=0.0, warmup_ratio=0.0)
    assert learning_rate(optim, 25, 50) == 0.5


def test_only_matrices_decay() -> None:
    model = Mixtral(SMALL)
    optimizer = build_optimizer(dict(model.named_parameters()), SMALL, Optim(weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == ("norm" not in name), name


def test_clipping_scales_to_the_bound() -> None:
    assert clip_factor(5.0, 1.0) == pytest.approx(0.2, rel=1e-5)
    assert clip_factor(5.0, 10.0) == 1.0


def test_the_state_exists_before_the_first_step_and_is_all_of_it() -> None:
    torch.manual_seed(0)
    model = Mixtral(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    optimizer = build_optimizer(dict(model.named_parameters()), SMALL, Optim())
    before = {name: tensor.clone() for name, tensor in state_tensors(dict(model.named_parameters()), optimizer).items()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    after = state_tensors(dict(model.named_parameters()), optimizer)
    assert after.keys() == before.keys()
    assert len(after) == 4 * len(list(model.parameters()))
    assert all(not torch.equal(after[name], before[name]) for name in after)
