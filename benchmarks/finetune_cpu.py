"""A fine-tuning step on the CPU, of everything, of LoRA, of LoRA over 4 bits, beside transformers' with peft.

Shapes, precision, AdamW and clipping are the same; LoRA is of rank 16 on attention and experts. Contenders take turns,
each turn a process of its own, so that its memory is its own: the peak, and what of it is above the process before the
model. There is no 4-bit contender: bitsandbytes holds stacked experts in 4 bits, but peft 0.21 cannot train over them.

    python benchmarks/finetune_cpu.py [--quick] [--json FILE]
    python benchmarks/finetune_cpu.py --real-layers     # QLoRA over two layers of 8x7B, beside what a dry run says
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from train_cpu import SIZES, config_of

CONTENDERS = (
    ("full", "ostro"),
    ("full", "transformers eager"),
    ("full", "transformers grouped_mm"),
    ("LoRA", "ostro"),
    ("LoRA", "transformers eager"),
    ("LoRA", "transformers grouped_mm"),
    ("QLoRA", "ostro"),
)
LORA = ["lora.targets=[attention,experts]", "lora.rank=16", "lora.alpha=32"]
KINDS = {"full": [], "LoRA": LORA, "QLoRA": [*LORA, "lora.quantize=nf4"]}
REAL_TOKENS = 512


def config_of_step(kind: str, model: Any, rows: int, length: int, precision: str) -> Any:
    from ostro.config import load_config

    sizes = [f"model.{name}={value}" for name, value in model.as_fields().items() if value is not None]
    return load_config(
        "tiny",
        [
            *(size for size in sizes if not size.startswith("model.max_pos")),
            *KINDS[kind],
            "model.max_position_embeddings=4096",
            f"data.seq_length={length}",
            f"train.global_batch_sequences={rows}",
            f"train.micro_batch_sequences={rows}",
            f"train.dtype={precision}",
        ],
    )


def ostro_step(config: Any) -> Any:
    """Return a function that does one step of ours, as `ostro.step` does it, over random weights."""
    import torch

    from ostro.batch import Batch
    from ostro.machine import keep_freed_memory
    from ostro.model import routing
    from ostro.model.spans import spans_of
    from ostro.optim import build_optimizer, clip_factor
    from ostro.parallel.apply import mesh_of, parallelize
    from ostro.step import add_gradients, update

    keep_freed_memory()
    cpu = torch.device("cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.train.dtype]
    world = parallelize(config, mesh_of(config, cpu), dtype)
    with torch.no_grad():
        for p in world.parameters().values():
            p.normal_(0, 0.02) if p.dim() > 1 else p.fill_(1)
        for kept in world.quantized().values():
            *stack, rows, cols = kept.shape
            for at in torch.cartesian_prod(*map(torch.arange, stack)).view(-1, len(stack)).tolist() if stack else [[]]:
                kept.fill(tuple(at), torch.empty(rows, cols, dtype=dtype).normal_(0, 0.02))
    optimizer = build_optimizer(world.parameters(), config.model, config.optim, places=world.places())
    count, length = config.train.global_batch_sequences, config.data.seq_length
    tokens = torch.randint(32000, (count * length,))
    stats = (config.model.num_hidden_layers, routing.num_stats(config.model.num_local_experts))

    def step() -> None:
        stats_LS = torch.zeros(*stats, dtype=torch.float64)
        spans = spans_of([length] * count, balance_scale=1 / len(tokens), stats_LS=stats_LS)
        batch = Batch(tokens, tokens.roll(-1), torch.ones(len(tokens)), spans)
        sums = add_gradients(world, [batch], 1 / len(tokens), stats_LS)
        update(world, optimizer, clip_factor(sums[1].item() ** 0.5, 1.0))

    return step


def transformers_step(kind: str, model: Any, rows: int, length: int, precision: str, experts: str) -> Any:
    """Return a function that does one step of transformers', with peft where LoRA is trained."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    fields = model.as_fields()
    theta = fields.pop("rope_theta")
    made: Any = MixtralForCausalLM(
        MixtralConfig(
            **fields,
            rope_parameters={"rope_theta": theta, "rope_type": "default"},
            attn_implementation="sdpa",
            experts_implementation=experts,
        )
    )
    if kind == "LoRA":
        from peft import LoraConfig, get_peft_model

        if precision == "bf16":  # frozen weights as ours are: in the dtype that is computed in
            made = made.to(torch.bfloat16)
        made = get_peft_model(
            made,
            LoraConfig(
                r=16,
                lora_alpha=32,
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
                target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            ),
        )
    made.train()
    trained = [p for p in made.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    tokens = torch.randint(32000, (rows, length))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = made(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def work(kind: str, contender: str, size: str, precision: str) -> None:
    """Do a step for each line read, and print its seconds, the peak memory and that before the model, in bytes."""
    import torch

    torch.manual_seed(0)
    if contender == "ostro":
        import ostro.parallel.apply  # noqa: F401
    else:
        import peft  # noqa: F401
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if size == "real":
        step = ostro_step(real_config(precision))
    else:
        *_, rows, length = SIZES[size]
        model = config_of(size)
        if contender == "ostro":
            step = ostro_step(config_of_step(kind, model, rows, length, precision))
        else:
            step = transformers_step(kind, model, rows, length, precision, contender.split()[1])
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, before, flush=True)


def real_config(precision: str) -> Any:
    from ostro.model.settings import ModelConfig

    return config_of_step("QLoRA", ModelConfig(num_hidden_layers=2), 1, REAL_TOKENS, precision)


def turn(kind: str, contender: str, size: str, precision: str, steps: int) -> list[list[float]]:
    """Run one turn: a step that does not count, then `steps` that do."""
    command = [sys.executable, __file__, "--work", kind, contender, size, precision]
    done = subprocess.run(command, input="step\n" * (steps + 1), stdout=-1, text=True, check=True)
    return [[float(each) for each in line.split()] for line in done.stdout.splitlines()][1:]


def measure(size: str, precision: str, rounds: int, steps: int) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], list[list[float]]] = {each: [] for each in CONTENDERS}
    for _ in range(rounds):
        for each in CONTENDERS:
            found[each] += turn(*each, size, precision, steps)
    *_, count, length = SIZES[size]
    rows = []
    for (kind, contender), taken in found.items():
        seconds = [row[0] for row in taken]
        rows.append(
            {
                "size": size,
                "precision": precision,
                "kind": kind,
                "contender": contender,
                "tokens_per_second": count * length / statistics.median(seconds),
                "seconds": seconds,
                "peak_bytes": max(row[1] for row in taken),
                "own_bytes": max(row[1] - row[2] for row in taken),
            }
        )
    for row in rows:
        theirs = [r["tokens_per_second"] for r in rows if r["kind"] == row["kind"] and r["contender"] != "ostro"]
        row["over_theirs"] = row["tokens_per_second"] / max(theirs) if theirs and row["contender"] == "ostro" else None
    return rows


def line(row: dict[str, Any]) -> str:
    took = row["seconds"]
    over = f"{row['over_theirs']:.2f}×" if row["over_theirs"] else ""
    who = f"{row['size']:10} {row['precision']:5} {row['kind']:6} {row['contender']:24}"
    spread = f"{min(took):6.2f}–{max(took):.2f} s"
    memory = f"{row['peak_bytes'] / 1e9:5.2f} GB {row['own_bytes'] / 1e9:5.2f} GB"
    return f"{who} {row['tokens_per_second']:9,.1f} {spread:>15} {memory}  {over}"


def real_layers(precision: str, steps: int) -> dict[str, Any]:
    """Measure QLoRA over two layers of 8x7B, and ask a dry run what it would hold."""
    from ostro.plan import dry_run

    taken = turn("QLoRA", "ostro", "real", precision, steps)
    planned = dry_run(real_config(precision), 0, as_accelerator=False)
    row = {
        "tokens_per_second": REAL_TOKENS / statistics.median(row[0] for row in taken),
        "own_bytes": max(row[1] - row[2] for row in taken),
        "dry_run_bytes": planned.peak_bytes,
        "dry_run_peak": planned.peak,
    }
    print(
        f"QLoRA, two layers of 8x7B, {REAL_TOKENS} tokens, {precision}: {row['tokens_per_second']:.1f} tokens/s, "
        f"{row['own_bytes'] / 1e9:.2f} GB above the process; a dry run says {row['dry_run_bytes'] / 1e9:.2f} GB"
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small size, two steps")
    parser.add_argument("--real-layers", action="store_true", help="QLoRA over two layers of 8x7B alone")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work)
        return
    from ostro import device

    precisions = ("fp32", "bf16") if device.bf16_is_fast() else ("fp32",)
    if options.real_layers:
        rows = [real_layers(precisions[-1], 2)]
    else:
        rows = []
        heads = f"{'contender':24} {'tokens/s':>9} {'spread':>15} {'peak':>8} {'own':>8}  over theirs"
        print(f"{'size':10} {'':5} {'':6} {heads}")
        for precision in precisions:
            for size in list(SIZES)[: 1 if options.quick else None]:
                for row in measure(size, precision, *((1, 2) if options.quick else (2, 3))):
                    rows.append(row)
                    print(line(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
