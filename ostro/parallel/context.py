"""Context parallel: the tokens of each sequence are cut over ranks, and attention gathers keys and values first.

A sequence is cut into 2·cp equal pieces, of which rank i has the i-th from the start and the i-th from the end, so
that all attend to equally many pairs. With 8 key heads, keys and values of 32,768 tokens are 128 MiB a layer in bf16:
to gather them whole costs less than passing them round, and documents are respected as they are in one process.

What tensor parallel cuts further (the tokens between blocks) is cut here too, since both come from one micro-batch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
import torch
from torch import Tensor

from ostro.batch import Batch
from ostro.model.attention import attend_document, attend_varlen_segments
from ostro.model.capacity import within_capacity
from ostro.model.mixtral import Mixtral
from ostro.model.routing import Routing
from ostro.model.settings import MoeConfig
from ostro.model.spans import Spans
from ostro.parallel.collectives import Group, gather, gathered, summed
from ostro.parallel.mesh import Mesh

HOST = torch.device("cpu")


def apply(model: Mixtral, mesh: Mesh) -> None:
    """Let attention, balance and capacity see whole sequences where each rank has a part of them."""
    degrees = mesh.degrees
    for block in model.blocks.values():
        moe = block.block_sparse_moe
        if mesh.cp is not None:
            block.self_attn.attend = functools.partial(_attend, group=mesh.cp, cp=degrees.cp, cp_rank=mesh.cp_rank)
        if mesh.sequence is not None:
            moe.sum_counts = functools.partial(summed, group=mesh.sequence)
            if model.moe.capacity_group == "sequence":
                moe.limit = functools.partial(_limit, group=mesh.sequence, cp=degrees.cp)
        if mesh.stage is not None:
            moe.sum_batch_counts = functools.partial(summed, group=mesh.stage)


def share(batch: Batch, mesh: Mesh) -> Batch:
    """Return what a rank of a sequence group needs of a micro-batch whose rows are multiples of 2·cp·tp tokens.

    Tokens, labels and positions are the cp share, which attention and the loss see; what the router reads is the part
    of it that lies on this rank between blocks.
    """
    if mesh.sequence is None:
        return batch
    spans, degrees = batch.spans, mesh.degrees
    mine = cut(spans.sequence_lengths, degrees.cp, mesh.cp_rank, batch.tokens_T.device)
    routed = mine.chunk(degrees.tp)[mesh.tp_rank]
    learned = routed if degrees.vocab_emb_dp else mine
    return Batch(
        tokens_T=batch.tokens_T[mine],
        labels_T=batch.labels_T[learned],
        weights_T=batch.weights_T[learned],
        spans=dataclasses.replace(
            spans,
            positions_T=spans.positions_T[mine],
            sequence_ids_T=spans.sequence_ids_T[routed],
            valid_T=spans.valid_T[routed],
            draws_T=None if spans.draws_T is None else spans.draws_T[routed],
            attended_draws_T=None if spans.draws_T is None else spans.draws_T[mine],
        ),
    )


def cut(sequence_lengths: tuple[int, ...], cp: int, cp_rank: int, device: torch.device = HOST) -> Tensor:
    """Return which tokens of a micro-batch are a rank's, in its own order; each length is a multiple of 2·cp."""
    return torch.tensor(_cut(sequence_lengths, cp, cp_rank)).to(device)


# What is kept is kept as arrays: a tensor made in a dry run has no values, and the next run would find it.
@functools.lru_cache(maxsize=64)
def _cut(sequence_lengths: tuple[int, ...], cp: int, cp_rank: int) -> np.ndarray:
    if cp == 1:
        return np.arange(sum(sequence_lengths))
    pieces = []
    for start, length in zip(itertools.accumulate((0, *sequence_lengths)), sequence_lengths, strict=False):
        each = length // (2 * cp)
        for piece in (cp_rank, 2 * cp - 1 - cp_rank):
            pieces.append(np.arange(start + piece * each, start + (piece + 1) * each))
    return np.concatenate(pieces)


@functools.lru_cache(maxsize=64)
def _whence(sequence_lengths: tuple[int, ...], cp: int) -> np.ndarray:
    return np.argsort(np.concatenate([_cut(sequence_lengths, cp, rank) for rank in range(cp)]))


def _back(sequence_lengths: tuple[int, ...], cp: int, device: torch.device) -> Tensor:
    """Return where in the gathered shares each token of the micro-batch lies."""
    return torch.tensor(_whence(sequence_lengths, cp)) if device == HOST else _back_there(sequence_lengths, cp, device)


@functools.lru_cache(maxsize=64)
def _back_there(sequence_lengths: tuple[int, ...], cp: int, device: torch.device) -> Tensor:
    # Once a micro-batch, not once a layer: the host waits for the copy.
    return torch.tensor(_whence(sequence_lengths, cp)).to(device)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Some of this rank's tokens, [start, stop), that lie together in a document, and the keys they may see."""

    start: int
    stop: int
    first_key: int
    last_key: int


@functools.lru_cache(maxsize=64)
def segments(
    sequence_lengths: tuple[int, ...], document_lengths: tuple[int, ...], cp: int, cp_rank: int
) -> tuple[Segment, ...]:
    """Return a rank's tokens as runs within documents; the keys of a run end with its last token."""
    mine = _cut(sequence_lengths, cp, cp_rank)
    ends = np.cumsum(document_lengths)
    document = np.searchsorted(ends, mine, side="right")
    breaks = (np.diff(mine) != 1) | (np.diff(document) != 0)
    starts = [0, *(np.flatnonzero(breaks) + 1).tolist()]
    firsts = [0, *ends.tolist()]
    return tuple(
        Segment(start, stop, firsts[int(document[start])], int(mine[stop - 1]) + 1)
        for start, stop in zip(starts, [*starts[1:], len(mine)], strict=True)
    )


def _attend(
    q_THC: Tensor,
    k_TKC: Tensor,
    v_TKC: Tensor,
    spans: Spans,
    window: int | None,
    *,
    group: Group,
    cp: int,
    cp_rank: int,
) -> Tensor:
    """Gather keys and values, and attend from this rank's queries document by document."""
    both = gather(torch.stack([k_TKC, v_TKC], dim=1), group)[_back(spans.sequence_lengths, cp, k_TKC.device)]
    k_SKC, v_SKC = both.unbind(dim=1)
    runs = segments(spans.sequence_lengths, spans.document_lengths, cp, cp_rank)
    if q_THC.device.type != "cpu" and q_THC.dtype != torch.float32:
        spans_of_runs = tuple((s.stop - s.start, s.first_key, s.last_key) for s in runs)
        return attend_varlen_segments(q_THC, k_SKC, v_SKC, spans_of_runs, window)
    return torch.cat(
        [
            attend_document(
                q_THC[s.start : s.stop], k_SKC[s.first_key : s.last_key], v_SKC[s.first_key : s.last_key], window
            )
            for s in runs
        ]
    )


def _limit(routing: Routing, spans: Spans, moe: MoeConfig, *, group: Group, cp: int) -> Routing:
    """Find who is within capacity among all tokens of the sequences; each rank then knows of its own."""
    # One exchange: experts fit a float exactly, and so do flags.
    asked = torch.cat(
        [
            routing.weights_TA.detach(),
            routing.experts_TA.to(routing.weights_TA.dtype),
            spans.sequence_ids_T[:, None].to(routing.weights_TA.dtype),
            spans.valid_T[:, None].to(routing.weights_TA.dtype),
        ],
        dim=1,
    )
    back = _back(spans.sequence_lengths, cp, asked.device)
    everyone = gathered(asked, group)[back]
    num_choices = routing.experts_TA.shape[1]
    weights_TA, experts_TA = everyone[:, :num_choices], everyone[:, num_choices : 2 * num_choices].long()
    whole = dataclasses.replace(spans, sequence_ids_T=everyone[:, -2].long(), valid_T=everyone[:, -1] > 0)
    limited = within_capacity(Routing(experts_TA, weights_TA, routing.probs_TE, routing.logits_TE), whole, moe)
    assert limited.kept_TA is not None
    rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    mine = torch.empty_like(back).scatter_(0, back, torch.arange(len(back), device=back.device)).chunk(size)[rank]
    kept_TA = limited.kept_TA[mine]
    return dataclasses.replace(routing, weights_TA=routing.weights_TA * kept_TA, kept_TA=kept_TA)
