"""transformers' Mixtral as an oracle, set up so that it does not mislead.

Packed rows are right in it only with `use_cache=False`, no attention mask, batch 1 and restarting position ids; odd
ffn sizes need the eager experts.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from ostro.model import layout
from ostro.model.balance import hf_balance
from ostro.model.mixtral import Mixtral
from ostro.model.settings import ModelConfig, MoeConfig
from ostro.model.spans import spans_of

AUX_COEF = 0.02


def hf_name(name: str) -> str:
    """Return transformers' in-memory name of a canonical parameter."""
    name = name.replace("block_sparse_moe.experts.w13", "mlp.experts.gate_up_proj")
    name = name.replace("block_sparse_moe.experts.w2", "mlp.experts.down_proj")
    return name.replace("block_sparse_moe", "mlp")


def pair(config: ModelConfig, moe: MoeConfig | None = None) -> tuple[Mixtral, MixtralForCausalLM]:
    """Return our model and transformers' with the same random weights."""
    fields = config.as_fields()
    theta = fields.pop("rope_theta")
    oracle = MixtralForCausalLM(
        MixtralConfig(
            **fields,
            router_aux_loss_coef=AUX_COEF,
            rope_parameters={"rope_theta": theta, "rope_type": "default"},
            attn_implementation="eager",
            experts_implementation="eager",
        )
    )
    ours = Mixtral(config, moe or MoeConfig(router_aux_loss_coef=AUX_COEF, balance="hf"))
    theirs = oracle.state_dict()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.normal_(0, 0.2)
        for name, parameter in ours.named_parameters():
            parameter.copy_(theirs[hf_name(name)].view_as(parameter))
    return ours, oracle


def relative(a: Tensor, b: Tensor) -> float:
    """Return max|a − b| / max|b|."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()


def gradients(ours: nn.Module, oracle: nn.Module) -> dict[str, float]:
    """Return each parameter's relative difference of gradients.

    Where a gradient is zero by construction (a gate whose one choice always weighs 1) both sides hold rounding noise
    below 1e-6 of the model's largest gradient; it is measured against that one instead of against itself.
    """
    theirs = {name: p.grad for name, p in oracle.named_parameters() if p.grad is not None}
    largest = max(grad.abs().max().item() for grad in theirs.values())
    out = {}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        other = theirs[hf_name(name)].view_as(parameter)
        scale = other.abs().max().item()
        out[name] = (parameter.grad - other).abs().max().item() / (scale if scale > 1e-6 * largest else largest)
    return out


def differences(config: ModelConfig, seed: int) -> dict[str, float]:
    """Compare one forward and backward pass; return the relative difference of everything that comes out."""
    torch.manual_seed(seed)
    ours, oracle = pair(config)
    length = 23
    ids = torch.randint(config.vocab_size, (1, length))
    theirs = oracle(ids, labels=ids, use_cache=False, output_router_logits=True)
    theirs.loss.backward()

    routings = []
    for block in ours.blocks.values():
        block.block_sparse_moe.register_forward_hook(lambda _, inputs, outputs: routings.append(outputs[1]))
    spans = spans_of([length], balance_scale=1 / length)
    logits = ours.logits(ours(ids[0], spans))
    balance = hf_balance(routings, spans)
    weights = torch.ones(length)
    weights[-1] = 0
    loss = ours.loss(ids[0], spans, ids[0].roll(-1), weights) / (length - 1)
    loss.backward()
    kinds = layout.table(config)
    found = {
        "logits": relative(logits.detach(), theirs.logits[0].detach()),
        "loss": relative(loss.detach(), (theirs.loss - AUX_COEF * theirs.aux_loss).detach()),
        "balancing loss": relative(balance.detach(), theirs.aux_loss.detach()),
    }
    for name, difference in gradients(ours, oracle).items():
        what = f"gradient of {kinds[name].kind.name}"
        found[what] = max(found.get(what, 0.0), difference)
    return found


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Draw small architectures: heads, kv heads, experts 1–16, top-k 1–4, odd ffn sizes, windows, tied embeddings."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 4]))
    head_dim = draw(st.sampled_from([4, 8, 10]))
    experts = draw(st.integers(1, 16))
    return ModelConfig(
        vocab_size=draw(st.integers(17, 70)),
        hidden_size=draw(st.sampled_from([heads * head_dim, 24, 40])),
        head_dim=head_dim,
        intermediate_size=draw(st.integers(5, 40)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_local_experts=experts,
        num_experts_per_tok=draw(st.integers(1, min(4, experts))),
        rope_theta=draw(st.sampled_from([1e4, 1e6])),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        sliding_window=draw(st.sampled_from([None, 2, 3, 7])),
        tie_word_embeddings=draw(st.booleans()),
    )
