"""What a recipe must say though the YAML does not: MindFormers' defaults where Ostro's are others, and what follows."""

from __future__ import annotations

from typing import Any

from ostro.migrate.rules import Given, Leaf, count, is_dropless, number, shards

_LONGEST = 32768  # Mixtral-8x7B's positions


def absent(given: Given, said: set[str], stem: str) -> dict[str, tuple[Any, str]]:
    """Return value and reason of each key that no setting of the YAML says; `stem` names the run."""
    found = _of_model(given)
    if given.get("run_mode", "train") in ("train", "finetune"):
        found |= _of_training(given) | _of_optimizer(given) | _of_layout(given)
        found["run.dir"] = (f"runs/{stem}", "where everything is written")
    return {name: value for name, value in found.items() if name not in said}


def _of_model(given: Given) -> dict[str, tuple[Any, str]]:
    hidden = count(given, "model.model_config.hidden_size", 4096)
    found: dict[str, tuple[Any, str]] = {
        "model.num_key_value_heads": (count(given, "model.model_config.num_heads", 32), "as many as query heads"),
        "model.num_experts_per_tok": (1, "MindFormers' default"),
        "model.rope_theta": (10000.0, "MindFormers' default"),
        "model.initializer_range": (0.01, "MindFormers' default"),
        "model.max_position_embeddings": (
            max(_LONGEST, count(given, "model.model_config.seq_length", 2048)),
            "Mixtral's own",
        ),
    }
    if "model.model_config.intermediate_size" not in given:
        found["model.intermediate_size"] = (_inner_size(given, hidden), "what MindFormers makes of the hidden size")
    return found


def _inner_size(given: Given, hidden: int) -> int:
    multiple = max(1, count(given, "model.model_config.multiple_of", 256))
    factor = given.get("model.model_config.ffn_dim_multiplier")
    wide = 1.0 if factor is None else number(Leaf("model.model_config.ffn_dim_multiplier", factor)) + 0.01
    return multiple * -(-int(2 * int(wide * 4 * hidden) / 3) // multiple)


def _of_training(given: Given) -> dict[str, tuple[Any, str]]:
    batch, data_ranks = count(given, "runner_config.batch_size"), count(given, "parallel_config.data_parallel")
    parts = count(given, "micro_batch_interleave_num")
    if count(given, "parallel_config.pipeline_stage") > 1:
        parts *= count(given, "parallel_config.micro_batch_num")
        words = "batch size · data parallel · micro-batches"
    else:
        parts *= count(given, "runner_config.gradient_accumulation_steps")
        words = "batch size · data parallel · accumulated steps"
    found: dict[str, tuple[Any, str]] = {
        "data.seq_length": (2048, "MindFormers' default"),
        "data.pad_token_id": (0, "MindFormers' default"),
        "train.global_batch_sequences": (batch * data_ranks * parts, words),
        "train.dtype": ("fp16", "MindFormers' default"),
        "train.seed": (1, "MindFormers' default"),
        "moe.capacity_factor": (None if is_dropless(given) else 1.1, "MindFormers' default"),
        "moe.router_aux_loss_coef": (0.0, "there is none there"),
    }
    if not is_dropless(given):
        sequence_parallel = given.get("parallel_config.use_seq_parallel") is True
        multiple = 1 if sequence_parallel else count(given, "parallel_config.model_parallel")
        if given.get("moe_config.comp_comm_parallel") is True:
            multiple *= count(given, "moe_config.comp_comm_parallel_degree", 2)
        found["moe.drop"] = ("choice", "MindFormers' default")
        found["moe.capacity_group"] = ("rank", "as there: padding counts, and what is dropped depends on the layout")
        if multiple > 1:
            found["moe.capacity_multiple"] = (multiple, "as there")
    return found


def _of_optimizer(given: Given) -> dict[str, tuple[Any, str]]:
    eps = 1e-6 if given.get("optimizer.type") == "FP32StateAdamWeightDecay" else 1e-8
    found: dict[str, tuple[Any, str]] = {
        "optim.betas": ([0.9, 0.999], "MindFormers' default"),
        "optim.eps": (eps, "MindFormers' default"),
        "optim.warmup_ratio": (0.0, "MindFormers' default"),
        "optim.min_learning_rate": (0.0, "MindFormers' default"),
        "optim.schedule": ("constant", "there is no schedule"),
    }
    if "runner_wrapper.use_clip_grad" not in given:
        found["optim.max_grad_norm"] = (1e9, "MindFormers' default is not to clip")
    return found


def _of_layout(given: Given) -> dict[str, tuple[Any, str]]:
    degree, tensor = count(given, "parallel_config.data_parallel"), count(given, "parallel_config.model_parallel")
    found: dict[str, tuple[Any, str]] = {}
    if tensor > 1:
        found["parallel.etp"] = (tensor, "the same: there the experts' inner dim is cut, too")
        found["parallel.vocab_emb_dp"] = (True, "MindFormers' default")
    if degree > shards(given) > 1:
        found["parallel.dp"] = (degree // shards(given), "the data ranks that do not share")
    return found
