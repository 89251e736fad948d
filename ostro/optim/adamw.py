"""AdamW over what one rank holds: torch's own arithmetic, on parts at a time where values are not held in fp32."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from ostro.model import ops
from ostro.optim import eight_bits, rounding

AVERAGES = ("exp_avg", "exp_avg_sq")
SCALE = "_scale"

# So many values are updated at one time where they are made fp32 for it: a CPU's cache, or a small part of a GPU.
_PART_VALUES = {"cpu": 1 << 18}
_LARGE_PART = 1 << 24


def local(value: Tensor) -> Tensor:
    """Return the memory of a tensor that is on this rank."""
    return value.to_local() if isinstance(value, DTensor) else value


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this rank's part of a parameter begins, and the shape of the whole."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """What every update is made of; `is_corrected` whether the averages are for their start from 0."""

    betas: tuple[float, float]
    eps: float
    is_corrected: bool
    is_fused: bool
    seed: int


class AdamW:
    """AdamW (arXiv 1711.05101), its averages in fp32 or 8 bits, on the device or in host memory.

    `param_groups` and `state` are as in torch's optimizers, but a state holds this rank's part alone. Parameters of
    16 bits are updated in fp32 and rounded stochastically. The state is there before the first step, so that a
    checkpoint can be read straight into it.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        arithmetic: Arithmetic,
        keys: Mapping[nn.Parameter, int],
        places: Mapping[nn.Parameter, Place],
    ) -> None:
        self.param_groups = list(groups)
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        self._arithmetic, self._keys, self._places = arithmetic, keys, places

    def add_state(self, p: nn.Parameter, *, in_eight_bits: bool, offload: bool) -> None:
        """Allocate a parameter's state."""
        value = local(p.detach())
        where: dict[str, Any] = {"device": "cpu", "pin_memory": True} if offload else {"device": value.device}
        state = {"step": torch.zeros((), dtype=torch.float32, device=value.device)}
        for name in AVERAGES:
            dtype = torch.uint8 if in_eight_bits else torch.float32
            state[name] = torch.zeros(value.shape, dtype=dtype, **where)
            if in_eight_bits:
                blocks = (*value.shape[:-1], eight_bits.num_blocks(value.shape[-1]))
                state[name + SCALE] = torch.zeros(blocks, dtype=torch.float32, **where)
        self.state[p] = state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                if set_to_none:
                    p.grad = None
                elif p.grad is not None:
                    p.grad.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            whole = [p for p in held if not self._is_in_parts(p)]
            states = [self.state[p] for p in whole]
            self._update(
                [local(p.detach()) for p in whole],
                [local(p.grad) for p in whole],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
                group,
            )
            for p in held:
                if self._is_in_parts(p):
                    self._update_in_parts(p, group)

    def _is_in_parts(self, p: nn.Parameter) -> bool:
        state = self.state[p]["exp_avg"]
        return p.dtype != torch.float32 or state.dtype != torch.float32 or state.device != p.device

    def _update(
        self,
        values: list[Tensor],
        gradients: list[Tensor],
        means: list[Tensor],
        squares: list[Tensor],
        steps: list[Tensor],
        group: Mapping[str, Any],
    ) -> None:
        if not values:
            return
        how = self._arithmetic
        if not how.is_corrected:  # as after infinitely many steps
            torch._foreach_add_(steps, 1)
            steps = [torch.full_like(step, math.inf) for step in steps]
        adamw(
            values,
            gradients,
            means,
            squares,
            [],
            steps,
            fused=how.is_fused,
            foreach=not how.is_fused,
            amsgrad=False,
            beta1=how.betas[0],
            beta2=how.betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=how.eps,
            maximize=False,
        )

    def _update_in_parts(self, p: nn.Parameter, group: Mapping[str, Any]) -> None:
        assert p.grad is not None
        state, place = self.state[p], self._places[p]
        value_RC, grad_RC = _rows(local(p.detach())), _rows(local(p.grad))
        numbers_R = rounding.row_numbers(local(p).shape, place.offsets, place.shape).to(value_RC.device)
        key = rounding.key(self._arithmetic.seed, self._keys[p], state["step"])
        for rows in _parts(value_RC):
            new, before = value_RC[rows].float(), state["step"].clone()
            mean, square = (_read(state, name, rows, new.device) for name in AVERAGES)
            self._update([new], [grad_RC[rows].float()], [mean], [square], [before], group)
            for name, average in zip(AVERAGES, (mean, square), strict=True):
                _write(state, name, rows, average)
            if value_RC.dtype != torch.float32:
                draws = rounding.draws(key, numbers_R[rows], place.offsets[-1], value_RC.shape[1])
                value_RC[rows] = rounding.to_bf16(new, draws)
        state["step"] += 1


def _rows(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])


def _parts(value_RC: Tensor) -> Iterator[slice]:
    if not value_RC.numel():
        return
    num_values = _PART_VALUES.get(value_RC.device.type, _LARGE_PART) if ops.has_values() else _LARGE_PART
    count = max(1, num_values // value_RC.shape[1])
    for first in range(0, len(value_RC), count):
        yield slice(first, min(first + count, len(value_RC)))


def _read(state: Mapping[str, Tensor], name: str, rows: slice, device: torch.device) -> Tensor:
    """Return rows of an average in fp32 on the device: those that are held, if they are so already."""
    held = _rows(state[name])[rows].to(device, non_blocking=True)
    if held.dtype == torch.float32:
        return held
    scale = _rows(state[name + SCALE])[rows].to(device, non_blocking=True)
    return eight_bits.dequantize(held, scale, is_signed=name == "exp_avg")


def _write(state: Mapping[str, Tensor], name: str, rows: slice, value: Tensor) -> None:
    held = _rows(state[name])[rows]
    if held.dtype == torch.float32:
        if held.device != value.device:
            held.copy_(value, non_blocking=True)
        return
    codes, scale = eight_bits.quantize(value, is_signed=name == "exp_avg")
    held.copy_(codes, non_blocking=True)
    _rows(state[name + SCALE])[rows].copy_(scale, non_blocking=True)
