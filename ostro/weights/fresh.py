"""What a LoRA starts from, so that at first nothing is corrected: as PEFT, B 0 and A random."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ostro.model import layout
from ostro.model.settings import LoraConfig
from ostro.weights.store import Reader, TensorInfo, Where, drawn


class FreshAdapter:
    """LoRA's parameters before training as a reader, fp32; slices have the bits they have in the whole.

    A is N(0, 1/(3·in)), the variance of PEFT's uniform values, and B is 0; of an embedding A is 0 and B N(0, 1), as
    there. DoRA's magnitudes are the norms of the model's own rows.
    """

    format = "fresh adapter"
    notes = ()

    def __init__(self, base: Reader, lora: LoraConfig, seed: int) -> None:
        self.model, self._base, self._seed = base.model, base, seed
        self._table = layout.adapter_table(base.model, lora)

    def names(self) -> Mapping[str, TensorInfo]:
        """Return every tensor of the adapter."""
        return {name: TensorInfo(p.shape, torch.float32) for name, p in self._table.items()}

    def read(self, name: str, where: Where = ()) -> Tensor:
        """Return a slice."""
        parameter = self._table[name]
        if name.endswith(layout.LORA_MAGNITUDE):
            weight = self._base.read(name.removesuffix(layout.LORA_MAGNITUDE) + "weight", where[:1])
            return weight.float().norm(dim=-1)
        is_embedding = name.startswith(layout.EMBEDDING.name.removesuffix("weight"))
        if name.endswith(layout.LORA_B) != is_embedding:
            return torch.zeros(parameter.shape)[where]
        return drawn(self._seed, parameter, 1.0 if is_embedding else math.sqrt(1 / (3 * parameter.shape[-1])), where)
