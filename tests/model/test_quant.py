"""NF4: bitsandbytes' own values, the same wherever a matrix is cut; tests/interop/nf4.py compares at full size."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode

from ostro.errors import WeightsError
from ostro.model.quant import NF4, _quantize_absmax, why_not

GOLDEN = Path(__file__).parent / "nf4.safetensors"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HELD = ("codes", "absmax_codes", "scales", "offsets")


def quantized(matrix: torch.Tensor) -> NF4:
    held = NF4(tuple(matrix.shape))
    held.fill((), matrix)
    return held


@pytest.mark.parametrize("name", ["bf16", "fp32", "fp16", "constant", "zeros"])
def test_values_are_those_of_bitsandbytes(name: str) -> None:
    with safe_open(GOLDEN, "pt") as golden:
        hashes = golden.metadata()
        ours = quantized(golden.get_tensor(f"{name}.matrix"))
        for key in HELD:
            assert torch.equal(getattr(ours, key).flatten(), golden.get_tensor(f"{name}.{key}")), key
    for dtype in DTYPES:
        values = ours.dequantize((), dtype)
        digest = hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()
        assert digest == hashes[f"{name}.{dtype}"], dtype


def test_a_cut_changes_no_value() -> None:
    torch.manual_seed(0)
    whole_shape = (2, 2, 70, 512)  # 560 blocks: three second-level blocks, cut within rows of them
    matrices = torch.randn(whole_shape).bfloat16()
    whole = NF4(whole_shape)
    box = NF4((1, 2, 35, 128), whole_shape, (1, 0, 35, 320))
    for i in range(2):
        for j in range(2):
            whole.fill((i, j), matrices[i, j])
    for j in range(2):
        box.fill((0, j), matrices[1, j])
    for dtype in DTYPES:
        assert torch.equal(box.dequantize((), dtype)[0], whole.dequantize((1,), dtype)[:, 35:70, 320:448])
        assert torch.equal(box.dequantize((0, 1), dtype), whole.dequantize((1, 1), dtype)[35:, 320:448])
    # Of a stack each matrix is quantised by itself.
    assert torch.equal(whole.dequantize((1, 0), torch.float32), quantized(matrices[1, 0]).dequantize((), torch.float32))


def test_a_large_matrix_is_its_parts() -> None:
    """Work is done in chunks: values on both sides of their borders must not know of it."""
    torch.manual_seed(0)
    matrix = torch.randn(1100, 1024)  # more than one chunk of quantising, and of dequantising
    held = quantized(matrix)
    values = held.dequantize((), torch.float32)
    scale = matrix.view(-1, 64).abs().amax(1, keepdim=True)
    unit = values.view(-1, 64) / scale
    assert (unit - matrix.view(-1, 64) / scale).abs().max() < 0.17  # half the widest step, and the 8-bit absmax
    rows = NF4((100, 1024), (1100, 1024), (1000, 0))
    rows.fill((), matrix)
    assert torch.equal(rows.dequantize((), torch.float32), values[1000:])


def test_threads_change_no_bit() -> None:
    """A mean of so many values differs in its last bit between one thread and two as often as not."""
    absmaxes = [torch.rand(40000, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    before, offsets = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            offsets.append([_quantize_absmax(absmax)[2] for absmax in absmaxes])
    finally:
        torch.set_num_threads(before)
    assert offsets[0] == offsets[1]


def test_memory_is_a_half_and_a_64th() -> None:
    held = NF4((4, 2, 1024, 512))
    assert held.num_bytes / (4 * 2 * 1024 * 512) == pytest.approx(0.5 + 1 / 64 + 4 / (64 * 256), rel=1e-4)
    assert not list(held.parameters())
    assert not held.state_dict()


def test_values_that_are_none_are_refused() -> None:
    for bad in (float("nan"), float("inf")):
        matrix = torch.ones(3, 128, dtype=torch.bfloat16)
        matrix[2, 70] = bad
        with pytest.raises(WeightsError, match=r"\[3, 128\] holds (nan|inf) in row 2, column 70"):
            quantized(matrix)


def test_what_cannot_be_quantised_has_a_reason() -> None:
    assert why_not(4096, 4096) is None
    assert why_not(4096, 64) is None
    assert "96 values" in (why_not(96, 96) or "")
    assert "into 32 a rank" in (why_not(128, 32) or "")


def test_shapes_alone_are_enough() -> None:
    for held in (NF4((8, 2, 1024, 256), device="meta"), fake()):
        assert held.dequantize((), torch.bfloat16).shape == (8, 2, 1024, 256)
        values = held.dequantize((3, 1), torch.bfloat16)
        assert values.shape == (1024, 256)
        assert values.dtype == torch.bfloat16


def fake() -> NF4:
    with FakeTensorMode():
        return NF4((8, 2, 1024, 256))
