"""The passes around the experts' grouped products: permute, SwiGLU with the routing weight, un-permute.

`plain.py` spells each out in torch; `rows.py` and `swiglu.py` do it in Triton, one reading and one writing of memory
each. `grouped.py` puts them together. Everywhere `ends_E` (int32, on the device) is the end of each expert's rows in
the sorted buffer; rows past the last end are nobody's, may hold anything, and reach no result and no gradient.

N is the number of rows of the buffer; order_N gives each row's place in the flattened [T, A] choices.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from ostro import device
from ostro.model.kernels import plain
from ostro.model.kernels.order import Order
from ostro.model.settings import ModelConfig, MoeConfig

Permute = Callable[[Tensor, Order], Tensor]
Unpermute = Callable[[Tensor, Tensor | None, Order], Tensor]
Swiglu = Callable[[Tensor, Tensor | None, Order], Tensor]
SwigluBackward = Callable[[Tensor, Tensor, Tensor | None, Order], tuple[Tensor, Tensor, Tensor | None]]


@dataclasses.dataclass(frozen=True)
class Passes:
    """One implementation of the passes; the docstrings of `plain` say what each computes."""

    permute: Permute
    unpermute: Unpermute
    swiglu: Swiglu
    swiglu_backward: SwigluBackward


TORCH = Passes(plain.permute, plain.unpermute, plain.swiglu, plain.swiglu_backward)


@functools.cache
def triton_passes() -> Passes:
    """Return the Triton kernels; ImportError where there is no Triton."""
    from ostro.model.kernels import rows, swiglu

    return Passes(rows.permute, rows.unpermute, swiglu.swiglu, swiglu.swiglu_backward)


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not imported for that."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def compute_capability() -> int:
    """Return 80 for SM80, 90 for SM90 and so on; 0 where there is no such GPU or no Triton to ask."""
    if not has_triton() or not device.is_cuda(device.accelerator()):
        return 0
    from triton.runtime import driver  # pyright: ignore[reportMissingImports]

    arch = getattr(driver.active.get_current_target(), "arch", None)
    return arch if isinstance(arch, int) else 0


def why_not(moe: MoeConfig, model: ModelConfig, dtype: torch.dtype, where: torch.device) -> str | None:
    """Return why `moe.kernels` or `moe.fp8` would do nothing on a device, for a model computed in `dtype`, or None."""
    if moe.kernels != "triton" and not moe.fp8:
        return None
    asked, instead = ("moe.fp8=true", "leave it out") if moe.fp8 else ("moe.kernels=triton", "set moe.kernels=auto")
    multiple = 16 if moe.fp8 else 8  # of values in a row, for torch's grouped products
    widths = f"model.hidden_size={model.hidden_size} and model.intermediate_size={model.intermediate_size}"
    wanting = (
        (not has_triton(), f"Triton, which is not installed: install it, or {instead}"),
        (not device.is_cuda(where), f"a GPU and this is {device.name(where)}: {instead}"),
        (moe.fp8 and compute_capability() != 90, f"a GPU of SM90 and this is {device.name(where)}: {instead}"),
        (dtype != torch.bfloat16, f"train.dtype=bf16, which grouped products take alone: set it, or {instead}"),
        (
            bool(model.hidden_size % multiple or model.intermediate_size % multiple),
            f"multiples of {multiple} and finds {widths}: change them, or {instead}",
        ),
    )
    return next((f"{asked} needs {what}." for is_wanting, what in wanting if is_wanting), None)


def choose(kernels: str, where: torch.device) -> Passes:
    """Return the passes for the setting `auto`, `triton` or `torch`: auto takes Triton's on SM80 and later.

    `triton` insists, also on a CPU, where it needs the interpreter (TRITON_INTERPRET=1).
    """
    if kernels == "triton" or (kernels == "auto" and device.is_cuda(where) and compute_capability() >= 80):
        return triton_passes()
    return TORCH
