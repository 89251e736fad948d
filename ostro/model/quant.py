"""Placeholder until the codec arrives."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NF4(nn.Module):
    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    def __init__(self, shape, whole_shape=None, offsets=None, device=None) -> None: ...

    def dequantize(self, stack: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...
    def fill(self, stack: tuple[int, ...], matrix: Tensor) -> None: ...
