"""Rows of the loader as one micro-batch of flat tokens on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ostro.data.loader import Row
from ostro.model.spans import Spans, spans_of


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """tokens_T and labels_T (int64), weights_T (fp32: how much each label counts), and what the tokens are."""

    tokens_T: Tensor
    labels_T: Tensor
    weights_T: Tensor
    spans: Spans


def batch_of(
    rows: Sequence[Row],
    device: torch.device,
    *,
    balance_scale: float = 0.0,
    stats_LS: Tensor | None = None,
    draws_from: int | None = None,
) -> Batch:
    """Lay rows one after another; each is a sequence, made of its documents.

    `draws_from` is the first token's number among all tokens of the training, which jitter is drawn from; None draws
    none.
    """
    num_tokens = sum(len(row.tokens_L) for row in rows)

    def tensor(arrays: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(device)

    return Batch(
        tokens_T=tensor([row.tokens_L for row in rows]),
        labels_T=tensor([row.labels_L for row in rows]),
        weights_T=tensor([row.weights_L for row in rows]),
        spans=spans_of(
            [n for row in rows for n in row.document_lengths],
            [len(row.tokens_L) for row in rows],
            balance_scale=balance_scale,
            stats_LS=stats_LS,
            draws_T=None if draws_from is None else draws_from + torch.arange(num_tokens),
            device=device,
        ),
    )


def why_none(rows: Sequence[Row]) -> str:
    """Say why no label of these rows is learned, and what helps."""
    if not any(row.labels_L.any() for row in rows):
        return "its documents are single tokens, so look at the data"
    return (
        "all of it is masked (what the assistant does not say, or what follows data.pad_token_id), so raise "
        "train.global_batch_sequences or data.seq_length, or leave out long documents with data.overlong=drop"
    )
