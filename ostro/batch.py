"""Rows of the loader as one micro-batch of flat tokens on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ostro.data.loader import Row
from ostro.errors import DataError
from ostro.model.spans import Spans, spans_of


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """tokens_T and labels_T (int64), weights_T (fp32: how much each label counts), and what the tokens are."""

    tokens_T: Tensor
    labels_T: Tensor
    weights_T: Tensor
    spans: Spans


# For a rank without a row where others have some: a token that counts for nothing.
NO_ROW = Row(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32), ())


def batch_of(
    rows: Sequence[Row],
    device: torch.device,
    *,
    balance_scale: float = 0.0,
    stats_LS: Tensor | None = None,
    draws_from: Sequence[int] | None = None,
    multiple: int = 1,
) -> Batch:
    """Lay rows one after another; each is a sequence, made of its documents.

    `draws_from` is for each row its first token's number among all tokens of the training, which jitter is drawn from;
    None draws none. Rows are padded to a `multiple` of tokens: the padding is a document that counts for nothing.
    """
    padding = [-len(row.tokens_L) % multiple or (0 if len(row.tokens_L) else multiple) for row in rows]
    lengths = [len(row.tokens_L) + more for row, more in zip(rows, padding, strict=True)]
    documents = [(*row.document_lengths, more) for row, more in zip(rows, padding, strict=True)]
    valid = [torch.arange(n) < len(row.tokens_L) for row, n in zip(rows, lengths, strict=True)]

    def tensor(arrays: list[np.ndarray]) -> Tensor:
        padded = [np.pad(array, (0, more)) if more else array for array, more in zip(arrays, padding, strict=True)]
        return torch.from_numpy(np.concatenate(padded)).to(device)

    return Batch(
        tokens_T=tensor([row.tokens_L for row in rows]),
        labels_T=tensor([row.labels_L for row in rows]),
        weights_T=tensor([row.weights_L for row in rows]),
        spans=spans_of(
            [n for row in documents for n in row if n],
            lengths,
            valid_T=torch.cat(valid),
            balance_scale=balance_scale,
            stats_LS=stats_LS,
            draws_T=None
            if draws_from is None
            else torch.cat([first + torch.arange(n) for first, n in zip(draws_from, lengths, strict=True)]),
            device=device,
        ),
    )


def require_known(rows: Sequence[Row], vocab_size: int, where: str) -> None:
    """Raise DataError for a token that the model does not have: on a GPU looking it up would end the process."""
    ids = [int(bound) for row in rows if len(row.tokens_L) for bound in (row.tokens_L.min(), row.tokens_L.max())]
    unknown = [id_ for id_ in ids if not 0 <= id_ < vocab_size]
    if unknown:
        raise DataError(
            f"{where}: the data hold token id {unknown[0]} and the model has vocab_size={vocab_size}: they are not "
            "what was prepared, so prepare them again."
        )


def why_none(rows: Sequence[Row]) -> str:
    """Say why no label of these rows is learned, and what helps."""
    if not any(row.labels_L.any() for row in rows):
        return "its documents are single tokens, so look at the data"
    return (
        "all of it is masked (what the assistant does not say, or what follows data.pad_token_id), so raise "
        "train.global_batch_sequences or data.seq_length, or leave out long documents with data.overlong=drop"
    )
