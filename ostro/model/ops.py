"""The arithmetic of a Mixtral block as pure functions: products, norm, rotary positions, SwiGLU, the loss.

Shapes everywhere in `model`: T tokens, D hidden, H query heads, K kv heads, C head dim, E experts, A experts per
token, F ffn, V vocab, N = T·A routed rows. A suffix names the logical dims of a tensor, never a rank's share of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ostro import device


@contextlib.contextmanager
def weights_cast_once() -> Iterator[None]:
    """Within it a parameter is cast to the dtype of the activations once, not once a micro-batch.

    Nobody may change a parameter meanwhile. The copies go when it ends.
    """
    _casts.append({})
    try:
        yield
    finally:
        _casts.pop()


_casts: list[dict[tuple[int, torch.dtype, bool], tuple[Tensor, Tensor]]] = []


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight (an fp32 master, perhaps) in `dtype`, made once where `weights_cast_once` is in force."""
    if weight.dtype == dtype:
        return weight
    if not _casts or not isinstance(weight, nn.Parameter):
        return weight.to(dtype)
    key = (id(weight), dtype, torch.is_grad_enabled())
    if key not in _casts[-1]:
        _casts[-1][key] = (weight, _copy(weight, dtype))  # a held parameter's id is nobody else's
    return _casts[-1][key][1]


def _copy(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy that is a leaf of its own, and hands each gradient on to the weight as soon as it is whole.

    A cast that autograd knows would be older than all later micro-batches' operations, and autograd goes backwards by
    age: their gradients, a whole model's, would wait for the end of each backward pass.
    """
    copy = weight.detach().to(dtype)
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return copy

    def hand_on(copy: Tensor) -> None:
        assert copy.grad is not None
        grad, copy.grad = copy.grad.to(weight.dtype), None
        weight.grad = grad if weight.grad is None else weight.grad.add_(grad)

    copy.requires_grad_().register_post_accumulate_grad_hook(hand_on)
    return copy


Later = list[Callable[[], None]]
"""Gradients of weights that are still to be computed and added."""

_later: list[Later] = []


@contextlib.contextmanager
def weights_later() -> Iterator[Later]:
    """Within it backward passes leave the gradients of matrices for later, in the list that it gives.

    Forward passes must have run within it as well. So split, a pipeline sends the gradients of inputs on at once and
    fills its bubble with those of weights (arXiv 2401.10241).
    """
    later: Later = []
    _later.append(later)
    try:
        yield later
    finally:
        _later.pop()


def run_later(later: Later) -> None:
    """Compute the gradients that were left, and add them to their weights'."""
    with torch.no_grad():
        for add in later:
            add()


def splits_backward() -> bool:
    """Whether `weights_later` is in force."""
    return bool(_later)


def leave_for_later(weights: Sequence[Tensor], gradients: Callable[[], Sequence[Tensor]]) -> None:
    """Leave the gradients of leaves for later."""
    assert all(weight.is_leaf for weight in weights)

    def add() -> None:
        for weight, grad in zip(weights, gradients(), strict=True):
            if weight.requires_grad:
                own = grad.to(weight.dtype)
                weight.grad = own if weight.grad is None else weight.grad + own

    _later[-1].append(add)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T` in x's dtype; the weight is cast to it."""
    if _later and weight.requires_grad and weight.is_leaf:
        return _SplitLinear.apply(x, weight)  # type: ignore[return-value]
    weight = cast(weight, x.dtype)
    if _products_in_fp32(x):
        return F.linear(x.float(), weight.float()).to(x.dtype)
    return F.linear(x, weight)


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight  # itself: what recompute hands back for a saved tensor is another
        ctx.save_for_backward(x)
        return product(x, cast(weight, x.dtype).t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (x,), weight = ctx.saved_tensors, ctx.weight
        leave_for_later((weight,), lambda: (product(grad.flatten(0, -2).t(), x.flatten(0, -2)),))
        return product(grad, cast(weight, x.dtype)), None


def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write `a @ b` into `out`, for the hand-written backward passes; all three share a dtype."""
    if _products_in_fp32(a):
        out.copy_(a.float() @ b.float())
    else:
        torch.mm(a, b, out=out)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b`, both of one dtype, in it."""
    return (a.float() @ b.float()).to(a.dtype) if _products_in_fp32(a) else a @ b


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add `a @ b` to the fp32 `total`; a and b share a dtype."""
    if a.dtype == total.dtype or _products_in_fp32(a):
        total.addmm_(a.float(), b.float())
    else:
        total += a @ b


def add_scaled_product(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Add `scale · a @ b` to `total`; all three share a dtype."""
    if _products_in_fp32(a):
        total.add_(product(a, b), alpha=scale)
    else:
        total.addmm_(a, b, alpha=scale)


@contextlib.contextmanager
def without_values(as_accelerator: bool) -> Iterator[None]:
    """Within it tensors have shapes and no values (a dry run): what depends on them is taken to be as it mostly is.

    Routing is balanced, no probability is rare. `as_accelerator` computes in the steps an accelerator takes: products
    of 16 bits as they are, and the loss in its larger chunks.
    """
    _assumed.append(as_accelerator)
    try:
        yield
    finally:
        _assumed.pop()


_assumed: list[bool] = []


def has_values() -> bool:
    """Whether tensors can be asked for what is in them: `without_values` is not in force."""
    return not _assumed


def _computes_as_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not any(_assumed)


def _products_in_fp32(x: Tensor) -> bool:
    # A CPU without 16-bit units (for fp16 none has them) multiplies such matrices hundreds of times slower than fp32
    # ones. The product of the rounded operands, accumulated in fp32 and rounded once, is what such a unit would give.
    if x.dtype == torch.float32 or x.dtype.itemsize >= 4 or not _computes_as_cpu(x):
        return False
    return x.dtype == torch.float16 or not device.bf16_is_fast()


def embedding(tokens_T: Tensor, table_VD: Tensor) -> Tensor:
    """Return the tokens' rows of the table; backward adds up what falls on the same row in fp32.

    A CPU's own backward adds in the table's dtype, and FSDP hands over a table of 16 bits.
    """
    if table_VD.dtype == torch.float32 or table_VD.device.type != "cpu":
        return F.embedding(tokens_T, table_VD)
    return _Embedding.apply(tokens_T, table_VD)  # type: ignore[return-value]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_T: Tensor, table_VD: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_T)
        ctx.num_rows, ctx.dtype = len(table_VD), table_VD.dtype
        return F.embedding(tokens_T, table_VD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (tokens_T,) = ctx.saved_tensors
        total_VD = torch.zeros(ctx.num_rows, grad.shape[1], dtype=torch.float32, device=grad.device)
        return None, total_VD.index_add_(0, tokens_T, grad.float()).to(ctx.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dim, computed in fp32 (arXiv 1910.07467).

    Backward makes it again from x, which the residual stream keeps anyway: what is kept here is a number per token.
    """
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[return-value]


def rms_norm_kept(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The oracle of `rms_norm`: everything its backward needs is kept by autograd."""
    return F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype) * weight.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = (x.float().square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, inverse)
        return (x.float() * inverse).to(x.dtype) * weight.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        normed, grad = x.float() * inverse, grad.float()
        grad_weight = (grad * normed).flatten(0, -2).sum(dim=0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad = grad * weight.to(x.dtype)
        grad_x = inverse * (grad - normed * (grad * normed).mean(dim=-1, keepdim=True))
        return grad_x.to(x.dtype), grad_weight, None


def rope_tables(positions_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each [T, 1, C/2], of the rotary angles `position · theta^(-2i/C)` (arXiv 2104.09864)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device) / head_dim
    angles = positions_T[:, None].float() * (1.0 / theta**exponents)
    return angles.cos().to(dtype)[:, None, :], angles.sin().to(dtype)[:, None, :]


def apply_rope(x_TGC: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate every head's pairs (i, i + C/2): Hugging Face's half-rotation order."""
    cos, sin = rope
    first, second = x_TGC.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) · up` (arXiv 2002.05202)."""
    return F.silu(gate) * up


def cross_entropy(logits_TV: Tensor, labels_T: Tensor, weights_T: Tensor) -> Tensor:
    """Return `Σ weight · −log p(label)`, from whole logits: the oracle of `linear_cross_entropy`."""
    return (F.cross_entropy(logits_TV.float(), labels_T, reduction="none") * weights_T).sum()


@dataclasses.dataclass(frozen=True)
class Words:
    """Which words a head has: those from `first` on; `combine` makes sums over all words out of those over these.

    It takes the logarithm of each token's normaliser and the label's logit (0 where the label is another's), fp32 [T].
    """

    first: int = 0
    combine: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda normaliser_T, logit_T: (normaliser_T, logit_T)


ALL_WORDS = Words()


def linear_cross_entropy(
    x_TD: Tensor,
    head_VD: Tensor,
    labels_T: Tensor,
    weights_T: Tensor,
    chunk_tokens: int = 0,
    tile_vocab: int = 0,
    words: Words = ALL_WORDS,
) -> Tensor:
    """Return `Σ weight · −log p(label)` with logits `x @ head.T`, never holding more than a chunk of them.

    The gradients are made beside the loss, chunk by chunk, while the logits are at hand (arXiv 2410.10989). A chunk is
    swept twice in tiles of the vocabulary: the first sweep leaves each tile's softmax, the second, which knows the
    normaliser over all tiles, is products alone, since what a tile's softmax lacks is a factor per token, and what the
    label adds is a row of the head. The head's gradient is summed in fp32. Of a head with a part of the words the
    loss is that over all of them, and x's gradient the part that comes through these.
    """
    # Measured on two cores at D 256 and 1024: in tiles of 1,024 tokens and 2,048 words the three products run at 0.95
    # of a large square one's rate, over all 32,000 words at 0.65 to 0.9. GPUs want them whole.
    is_cpu = _computes_as_cpu(x_TD)
    chunk_tokens = chunk_tokens or (1024 if is_cpu else 2048)
    tile_vocab = tile_vocab or (2048 if is_cpu else len(head_VD))
    # A frozen head (LoRA) needs no gradient, of which it would be a third of the work.
    needs_grad = (torch.is_grad_enabled() and (x_TD.requires_grad or head_VD.requires_grad), head_VD.requires_grad)
    return _LinearCrossEntropy.apply(
        x_TD, head_VD, labels_T - words.first, weights_T, chunk_tokens, tile_vocab, words, needs_grad
    )  # type: ignore[return-value]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        master_VD: Tensor,
        labels_T: Tensor,
        weights_T: Tensor,
        chunk_tokens: int,
        tile_vocab: int,
        words: Words,
        needs_grad: tuple[bool, bool],
    ) -> Tensor:
        head_VD = cast(master_VD, x_TD.dtype)
        num_rows = min(chunk_tokens, len(x_TD))
        probs, logits = x_TD.new_empty(num_rows * len(head_VD)), x_TD.new_empty(num_rows * tile_vocab)
        loss = torch.zeros((), dtype=torch.float32, device=x_TD.device)
        grad_x = torch.empty_like(x_TD) if needs_grad[0] else None
        grad_head = torch.zeros_like(head_VD, dtype=torch.float32) if all(needs_grad) else None
        for start in range(0, len(x_TD), chunk_tokens):
            x, labels, weights = (t[start : start + chunk_tokens] for t in (x_TD, labels_T, weights_T))
            tiles, normaliser_TJ, label_logits_T = _softmax_tiles(x, head_VD, labels, probs, logits, tile_vocab)
            normaliser_T, label_logits_T = words.combine(normaliser_TJ.logsumexp(dim=1), label_logits_T)
            # Rounding alone can take −log p below 0.
            loss += ((normaliser_T - label_logits_T).clamp(min=0) * weights).sum()
            if grad_x is None:
                continue
            # d loss / d logits = weight · (softmax − one-hot). The label's p − 1 leaves its tile and goes its own way
            # in fp32: of a p rounded to 16 bits nothing would be left.
            residual_T = torch.expm1(label_logits_T - normaliser_T).clamp(max=0) * weights
            _leave_out(tiles, labels)
            factor_TJ = (normaliser_TJ - normaliser_T[:, None]).exp() * weights[:, None]
            if words is not ALL_WORDS:
                residual_T = torch.where((labels >= 0) & (labels < len(head_VD)), residual_T, 0)
                labels = labels.clamp(0, len(head_VD) - 1)
            grad = head_VD[labels] * residual_T[:, None]
            for j, (tile, head) in enumerate(zip(tiles, head_VD.split(tile_vocab), strict=True)):
                factor = factor_TJ[:, j, None]
                grad.addcmul_(product(tile, head), factor)
                if grad_head is not None:
                    part = grad_head[j * tile_vocab : (j + 1) * tile_vocab]
                    add_product(part, tile.t(), (x * factor).to(x.dtype))
            grad_x[start : start + len(x)] = grad
            if grad_head is not None:
                grad_head.index_add_(0, labels, residual_T[:, None] * x)
        if grad_x is not None:
            ctx.save_for_backward(grad_x, None if grad_head is None else grad_head.to(master_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:  # type: ignore[override]
        grad_x, grad_head = ctx.saved_tensors
        # In place: they are this backward's alone, and the head's is one of the largest tensors of a step.
        grad_head = None if grad_head is None else grad_head.mul_(grad_loss)
        return grad_x.mul_(grad_loss), grad_head, None, None, None, None, None, None


def _softmax_tiles(
    x_TD: Tensor, head_VD: Tensor, labels_T: Tensor, probs: Tensor, logits: Tensor, tile_vocab: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return the softmax of every tile's logits, the logarithms of their normalisers [T, J], the labels' logits [T].

    `probs`, which the first are views of, and `logits` are memory for T · V and T · tile_vocab values: a tile's logits
    are read from the cache. The labels' logits are those that were normalised, rounded alike.
    """
    tiles, normalisers, first = [], [], 0
    label_logits_T = torch.zeros_like(labels_T, dtype=torch.float32)
    for head in head_VD.split(tile_vocab):
        num_values = len(x_TD) * len(head)
        logits_Tj = logits[:num_values].view(len(x_TD), -1)
        tile = probs[first * len(x_TD) :][:num_values].view(len(x_TD), -1)
        mm(x_TD, head.t(), logits_Tj)
        place_T = labels_T - first
        found_T = logits_Tj.gather(1, place_T.clamp(0, len(head) - 1)[:, None]).squeeze(1).float()
        label_logits_T = torch.where((place_T >= 0) & (place_T < len(head)), found_T, label_logits_T)
        normalisers.append(_softmax(logits_Tj, tile))
        tiles.append(tile)
        first += len(head)
    return tiles, torch.stack(normalisers, dim=1), label_logits_T


def _leave_out(tiles: list[Tensor], labels_T: Tensor) -> None:
    """Write 0 at each token's label, in whichever tile it is."""
    place_T = labels_T.clone()
    for tile in tiles:
        at_T1 = place_T.clamp(0, tile.shape[1] - 1)[:, None]
        is_here = (place_T >= 0) & (place_T < tile.shape[1])
        tile.scatter_(1, at_T1, torch.where(is_here[:, None], 0, tile.gather(1, at_T1)))
        place_T -= tile.shape[1]


# Below this a probability loses the digits of its logarithm.
_RARE = 1e-30


def _softmax(logits_TV: Tensor, out_TV: Tensor) -> Tensor:
    """Write the softmax of each row into `out`; return the logarithm of each row's normaliser, fp32 [T]."""
    if logits_TV.device.type != "cpu" or logits_TV.dtype != torch.float32:
        log_probs_TV = torch.log_softmax(logits_TV, dim=-1, dtype=torch.float32)
        normaliser_T = logits_TV[:, 0].float() - log_probs_TV[:, 0]
        out_TV.copy_(log_probs_TV.exp_())
        return normaliser_T
    # One pass over a row in the nearest cache, where log_softmax and exp take two: the normaliser of a row is any of
    # its logits less the logarithm of its probability.
    torch.softmax(logits_TV, dim=-1, out=out_TV)
    normaliser_T = logits_TV[:, 0] - out_TV[:, 0].log()
    rare_T = out_TV[:, 0] < _RARE
    if has_values() and rare_T.any():
        normaliser_T[rare_T] = logits_TV[rare_T].logsumexp(dim=-1)
    return normaliser_T


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """Return x unchanged, so that its backward pass also gives `loss` the gradient 1.

    A loss that rides on an activation reaches the parameters from any pipeline stage, under recompute and under
    accumulation, without anybody passing it along.
    """
    return _AttachLoss.apply(x, loss)  # type: ignore[return-value]


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.shape, ctx.options = loss.shape, {"dtype": loss.dtype, "device": loss.device}
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad, torch.ones(ctx.shape, **ctx.options)
