"""Causal attention inside documents. No path but the oracle ever builds a mask of all tokens by all tokens."""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ostro import device
from ostro.model.spans import Spans

# Query rows per masked block where a window or a cached prefix rules out plain causal attention.
_BLOCK_TOKENS = 512


class Attend(Protocol):
    """The seam: context parallel gathers K and V around it, the serving cache puts earlier tokens before them."""

    def __call__(self, q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, spans: Spans, window: int | None) -> Tensor: ...


def attend(q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, spans: Spans, window: int | None) -> Tensor:
    """Attend with the fastest implementation for where the tensors are.

    Each token sees itself and the tokens before it in its document, at most `window` in all. Query head h reads key
    head h·K/H. Returns [T, H, C].
    """
    kind = "varlen" if device.is_cuda(q_THC.device) and q_THC.dtype != torch.float32 else "documents"
    return ATTENTION[kind](q_THC, k_TKC, v_TKC, spans, window)


def _attend_varlen(q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, spans: Spans, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = spans.document_starts, spans.longest_document
    left = -1 if window is None else window - 1
    # torch 2.11 groups query heads by their number alone and has no such argument; later ones want to be told.
    is_told = q_THC.shape[1] != k_TKC.shape[1] and _varlen_is_told_of_groups()
    grouped: dict[str, Any] = {"enable_gqa": True} if is_told else {}
    out = varlen_attn(q_THC, k_TKC, v_TKC, starts, starts, longest, longest, window_size=(left, 0), **grouped)
    assert isinstance(out, Tensor)
    return out


Runs = tuple[tuple[int, int, int], ...]


def attend_varlen_segments(q_THC: Tensor, k_SKC: Tensor, v_SKC: Tensor, runs: Runs, window: int | None) -> Tensor:
    """Attend from runs of queries, each (its length, first key, end of its keys), whose last query is its last key."""
    from torch.nn.attention.varlen import varlen_attn

    keys, of_queries, of_keys = _laid_out(runs, q_THC.device)
    left = -1 if window is None else window - 1
    is_told = q_THC.shape[1] != k_SKC.shape[1] and _varlen_is_told_of_groups()
    grouped: dict[str, Any] = {"enable_gqa": True} if is_told else {}
    most_queries, most_keys = max(n for n, _, _ in runs), max(last - first for _, first, last in runs)
    k, v = k_SKC[keys], v_SKC[keys]
    out = varlen_attn(q_THC, k, v, of_queries, of_keys, most_queries, most_keys, window_size=(left, 0), **grouped)
    assert isinstance(out, Tensor)
    return out


@functools.lru_cache(maxsize=64)
def _laid_out(runs: Runs, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return which keys the runs see, one after another, and where in queries and in keys each starts; cached, since
    every layer asks and the host waits for the copies."""
    keys = torch.cat([torch.arange(first, last) for _, first, last in runs])
    lengths = [n for n, _, _ in runs], [last - first for _, first, last in runs]
    of_queries, of_keys = (torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in lengths)
    return keys.to(device), of_queries.to(device), of_keys.to(device)


@functools.cache
def _varlen_is_told_of_groups() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _attend_documents(q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, spans: Spans, window: int | None) -> Tensor:
    lengths = spans.document_lengths
    length = lengths[0]
    if all(n == length for n in lengths) and (window is None or length <= window):
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q_THC, k_TKC, v_TKC))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)
    pieces = zip(q_THC.split(lengths), k_TKC.split(lengths), v_TKC.split(lengths), strict=True)
    return torch.cat([attend_document(q, k, v, window) for q, k, v in pieces])


def attend_document(q_THC: Tensor, k_SKC: Tensor, v_SKC: Tensor, window: int | None) -> Tensor:
    """Attend from the last T of a document's S tokens to the tokens before them; returns [T, H, C]."""
    num_queries, num_keys = len(q_THC), len(k_SKC)
    earlier = num_keys - num_queries
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THC, k_SKC, v_SKC))
    if num_queries == 1:
        first = 0 if window is None else max(0, num_keys - window)
        out = F.scaled_dot_product_attention(q, k[:, :, first:], v[:, :, first:], enable_gqa=True)
    elif earlier == 0 and (window is None or num_keys <= window):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        blocks = []
        for start in range(0, num_queries, _BLOCK_TOKENS):
            stop = min(start + _BLOCK_TOKENS, num_queries)
            first = 0 if window is None else max(0, earlier + start - window + 1)
            last = earlier + stop
            distance = (
                torch.arange(earlier + start, last, device=q.device)[:, None]
                - torch.arange(first, last, device=q.device)[None, :]
            )
            seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            blocks.append(
                F.scaled_dot_product_attention(
                    q[:, :, start:stop],
                    k[:, :, first:last],
                    v[:, :, first:last],
                    attn_mask=seen,
                    enable_gqa=True,
                )
            )
        out = torch.cat(blocks, dim=2)
    return out[0].transpose(0, 1)


def _attend_masked(q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, spans: Spans, window: int | None) -> Tensor:
    lengths = torch.tensor(spans.document_lengths, device=q_THC.device)
    document_T = torch.repeat_interleave(torch.arange(len(lengths), device=q_THC.device), lengths)
    distance_TT = torch.arange(len(q_THC), device=q_THC.device)
    distance_TT = distance_TT[:, None] - distance_TT[None, :]
    seen_TT = (document_T[:, None] == document_T[None, :]) & (distance_TT >= 0)
    if window is not None:
        seen_TT &= distance_TT < window
    groups = q_THC.shape[1] // k_TKC.shape[1]
    k_THC, v_THC = (x.repeat_interleave(groups, dim=1) for x in (k_TKC, v_TKC))
    scores_HTT = torch.einsum("thc,shc->hts", q_THC, k_THC) * q_THC.shape[-1] ** -0.5
    scores_HTT = scores_HTT.masked_fill(~seen_TT, float("-inf"))
    return torch.einsum("hts,shc->thc", scores_HTT.softmax(dim=-1, dtype=torch.float32).to(v_THC.dtype), v_THC)


# varlen: flash attention over cumulative lengths. documents: causal attention document by document.
# masked: the oracle, which spells out the definition and takes T² memory.
ATTENTION: dict[str, Attend] = {
    "varlen": _attend_varlen,
    "documents": _attend_documents,
    "masked": _attend_masked,
}
