"""LoRA: what is trained is a low-rank correction of matrices that stay as they are (arXiv 2106.09685).

`add` puts A and B (and DoRA's magnitude) beside the targeted parameters of a model and freezes everything else. Each
expert has its own, which meet only the tokens that are routed to it (`corrected`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ostro.model import layout, ops
from ostro.model.corrected import low_rank
from ostro.model.quant import NF4
from ostro.model.routing import uniform
from ostro.model.settings import TARGETS, LoraConfig, ModelConfig


@dataclasses.dataclass(eq=False)
class Correction:
    """What LoRA adds to one dense matrix; A, B and magnitude stand on the module that has the matrix.

    `salt` tells this matrix's dropout from others'. Where a rank has some of the input's channels, `first_channel` is
    the first of them and `sum_squares` adds up over the ranks that have the others.
    """

    lora: LoraConfig
    salt: int
    first_channel: int = 0
    sum_squares: Callable[[Tensor], Tensor] = lambda squares: squares

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, draws_T: Tensor | None) -> Tensor:
        """Return y, which is the matrix's product with x, corrected; `draws_T` numbers the tokens of a training."""
        a, b = low_of(module)
        dropped = self._dropped(x, draws_T) if module.training else x
        delta = low_rank(dropped, a, b, self.lora.scale)
        if not self.lora.dora:
            return y + delta
        # As in PEFT what is dropped for A is dropped for the matrix too, as far as DoRA changes its product.
        base = y if dropped is x else ops.linear(dropped, module.weight)  # type: ignore[arg-type]
        ratio = self.ratio(module)  # near 1: less 1 first, then rounded to y's dtype
        return y + (ratio - 1).to(y.dtype) * base + ratio.to(y.dtype) * delta

    def ratio(self, module: nn.Module) -> Tensor:
        """Return DoRA's magnitude over the norm of each row of W + scale·B·A, which is taken as a constant [out]."""
        a, b = low_of(module)
        with torch.no_grad():
            squares = (module.weight.float() + self.lora.scale * (b @ a)).square().sum(dim=1)  # type: ignore[operator,union-attr]
            norm = self.sum_squares(squares).sqrt()
        return getattr(module, layout.LORA_MAGNITUDE) / norm

    def of_rows(self, module: nn.Module, tokens_T: Tensor, found_TD: Tensor) -> Tensor:
        """Return an embedding's rows corrected: A is looked up, too."""
        a, b = low_of(module)
        return found_TD + ops.linear(ops.embedding(tokens_T, a.t()) * self.lora.scale, b)

    def of_head(self, module: nn.Module, x_TD: Tensor, draws_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return states and matrix whose product is the corrected head's: [x, scale·A·x] and [W, B], side by side."""
        a, b = low_of(module)
        dropped = self._dropped(x_TD, draws_T) if module.training else x_TD
        wide = torch.cat([x_TD, ops.linear(dropped, a) * self.lora.scale], dim=1)
        matrix = torch.cat([ops.cast(module.weight, x_TD.dtype), ops.cast(b, x_TD.dtype)], dim=1)  # type: ignore[arg-type]
        return wide, matrix * self.ratio(module)[:, None].to(x_TD.dtype) if self.lora.dora else matrix

    def _dropped(self, x: Tensor, draws_T: Tensor | None) -> Tensor:
        rate = self.lora.dropout
        if not rate or draws_T is None:
            return x
        # Counted, not drawn: the same in recompute, after a resume, and on every layout.
        kept = uniform(draws_T, self.salt, x.shape[-1], self.first_channel) >= rate
        return torch.where(kept, x / (1 - rate), 0)


def low_of(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return A and B of the module's matrix."""
    return getattr(module, layout.LORA_A), getattr(module, layout.LORA_B)


def add(model: nn.Module, config: ModelConfig, lora: LoraConfig) -> None:
    """Put A and B (fp32, uninitialised) beside every targeted parameter of a whole model; freeze everything else."""
    model.requires_grad_(False)
    modules: dict[str, Any] = dict(model.named_modules())
    device = next(model.parameters()).device
    for name, parameter in layout.adapter_table(config, lora).items():
        holder, _, own = name.rpartition(".")
        values = torch.empty(parameter.shape, dtype=torch.float32, device=device)
        modules[holder].register_parameter(own, nn.Parameter(values))
    for parameter in layout.parameters(config):
        target, holder = parameter.kind.target, modules[parameter.name.rpartition(".")[0]]
        if parameter.kind in (layout.W13, layout.W2):
            holder.lora = lora
        elif target in lora.matrices:
            salt = (parameter.layer or 0) * len(TARGETS) + TARGETS.index(target) + 1
            holder.correction = Correction(lora, salt)


def keep_in_four_bits(model: nn.Module, config: ModelConfig) -> dict[str, NF4]:
    """Replace attention's and the experts' matrices of a whole model by empty ones in 4 bits; return them by name."""
    kept = {}
    for name, parameter in layout.table(config).items():
        if parameter.kind in layout.QUANTIZED:
            kept[name] = replace_by_nf4(model, name, NF4(parameter.shape, device=next(model.parameters()).device))
    return kept


def replace_by_nf4(model: nn.Module, name: str, nf4: NF4) -> NF4:
    """Put a matrix in 4 bits, a module, in the place of the parameter of that name."""
    holder, _, own = name.rpartition(".")
    delattr(model.get_submodule(holder), own)
    model.get_submodule(holder).add_module(own, nf4)
    return nf4
