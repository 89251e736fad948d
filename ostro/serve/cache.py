"""Keys and values of earlier tokens, so that each token is computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ostro.model.attention import attend_document
from ostro.model.settings import ModelConfig
from ostro.model.spans import Spans


class KVCache:
    """One growing stretch of keys and values per sequence and layer; it wraps the model's `attend`.

    Memory: 2 · layers · capacity · kv heads · head dim values a sequence.
    """

    def __init__(
        self, config: ModelConfig, capacities: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_hidden_layers, 2)
        heads = (config.num_key_value_heads, config.head_dim)
        self._kv = [torch.empty(*shape, capacity, *heads, dtype=dtype, device=device) for capacity in capacities]
        self.lengths = [0] * len(capacities)
        self.active: list[int] = []

    def begin(self, sequences: Sequence[int]) -> None:
        """Say which sequence each document of the next forward pass continues."""
        self.active = list(sequences)

    def attend(
        self, layer: int, q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, spans: Spans, window: int | None
    ) -> Tensor:
        """Keep the new keys and values of `layer`, and attend to them and all kept before; returns [T, H, C]."""
        lengths = spans.document_lengths
        outs = []
        pieces = zip(self.active, q_THC.split(lengths), k_TKC.split(lengths), v_TKC.split(lengths), strict=True)
        for sequence, q, k, v in pieces:
            start = self.lengths[sequence]
            stop = start + len(q)
            keys, values = self._kv[sequence][layer]
            keys[start:stop], values[start:stop] = k, v
            outs.append(attend_document(q, keys[:stop], values[:stop], window))
        return torch.cat(outs)

    def advance(self, spans: Spans) -> None:
        """Count the tokens of a finished forward pass as kept."""
        for sequence, length in zip(self.active, spans.document_lengths, strict=True):
            self.lengths[sequence] += length
