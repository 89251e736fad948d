"""The passes around the grouped products against the oracle: in torch everywhere, in Triton's interpreter where it is.

`python -m pytest` with TRITON_INTERPRET=1 runs the Triton half on a CPU; a GPU machine compiles the same kernels.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ostro import device
from ostro.model import kernels
from ostro.model.kernels import Passes, fp8, plain
from ostro.model.kernels.grouped import run_ordered, run_ordered_output_weighted
from ostro.model.kernels.order import Order, order_by_expert
from ostro.model.moe import dispatch_grouped, dispatch_loop
from ostro.model.routing import Routing, route_softmax
from ostro.model.settings import ModelConfig, MoeConfig

WHERE = device.accelerator() if device.is_cuda(device.accelerator()) else torch.device("cpu")
CAN_RUN = kernels.has_triton() and (WHERE.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1")
needs_triton = pytest.mark.skipif(not CAN_RUN, reason="Triton is not installed, or neither a GPU nor its interpreter")
BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"
NAMES = ["torch", pytest.param("triton", marks=needs_triton)]

# Tokens, experts, choices, hidden, ffn: no multiple of a block, one token, one expert for all, more experts than rows.
SHAPES = [
    (37, 5, 2, 24, 40),
    (1, 8, 2, 8, 8),
    (19, 4, 1, 16, 24),
    (23, 6, 3, 40, 8),
    (9, 4, 4, 8, 16),
    (3, 16, 2, 8, 8),
]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def passes_named(name: str) -> Passes:
    return kernels.triton_passes() if name == "triton" else kernels.TORCH


def routing_of(tokens: int, experts: int, choices: int, collapsed: bool = False) -> tuple[Tensor, Routing]:
    logits = torch.randn(tokens, experts, device=WHERE)
    if collapsed:
        logits += torch.arange(experts, 0, -1, device=WHERE) * 100.0
    logits.requires_grad_()
    routing = route_softmax(logits / 50 if collapsed else logits, choices)
    return logits, routing


def inputs(tokens: int, experts: int, hidden: int, ffn: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((tokens, hidden), (experts, 2, ffn, hidden), (experts, hidden, ffn))
    return [(torch.randn(s, device=WHERE) * 0.5).to(dtype).requires_grad_() for s in shapes]


def assert_near(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert found.isfinite().all()
    largest = exact.detach().float().abs().max().item() if exact.numel() else 0.0
    torch.testing.assert_close(found.float(), exact.float(), rtol=0, atol=TOLERANCE[dtype] * largest + 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("collapsed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weigh", [run_ordered, run_ordered_output_weighted])
@pytest.mark.parametrize("name", NAMES)
def test_the_layer_equals_the_oracle(name: str, weigh, shape, collapsed: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, experts, choices, hidden, ffn = shape
    _, routing = routing_of(tokens, experts, choices, collapsed)
    # The weights are leaves: one choice a token weighs 1 whatever the logits, whose gradients were only rounding.
    weights = torch.rand(tokens, choices, device=WHERE, requires_grad=True)
    routing = dataclasses.replace(routing, weights_TA=weights)
    x, w13, w2 = inputs(tokens, experts, hidden, ffn, dtype)
    order = order_by_expert(routing.experts_TA, None, experts)
    direction = torch.randn(tokens, hidden, device=WHERE)
    found = weigh(x, weights, order, w13, w2, passes_named(name))
    assert found.dtype == dtype
    grads = torch.autograd.grad((found * direction).sum(), (x, w13, w2, weights))
    exact_x, exact_w13, exact_w2 = (t.detach().float().requires_grad_() for t in (x, w13, w2))
    exact = dispatch_loop(exact_x, routing, exact_w13, exact_w2)
    exact_grads = torch.autograd.grad((exact * direction).sum(), (exact_x, exact_w13, exact_w2, weights))
    assert_near(found, exact, dtype)
    for fast, slow in zip(grads, exact_grads, strict=True):
        assert_near(fast, slow, dtype)


def poisoned(num_tokens: int, num_choices: int, dtype: torch.dtype) -> tuple[Order, Tensor, Tensor, Tensor]:
    """A third of the choices is dropped; return the order, weights, and rows of 24 and 48 values, NaN where unused."""
    _, routing = routing_of(num_tokens, 5, num_choices)
    kept_TA = torch.rand(num_tokens, num_choices, device=WHERE) < 0.7
    kept_TA[0] = False
    order = order_by_expert(routing.experts_TA, kept_TA, 5)
    assert 0 < order.ends_E[-1] == kept_TA.sum() < num_tokens * num_choices
    y_ND, h_N2F = (torch.randn(num_tokens * num_choices, n, device=WHERE).to(dtype) for n in (24, 48))
    y_ND[~order.used_N] = torch.nan
    h_N2F[~order.used_N] = torch.nan
    return order, routing.weights_TA.detach(), y_ND, h_N2F


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choices", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_poisoned_tails_reach_nothing(name: str, choices: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    order, weights, y_ND, h_N2F = poisoned(13, choices, dtype)
    passes, tokens_N = passes_named(name), order.order_N // choices
    used, clean_y, clean_h = order.used_N[:, None], y_ND.nan_to_num(), h_N2F.nan_to_num().float()
    flat_N = weights.flatten()[order.order_N][:, None]

    x = torch.randn(13, 24, device=WHERE).to(dtype).requires_grad_()
    rows = passes.permute(x, order)
    assert torch.equal(rows, torch.where(used, x[tokens_N], 0))
    (grad_x,) = torch.autograd.grad(rows, x, y_ND)
    summed = torch.zeros(13, 24, device=WHERE).index_add(0, tokens_N, clean_y.float())
    assert_near(grad_x, summed, dtype)

    for weights_TA in (None, weights.clone().requires_grad_()):
        y = y_ND.clone().requires_grad_()
        out = passes.unpermute(y, weights_TA, order)
        share = torch.ones_like(flat_N) if weights_TA is None else flat_N
        assert_near(out, torch.zeros(13, 24, device=WHERE).index_add(0, tokens_N, clean_y.float() * share), dtype)
        direction = torch.randn(13, 24, device=WHERE).to(dtype)
        leaves = (y,) if weights_TA is None else (y, weights_TA)
        grads = torch.autograd.grad(out, leaves, direction)
        assert_near(grads[0], torch.where(used, direction[tokens_N].float() * share, 0), dtype)
        if weights_TA is not None:
            dots_N = (direction[tokens_N].float() * clean_y.float()).sum(dim=1)
            assert_near(
                grads[1],
                torch.zeros_like(weights).flatten().index_copy(0, order.order_N, dots_N).view_as(weights),
                dtype,
            )

    grad_a = y_ND
    for weights_TA in (None, weights):
        h, leaf = clean_h.clone().requires_grad_(), weights.clone().requires_grad_()
        exact = torch.nn.functional.silu(h[:, :24]) * h[:, 24:]
        exact = exact if weights_TA is None else exact * leaf.flatten()[order.order_N][:, None]
        exact = torch.where(used, exact, 0)
        exact_h, exact_w = torch.autograd.grad(exact, (h, leaf), clean_y.float(), allow_unused=True)
        grad_h, again, grad_w = passes.swiglu_backward(grad_a, h_N2F, weights_TA, order)
        assert_near(passes.swiglu(h_N2F, weights_TA, order), exact, dtype)
        assert_near(again, exact, dtype)
        assert_near(grad_h, exact_h, dtype)
        assert (grad_w is None) == (weights_TA is None)
        if grad_w is not None:
            assert_near(grad_w, exact_w, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_dropped_choices_add_nothing_and_give_the_router_nothing(name: str) -> None:
    torch.manual_seed(2)
    logits, routing = routing_of(17, 4, 2)
    kept_TA = torch.rand(17, 2, device=WHERE) < 0.5
    routing = Routing(routing.experts_TA, routing.weights_TA * kept_TA, routing.probs_TE, routing.logits_TE, kept_TA)
    x, w13, w2 = inputs(17, 4, 16, 24, torch.float32)
    found = dispatch_grouped(x, routing, w13, w2, name)  # type: ignore[arg-type]
    exact = dispatch_loop(x, routing, w13, w2)
    for fast, slow in zip(
        (found, *torch.autograd.grad(found.square().sum(), (x, w13, w2, logits), retain_graph=True)),
        (exact, *torch.autograd.grad(exact.square().sum(), (x, w13, w2, logits))),
        strict=True,
    ):
        assert_near(fast, slow, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_end_inside_wide_rows(name: str) -> None:
    torch.manual_seed(3)
    order, weights, _, _ = poisoned(3, 2, torch.float32)
    h_N2F, grad_NF = torch.randn(6, 2 * 2100, device=WHERE), torch.randn(6, 2100, device=WHERE)
    y = torch.randn(6, 2100, device=WHERE, requires_grad=True)
    w = weights.clone().requires_grad_()
    passes = passes_named(name)
    assert_near(passes.swiglu(h_N2F, weights, order), plain.swiglu(h_N2F, weights, order), torch.float32)
    for fast, slow in zip(
        passes.swiglu_backward(grad_NF, h_N2F, weights, order),
        plain.swiglu_backward(grad_NF, h_N2F, weights, order),
        strict=True,
    ):
        assert fast is not None
        assert slow is not None
        assert_near(fast, slow, torch.float32)
    outs = [run(y, w, order) for run in (passes.unpermute, plain.unpermute)]
    grads = [torch.autograd.grad(out.square().sum(), (y, w)) for out in outs]
    assert_near(outs[0], outs[1], torch.float32)
    for fast, slow in zip(*grads, strict=True):
        assert_near(fast, slow, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_permute_then_unpermute_multiplies_by_the_choices(name: str) -> None:
    _, routing = routing_of(11, 6, 3)
    order = order_by_expert(routing.experts_TA, None, 6)
    x = torch.randint(-8, 8, (11, 24), device=WHERE).float()
    passes = passes_named(name)
    assert torch.equal(passes.unpermute(passes.permute(x, order), None, order), 3 * x)


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_at_all(name: str) -> None:
    order = order_by_expert(torch.empty(0, 2, dtype=torch.int64, device=WHERE), None, 4)
    assert order.ends_E.tolist() == [0, 0, 0, 0]
    weights = torch.empty(0, 2, device=WHERE, requires_grad=True)
    x = torch.empty(0, 8, device=WHERE, requires_grad=True)
    passes = passes_named(name)
    rows = passes.permute(x, order)
    out = passes.unpermute(rows, weights, order)
    assert [tuple(grad.shape) for grad in torch.autograd.grad(out.sum(), (x, weights))] == [(0, 8), (0, 2)]
    assert passes.swiglu(rows, None, order).shape == (0, 4)
    assert passes.swiglu_backward(rows[:, :4].detach(), rows.detach(), weights, order)[0].shape == (0, 8)


def test_the_order_is_stable_and_its_inverse_is_right() -> None:
    experts_TA = torch.tensor([[2, 0], [0, 2], [3, 0]])
    order = order_by_expert(experts_TA, None, 5)
    assert order.order_N.tolist() == [1, 2, 5, 0, 3, 4]
    assert order.ends_E.tolist() == [3, 3, 5, 6, 6]
    assert order.order_N[order.place_TA.flatten()].tolist() == list(range(6))
    dropped = order_by_expert(experts_TA, torch.tensor([[True, False], [True, True], [False, True]]), 5)
    assert dropped.order_N.tolist() == [2, 5, 0, 3, 1, 4]
    assert dropped.ends_E.tolist() == [2, 2, 4, 4, 4]


def test_the_host_asks_for_no_number() -> None:
    """On the meta device a question for a value, a count or a data-dependent shape cannot be answered, and raises."""
    experts_TA = torch.zeros(12, 2, dtype=torch.int64, device="meta")
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.bincount(experts_TA.flatten(), minlength=4)
    x, w13, w2 = (
        torch.empty(s, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for s in ((12, 16), (4, 2, 24, 16), (4, 16, 24))
    )
    weights = torch.empty(12, 2, device="meta", requires_grad=True)
    unused = torch.empty(12, 4, device="meta")
    for kept_TA in (None, torch.ones(12, 2, dtype=torch.bool, device="meta")):
        routing = Routing(experts_TA, weights, unused, unused, kept_TA)
        out = dispatch_grouped(x, routing, w13, w2, "torch")
        out.backward(torch.empty_like(out))
    assert [t.grad is not None and t.grad.shape == t.shape for t in (x, w13, w2, weights)] == [True] * 4


def test_the_setting_chooses() -> None:
    assert kernels.choose("torch", WHERE) is kernels.TORCH
    assert kernels.choose("auto", torch.device("cpu")) is kernels.TORCH
    if kernels.has_triton():
        assert kernels.choose("triton", torch.device("cpu")) is kernels.triton_passes()
    else:
        with pytest.raises(ImportError):
            kernels.choose("triton", torch.device("cpu"))


def test_fp8_stays_within_its_rounding() -> None:
    torch.manual_seed(4)
    logits, routing = routing_of(64, 4, 2)
    x, w13, w2 = inputs(64, 4, 32, 48, torch.float32)
    found = dispatch_grouped(x, routing, w13, w2, "torch", use_fp8=True)
    exact = dispatch_loop(x, routing, w13, w2)
    grads = [torch.autograd.grad(out.square().sum(), (x, w13, w2, logits), retain_graph=True) for out in (found, exact)]
    for rounded, right in zip((found, *grads[0]), (exact, *grads[1]), strict=True):
        # e4m3 rounds a value by at most 1/16; errors of a sum's terms are independent, so they shrink beside it.
        assert 1e-4 < (rounded - right).norm() / right.norm() < 0.1


def test_fp8_scales_each_row_by_its_largest() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [3e4, 1.0, -3e-3]])
    rounded, scale = fp8.quantize(x)
    assert rounded.float().abs().amax(dim=1).tolist() == [448.0, 0.0, 448.0]
    back = rounded.float() * scale[:, None]
    # Half a step of three mantissa bits, or of the smallest subnormal, 2^-9.
    assert ((back - x).abs() <= (x.abs() / 16).maximum(scale[:, None] * 2.0**-10) * 1.0001).all()


def test_fp8_leaves_unused_rows_alone() -> None:
    torch.manual_seed(5)
    x = torch.randn(7, 16)
    x[5:] = torch.nan
    x.requires_grad_()
    w = torch.randn(3, 8, 16, requires_grad=True)
    out = fp8.grouped_mm_fp8(x, w, torch.tensor([2, 2, 5], dtype=torch.int32))[:5]
    grads = torch.autograd.grad(out.sum(), (x, w))
    assert out.isfinite().all()
    assert grads[0][:5].isfinite().all()
    assert grads[1].isfinite().all()
    assert not grads[1][1].any()


def test_the_gpu_benchmark_runs_whole_at_tiny_dims(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [sys.executable, str(BENCHMARK), "--quick", "--cpu", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Every result was right against fp32." in done.stdout
    rows = json.loads(file.read_text("utf-8"))["rows"]
    timed = {(row["part"].split()[0], row["name"]) for row in rows if "tflops" in row}
    ours = ["ostro", "ostro, torch passes", "ostro, weighed last", "ostro, fp8", "dense product"]
    assert {("experts", name) for name in ours} <= timed
    assert {("attention", "documents"), ("cross-entropy", "by chunks"), ("training", "1 layers")} <= timed
    assert sum("right" in row for row in rows) >= 8


@pytest.mark.parametrize(
    ("moe", "widths", "dtype", "capability", "sentence"),
    [
        ({"kernels": "auto"}, (20, 20), torch.float32, 80, None),
        ({"kernels": "triton"}, (24, 40), torch.bfloat16, 80, None),
        ({"fp8": True}, (32, 48), torch.bfloat16, 90, None),
        (
            {"fp8": True},
            (32, 48),
            torch.bfloat16,
            80,
            "moe.fp8=true needs a GPU of SM90 and this is a card: leave it out.",
        ),
        ({"kernels": "triton"}, (32, 48), torch.float32, 90, "moe.kernels=triton needs train.dtype=bf16"),
        (
            {"fp8": True},
            (24, 48),
            torch.bfloat16,
            90,
            "moe.fp8=true needs multiples of 16 and finds model.hidden_size=24",
        ),
        ({"kernels": "triton"}, (32, 20), torch.bfloat16, 90, "moe.kernels=triton needs multiples of 8"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(
    moe: dict, widths: tuple[int, int], dtype: torch.dtype, capability: int, sentence: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    monkeypatch.setattr(kernels, "compute_capability", lambda: capability)
    monkeypatch.setattr(device, "name", lambda where: "a card")
    hidden, ffn = widths
    model = ModelConfig(hidden_size=hidden, intermediate_size=ffn, num_attention_heads=2, num_key_value_heads=1)
    found = kernels.why_not(MoeConfig(**moe), model, dtype, torch.device("cuda"))
    assert found is None if sentence is None else (found or "").startswith(sentence)
