"""Products, norm, rotary positions and the loss against their plain definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ostro import device
from ostro.model import ops


@given(tokens=st.integers(1, 30), chunk=st.integers(1, 40), seed=st.integers(0, 999))
def test_chunked_loss_equals_the_loss_of_whole_logits(tokens: int, chunk: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(tokens, 8, requires_grad=True)
    head = torch.randn(19, 8, requires_grad=True)
    labels, weights = torch.randint(19, (tokens,)), torch.rand(tokens)
    exact = ops.cross_entropy(x @ head.t(), labels, weights)
    chunked = ops.linear_cross_entropy(x, head, labels, weights, chunk_tokens=chunk)
    torch.testing.assert_close(chunked, exact, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(loss * 0.3, (x, head)) for loss in (chunked, exact)]
    for ours, oracle in zip(*grads, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-4, atol=1e-6)


def test_a_label_beyond_fp32_has_its_true_loss() -> None:
    x = torch.ones(2, 1, requires_grad=True)
    head = torch.tensor([[0.0], [200.0]], requires_grad=True)
    loss = ops.linear_cross_entropy(x, head, torch.tensor([0, 1]), torch.tensor([1.0, 1.0]))
    assert loss.item() == pytest.approx(200.0)
    loss.backward()
    assert head.grad is not None
    assert head.grad.flatten().tolist() == [-1.0, 1.0]


def test_chunked_loss_in_bf16_and_without_gradients() -> None:
    torch.manual_seed(0)
    x, head = torch.randn(20, 16), torch.randn(50, 16)
    labels, weights = torch.randint(50, (20,)), torch.ones(20)
    exact = ops.cross_entropy(x @ head.t(), labels, weights)
    with torch.no_grad():
        rounded = ops.linear_cross_entropy(x.bfloat16(), head, labels, weights, chunk_tokens=8)
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_and_its_gradients_equal_the_kept_ones(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 7, 16).to(dtype).requires_grad_(), torch.randn(16, requires_grad=True)
    direction = torch.randn(2, 7, 16).to(dtype)
    outs = [norm(x, weight, 1e-5) for norm in (ops.rms_norm, ops.rms_norm_kept)]
    grads = [torch.autograd.grad(out, (x, weight), direction) for out in outs]
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, oracle in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        assert ours.dtype == oracle.dtype
        assert (ours - oracle).abs().max() <= limit * oracle.abs().max()


def test_what_a_norm_keeps_is_its_input_and_a_number_a_token() -> None:
    kept: list[torch.Tensor] = []
    x, weight = torch.randn(9, 16).bfloat16().requires_grad_(), torch.randn(16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ops.rms_norm(x, weight, 1e-5)
    assert sorted(tensor.numel() for tensor in kept) == [9, 16, 9 * 16]
    assert sum(tensor.data_ptr() == x.data_ptr() for tensor in kept) == 1


def test_rms_norm_is_computed_in_fp32() -> None:
    x = torch.full((1, 4), 300.0, dtype=torch.float16)  # its square overflows fp16
    out = ops.rms_norm(x, torch.full((4,), 2.0), eps=1e-6)
    assert out.dtype == torch.float16
    assert out.tolist() == [[2.0] * 4]


def test_rope_rotates_pairs_by_position_times_frequency() -> None:
    tables = ops.rope_tables(torch.tensor([0, 3]), head_dim=4, theta=100.0, dtype=torch.float32)
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]).expand(2, 1, 4)
    out = ops.apply_rope(x, tables)
    torch.testing.assert_close(out[0], x[0])
    pairs = torch.complex(x[1, 0, :2], x[1, 0, 2:]) * torch.polar(torch.ones(2), torch.tensor([3.0, 0.3]))
    torch.testing.assert_close(out[1, 0], torch.cat([pairs.real, pairs.imag]))


@pytest.mark.parametrize("has_bf16_units", [True, False])
def test_products_of_bf16_do_not_depend_on_how_they_are_computed(
    has_bf16_units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "bf16_is_fast", lambda: has_bf16_units)
    torch.manual_seed(0)
    x, weight = torch.randn(6, 8).bfloat16(), torch.randn(5, 8)
    exact = x.float() @ weight.bfloat16().float().t()
    assert ops.linear(x, weight).dtype == torch.bfloat16
    torch.testing.assert_close(ops.linear(x, weight), exact.bfloat16(), rtol=1e-2, atol=1e-2)
    out = torch.empty(6, 5, dtype=torch.bfloat16)
    ops.mm(x, weight.bfloat16().t(), out)
    torch.testing.assert_close(out, exact.bfloat16(), rtol=1e-2, atol=1e-2)


def test_an_attached_loss_leaves_values_alone_and_gets_gradient_one() -> None:
    x, parameter = torch.randn(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    out = ops.attach_loss(x, parameter**2)
    assert torch.equal(out, x)
    (out * 0.0).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.item() == 4.0
