"""The model on an accelerator against itself on the CPU; skipped where there is none.

It needs torch and pytest alone, so that it runs on a bare GPU machine: python -m pytest -c /dev/null tests/test_gpu.py
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ostro import device
from ostro.model.attention import ATTENTION
from ostro.model.kernels import fp8
from ostro.model.mixtral import Mixtral
from ostro.model.moe import dispatch_grouped, dispatch_loop
from ostro.model.quant import NF4
from ostro.model.routing import Routing, route_softmax
from ostro.model.settings import ModelConfig, MoeConfig
from ostro.model.spans import spans_of

pytestmark = pytest.mark.skipif(not device.is_cuda(device.accelerator()), reason="there is no GPU here")

CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=320,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    num_local_experts=8,
)
LENGTHS = [100, 1, 155]


def model(where: torch.device, dtype: torch.dtype, config: ModelConfig = CONFIG) -> Mixtral:
    generator = torch.Generator().manual_seed(0)
    built = Mixtral(config, MoeConfig(), dtype)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.06 + (parameter.dim() == 1))
    return built.to(where)


def gradients(built: Mixtral) -> tuple[Tensor, dict[str, Tensor]]:
    where = built.head_weight.device
    tokens = torch.randint(512, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1)).to(where)
    spans = spans_of(LENGTHS, balance_scale=1 / len(tokens), device=where)
    built.zero_grad()
    loss = built.loss(tokens, spans, tokens.roll(-1), torch.ones(len(tokens), device=where)) / len(tokens)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in built.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("window", [None, 1, 40])
def test_varlen_attention_equals_the_oracle(window: int | None) -> None:
    torch.manual_seed(0)
    where = device.accelerator()
    spans = spans_of(LENGTHS, device=where)
    options = {"device": where, "dtype": torch.bfloat16, "requires_grad": True}
    q, k, v = (torch.randn(256, heads, 64, **options) for heads in (8, 2, 2))
    outs = [ATTENTION[kind](q, k, v, spans, window) for kind in ("varlen", "masked")]
    torch.testing.assert_close(outs[0], outs[1], rtol=2e-2, atol=2e-2)
    direction = torch.randn_like(outs[0])
    grads = [torch.autograd.grad((out * direction).sum(), (q, k, v)) for out in outs]
    for fast, slow in zip(*grads, strict=True):
        torch.testing.assert_close(fast, slow, rtol=5e-2, atol=1e-1)


def test_fp32_equals_the_cpu() -> None:
    loss, grads = gradients(model(device.accelerator(), torch.float32))
    exact_loss, exact = gradients(model(torch.device("cpu"), torch.float32))
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-5)
    for name, grad in grads.items():
        assert (grad.cpu() - exact[name]).abs().max() <= 1e-4 * exact[name].abs().max(), name


def test_bf16_stays_close_to_fp32() -> None:
    # Every token uses every expert here: a rounded activation cannot send it to another one.
    config = dataclasses.replace(CONFIG, num_local_experts=2)
    loss, grads = gradients(model(device.accelerator(), torch.bfloat16, config))
    exact_loss, exact = gradients(model(torch.device("cpu"), torch.float32, config))
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-3)
    for name, grad in grads.items():
        assert (grad.cpu() - exact[name]).norm() <= 0.05 * exact[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_step_gives_the_same_bits(dtype: torch.dtype) -> None:
    where = device.accelerator()
    device.set_deterministic(where)
    try:
        built = model(where, dtype)
        _, first = gradients(built)
        for _ in range(3):
            _, again = gradients(built)
            assert all(torch.equal(first[name], again[name]) for name in first)
    finally:
        torch.use_deterministic_algorithms(False)


def layer(tokens: int, collapsed: bool = False) -> tuple[tuple[Tensor, ...], Routing]:
    """Random rows, weights and routing weights, all leaves, and the routing; collapsed is to the first two experts."""
    torch.manual_seed(0)
    where = device.accelerator()
    logits = torch.randn(tokens, 8, device=where)
    if collapsed:
        logits[:, :2] += 1000.0
    routing = route_softmax(logits, 2)
    weights = torch.rand(tokens, 2, device=where, requires_grad=True)
    shapes = ((tokens, 256), (8, 2, 320, 256), (8, 256, 320))
    x, w13, w2 = (torch.randn(s, device=where).mul(0.1).bfloat16().requires_grad_() for s in shapes)
    return (x, w13, w2, weights), dataclasses.replace(routing, weights_TA=weights)


@pytest.mark.parametrize("kernels_named", ["auto", "torch"])
@pytest.mark.parametrize(
    ("tokens", "collapsed", "dropping"), [(1, False, False), (257, True, False), (300, False, True)]
)
def test_the_layer_equals_the_oracle_in_fp32(kernels_named: str, tokens: int, collapsed: bool, dropping: bool) -> None:
    leaves, routing = layer(tokens, collapsed)
    x, w13, w2, weights = leaves
    if dropping:
        kept_TA = torch.rand_like(weights) < 0.6
        routing = dataclasses.replace(routing, kept_TA=kept_TA, weights_TA=weights * kept_TA)
    # What is allocated next lies where NaN was: an empty expert's gradient and unused rows must not show it.
    poison = torch.full((64 << 20,), torch.nan, device=x.device, dtype=torch.bfloat16)
    del poison
    out = dispatch_grouped(x, routing, w13, w2, kernels_named)  # type: ignore[arg-type]
    direction = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, direction, retain_graph=True)
    wide = [t.detach().float().requires_grad_() for t in (x, w13, w2)]
    exact = dispatch_loop(wide[0], routing, wide[1], wide[2])
    exact_grads = torch.autograd.grad(exact, (*wide, weights), direction.float())
    for fast, slow in zip((out, *grads), (exact, *exact_grads), strict=True):
        assert fast.isfinite().all()
        assert (fast.float() - slow).norm() <= 0.02 * slow.norm()


@pytest.mark.parametrize("deterministic", [False, True])  # training's is True
@pytest.mark.parametrize("use_fp8", [False, True])
@pytest.mark.parametrize("kernels_named", ["auto", "torch"])
def test_the_host_never_waits(kernels_named: str, use_fp8: bool, deterministic: bool) -> None:
    (x, w13, w2, weights), routing = layer(300)
    direction = torch.randn_like(x)

    def once() -> None:
        out = dispatch_grouped(x, routing, w13, w2, kernels_named, use_fp8)  # type: ignore[arg-type]
        torch.autograd.grad(out, (x, w13, w2, weights), direction)

    if deterministic:
        device.set_deterministic(x.device)
    once()  # compiling may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
        with pytest.raises(RuntimeError, match="synchroniz"):
            x.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)


def test_fp8_products_equal_their_emulation() -> None:
    torch.manual_seed(0)
    where = device.accelerator()
    ends = torch.tensor([100, 100, 129, 256], device=where, dtype=torch.int32)
    a, b = (torch.randn(s, device=where).bfloat16() for s in ((256, 256), (4, 320, 256)))
    if not fp8._is_offered(a):
        pytest.skip("torch offers no grouped fp8 product on this GPU")
    (qa, scale_a), (qb, scale_b) = fp8.quantize(a), fp8.quantize(b)
    found = fp8.scaled_grouped_mm(qa, qb, scale_a, scale_b, ends).float()
    exact = fp8.scaled_grouped_mm_emulated(qa, qb, scale_a, scale_b, ends)
    assert (found - exact).norm() <= 0.01 * exact.norm()


def test_4_bit_values_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    matrix = (torch.randn(3000, 1024) * 0.02).bfloat16()
    held = {}
    for where in (torch.device("cpu"), device.accelerator()):
        held[where.type] = NF4((2, 3000, 512), (2, 3000, 1024), (0, 0, 512), device=where)
        held[where.type].fill((1,), matrix)
    ours, oracle = held.values()
    for name, buffer in oracle.named_buffers():
        assert torch.equal(buffer.cpu(), getattr(ours, name).cpu()), name
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(oracle.dequantize((1,), dtype).cpu(), ours.dequantize((1,), dtype).cpu())
