"""Layouts against one process: a sample here, all of them with `make parity`; what cannot be is refused."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
from matrix import DIMENSIONS, EXCLUSIVE, PRODUCTS, SEEDS, adapted, alone, features, pairs, whole
from parity import TOLERANCE, difference, settings

from ostro.errors import ConfigError

CASES = {**dict(alone()), **dict(pairs()), **PRODUCTS, **dict(adapted())}
SAMPLE = (
    "accumulation",
    "tp · zero_bubble",
    "dp · full",
    "seed: pretrain 4k and finetune",
    "hsdp · tp · ep",
    "fsdp · ep · interleaved",
    "fsdp · ep · zero bubble · drops",
    "tied embeddings · pp · tp · fsdp",
    "rows of 27 tokens · cp · tp · drops",
    "jitter · cp · fsdp · ep",
    "words uncut by tp, and nothing else sharded",
    "LoRA · hsdp · tp · ep",
    "DoRA, dropout · tp",
    "QLoRA · etp",
)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_layout_gives_the_same_model(name: str) -> None:
    found = difference(whole(CASES[name]))
    assert max(found.values()) < TOLERANCE, found


def test_every_pair_of_dimensions_has_a_case() -> None:
    covered = [features(settings(whole(case))) for case in CASES.values()]
    wanted = [
        {one, other}
        for one, other in itertools.combinations(DIMENSIONS, 2)
        if not any({one, other} <= group for group in EXCLUSIVE)
    ]
    assert len(wanted) > 100
    assert not [pair for pair in wanted if not any(pair <= found for found in covered)]
    assert all(any({name} <= found for found in covered) for name in DIMENSIONS)


def test_there_are_a_dozen_products_of_three_dimensions_and_the_seeds_own() -> None:
    counted = {name for name in DIMENSIONS if name not in ("dropless", "accumulation")}
    products = [case for case in PRODUCTS.values() if len(features(settings(whole(case))) & counted) >= 3]
    assert len(products) >= 12
    sizes = [settings(whole(case)).parallel.degrees().num_ranks for case in SEEDS.values()]
    assert sizes == [16, 16, 16, 16]


def test_the_seeds_words_mean_what_they_say() -> None:
    seed = settings(whole(SEEDS["pretrain 4k and finetune"])).parallel
    assert (seed.fsdp, seed.tp, seed.etp, seed.ep, seed.pp) == (2, 4, 4, 2, 2)
    assert seed.vocab_emb_dp
    assert seed.gradient_aggregation_group == 4


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ({"parallel.tp": 3}, r"tp=3 does not divide num_key_value_heads=8: use tp 1, 2, 4, 8"),
        ({"parallel.fsdp": 3, "parallel.ep": 3}, r"ep=3 does not divide num_local_experts=8"),
        ({"parallel.ep": 2}, r"ep·etp=2 does not divide fsdp·cp·tp=1: experts lie within these"),
        ({"parallel.pp": 5}, r"pp·virtual_stages=5 is more than num_hidden_layers=4: each stage needs a layer"),
        ({"parallel.pp": 2, "parallel.stage_layers": "[1, 2]"}, r"stage_layers=\[1, 2\] must be 2 numbers"),
        ({"parallel.fsdp": 3}, r"3 ranks .* share 8 experts of inner size 16, and neither"),
        ({"parallel.dp": 3}, r"global_batch_sequences=16 is no multiple of .*=3: use 18"),
        (
            {"parallel.pp": 2, "parallel.micro_batch_num": 3},
            r"micro_batch_num=3 .* make 16: set train.global_batch_sequences=3",
        ),
        ({"parallel.schedule": "zero_bubble"}, r"schedule, virtual_stages and stage_layers mean nothing with pp=1"),
        ({"parallel.pp": 2, "parallel.virtual_stages": 2}, r"interleaved is what has 2 stages a rank or more"),
        (
            {
                "parallel.pp": 4,
                "parallel.schedule": "interleaved",
                "parallel.virtual_stages": 2,
                "model.num_hidden_layers": 8,
                "train.global_batch_sequences": 6,
            },
            r"takes micro-batches pp=4 at a time and there are 6: use a multiple \(train.global_batch_sequences=8\)",
        ),
        ({"parallel.tp": 2, "train.exact": True}, r"train.exact is the path of one process"),
        ({"parallel.pp": 2, "parallel.schedule": "zero_bubble", "train.exact": True}, r"train.exact cannot split"),
        ({"parallel.pp": 2, "parallel.schedule": "zero_bubble", "train.compile": True}, r"train.compile cannot split"),
        ({"parallel.dp": 2, "moe.balance": "hf", "train.micro_batch_sequences": 16}, r"."),
        ({"parallel.tp": 2, "parallel.model_parallel": 2}, r"model_parallel and tp say the same"),
        ({"parallel.model_parallel": 2, "parallel.use_seq_parallel": False}, r"always cuts the sequence between"),
    ],
    ids=lambda case: "-".join(key.split(".")[1] for key in case) if isinstance(case, dict) else "",
)
def test_what_a_layout_cannot_do_is_refused(case: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        settings({"train.micro_batch_sequences": 1, **case})


LONG = {
    "data.seq_length": 32768,
    "model.max_position_embeddings": 32768,
    "model.num_hidden_layers": 1,
    "model.num_attention_heads": 2,
    "model.num_key_value_heads": 1,
    "train.global_batch_sequences": 1,
    "train.micro_batch_sequences": 1,
}


def test_long_sequences_are_cut_over_ranks() -> None:
    """32,768 tokens in one row of three documents, on two ranks: no mask of all tokens by all is ever built."""
    found = difference({**LONG, "parallel.cp": 2}, num_steps=1)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.skipif("OSTRO_PARITY" not in os.environ, reason="compiling takes minutes: make parity has it")
def test_compiled_blocks_give_the_same_model() -> None:
    found = difference(whole({"train.compile": True, "parallel.fsdp": 2, "parallel.ep": 2}))
    assert max(found.values()) < TOLERANCE, found
