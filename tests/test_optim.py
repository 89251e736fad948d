"""Schedules, parameter groups, clipping."""

from __future__ import annotations

import pytest
import torch

from ostro.model.mixtral import Mixtral
from ostro.model.settings import ModelConfig
from ostro.optim import SCHEDULES, build_optimizer, clip_factor, eight_bits, learning_rate, rounding, state_tensors
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


def test_numbers_of_8_bits_are_those_of_bitsandbytes() -> None:
    signed, unsigned = (torch.from_numpy(eight_bits.values(is_signed)) for is_signed in (True, False))
    for table in (signed, unsigned):
        assert len(table) == len(table.unique()) == 256
        assert table[-1] == 1.0
    torch.testing.assert_close(signed[128:131], torch.tensor([5.5e-7, 3.25e-6, 7.75e-6]))
    assert signed[127] == 0
    torch.testing.assert_close(-signed[:127].flip(0), signed[128:-1])
    torch.testing.assert_close(unsigned[:3], torch.tensor([0.0, 3.25e-7, 7.75e-7]))
    assert unsigned[-2] == pytest.approx(1 - 0.9 / 256)


@pytest.mark.parametrize("columns", [512, 300, 7])
def test_a_block_of_8_bits_has_its_own_scale(columns: int) -> None:
    torch.manual_seed(0)
    value = torch.randn(5, columns) * torch.tensor([1e-6, 1.0, 1e3, 0.0, 1e-3])[:, None]
    codes, scale = eight_bits.quantize(value, is_signed=True)
    assert (codes.shape, scale.shape) == (value.shape, (5, -(-columns // 256)))
    back = eight_bits.dequantize(codes, scale, is_signed=True)
    error = (back - value).abs() / scale.repeat_interleave(256, dim=1)[:, :columns].clamp(min=1e-30)
    assert error.max() < 0.0075
    assert torch.equal(back[3], torch.zeros(columns))
    again, _ = eight_bits.quantize(back, is_signed=True)
    assert torch.equal(again, codes)
    # What is divided by the root of never is 0 beside one that is not.
    tiny = torch.tensor([[1.0, 1e-12]])
    codes, scale = eight_bits.quantize(tiny, is_signed=False)
    assert eight_bits.dequantize(codes, scale, is_signed=False)[0, 1] > 0


def test_stochastic_rounding_is_exact_in_the_mean_and_in_both_neighbours() -> None:
    value = torch.tensor([[1.001, -1.001, 3e-5, 1.0]]).repeat(20_000, 1)
    key = rounding.key(7, 3, torch.tensor(5.0))
    drawn = rounding.draws(key, torch.arange(len(value)), 0, 4)
    rounded = rounding.to_bf16(value, drawn).float()
    assert (rounded.mean(dim=0) - value[0]).abs().max() < 1.2e-4
    assert rounded[:, 0].unique().tolist() == [1.0, 1.0078125]
    assert rounded[:, 3].unique().tolist() == [1.0]
    counts = torch.bincount(drawn.flatten() >> 12, minlength=16)
    assert (counts - counts.float().mean()).abs().max() < 5 * counts.float().mean().sqrt()


def test_draws_are_of_an_elements_place_in_the_whole() -> None:
    key = rounding.key(0, 1, torch.tensor(2.0))
    rows = rounding.row_numbers((3, 2, 8, 16), (0, 0, 0, 0), (3, 2, 8, 16))
    assert rows.tolist() == list(range(48))
    whole = rounding.draws(key, rows, 0, 16).view(3, 2, 8, 16)
    rows = rounding.row_numbers((2, 2, 3, 5), (1, 0, 4, 6), (3, 2, 8, 16))
    part = rounding.draws(key, rows, 6, 5).view(2, 2, 3, 5)
    assert torch.equal(part, whole[1:3, :, 4:7, 6:11])
    for other in (rounding.key(1, 1, torch.tensor(2.0)), rounding.key(0, 2, torch.tensor(2.0))):
        assert not torch.equal(rounding.draws(other, rows, 0, 16), rounding.draws(key, rows, 0, 16))
    assert not torch.equal(rounding.key(0, 1, torch.tensor(3.0)), key)


def updated(dtype: torch.dtype, optim: Optim, steps: int = 20) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6, 2, 700, generator=generator).to(dtype))
    optimizer = build_optimizer({"p": p}, SMALL, optim)
    for _ in range(steps):
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    return p.detach().float(), state_tensors({"p": p}, optimizer)


def test_held_in_fewer_bits_the_update_stays_the_same_to_their_rounding() -> None:
    fields: dict = {"learning_rate": 1e-2, "weight_decay": 0.1}
    exact, _ = updated(torch.float32, Optim(**fields))
    in_bits, tensors = updated(torch.float32, Optim(**fields, state_dtype="int8"))
    assert {name: tuple(t.shape) for name, t in tensors.items() if t.ndim} == {
        "model.p": (6, 2, 700),
        "optim.p.exp_avg": (6, 2, 700),
        "optim.p.exp_avg_sq": (6, 2, 700),
        "optim.p.exp_avg_scale": (6, 2, 3),
        "optim.p.exp_avg_sq_scale": (6, 2, 3),
    }
    assert tensors["optim.p.step"] == 20
    moved = (exact - updated(torch.float32, Optim(**fields), 0)[0]).std()
    assert (in_bits - exact).std() < 0.03 * moved
    in_bf16, _ = updated(torch.bfloat16, Optim(**fields))
    assert (in_bf16 - exact).abs().max() < 0.1
    assert abs((in_bf16 - exact).mean()) < 1e-3


def test_updates_too_small_for_bf16_are_made_in_the_mean() -> None:
    p = torch.nn.Parameter(torch.ones(64, 256, dtype=torch.bfloat16))
    optimizer = build_optimizer({"p": p}, SMALL, Optim(learning_rate=1e-4, min_learning_rate=0))
    for _ in range(50):  # each a fortieth of bf16's step at 1
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.float().mean().item() == pytest.approx(1 - 50e-4, abs=2e-4)
