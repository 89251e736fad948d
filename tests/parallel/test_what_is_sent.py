"""Two processes send what docs/parallel.md says a layout sends, to the byte."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

import pytest
from parity import settings
from test_dry_run import really
from worlds import run_in_world

from ostro.config import Config
from ostro.model import layout

C = 4  # bytes of an activation: these runs compute in fp32
MICRO = 4
CASES: dict[str, dict[str, Any]] = {
    "fsdp": {"parallel.fsdp": 2, "train.micro_batch_sequences": 2},
    "dp": {"parallel.dp": 2, "train.micro_batch_sequences": 2},
    "tp": {"parallel.tp": 2, "train.micro_batch_sequences": 4},
    "ep": {"parallel.fsdp": 2, "parallel.ep": 2, "train.micro_batch_sequences": 2},
    "cp": {"parallel.cp": 2, "train.micro_batch_sequences": 4},
    "pp": {"parallel.pp": 2, "train.micro_batch_sequences": 4},
}


def count(config: Config, *kinds: layout.Kind) -> int:
    return sum(prod(p.shape) for p in layout.parameters(config.model) if p.kind in kinds)


def expected(name: str, config: Config) -> Counter[str]:
    """Write out the formulas of docs/parallel.md for two processes."""
    model, rows = config.model, config.train.micro_batch_sequences
    num_layers, hidden, experts = model.num_hidden_layers, model.hidden_size, model.num_local_experts
    tokens = rows * config.data.seq_length  # of a micro-batch, whole
    ends, attention = (
        count(config, layout.EMBEDDING, layout.HEAD),
        count(config, layout.Q, layout.K, layout.V, layout.O),
    )
    of_experts = count(config, layout.W13, layout.W2)
    norms = (layout.INPUT_NORM, layout.POST_NORM, layout.GATE, layout.NORM)
    sent: Counter[str] = Counter()
    stats = num_layers * (experts + 5)
    sent["all-reduce"] += 8 * (3 + 2 + stats)  # labels, tokens, FLOPs; loss and norm; statistics
    if name != "pp":
        sent["all-reduce"] += 4 * count(config, *norms)
    sharded = {
        "fsdp": (ends, attention + of_experts),
        "cp": (ends, attention + of_experts),
        "tp": (0, of_experts),
        "ep": (ends, attention),
    }.get(name, (0, 0))
    sent["all-gather"] += MICRO * (sharded[0] + 2 * sharded[1]) // 2 * C
    sent["reduce-scatter"] += 4 * sum(sharded)
    if name == "dp":
        sent["all-reduce"] += 4 * (ends + attention + of_experts)
    if name == "tp":
        mine = tokens // 2
        sent["all-gather"] += MICRO * (2 * num_layers + 2) * mine * hidden * C + MICRO * 2 * tokens * 4
        sent["reduce-scatter"] += MICRO * (2 * num_layers + 2) * tokens * hidden * C
    if name == "ep":
        rows_sent = tokens * model.num_experts_per_tok
        sent["all-to-all"] += MICRO * num_layers * (4 * experts + 4 * rows_sent * hidden * C + 2 * rows_sent * 4)
    if name == "cp":
        both = tokens * 2 * model.num_key_value_heads * model.head_dim * C
        sent["all-gather"] += MICRO * num_layers * both // 2
        sent["reduce-scatter"] += MICRO * num_layers * both
    if name in ("tp", "cp"):  # the balancing loss counts each sequence's choices and tokens
        sent["all-reduce"] += MICRO * num_layers * rows * (experts + 1) * 4
    if name == "pp":
        sent["send"] = sent["receive"] = MICRO * tokens * hidden * C
    return sent


@pytest.mark.parametrize("name", CASES)
def test_two_processes_send_what_the_formula_says(name: str) -> None:
    config = settings(CASES[name])
    for rank in run_in_world(2, really, CASES[name]):
        counted: Counter[str] = Counter()
        for sent in rank["sent"]:
            counted[sent.kind] += sent.num_bytes
        assert +counted == +expected(name, config)
