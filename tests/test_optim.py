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


def stepped(name: str, implementation: str, steps: int) -> torch.Tensor:
    p = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    optim = Optim.model_validate(
        {
            "name": name,
            "implementation": implementation,
            "learning_rate": 0.1,
            "min_learning_rate": 0,
            "betas": (0.9, 0.95),
            "eps": 1e-8,
            "weight_decay": 0.1,
        }
    )
    optimizer = build_optimizer({"p": p}, SMALL, optim)
    for _ in range(steps):
        p.grad = torch.tensor([[0.1, -0.2], [0.3, 0.4]])
        optimizer.step()
    return p.detach()


# From MindFormers' own AdamW and AdamWeightDecay.
GOLDEN = {
    ("adamw", 1): [[0.89, 2.08], [2.87, 3.86]],
    ("adamw", 3): [[0.673289, 2.237608], [2.613888, 3.584186]],
    ("fp32_state_adam_weight_decay", 1): [[0.945279, 2.024721], [2.925279, 3.915279]],
    ("fp32_state_adam_weight_decay", 3): [[0.794469, 2.116428], [2.735067, 3.705366]],
}


@pytest.mark.parametrize("implementation", ["auto", "fused", "foreach"])
@pytest.mark.parametrize("case", GOLDEN)
def test_updates_are_those_of_mindformers(case: tuple[str, int], implementation: str) -> None:
    found = stepped(case[0], implementation, case[1])
    torch.testing.assert_close(found, torch.tensor(GOLDEN[case]), rtol=0, atol=1e-6)


def test_mindformers_optimizer_has_its_own_eps_unless_one_is_given() -> None:
    assert Optim(name="fp32_state_adam_weight_decay").eps == 1e-6
    assert Optim(name="fp32_state_adam_weight_decay", eps=1e-7).eps == 1e-7
    assert Optim().eps == 1e-8


def test_wsd_stays_and_then_falls_in_a_straight_line() -> None:
    optim = Optim(schedule="wsd", learning_rate=1.0, min_learning_rate=0.0, warmup_ratio=0.1, decay_ratio=0.2)
    rates = [learning_rate(optim, step, 100) for step in range(101)]
    assert set(rates[10:81]) == {1.0}
    assert rates[90] == pytest.approx(0.5)
    assert rates[100] == 0.0


def test_a_schedule_may_be_longer_than_the_run() -> None:
    optim = Optim(schedule="linear", learning_rate=1.0, min_learning_rate=0.0, warmup_ratio=0.0, total_steps=200)
    assert learning_rate(optim, 50, 100) == 0.75
    with pytest.raises(ValueError, match="must be at least 1"):
        Optim(total_steps=0)
