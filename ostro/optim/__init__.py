"""The optimizer: who decays, how parameters and averages are held, what of it a checkpoint has, clipping."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ostro import device as devices
from ostro.errors import ConfigError, LayoutError
from ostro.model import layout
from ostro.model.settings import ModelConfig
from ostro.optim import eight_bits
from ostro.optim.adamw import SCALE, AdamW, Arithmetic, Place, local
from ostro.optim.schedules import SCHEDULES, learning_rate
from ostro.sections import Optim

__all__ = [
    "SCHEDULES",
    "AdamW",
    "Optimizer",
    "Place",
    "build_optimizer",
    "clip_factor",
    "learning_rate",
    "local",
    "parameter_of",
    "set_learning_rate",
    "state_tensors",
]


class Optimizer(Protocol):
    """What a step asks of an optimizer; torch's own have it too."""

    param_groups: list[dict[str, Any]]

    @property
    def state(self) -> Mapping[Any, Any]: ...

    def step(self) -> Any: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    model: ModelConfig,
    optim: Optim,
    *,
    seed: int = 0,
    places: Mapping[str, Place] | None = None,
) -> AdamW:
    """Return the optimizer of what requires a gradient, with its state allocated; decay falls on matrices only.

    The router's selection bias is left alone: it has a rule of its own (`model.balance.update_bias`). Norms, routers
    and what has fewer than 4096 values keep averages of fp32 on the device, whatever the others have. `places` are
    those of a rank's parts (None: it has wholes), `seed` decides how parameters of 16 bits are rounded.
    """
    table = layout.table(model)
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    some = next(iter(trained.values()))
    betas = optim.betas
    if optim.name != "adamw":  # MindSpore subtracts from 1 in fp32: of 0.999 that is 1.3e-5 less
        betas = float(np.float32(betas[0])), float(np.float32(betas[1]))
    # Those of one group share a device and a dtype, and decay or not.
    groups: dict[tuple[bool, torch.dtype], list[nn.Parameter]] = {}
    for p in trained.values():
        groups.setdefault((p.ndim > 1, p.dtype), []).append(p)
    own = {p: (places or {}).get(name) or Place((0,) * p.ndim, tuple(p.shape)) for name, p in trained.items()}
    optimizer = AdamW(
        [
            {"params": group, "weight_decay": optim.weight_decay if is_matrix else 0.0, "lr": optim.learning_rate}
            for (is_matrix, _), group in groups.items()
        ],
        Arithmetic(betas, optim.eps, optim.name == "adamw", _is_fused(optim, some.device), seed),
        {p: zlib.crc32(name.encode()) for name, p in trained.items()},
        own,
    )
    for name, p in trained.items():
        is_large = p.ndim > 1 and math.prod(own[p].shape) >= 4096 and not (name in table and table[name].kind.is_small)
        in_eight_bits = is_large and optim.state_dtype == "int8"
        if in_eight_bits:
            _require_whole_blocks(name, local(p).shape, own[p])
        optimizer.add_state(p, in_eight_bits=in_eight_bits, offload=is_large and optim.offload)
    return optimizer


def _is_fused(optim: Optim, device: torch.device) -> bool:
    has_fused = devices.has_fused_optimizer(device)
    if optim.implementation == "fused" and not has_fused:
        raise ConfigError(
            f"optim.implementation=fused: torch has no fused AdamW for {device.type}: set it to foreach or auto."
        )
    return has_fused and optim.implementation != "foreach"


def _require_whole_blocks(name: str, shape: torch.Size, place: Place) -> None:
    first, last, whole = place.offsets[-1], place.offsets[-1] + shape[-1], place.shape[-1]
    if first % eight_bits.BLOCK or (last % eight_bits.BLOCK and last != whole):
        raise LayoutError(
            f"optim.state_dtype=int8 keeps blocks of {eight_bits.BLOCK} values, and this layout cuts {name} into parts "
            f"of {shape[-1]}: use another layout, or fp32 states."
        )


def block_box(
    offsets: tuple[int, ...], sizes: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return which blocks of 8 bits a part of a parameter is: their offsets and number, and the number of all."""
    return (
        (*offsets[:-1], offsets[-1] // eight_bits.BLOCK),
        (*sizes[:-1], eight_bits.num_blocks(sizes[-1])),
        (*shape[:-1], eight_bits.num_blocks(shape[-1])),
    )


def is_of_blocks(key: str) -> bool:
    """Whether a tensor of a training checkpoint holds a number a block of its parameter."""
    return key.startswith("optim.") and key.endswith(SCALE)


def state_tensors(parameters: Mapping[str, nn.Parameter], optimizer: AdamW) -> dict[str, Tensor]:
    """Return the tensors of a training checkpoint by name: `model.<parameter>` and `optim.<parameter>.<state>`."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optim.{name}.{key}"] = value
    return tensors


def parameter_of(key: str) -> str:
    """Return the parameter that a tensor of a training checkpoint (`state_tensors`) belongs to."""
    kind, _, name = key.partition(".")
    return name if kind == "model" else name.rpartition(".")[0]


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Set the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clip_factor(norm: float, max_norm: float) -> float:
    """Return what gradients of this joint 2-norm are multiplied by, so that it is at most `max_norm`."""
    return min(1.0, max_norm / (norm + 1e-6))  # torch.nn.utils.clip_grad_norm_'s own
