"""LoRA against what it means: the same model with W + scale·B·A in the place of W, through autograd."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from small import SMALL
from torch import Tensor

from ostro.errors import ConfigError
from ostro.model import layout, lora
from ostro.model.corrected import Corrected
from ostro.model.kernels.order import order_by_expert
from ostro.model.mixtral import Mixtral
from ostro.model.moe import dispatch, dispatch_loop
from ostro.model.routing import Routing, route_softmax
from ostro.model.settings import TARGET_GROUPS, LoraConfig
from ostro.model.spans import spans_of
from ostro.weights.store import RandomReader, drawn

EVERYTHING = LoraConfig(targets=tuple(TARGET_GROUPS), rank=3, alpha=2.0)
LORAS = {
    **{group: LoraConfig(targets=(group,), rank=3, alpha=2.0) for group in TARGET_GROUPS},
    "everything": EVERYTHING,
    "everything, rslora": dataclasses.replace(EVERYTHING, rslora=True),
    "one matrix": LoraConfig(targets=("w2",), rank=2, alpha=2.0),
    "dora": LoraConfig(targets=("attention", "lm_head"), rank=3, alpha=2.0, dora=True),
}


def models(config: LoraConfig, exact: bool = False) -> tuple[Mixtral, Mixtral]:
    """Return a plain model and one of the same weights with LoRA, none of whose parameters is 0."""
    plain, corrected = Mixtral(SMALL, exact=True), Mixtral(SMALL, exact=exact)
    lora.add(corrected, SMALL, config)
    reader, adapters = RandomReader(SMALL, 1), layout.adapter_table(SMALL, config)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(reader.read(name))
        for name, p in corrected.named_parameters():
            if name not in adapters:
                p.copy_(reader.read(name))
            elif p.dim() == 1:
                p.copy_(torch.linspace(0.5, 2, len(p)))
            else:
                p.copy_(drawn(2, adapters[name], 0.3))
    return plain.requires_grad_(False), corrected


def merged(plain: Mixtral, corrected: Mixtral, config: LoraConfig) -> dict[str, Tensor]:
    """Return W + scale·B·A of every target, written out, differentiable in A, B and magnitude."""
    low, weights = dict(corrected.named_parameters()), dict(plain.named_parameters())
    for parameter in layout.parameters(SMALL):
        if parameter.kind.target not in config.matrices:
            continue
        names = [k.name.format(layer=parameter.layer) for k in layout.adapter_kinds(parameter.kind, config.dora)]
        a, b, *magnitude = (low[name] for name in names)
        w = weights[parameter.name]
        if parameter.kind is layout.EMBEDDING:
            a, b = b, a
            delta = torch.einsum("dr,rv->vd", a, b)
        elif parameter.kind is layout.W13:
            delta = torch.einsum("ehfr,erd->ehfd", b, a)
        else:
            delta = b @ a
        w = w + config.scale * delta
        weights[parameter.name] = w * (magnitude[0] / w.norm(dim=1).detach())[:, None] if magnitude else w
    return weights


def batch() -> tuple[Tensor, Any, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(0, SMALL.vocab_size, (23,), generator=draw) for _ in range(2))
    spans = spans_of([9, 14], draws_T=torch.arange(100, 123), balance_scale=1 / 23)
    return tokens, spans, labels, torch.ones(23)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", LORAS)
def test_a_corrected_model_is_the_merged_one(name: str, exact: bool) -> None:
    config = LORAS[name]
    plain, corrected = models(config, exact)
    trained = {n: p for n, p in corrected.named_parameters() if p.requires_grad}
    assert set(trained) == set(layout.adapter_table(SMALL, config))
    loss = corrected.loss(*batch())
    wanted = torch.func.functional_call(_Loss(plain), _prefixed(merged(plain, corrected, config)), batch())
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    grads, exact_grads = (torch.autograd.grad(each, list(trained.values())) for each in (loss, wanted))
    for key, found, right in zip(trained, grads, exact_grads, strict=True):
        assert right.abs().max() > 0, key
        assert (found - right).abs().max() <= 1e-5 * right.abs().max(), key


class _Loss(torch.nn.Module):
    def __init__(self, model: Mixtral) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Tensor:
        return self.model.loss(*args)


def _prefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in tensors.items()}


def test_dropout_is_of_the_rate_the_same_again_and_for_training_alone() -> None:
    config = LoraConfig(targets=("attention",), rank=4, dropout=0.25)
    _, corrected = models(config)
    q, (tokens, spans, *_) = corrected.blocks[0].self_attn.q_proj, batch()
    assert q.correction is not None
    kept = torch.stack([q.correction._dropped(torch.ones(23, 400), spans.draws_T + 100 * i) for i in range(9)])
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert kept.mean().item() == pytest.approx(1, abs=0.01)
    assert not torch.equal(kept[0], kept[1])
    halves = [dataclasses.replace(q.correction, first_channel=first) for first in (0, 200)]
    parts = [half._dropped(torch.ones(23, 200), spans.draws_T) for half in halves]
    assert torch.equal(torch.cat(parts, dim=1), kept[0])
    first, again = corrected(tokens, spans), corrected(tokens, spans)
    assert torch.equal(first, again)
    assert not torch.equal(corrected.eval()(tokens, spans), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_equal_the_oracle(dtype: torch.dtype) -> None:
    from ostro.model import kernels
    from ostro.model.kernels.grouped import run_ordered

    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=draw) * 0.5).to(dtype).requires_grad_()

    x, weights = normal(21, 16), torch.rand(21, 2, generator=draw).requires_grad_()
    chosen = route_softmax(torch.randn(21, 4, generator=draw) - 9 * torch.tensor([0, 0, 0, 1.0]), 2)
    kept_TA = torch.rand(21, 2, generator=draw) < 0.8
    routing = Routing(chosen.experts_TA, weights * kept_TA, chosen.probs_TE, chosen.logits_TE, kept_TA)
    w13, w2 = (normal(*shape).detach() for shape in ((4, 2, 24, 16), (4, 16, 24)))
    low = [normal(*shape) for shape in ((4, 8, 16), (4, 2, 24, 8), (4, 8, 24), (4, 16, 8))]
    leaves = [x, weights, *low]
    order = order_by_expert(routing.experts_TA, kept_TA, 4)

    def stacks(parts: list[Tensor]) -> tuple[Corrected, Corrected]:
        up, down = (w.to(parts[0].dtype) for w in (w13, w2))
        return Corrected(up, parts[0], parts[1], 0.7), Corrected(down, parts[2], parts[3], 0.7)

    out = run_ordered(x, routing.weights_TA, order, *stacks(low), kernels.TORCH)
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    wanted = dispatch_loop(wide[0], dataclasses.replace(routing, weights_TA=wide[1] * kept_TA), *stacks(wide[2:]))
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    pairs = [(out, wanted)]
    direction = torch.randn(21, 16, generator=draw)
    found = torch.autograd.grad((out * direction).sum(), leaves)
    right = torch.autograd.grad((wanted * direction).sum(), wide)
    for fast, slow in [*pairs, *zip(found, right, strict=True)]:
        assert (fast.float() - slow).abs().max() <= tolerance * slow.abs().max()


def test_frozen_experts_are_run_without_any_correction() -> None:
    torch.manual_seed(0)
    x = torch.randn(13, 16, requires_grad=True)
    routing = route_softmax(torch.randn(13, 4), 2)
    w13, w2 = torch.randn(4, 2, 12, 16), torch.randn(4, 16, 12)
    found = dispatch(x, routing, Corrected(w13, None, None, 1.0), Corrected(w2, None, None, 1.0))
    wanted = dispatch(x, routing, w13, w2)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for out in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"targets": ("w1",)}, "names w1 alone, which PEFT's format cannot say.*Name w13"),
        ({"targets": ("atention",)}, "names 'atention'; known: attention, .*[Mm]ean"),
        ({"targets": ()}, "lora.targets is empty"),
        ({"dropout": 0.1}, "lora.dropout is for attention and lm_head alone.* w13, w2"),
        ({"dora": True, "targets": ("router", "attention")}, "lora.dora is for attention and lm_head alone.* gate"),
        ({"dora": True, "targets": ("attention",), "quantize": "nf4"}, "lora.dora takes the norms"),
        ({"dora": True, "targets": ("lm_head",), "dropout": 0.1}, "not for lm_head"),
    ],
)
def test_what_no_adapter_can_say_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        LoraConfig(**fields)
