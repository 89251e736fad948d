"""Stochastic rounding of fp32 to bf16: up or down so that the mean is the number itself (arXiv 2010.06192).

An update of less than half a bf16's last place would be lost every time; so it is kept in the mean. Which way is a
pure function of (seed, step, parameter, element): resumed runs, replicas and other layouts draw alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ostro.model.routing import GOLDEN, mixed

_DRAWS = 4  # of 16 bits in a number of 64


def key(seed: int, parameter: int, step: Tensor) -> Tensor:
    """Return what a step's draws for a parameter are made of, an int64 on the step's device."""
    return mixed(mixed(step.long() * GOLDEN + seed) + parameter)


def row_numbers(shape: Sequence[int], offsets: Sequence[int], whole: Sequence[int]) -> Tensor:
    """Return the numbers, in the whole parameter, of the rows (of its last dim) of a part, int64 [R]."""
    numbers = torch.zeros((), dtype=torch.int64)
    for size, offset, full in zip(shape[:-1], offsets, whole, strict=False):
        numbers = numbers[..., None] * full + torch.arange(offset, offset + size)
    return numbers.reshape(-1)


def draws(key: Tensor, rows_R: Tensor, first_column: int, num_columns: int) -> Tensor:
    """Return uniform numbers of 16 bits for columns of rows, int32 [R, C]."""
    first, last = first_column // _DRAWS, -(-(first_column + num_columns) // _DRAWS)
    words_W = torch.arange(first + 1, last + 1, device=rows_R.device) * GOLDEN
    bits_RW = mixed(mixed(rows_R * GOLDEN + key)[:, None] + words_W)
    skip = first_column - first * _DRAWS
    return bits_RW.view(torch.int16)[:, skip : skip + num_columns].int() & 0xFFFF


def to_bf16(value: Tensor, draws: Tensor) -> Tensor:
    """Return fp32 values in bf16, away from 0 where what bf16 cuts off, in 65536ths, and the draw make one."""
    bits = value.view(torch.int32)
    return ((bits + draws) & -65536).view(torch.float32).bfloat16()
