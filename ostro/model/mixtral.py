"""Mixtral, top to bottom (arXiv 2401.04088): exactly what Hugging Face's `MixtralForCausalLM` computes.

Parameters carry the canonical names of `layout.py`. The model is built with uninitialised values: weights come from a
checkpoint or from `weights.RandomReader`. Activations have the dtype `compute_dtype`; the parameters may be of a wider
one (fp32 masters) and are cast where they are used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ostro.model import ops
from ostro.model.attention import Attend, attend
from ostro.model.balance import hf_balance
from ostro.model.corrected import linear
from ostro.model.lora import Correction
from ostro.model.moe import MoE, dispatch_loop
from ostro.model.quant import NF4
from ostro.model.routing import Routing
from ostro.model.settings import ModelConfig, MoeConfig
from ostro.model.spans import Spans

HeadLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Hidden states, head, labels and weights to a loss; tensor parallel cuts the vocabulary in it."""


class Linear(nn.Module):
    """A product with weight [out, in], which LoRA may correct; Mixtral has no biases."""

    weight: nn.Parameter | NF4
    correction: Correction | None = None

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in))

    def forward(self, x: Tensor, draws_T: Tensor | None = None) -> Tensor:
        y = linear(x, self.weight)
        return y if self.correction is None else self.correction(self, x, y, draws_T)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight per channel."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and, where configured, a sliding window."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        self.head_dim, self.window = head_dim, config.sliding_window
        self.q_proj = Linear(hidden, config.num_attention_heads * head_dim)
        self.k_proj = Linear(hidden, config.num_key_value_heads * head_dim)
        self.v_proj = Linear(hidden, config.num_key_value_heads * head_dim)
        self.o_proj = Linear(config.num_attention_heads * head_dim, hidden)
        self.attend: Attend = attend

    def forward(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], spans: Spans) -> Tensor:
        # -1 heads: under tensor parallel a rank has fewer of them.
        draws_T = spans.attended_draws_T
        q_THC = ops.apply_rope(self.q_proj(x_TD, draws_T).unflatten(-1, (-1, self.head_dim)), rope)
        k_TKC = ops.apply_rope(self.k_proj(x_TD, draws_T).unflatten(-1, (-1, self.head_dim)), rope)
        v_TKC = self.v_proj(x_TD, draws_T).unflatten(-1, (-1, self.head_dim))
        return self.o_proj(self.attend(q_THC, k_TKC, v_TKC, spans, self.window).flatten(-2), draws_T)


class Block(nn.Module):
    """One layer: attention and experts, each normed before and added after."""

    def __init__(self, config: ModelConfig, moe: MoeConfig, layer: int = 0) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.block_sparse_moe = MoE(config, moe, layer)

    def forward(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], spans: Spans) -> tuple[Tensor, Routing, Tensor]:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rope, spans)
        out_TD, routing, stats_S = self.block_sparse_moe(self.post_attention_layernorm(x_TD), spans)
        return x_TD + out_TD, routing, stats_S


class Embedding(nn.Module):
    """The token table [V, D], which LoRA may correct."""

    correction: Correction | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, tokens_T: Tensor) -> Tensor:
        return self.lookup(tokens_T)

    def lookup(self, tokens_T: Tensor) -> Tensor:
        """Return the tokens' rows of what is here of the table."""
        found_TD = ops.embedding(tokens_T, self.weight)
        return found_TD if self.correction is None else self.correction.of_rows(self, tokens_T, found_TD)


class Body(nn.Module):
    """Embedding, layers and final norm; a ModuleDict keeps a layer's name when others live on other ranks."""

    def __init__(self, config: ModelConfig, moe: MoeConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config)
        self.layers = nn.ModuleDict({str(i): Block(config, moe, i) for i in range(config.num_hidden_layers)})
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Mixtral(nn.Module):
    """The whole model: tokens to final hidden states, to logits, or to a loss.

    `exact` computes as the oracles do, expert by expert (`dispatch_loop`) and from whole logits (`ops.cross_entropy`).
    """

    def __init__(
        self,
        config: ModelConfig,
        moe: MoeConfig | None = None,
        compute_dtype: torch.dtype = torch.float32,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.exact = exact
        self.is_first = self.is_last = True  # a stage of a pipeline may lack the embedding or norm and head
        self.head_loss: HeadLoss = ops.linear_cross_entropy
        self.config, self.moe, self.compute_dtype = config, moe or MoeConfig(), compute_dtype
        self.model = Body(config, self.moe)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if exact:
            for block in self.blocks.values():
                block.block_sparse_moe.experts.dispatch = dispatch_loop

    @property
    def blocks(self) -> dict[int, Block]:
        """The layers this process holds, by number."""
        return {int(name): block for name, block in self.model.layers.items() if isinstance(block, Block)}

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, D]: its own, or the embedding's where they are tied."""
        weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, tokens_T: Tensor, spans: Spans) -> Tensor:
        """Return the final normed hidden states [T, D]; statistics go into `spans`.

        A stage that is not the first takes hidden states for `tokens_T`, one that is not the last returns them raw.
        """
        x_TD = self.model.embed_tokens(tokens_T).to(self.compute_dtype) if self.is_first else tokens_T
        rope = ops.rope_tables(spans.positions_T, self.config.head_dim, self.config.rope_theta, self.compute_dtype)
        routings = []
        for layer, block in self.blocks.items():
            x_TD, routing, stats_S = block(x_TD, rope, spans)
            routings.append(routing)
            # Outside the block, so that recomputing a block counts nothing twice.
            if spans.stats_LS is not None:
                spans.stats_LS[layer] += stats_S
            if spans.experts_LTA is not None:
                spans.experts_LTA[layer] = routing.experts_TA
        if self.moe.balance == "hf" and spans.balance_scale and torch.is_grad_enabled():
            balance = self.moe.router_aux_loss_coef * hf_balance(routings, spans)
            x_TD = ops.attach_loss(x_TD, balance)
        return self.model.norm(x_TD) if self.is_last else x_TD

    def head(self, x_TD: Tensor, draws_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return what is multiplied to logits: final hidden states and the output matrix, wider where LoRA corrects."""
        correction = None if self.config.tie_word_embeddings else self.lm_head.correction
        return (x_TD, self.head_weight) if correction is None else correction.of_head(self.lm_head, x_TD, draws_T)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return the logits [T, V] of final hidden states, fp32."""
        return ops.linear(*self.head(x_TD)).float()

    def loss(self, tokens_T: Tensor, spans: Spans, labels_T: Tensor, weights_T: Tensor) -> Tensor:
        """Return `Σ weight · −log p(label)` in nats, fp32; the balancing losses ride on its backward pass."""
        x_TD, head_VD = self.head(self(tokens_T, spans), spans.draws_T)
        if self.exact:
            return ops.cross_entropy(ops.linear(x_TD, head_VD).float(), labels_T, weights_T)
        return self.head_loss(x_TD, head_VD, labels_T, weights_T)
