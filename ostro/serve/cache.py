"""Keys and values of earlier tokens, so that each token is computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ostro.model.attention import attend_document
from ostro.model.settings import ModelConfig
from ostro.model.spans import Spans


class Branches:
    """Several texts after one, in one forward pass: a document with a parent attends to all of that one first.

    `parents` has for each document the number of an earlier one, or None. Wraps the model's `attend` as KVCache does.
    """

    def __init__(self, parents: Sequence[int | None]) -> None:
        self.parents = parents

    def attend(
        self, layer: int, q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, spans: Spans, window: int | None
    ) -> Tensor:
        """Attend inside documents and to their parents; returns [T, H, C]."""
        lengths = spans.document_lengths
        keys, values = k_TKC.split(lengths), v_TKC.split(lengths)
        outs = []
        for at, (q, parent) in enumerate(zip(q_THC.split(lengths), self.parents, strict=True)):
            k, v = keys[at], values[at]
            if parent is not None:
                k, v = torch.cat([keys[parent], k]), torch.cat([values[parent], v])
            outs.append(attend_document(q, k, v, window))
        return torch.cat(outs)


class KVCache:
    """One growing stretch of keys and values per sequence and layer; it wraps the model's `attend`.

    `ids` are the tokens of each sequence whose keys and values are kept. A sequence that outgrows its capacity gets
    twice as much. Memory: 2 · layers · capacity · kv heads · head dim values a sequence.
    """

    def __init__(
        self, config: ModelConfig, capacities: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_hidden_layers, 2)
        heads = (config.num_key_value_heads, config.head_dim)
        self._kv = [torch.empty(*shape, capacity, *heads, dtype=dtype, device=device) for capacity in capacities]
        self.ids: list[list[int]] = [[] for _ in capacities]
        self.active: list[int] = []

    def rewind(self, sequence: int, ids: Sequence[int]) -> int:
        """Forget all that is not how `ids` begin, whose last token is always computed; return how many are kept."""
        kept = self.ids[sequence]
        most = min(len(kept), len(ids) - 1)
        same = next((at for at in range(most) if kept[at] != ids[at]), most)
        del kept[same:]
        return same

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
            start = len(self.ids[sequence])
            stop = start + len(q)
            if stop > self._kv[sequence].shape[2]:
                self._grow(sequence, stop)
            keys, values = self._kv[sequence][layer]
            keys[start:stop], values[start:stop] = k, v
            outs.append(attend_document(q, keys[:stop], values[:stop], window))
        return torch.cat(outs)

    def advance(self, pieces: Sequence[Sequence[int]]) -> None:
        """Count the tokens of a finished forward pass as kept."""
        for sequence, piece in zip(self.active, pieces, strict=True):
            self.ids[sequence] += piece

    def _grow(self, sequence: int, least: int) -> None:
        old = self._kv[sequence]
        layers, two, capacity, *heads = old.shape
        new = old.new_empty(layers, two, max(least, 2 * capacity), *heads)
        new[:, :, :capacity] = old
        self._kv[sequence] = new
