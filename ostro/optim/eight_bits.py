"""Numbers in 8 bits, 256 at a time: blockwise dynamic quantisation (arXiv 2110.02861), with bitsandbytes' values.

A block is up to 256 neighbours in the last dim, and has the largest of them in fp32: 1.016 bytes a value. Blocks are of
the whole tensor's rows, so a rank that holds whole blocks has the same codes as a process that holds everything.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ostro.model import ops
from ostro.model.quant import dynamic_values

BLOCK = 256


def num_blocks(columns: int) -> int:
    """Return how many blocks a row has."""
    return -(-columns // BLOCK)


def values(is_signed: bool) -> np.ndarray:
    """Return the 256 numbers that codes stand for, ascending, the largest 1: more of them near 0, in seven decades."""
    return dynamic_values(is_signed).numpy()


def _tables(is_signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    return _kept(is_signed, device) if ops.has_values() else _made(is_signed, device)


def _made(is_signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    table = values(is_signed)
    return torch.tensor(table, device=device), torch.tensor((table[1:] + table[:-1]) / 2, device=device)


_kept = functools.cache(_made)


def quantize(value_RC: Tensor, *, is_signed: bool) -> tuple[Tensor, Tensor]:
    """Return the nearest codes, uint8 [R, C], and the largest magnitude of each block, fp32 [R, C/256].

    What is not signed never becomes 0: the square root of such an average is divided by.
    """
    rows, columns = value_RC.shape
    blocks_RBN = F.pad(value_RC, (0, -columns % BLOCK)).view(rows, -1, BLOCK)
    scale_RB = blocks_RBN.abs().amax(dim=-1)
    _, bounds = _tables(is_signed, value_RC.device)
    normed_RBN = blocks_RBN / scale_RB.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    codes = torch.bucketize(normed_RBN, bounds, out_int32=True).view(rows, -1)[:, :columns]
    return (codes if is_signed else codes.clamp(min=1)).to(torch.uint8), scale_RB


def dequantize(codes_RC: Tensor, scale_RB: Tensor, *, is_signed: bool) -> Tensor:
    """Return the numbers, fp32 [R, C]."""
    table, _ = _tables(is_signed, codes_RC.device)
    columns = codes_RC.shape[1]
    return table[codes_RC.int()] * scale_RB.repeat_interleave(BLOCK, dim=1)[:, :columns]
