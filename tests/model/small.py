"""The model that tests of the experts share: two layers of four experts, weights large enough to route by."""

from __future__ import annotations

from ostro.model.settings import ModelConfig

SMALL = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_local_experts=4,
    initializer_range=0.3,
)
