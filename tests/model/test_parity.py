"""Our Mixtral against transformers': logits, loss, balancing loss and every gradient, in fp32."""

from __future__ import annotations

import torch
from hf_oracle import configs, differences, gradients, pair, relative
from hypothesis import given, settings
from hypothesis import strategies as st

from ostro.model.settings import ModelConfig
from ostro.model.spans import spans_of

BAR = 1e-5
NUM_CONFIGS = 24


@settings(max_examples=NUM_CONFIGS)
@given(config=configs(), seed=st.integers(0, 2**16))
def test_equals_transformers(config: ModelConfig, seed: int) -> None:
    worst = max(differences(config, seed).items(), key=lambda item: item[1])
    assert worst[1] <= BAR, worst


@settings(max_examples=NUM_CONFIGS)
@given(config=configs(), lengths=st.lists(st.integers(1, 14), min_size=2, max_size=4), seed=st.integers(0, 2**16))
def test_packed_documents_equal_separate_ones(config: ModelConfig, lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    ours, oracle = pair(config)
    ids = torch.randint(config.vocab_size, (sum(lengths),))
    packed = ours.logits(ours(ids, spans_of(lengths))).detach()
    separate = [oracle(part[None], use_cache=False).logits[0].detach() for part in ids.split(lengths)]
    assert relative(packed, torch.cat(separate)) <= BAR
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    rows = oracle(ids[None], position_ids=positions, use_cache=False).logits[0].detach()
    assert relative(packed, rows) <= BAR


@settings(max_examples=8)
@given(config=configs(), seed=st.integers(0, 2**16))
def test_packed_gradients_equal_the_sum_of_separate_ones(config: ModelConfig, seed: int) -> None:
    torch.manual_seed(seed)
    ours, oracle = pair(config)
    lengths = [9, 2, 14]
    ids = torch.randint(config.vocab_size, (sum(lengths),))
    weights = torch.ones(len(ids))
    weights[[8, 10, 24]] = 0
    ours.loss(ids, spans_of(lengths), ids.roll(-1), weights).backward()
    for part in ids.split(lengths):
        logits = oracle(part[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum").backward()
    worst = max(gradients(ours, oracle).items(), key=lambda item: item[1])
    assert worst[1] <= BAR, worst
