"""The layouts that must agree with one process: every dimension alone, every pair, and the products people run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from parity import NUM_ROWS, settings

from ostro.config import Config

Case = dict[str, Any]

# Each as it is set where it stands alone.
DIMENSIONS: dict[str, Case] = {
    "dp": {"parallel.dp": 2},
    "fsdp": {"parallel.fsdp": 2},
    "tp": {"parallel.tp": 2},
    "etp": {"parallel.tp": 2, "parallel.etp": 2},
    "ep": {"parallel.ep": 2},
    "cp": {"parallel.cp": 2},
    "1f1b": {"parallel.pp": 2, "parallel.schedule": "1f1b"},
    "interleaved": {"parallel.pp": 2, "parallel.schedule": "interleaved", "parallel.virtual_stages": 2},
    "zero_bubble": {"parallel.pp": 2, "parallel.schedule": "zero_bubble"},
    "accumulation": {},
    "selective": {"train.recompute": "selective"},
    "full": {"train.recompute": "full"},
    "dropless": {},
    "token": {"moe.capacity_factor": 0.9, "moe.drop": "token"},
    "choice": {"moe.capacity_factor": 0.9, "moe.drop": "choice"},
    "probability": {"moe.capacity_factor": 0.7, "moe.drop": "probability"},
}
# Of these a run has one at most.
EXCLUSIVE = (
    {"1f1b", "interleaved", "zero_bubble"},
    {"selective", "full"},
    {"dropless", "token", "choice", "probability"},
)

SEEDS: dict[str, Case] = {
    "pretrain 4k, as the seed's README has it": {
        "parallel.data_parallel": 8,
        "parallel.model_parallel": 1,
        "parallel.expert_parallel": 8,
        "parallel.pipeline_stage": 2,
    },
    "pretrain 4k and finetune": {
        "parallel.data_parallel": 2,
        "parallel.model_parallel": 4,
        "parallel.expert_parallel": 2,
        "parallel.pipeline_stage": 2,
        "parallel.use_seq_parallel": True,
        "parallel.vocab_emb_dp": True,
        "parallel.gradient_aggregation_group": 4,
        "train.recompute": "full",
    },
    "pretrain 32k": {
        "parallel.data_parallel": 1,
        "parallel.model_parallel": 8,
        "parallel.expert_parallel": 1,
        "parallel.pipeline_stage": 2,
        "parallel.use_seq_parallel": True,
        "train.recompute": "full",
    },
    "context parallel, which the seed refuses": {
        "parallel.data_parallel": 2,
        "parallel.model_parallel": 2,
        "parallel.context_parallel": 2,
        "parallel.expert_parallel": 4,
        "parallel.pipeline_stage": 2,
    },
}

PRODUCTS: dict[str, Case] = {
    **{f"seed: {name}": case for name, case in SEEDS.items()},
    "hsdp · tp · ep": {"parallel.dp": 2, "parallel.fsdp": 2, "parallel.tp": 2, "parallel.ep": 4},
    "hsdp · experts sharded further": {"parallel.dp": 2, "parallel.fsdp": 4, "parallel.ep": 2},
    "fsdp · tp · cp": {"parallel.fsdp": 2, "parallel.tp": 2, "parallel.cp": 2},
    "fsdp · ep · interleaved": {"parallel.fsdp": 4, "parallel.ep": 4, **DIMENSIONS["interleaved"]},
    "fsdp · ep · zero bubble · drops": {
        "parallel.fsdp": 4,
        "parallel.ep": 4,
        **DIMENSIONS["zero_bubble"],
        **DIMENSIONS["probability"],
    },
    "fsdp · cp · ep · full": {"parallel.fsdp": 2, "parallel.cp": 2, "parallel.ep": 4, **DIMENSIONS["full"]},
    "tp · cp · etp · drops": {"parallel.tp": 2, "parallel.etp": 2, "parallel.cp": 2, **DIMENSIONS["choice"]},
    "dp · tp · zero bubble": {"parallel.dp": 2, "parallel.tp": 2, **DIMENSIONS["zero_bubble"]},
    "fsdp · tp · etp · ep · 1f1b": {
        "parallel.fsdp": 4,
        "parallel.tp": 2,
        "parallel.etp": 2,
        "parallel.ep": 2,
        **DIMENSIONS["1f1b"],
        "parallel.stage_layers": "[1, 3]",
    },
    "pp 4, uneven · fsdp · tp": {
        "parallel.pp": 4,
        "parallel.fsdp": 2,
        "parallel.tp": 2,
        "model.num_hidden_layers": 6,
        "parallel.stage_layers": "[1, 2, 2, 1]",
    },
    "experts cut along ffn: more ranks than experts": {"parallel.fsdp": 16, "model.num_local_experts": 4},
    "words uncut by tp, and nothing else sharded": {"parallel.tp": 2, "parallel.etp": 2, "parallel.vocab_emb_dp": True},
    "words uncut by tp · ep · cp": {
        "parallel.tp": 2,
        "parallel.cp": 2,
        "parallel.ep": 4,
        "parallel.vocab_emb_dp": True,
    },
    "rows of 27 tokens · cp · tp · drops": {
        "data.seq_length": 27,
        "parallel.tp": 2,
        "parallel.cp": 2,
        **DIMENSIONS["token"],
    },
    "sliding window · cp": {"model.sliding_window": 7, "parallel.cp": 2},
    "three stages in a ring": {
        "model.num_hidden_layers": 6,
        "parallel.pp": 3,
        "parallel.schedule": "interleaved",
        "parallel.virtual_stages": 2,
        "train.global_batch_sequences": 12,
        "train.micro_batch_sequences": 2,
    },
    "tied embeddings · pp · tp · fsdp": {
        "model.tie_word_embeddings": True,
        "parallel.tp": 2,
        "parallel.fsdp": 2,
        **DIMENSIONS["1f1b"],
    },
    "sigmoid with a bias · fsdp · ep · tp": {
        "moe.router": "sigmoid",
        "moe.bias_update_rate": 0.01,
        "parallel.fsdp": 2,
        "parallel.tp": 2,
        "parallel.ep": 4,
    },
    "jitter · cp · fsdp · ep": {
        "moe.router_jitter_noise": 0.1,
        "parallel.cp": 2,
        "parallel.fsdp": 2,
        "parallel.ep": 2,
    },
    "gradients reduced with every micro-batch": {
        "parallel.fsdp": 4,
        "parallel.ep": 2,
        "parallel.gradient_accumulation_shard": True,
        "train.micro_batch_sequences": 1,
    },
    "gradients reduced with every micro-batch · fsdp · ep · 1f1b": {
        "parallel.fsdp": 4,
        "parallel.ep": 2,
        "parallel.gradient_accumulation_shard": True,
        **DIMENSIONS["1f1b"],
    },
    "gradients reduced with every micro-batch · fsdp · zero bubble": {
        "parallel.fsdp": 2,
        "parallel.gradient_accumulation_shard": True,
        **DIMENSIONS["zero_bubble"],
    },
    "balanced per batch · dp · tp · cp": {
        "moe.balance": "batch",
        "parallel.dp": 2,
        "parallel.tp": 2,
        "parallel.cp": 2,
    },
    "groups of two blocks · fsdp · pp": {
        "parallel.fsdp": 4,
        "parallel.gradient_aggregation_group": 2,
        **DIMENSIONS["1f1b"],
    },
}


# LoRA trains these beside each dimension and these products: everything that it can correct, DoRA with dropout, and
# experts in 4 bits, whose blocks of 64 want wider matrices.
LORA: Case = {"lora.targets": "[attention, experts, router, lm_head, embeddings]", "lora.rank": 4, "lora.alpha": 2}
DORA: Case = {"lora.targets": "[attention]", "lora.dora": True, "lora.dropout": 0.25, "lora.rank": 4, "lora.alpha": 2}
QLORA: Case = {
    "lora.quantize": "nf4",
    "lora.rank": 4,
    "lora.alpha": 2,
    "model.hidden_size": 64,
    "model.intermediate_size": 128,
    "model.head_dim": 8,
}
_PRODUCTS_WITH_LORA = (
    "seed: pretrain 4k and finetune",
    "hsdp · tp · ep",
    "fsdp · ep · interleaved",
    "fsdp · tp · etp · ep · 1f1b",
    "fsdp · ep · zero bubble · drops",
)


def adapted() -> Iterator[tuple[str, Case]]:
    """Yield every dimension with LoRA, some with DoRA and with experts in 4 bits, and the products with each."""
    for name, case in alone():
        if name not in ("choice", "probability"):
            yield f"LoRA · {name}", {**LORA, **case}
    for name in ("tp", "fsdp", "cp", "zero_bubble", "full", "accumulation"):
        yield f"DoRA, dropout · {name}", {**DORA, **dict(alone())[name]}
    for name in ("tp", "etp", "ep", "fsdp", "cp", "zero_bubble", "selective", "full"):
        yield f"QLoRA · {name}", {**QLORA, **dict(alone())[name]}
    for name in _PRODUCTS_WITH_LORA:
        yield f"LoRA · {name}", {**LORA, **PRODUCTS[name]}
        if not name.startswith("seed"):  # which cut the experts' inner dim below 64
            yield f"QLoRA · {name}", {**QLORA, **PRODUCTS[name]}


def whole(case: Case) -> Case:
    """Return a case with a micro-batch size: no accumulation but with a pipeline, or as the case says."""
    if "train.micro_batch_sequences" in case:
        return case
    parallel = settings({**case, "train.micro_batch_sequences": 1}).parallel
    share = NUM_ROWS // (parallel.dp * parallel.fsdp)
    pieces = min(share, 4) if parallel.pp > 1 else 1
    return {**case, "train.micro_batch_sequences": share // pieces}


def alone() -> Iterator[tuple[str, Case]]:
    """Yield every dimension by itself; experts need ranks to lie on."""
    for name, case in DIMENSIONS.items():
        yield name, _with_ranks(name, dict(case))


def pairs() -> Iterator[tuple[str, Case]]:
    """Yield every pair of dimensions that can meet."""
    for one, other in itertools.combinations(DIMENSIONS, 2):
        if not any({one, other} <= group for group in EXCLUSIVE):
            case = {**DIMENSIONS[one], **DIMENSIONS[other]}
            yield f"{one} · {other}", _with_ranks(f"{one} {other}", case)


def _with_ranks(names: str, case: Case) -> Case:
    """Give experts a dimension to lie in where there is none, and accumulation something to add up."""
    if "ep" in names.split() and not {"fsdp", "tp", "cp"} & set(names.split()):
        case["parallel.fsdp"] = 2
    if "etp" in names.split() and "ep" in names.split():
        case["parallel.fsdp"] = 2
    if "accumulation" in names:
        parallel = settings({**case, "train.micro_batch_sequences": 1}).parallel
        share = NUM_ROWS // (parallel.dp * parallel.fsdp)
        case["train.micro_batch_sequences"] = share // 4
    return case


def features(config: Config) -> set[str]:
    """Return which dimensions a run has, read off its settings."""
    parallel, moe = config.parallel, config.moe
    found = {name for name in ("dp", "fsdp", "tp", "ep", "cp") if getattr(parallel, name) > 1}
    found |= {"etp"} if parallel.etp > 1 else set()
    found |= {parallel.schedule} if parallel.pp > 1 else set()
    found |= {config.train.recompute} - {"none"}
    found |= {"dropless" if moe.capacity_factor is None else moe.drop}
    share = config.train.global_batch_sequences // (parallel.dp * parallel.fsdp)
    return found | ({"accumulation"} if share > config.train.micro_batch_sequences else set())
