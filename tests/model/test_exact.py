"""The exact path is the oracles' bit for bit; the fast one agrees with it; masters are cast once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ostro.model import ops
from ostro.model.mixtral import Mixtral
from ostro.model.moe import dispatch_loop
from ostro.model.settings import ModelConfig, MoeConfig
from ostro.model.spans import Spans, spans_of

CONFIG = ModelConfig(
    vocab_size=2100,  # more than one tile of the vocabulary
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=5,
)
LENGTHS = [17, 30, 9]
TOKENS = torch.randint(CONFIG.vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.rand(len(TOKENS), generator=torch.Generator().manual_seed(2))


def built(exact: bool, dtype: torch.dtype = torch.float32) -> Mixtral:
    torch.manual_seed(0)
    model = Mixtral(CONFIG, MoeConfig(z_loss_coef=0.1), dtype, exact)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def spans() -> Spans:
    return spans_of(LENGTHS, balance_scale=1 / len(TOKENS))


def loss_and_gradients(model: Mixtral, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(model.parameters()))
    return {"loss": loss.detach(), **grads}


def test_the_exact_path_has_the_bits_of_the_oracles() -> None:
    exact, plain = built(exact=True), built(exact=False)
    for block in plain.blocks.values():
        block.block_sparse_moe.experts.dispatch = dispatch_loop
    oracle = ops.cross_entropy(plain.logits(plain(TOKENS, spans())), TOKENS, WEIGHTS)
    ours = loss_and_gradients(exact, exact.loss(TOKENS, spans(), TOKENS, WEIGHTS))
    for name, value in loss_and_gradients(plain, oracle).items():
        assert torch.equal(ours[name], value), name


def test_the_fast_path_agrees_with_the_exact_one() -> None:
    exact, fast = built(exact=True), built(exact=False)
    ours = loss_and_gradients(fast, fast.loss(TOKENS, spans(), TOKENS, WEIGHTS))
    for name, value in loss_and_gradients(exact, exact.loss(TOKENS, spans(), TOKENS, WEIGHTS)).items():
        assert (ours[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    assert not all(torch.equal(ours[name], p.grad) for name, p in exact.named_parameters() if p.grad is not None)


def test_masters_are_cast_once_a_step_and_gradients_are_the_same() -> None:
    def step(model: Mixtral) -> dict[str, Tensor]:
        for _ in range(2):
            model.loss(TOKENS, spans(), TOKENS, WEIGHTS).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    each_time = step(built(exact=False, dtype=torch.bfloat16))
    model = built(exact=False, dtype=torch.bfloat16)
    with ops.weights_cast_once():
        once = step(model)
        master = model.model.layers["0"].self_attn.q_proj.weight
        kept = ops.cast(master, torch.bfloat16)
        assert kept is ops.cast(master, torch.bfloat16)
        with torch.no_grad():
            assert ops.cast(master, torch.bfloat16) is not kept  # one that no gradient flows through
        part = master[:3]
        assert ops.cast(part, torch.bfloat16) is not ops.cast(part, torch.bfloat16)
    assert ops.cast(master, torch.bfloat16) is not ops.cast(master, torch.bfloat16)
    assert once.keys() == each_time.keys()
    for name, grad in each_time.items():
        assert grad.dtype == torch.float32
        assert torch.equal(once[name], grad), name


@pytest.mark.parametrize("tile", [1, 7, 19, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_the_vocabulary_add_up(tile: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, head = torch.randn(23, 8).to(dtype), torch.randn(19, 8)
    labels, weights = torch.randint(19, (23,)), torch.rand(23)
    weights[5] = 0
    inputs = (x.requires_grad_(), head.requires_grad_())
    oracle = torch.autograd.grad(ops.cross_entropy(x.float() @ head.to(dtype).float().t(), labels, weights), inputs)
    tiled = torch.autograd.grad(
        ops.linear_cross_entropy(x, head, labels, weights, chunk_tokens=10, tile_vocab=tile), inputs
    )
    for ours, theirs in zip(tiled, oracle, strict=True):
        assert ours.dtype == theirs.dtype
        limit = 1e-5 if dtype == torch.float32 else 2e-2
        assert (ours - theirs).abs().max() <= limit * theirs.abs().max()
    assert (tiled[0][5] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_loss_is_negative_however_sure_the_model_is(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = torch.randn(300, 64)
    labels = torch.randint(300, (200,))
    x = head[labels].to(dtype)  # the label's logit is some 64, the others' are about 0
    for label, row in zip(labels, x, strict=True):
        loss = ops.linear_cross_entropy(row[None], head, label[None], torch.ones(1), tile_vocab=128)
        assert 0 <= loss.item() < 1e-3


@pytest.mark.parametrize("sureness", [0.15, 0.2, 0.3])
def test_the_gradient_of_a_sure_token_is_no_rounding_noise(sureness: float) -> None:
    torch.manual_seed(0)
    head, labels, weights = torch.randn(300, 64), torch.randint(300, (200,)), torch.ones(200)
    x = (head[labels] * sureness).bfloat16()
    rounded = (x.requires_grad_(), head.requires_grad_())
    plain = [tensor.detach().bfloat16().float().requires_grad_() for tensor in rounded]
    ours = torch.autograd.grad(ops.linear_cross_entropy(*rounded, labels, weights, tile_vocab=128), rounded)
    oracle = torch.autograd.grad(ops.cross_entropy(plain[0] @ plain[1].t(), labels, weights), plain)
    for one, other in zip(ours, oracle, strict=True):
        assert (one.float() - other).norm() <= 0.1 * other.norm()
