"""The optimizer: who decays, AdamW with fp32 state, the schedules, clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ostro.model.settings import ModelConfig
from ostro.sections import Optim


def build_optimizer(parameters: Mapping[str, nn.Parameter], model: ModelConfig, optim: Optim) -> torch.optim.AdamW:
    """Return AdamW over what requires a gradient, with its state allocated; decay falls on matrices only.

    The router's selection bias is left alone: it has a rule of its own (`model.balance.update_bias`). The state is
    there before the first step, so that a checkpoint can be read straight into it.
    """
    trained = [(name, p) for name, p in parameters.items() if p.requires_grad]
    # One group never mixes what is sharded over different meshes, or not at all.
    groups: dict[tuple[bool, int], list[nn.Parameter]] = {}
    for _, p in trained:
        groups.setdefault((p.dim() > 1, id(getattr(p, "device_mesh", None))), []).append(p)
    optimizer = torch.optim.AdamW(
        [
            {"params": group, "weight_decay": optim.weight_decay if is_matrix else 0.0}
            for (is_matrix, _), group in groups.items()
        ],
        lr=optim.learning_rate,
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
    )
    for _, parameter in trained:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer


def state_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
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


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clip_factor(norm: float, max_norm: float) -> float:
    """Return what gradients of this joint 2-norm are multiplied by, so that it is at most `max_norm`."""
    return min(1.0, max_norm / (norm + 1e-6))  # torch.nn.utils.clip_grad_norm_'s own


def _warmup_steps(optim: Optim, total_steps: int) -> int:
    return int(total_steps * optim.warmup_ratio)


def _decay(optim: Optim, step: int, total_steps: int) -> float:
    warmup = _warmup_steps(optim, total_steps)
    return (step - warmup) / max(1, total_steps - warmup)


def _cosine(optim: Optim, step: int, total_steps: int) -> float:
    span = optim.learning_rate - optim.min_learning_rate
    return optim.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * _decay(optim, step, total_steps)))


def _linear(optim: Optim, step: int, total_steps: int) -> float:
    span = optim.learning_rate - optim.min_learning_rate
    return optim.min_learning_rate + span * (1 - _decay(optim, step, total_steps))


def _constant(optim: Optim, step: int, total_steps: int) -> float:
    return optim.learning_rate


# Rates after warm-up; step counts from 0 at the first update.
SCHEDULES: dict[str, Callable[[Optim, int, int], float]] = {
    "cosine": _cosine,
    "cosine_mindformers": _cosine,
    "linear": _linear,
    "constant": _constant,
}


def learning_rate(optim: Optim, step: int, total_steps: int) -> float:
    """Return the rate of update `step` (from 0) of `total_steps`.

    Warm-up climbs in `int(total · warmup_ratio)` equal steps, the first of which is not zero. `cosine_mindformers` is
    CosineWithWarmUpLR of MindFormers, whose climb starts one step later: its very first update has rate 0.
    """
    warmup = _warmup_steps(optim, total_steps)
    if step >= total_steps:
        return optim.learning_rate if optim.schedule == "constant" else optim.min_learning_rate
    if step < warmup:
        climbed = step if optim.schedule == "cosine_mindformers" else step + 1
        return optim.learning_rate * climbed / warmup
    return SCHEDULES[optim.schedule](optim, step, total_steps)
