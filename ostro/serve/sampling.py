"""From logits to the next token: pure functions, in the order transformers applies them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ostro.errors import RequestError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose tokens. `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and penalty 1 do nothing.

    Each prompt draws from its own generator, started from `seed`: a batch gives each prompt what it gets alone
    (in fp32; in 16 bits products of other heights round otherwise, and near ties may fall otherwise).
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, is_fine, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature == 0 or self.temperature >= 1e-3, "0 (greedy) or at least 0.001"),
            ("seed", 0 <= self.seed < 2**63, "at least 0 and below 2^63"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 is none)"),
            ("stop", "" not in self.stop, "strings that are not empty"),
        ):
            if not is_fine:
                raise RequestError(f"{name}={getattr(self, name)!r} must be {rule}.")


def next_token(logits_V: Tensor, seen_ids: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose the next token. `seen_ids` (int64) are the prompt's and the answer's tokens so far."""
    logits_V = penalise(logits_V, seen_ids, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / sampling.temperature
    logits_V = keep_top_k(logits_V, sampling.top_k)
    logits_V = keep_top_p(logits_V, sampling.top_p)
    logits_V = keep_min_p(logits_V, sampling.min_p)
    return int(torch.multinomial(logits_V.softmax(dim=-1), 1, generator=generator))


def penalise(logits_V: Tensor, seen_ids: Tensor, penalty: float) -> Tensor:
    """Divide the positive and multiply the negative logits of tokens already seen (arXiv 1909.05858 §4.1)."""
    if penalty == 1.0:
        return logits_V
    seen = logits_V[seen_ids]
    return logits_V.scatter(0, seen_ids, torch.where(seen > 0, seen / penalty, seen * penalty))


def keep_top_k(logits_V: Tensor, k: int) -> Tensor:
    """Rule out all but the k most likely tokens; 0 rules out none."""
    if k == 0 or k >= len(logits_V):
        return logits_V
    return logits_V.masked_fill(logits_V < logits_V.topk(k).values[-1], float("-inf"))


def keep_top_p(logits_V: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities reach p (arXiv 1904.09751), at least one."""
    if p == 1.0:
        return logits_V
    order = logits_V.argsort()
    unlikely = logits_V[order].softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    unlikely[-1] = False
    return logits_V.masked_fill(torch.zeros_like(unlikely).scatter(0, order, unlikely), float("-inf"))


def keep_min_p(logits_V: Tensor, p: float) -> Tensor:
    """Rule out tokens less likely than p times the likeliest (arXiv 2407.01082)."""
    if p == 0.0:
        return logits_V
    probs_V = logits_V.softmax(dim=-1)
    return logits_V.masked_fill(probs_V < p * probs_V.max(), float("-inf"))
