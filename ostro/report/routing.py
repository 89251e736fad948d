"""Which experts take which tokens: load by domain and layer, and how often the next token goes to the same expert.

The questions are those of the Mixtral paper's section 5 (arXiv 2401.04088): figure 7, table 5, figure 8.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ostro import log
from ostro.batch import batch_of, require_known
from ostro.data import shards as token_shards
from ostro.data.loader import Loader, Row
from ostro.data.prepare import prepare
from ostro.data.shards import Shards
from ostro.data.tasks import Settings
from ostro.data.tokenizer import Tokenizer
from ostro.dataset import check_data
from ostro.errors import ConfigError
from ostro.model.mixtral import Mixtral
from ostro.model.settings import ModelConfig

# Tokens of one forward pass, whole rows of them; and of a domain's text that the page shows.
_BATCH_TOKENS = 8192
_SHOWN_TOKENS = 700


@dataclasses.dataclass(frozen=True)
class Domain:
    """How one kind of text was routed.

    `choices_LAE` counts, for each layer and each of a token's choices (best first), the tokens that fell on an expert.
    `repeated_LR` counts the tokens whose expert the next token of their document has again: the first choice of both,
    and any choice of both; `num_pairs` such neighbours there were. The text begins with `tokens_T` and went to
    `experts_LTA`.
    """

    name: str
    num_tokens: int
    num_pairs: int
    choices_LAE: np.ndarray
    repeated_LR: np.ndarray
    tokens_T: np.ndarray
    experts_LTA: np.ndarray

    @property
    def load(self) -> np.ndarray:
        """Each layer's share of all choices per expert; a layer's sum to 1."""
        counts_LE = self.choices_LAE.sum(axis=1)
        return counts_LE / counts_LE.sum(axis=1, keepdims=True)

    @property
    def repetition(self) -> np.ndarray:
        """The share of neighbours with the same first expert, and with a common expert; NaN without neighbours."""
        return self.repeated_LR / self.num_pairs if self.num_pairs else np.full(self.repeated_LR.shape, math.nan)


def random_repetition(num_experts: int, num_experts_per_tok: int) -> tuple[float, float]:
    """Return what repetitions two tokens have that choose blindly: of the first expert, and of any.

    The first is the same one time in E. Of the C(E, A) sets of experts the second token may choose, C(E − A, A) have
    none of the first token's, so a common one has 1 − C(E − A, A) / C(E, A): 46.4 % for two of eight (table 5).
    """
    apart = math.comb(num_experts - num_experts_per_tok, num_experts_per_tok)
    return 1 / num_experts, 1 - apart / math.comb(num_experts, num_experts_per_tok)


def repetitions(experts_LTA: np.ndarray, document_lengths: Sequence[int]) -> tuple[np.ndarray, int]:
    """Count, per layer, next tokens with the same first expert and with a common one [L, 2]; and the neighbours.

    A token and the first of the next document are no neighbours.
    """
    ends = np.cumsum(document_lengths)
    is_pair_T = np.ones(experts_LTA.shape[1], dtype=bool)
    is_pair_T[ends - 1] = False
    here, following = experts_LTA[:, is_pair_T], np.roll(experts_LTA, -1, axis=1)[:, is_pair_T]
    first = (here[..., 0] == following[..., 0]).sum(axis=1)
    common = (here[..., :, None] == following[..., None, :]).any(axis=(2, 3)).sum(axis=1)
    return np.stack([first, common], axis=1), int(is_pair_T.sum())


def chosen_layers(num_layers: int) -> list[int]:
    """Return the first, middle and last layer: 0, 15 and 31 of 32, as in the paper."""
    return sorted({0, (num_layers - 1) // 2, num_layers - 1})


def open_domain(path: str, folder: Path, tokenizer: Tokenizer, kind: str, model: ModelConfig) -> Shards:
    """Open prepared data; text is prepared into `folder` first."""
    if not token_shards.is_prepared(path):
        prepare([path], folder, tokenizer=tokenizer, settings=Settings(kind))
    opened = token_shards.open_shards(folder if not token_shards.is_prepared(path) else path)
    check_data(Path(path), opened, tokenizer, model)
    return opened


def domain_names(paths: Sequence[str]) -> list[str]:
    """Return what to call each source: its file's or folder's name, whole paths where these are not different."""
    names = [Path(path).resolve().stem for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


@torch.no_grad()
def route(model: Mixtral, name: str, shards: Shards, seq_length: int, most_tokens: int) -> Domain:
    """Send a domain's text through a model, in rows of `seq_length` tokens, up to `most_tokens` of it."""
    config = model.config
    if seq_length > config.max_position_embeddings:
        raise ConfigError(
            f"--seq-length {seq_length} is more than the model's {config.max_position_embeddings} positions."
        )
    loader = Loader([shards], seq_length=seq_length, shuffle=False, drop_last=False)
    num_rows = min(loader.num_rows, max(1, most_tokens // seq_length))
    num_layers, num_choices, num_experts = (
        config.num_hidden_layers,
        config.num_experts_per_tok,
        config.num_local_experts,
    )
    choices_LAE = np.zeros((num_layers, num_choices, num_experts), dtype=np.int64)
    repeated_LR, num_pairs, num_tokens = np.zeros((num_layers, 2), dtype=np.int64), 0, 0
    shown: list[tuple[np.ndarray, np.ndarray]] = []
    model.eval()
    for rows in _batches(loader, num_rows, seq_length):
        require_known(rows, config.vocab_size, f"{name}, rows from {num_tokens // seq_length}")
        experts_LTA = _experts(model, rows)
        lengths = [length for row in rows for length in row.document_lengths]
        repeated, pairs = repetitions(experts_LTA, lengths)
        repeated_LR, num_pairs, num_tokens = repeated_LR + repeated, num_pairs + pairs, num_tokens + sum(lengths)
        choices_LAE += (experts_LTA[..., None] == np.arange(num_experts)).sum(axis=1)
        if sum(len(tokens_T) for tokens_T, _ in shown) < _SHOWN_TOKENS:
            shown.append((np.concatenate([row.tokens_L for row in rows]), experts_LTA))
    tokens_T = np.concatenate([tokens for tokens, _ in shown])[:_SHOWN_TOKENS]
    experts_LTA = np.concatenate([experts for _, experts in shown], axis=1)[:, :_SHOWN_TOKENS]
    return Domain(name, num_tokens, num_pairs, choices_LAE, repeated_LR, tokens_T, experts_LTA)


def _batches(loader: Loader, num_rows: int, seq_length: int) -> Iterator[list[Row]]:
    at_once = max(1, _BATCH_TOKENS // seq_length)
    for first in range(0, num_rows, at_once):
        yield loader.read(first, min(at_once, num_rows - first))


def _experts(model: Mixtral, rows: Sequence[Row]) -> np.ndarray:
    config, device = model.config, model.head_weight.device
    batch = batch_of(rows, device)
    shape = (config.num_hidden_layers, len(batch.tokens_T), config.num_experts_per_tok)
    experts_LTA = torch.zeros(shape, dtype=torch.int64, device=device)
    model(batch.tokens_T, dataclasses.replace(batch.spans, experts_LTA=experts_LTA))
    return experts_LTA.cpu().numpy()


def tables(domains: Sequence[Domain]) -> dict[str, list[dict[str, Any]]]:
    """Return the numbers as rows: the load of every domain, layer and expert; the repetitions of domain and layer."""
    _, num_choices, num_experts = domains[0].choices_LAE.shape
    first, common = random_repetition(num_experts, num_choices)
    load = [
        {"domain": domain.name, "layer": layer, "expert": expert, "load": domain.load[layer, expert]}
        | {f"choice_{i + 1}": domain.choices_LAE[layer, i, expert] / domain.num_tokens for i in range(num_choices)}
        for domain in domains
        for layer in range(len(domain.choices_LAE))
        for expert in range(num_experts)
    ]
    repetition = [
        {"domain": domain.name, "layer": layer, "first_choice": same[0], "any_choice": same[1]}
        for domain in domains
        for layer, same in enumerate(domain.repetition)
    ]
    return {
        "load": load,
        "repetition": [*repetition, {"domain": "random", "layer": "any", "first_choice": first, "any_choice": common}],
    }


def write_tables(domains: Sequence[Domain], folder: Path) -> None:
    """Write load.csv, repetition.csv, and both as routing.json."""
    found = tables(domains)
    for name, rows in found.items():
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        log.write_text(folder / f"{name}.csv", text.getvalue())
    counted = {"tokens": {domain.name: domain.num_tokens for domain in domains}}
    log.write_text(folder / "routing.json", json.dumps(counted | found, indent=1, default=float) + "\n")
