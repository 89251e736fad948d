"""Attention: every implementation against the oracle, and no mask of all tokens by all tokens."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ostro.model.attention import ATTENTION, attend_document
from ostro.model.spans import spans_of


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    window=st.sampled_from([None, 1, 3, 16, 100]),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (8, 8)]),
    seed=st.integers(0, 999),
)
def test_documents_equal_the_oracle(lengths: list[int], window: int | None, heads: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    spans = spans_of(lengths)
    q, k, v = (torch.randn(sum(lengths), h, 8, requires_grad=True) for h in (heads[0], heads[1], heads[1]))
    outs = [ATTENTION[kind](q, k, v, spans, window) for kind in ("documents", "masked")]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(outs[0])
    grads = [torch.autograd.grad((out * direction).sum(), (q, k, v), retain_graph=True) for out in outs]
    for fast, slow in zip(*grads, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5, 700])
@pytest.mark.parametrize("num_new", [1, 2, 600, 1300])
def test_a_suffix_attends_as_it_does_in_the_whole(num_new: int, window: int | None) -> None:
    torch.manual_seed(0)
    length = 1300
    q, k, v = (torch.randn(length, h, 8) for h in (4, 2, 2))
    whole = ATTENTION["masked"](q, k, v, spans_of([length]), window)
    suffix = attend_document(q[-num_new:], k, v, window)
    torch.testing.assert_close(suffix, whole[-num_new:], rtol=1e-4, atol=1e-5)


_LONG = """
import resource, torch
from ostro.model.attention import ATTENTION
from ostro.model.spans import spans_of
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
lengths, window = {lengths}, {window}
torch.manual_seed(0)
q, k, v = (torch.randn(32768, h, 4, requires_grad=True) for h in (1, 1, 1))
spans = spans_of(lengths)
before = peak()
ATTENTION["documents"](q, k, v, spans, window).sum().backward()
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("lengths", "window"),
    [([32768], None), ([32768], 1024), ([20000, 12000, 768], None), ([1024] * 32, None)],
)
def test_32768_packed_tokens_stay_small(lengths: list[int], window: int | None) -> None:
    # A mask of 32,768² booleans would be 1,024 MiB, the scores of one head in fp32 4,096 MiB.
    code = _LONG.format(lengths=lengths, window=window)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200
