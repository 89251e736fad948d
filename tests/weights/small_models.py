"""Small models, readers that lie, and Hugging Face's own class, for the tests of the weights room."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ostro.model.mixtral import Mixtral
from ostro.model.settings import ModelConfig
from ostro.weights import RandomReader, Reader, Where, load_into

TINY = ModelConfig(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=10,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=3,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    initializer_range=0.3,
)


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Draw a small architecture: head counts, experts, odd sizes, tied embeddings."""
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 2))
    head_dim = draw(st.sampled_from([2, 4]))
    experts = draw(st.integers(1, 5))
    return ModelConfig(
        vocab_size=draw(st.integers(3, 40)),
        hidden_size=draw(st.integers(1, 5)) * 2 * heads,
        intermediate_size=draw(st.integers(1, 9)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_local_experts=experts,
        num_experts_per_tok=draw(st.integers(1, experts)),
        rope_theta=draw(st.sampled_from([1e4, 1e6])),
        sliding_window=draw(st.sampled_from([None, 7])),
        tie_word_embeddings=draw(st.booleans()),
        pad_token_id=draw(st.sampled_from([None, 0])),
    )


@dataclasses.dataclass(frozen=True)
class Altered:
    """A reader whose tensors pass through `alter(name, where, tensor)`."""

    source: Reader
    alter: Callable[[str, Where, Tensor], Tensor]

    format = "altered"
    notes = ()

    @property
    def model(self) -> ModelConfig:
        return self.source.model

    def names(self) -> Any:
        return self.source.names()

    def read(self, name: str, where: Where = ()) -> Tensor:
        return self.alter(name, where, self.source.read(name, where).clone())


def mixtral(reader: Reader, dtype: torch.dtype = torch.float32) -> Mixtral:
    """Return our model with the reader's weights."""
    model = Mixtral(reader.model).to(dtype)
    load_into(model, reader)
    return model


def transformers_model(config: ModelConfig = TINY, seed: int = 0) -> Any:
    """Return transformers' model of an architecture, with its own initial weights."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    fields = config.as_fields()
    theta = fields.pop("rope_theta")
    theirs = MixtralConfig(**fields, rope_parameters={"rope_theta": theta, "rope_type": "default"})
    return MixtralForCausalLM._from_config(theirs, experts_implementation="eager").eval()


def their_logits(path: Path) -> Tensor:
    """Return the logits that transformers computes from a folder, fp32."""
    from transformers import MixtralForCausalLM

    model, report = MixtralForCausalLM.from_pretrained(path, experts_implementation="eager", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return logits_of(model.eval())


def logits_of(model: Any) -> Tensor:
    """Return the logits of transformers' model for the tokens of `TOKENS`, fp32."""
    with torch.no_grad():
        return model(TOKENS[None], use_cache=False).logits[0].float()


def our_logits(model: Mixtral) -> Tensor:
    """Return our model's logits for the same tokens."""
    from ostro.model.spans import spans_of

    with torch.no_grad():
        return model.logits(model(TOKENS, spans_of([len(TOKENS)])))


TOKENS = torch.tensor([1, 5, 9, 2, 40, 40, 7, 3, 31, 0, 12])


def random(config: ModelConfig = TINY, seed: int = 0) -> RandomReader:
    """Return random weights of an architecture."""
    return RandomReader(config, seed)
