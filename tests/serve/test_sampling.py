"""Every way of ruling tokens out against transformers' own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ostro.errors import RequestError
from ostro.serve.sampling import Sampling, keep_min_p, keep_top_k, keep_top_p, next_token, penalise

seeds = st.integers(0, 9999)


def logits_of(seed: int) -> torch.Tensor:
    return torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3


@given(seed=seeds, k=st.integers(1, 60))
def test_top_k(seed: int, k: int) -> None:
    logits = logits_of(seed)
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(None, logits[None])[0])


@given(seed=seeds, p=st.floats(0.01, 0.999))
def test_top_p(seed: int, p: float) -> None:
    logits = logits_of(seed)
    assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(None, logits[None])[0])


@given(seed=seeds, p=st.floats(0.001, 0.999))
def test_min_p(seed: int, p: float) -> None:
    logits = logits_of(seed)
    assert torch.equal(keep_min_p(logits, p), MinPLogitsWarper(p)(None, logits[None])[0])


@given(seed=seeds, penalty=st.floats(0.5, 2.0), seen=st.lists(st.integers(0, 49), min_size=1, max_size=9))
def test_repetition_penalty(seed: int, penalty: float, seen: list[int]) -> None:
    logits, ids = logits_of(seed), torch.tensor(seen)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids[None], logits[None])[0]
    assert torch.equal(penalise(logits, ids, penalty), theirs)


def test_greedy_takes_the_likeliest_and_sampling_follows_the_probabilities() -> None:
    logits, seen = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0])
    generator = torch.Generator().manual_seed(0)
    assert next_token(logits, seen, Sampling(), generator) == 1
    drawn = torch.tensor([next_token(logits, seen, Sampling(temperature=0.5), generator) for _ in range(4000)])
    shares = torch.bincount(drawn, minlength=3) / 4000
    torch.testing.assert_close(shares, (logits / 0.5).softmax(0), atol=0.03, rtol=0)
    only = Sampling(temperature=9.0, top_k=1)
    assert {next_token(logits, seen, only, generator) for _ in range(50)} == {1}


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"temperature": 1e-44},
        {"seed": 2**64},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 1},
        {"repetition_penalty": 0},
        {"stop": ("",)},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(RequestError, match=f"{next(iter(wrong))}=.* must be"):
        Sampling(**wrong)
