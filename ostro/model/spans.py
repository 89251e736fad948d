"""What the flat tokens of one micro-batch are: which document and sequence each belongs to, and at which position.

A *document* bounds attention; a *sequence* bounds capacity and the balancing loss. The model takes
`tokens_T` and a `Spans` and knows no batch dim: packing, prefill, decode and pipeline micro-batches are one shape.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Spans:
    """Made once by whoever makes the tokens.

    Where sequences are cut over ranks, lengths and starts are of the whole micro-batch. Tensors along T are of this
    rank's tokens: positions of those it attends from, everything else of those it routes.

    positions_T: int64, place of each token in its document. document_lengths: tokens of each document, in order.
    document_starts: int32 [documents + 1], their cumulative sum. sequence_ids_T: int64, from 0.
    sequence_lengths: tokens of each sequence, in order.
    valid_T: bool, False for padding (routed, but counted in no statistic and no loss).
    draws_T: int64, a number of its own for each token of a training, which jitter is drawn from; None draws none.
    attended_draws_T: the same for the tokens it attends from, which dropout is drawn from.
    balance_scale: 1 / valid tokens of the whole optimizer step, over all ranks and micro-batches; 0 adds no loss.
    stats_LS: float64 [layers, routing.num_stats], added to by the model outside recompute; None keeps none.
    experts_LTA: int64 [layers, T, A], filled by the model with each token's experts, best first; None keeps none.
    """

    positions_T: Tensor
    document_lengths: tuple[int, ...]
    document_starts: Tensor
    sequence_ids_T: Tensor
    sequence_lengths: tuple[int, ...]
    valid_T: Tensor
    balance_scale: float = 0.0
    stats_LS: Tensor | None = None
    experts_LTA: Tensor | None = None
    draws_T: Tensor | None = None
    attended_draws_T: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        """How many sequences these tokens are of."""
        return len(self.sequence_lengths)

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document."""
        return max(self.document_lengths)


def spans_of(
    document_lengths: Sequence[int],
    sequence_lengths: Sequence[int] | None = None,
    *,
    starts: Sequence[int] | None = None,
    valid_T: Tensor | None = None,
    balance_scale: float = 0.0,
    stats_LS: Tensor | None = None,
    experts_LTA: Tensor | None = None,
    draws_T: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Spans:
    """Describe documents that lie one after another.

    `sequence_lengths` defaults to one sequence a document and has the same sum. `starts` gives each document's first
    position (0 unless earlier tokens of it are in a cache).
    """
    lengths = tuple(document_lengths)
    sequences = lengths if sequence_lengths is None else tuple(sequence_lengths)
    assert min(lengths) > 0
    assert sum(lengths) == sum(sequences)
    firsts = starts if starts is not None else [0] * len(lengths)
    positions = [torch.arange(first, first + n) for first, n in zip(firsts, lengths, strict=True)]
    num_tokens = sum(lengths)
    if valid_T is None:
        valid_T = torch.ones(num_tokens, dtype=torch.bool)
    draws_T = None if draws_T is None else draws_T.to(device)
    return Spans(
        positions_T=torch.cat(positions).to(device),
        document_lengths=lengths,
        document_starts=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device),
        sequence_ids_T=torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(sequences)).to(device),
        sequence_lengths=sequences,
        valid_T=valid_T.to(device),
        balance_scale=balance_scale,
        stats_LS=stats_LS,
        experts_LTA=experts_LTA,
        draws_T=draws_T,
        attended_draws_T=draws_T,
    )
