"""Tensor parallel with sequence parallel: heads, vocabulary (and, with etp, the experts' inner dim) are cut over ranks.

Between blocks each rank has its share of the tokens. Attention gathers them, computes this rank's heads for all, and
sums while scattering (arXiv 2205.05198); the embedding and the loss each have a part of the words.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ostro.model import layout, ops
from ostro.model.mixtral import Attention, Linear, Mixtral
from ostro.parallel.collectives import Group, gather, gathered, scatter_sum
from ostro.parallel.mesh import Mesh


def apply(model: Mixtral, mesh: Mesh) -> None:
    """Cut attention, embedding and loss over the ranks of tp; the parameters have been cut already."""
    group = mesh.tp
    if group is None:
        return
    for block in model.blocks.values():
        _cut_attention(block.self_attn, group)
        _cut_input(block.self_attn.o_proj, mesh, group)
    if mesh.degrees.vocab_emb_dp:
        if model.is_first:
            model.model.embed_tokens.register_forward_pre_hook(functools.partial(_own_tokens, group=group))
        return
    num_words = model.config.vocab_size // mesh.degrees.tp
    first = mesh.tp_rank * num_words
    if model.is_first:
        embedding = model.model.embed_tokens
        embedding.forward = functools.partial(_embed, embedding, first, group)
    if model.is_last:
        words = ops.Words(first, functools.partial(_over_all_words, group=group))
        model.head_loss = functools.partial(_cut_loss, words=words, group=group)


def _cut_attention(attention: Attention, group: Group) -> None:
    def gather_tokens(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (gather(args[0], group), *args[1:])

    def scatter_tokens(_: Any, __: Any, out_TD: Tensor) -> Tensor:
        return scatter_sum(out_TD, group)

    attention.register_forward_pre_hook(gather_tokens)
    attention.register_forward_hook(scatter_tokens)


def _cut_input(linear: Linear, mesh: Mesh, group: Group) -> None:
    """Tell the correction of a matrix whose input is cut which channels are here, and how norms of rows come whole."""
    if linear.correction is not None:
        num_channels = getattr(linear, layout.LORA_A).shape[1]
        linear.correction.first_channel = mesh.tp_rank * num_channels
        linear.correction.sum_squares = functools.partial(_summed_again, group=group)


def _summed_again(values: Tensor, group: Group) -> Tensor:
    dist.all_reduce(values, group=group)
    return values


def _own_tokens(_: Any, args: tuple[Tensor], group: Group) -> tuple[Tensor]:
    return (args[0].chunk(dist.get_world_size(group))[dist.get_rank(group)],)


def _embed(embedding: Any, first: int, group: Group, tokens_T: Tensor) -> Tensor:
    """Look up the words that are here, 0 for the others, and sum while each rank takes its share of the tokens."""
    place_T = tokens_T - first
    is_here_T = (place_T >= 0) & (place_T < len(embedding.weight))
    found_TD = embedding.lookup(place_T.clamp(0, len(embedding.weight) - 1))
    return scatter_sum(torch.where(is_here_T[:, None], found_TD, 0), group)


def _cut_loss(
    x_TD: Tensor, head_VD: Tensor, labels_T: Tensor, weights_T: Tensor, words: ops.Words, group: Group
) -> Tensor:
    return ops.linear_cross_entropy(gather(x_TD, group), head_VD, labels_T, weights_T, words=words)


def _over_all_words(normaliser_T: Tensor, logit_T: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    both = gathered(torch.stack([normaliser_T, logit_T])[None], group)
    return both[:, 0].logsumexp(dim=0), both[:, 1].sum(dim=0)
