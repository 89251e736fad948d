"""A whole training step on the CPU — forward, backward, clip, AdamW — beside transformers' with the same shapes.

Contenders take turns, each turn a process of its own, so that its peak memory is its own. The rate is `torch.mm` of two
4096³ matrices, measured before and after each turn: on a shared machine it drifts by a quarter within minutes, so a
share of it is taken turn by turn. FLOPs are 6 per active parameter and token (the head included, the embedding not)
plus attention; recomputing counts nothing. Ours computes the balancing loss, transformers' by default does not.

    python benchmarks/train_cpu.py [--quick] [--bf16-anyway] [--json FILE]

Where the CPU has no units for bf16, torch multiplies such matrices some hundred times slower than fp32 ones, and
transformers takes minutes a step: `--bf16-anyway` waits for them, one step each at the smaller size.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

# layers, hidden, ffn, heads, kv heads, sequences, tokens a sequence; vocabulary 32,000, 8 experts, 2 a token
SIZES = {"256 wide": (4, 256, 896, 8, 2, 4, 512), "1024 wide": (4, 1024, 3584, 16, 4, 4, 512)}
CONTENDERS = ("ostro", "transformers eager", "transformers grouped_mm")


def config_of(size: str) -> Any:
    from ostro.model.settings import ModelConfig

    layers, hidden, ffn, heads, kv_heads, *_ = SIZES[size]
    return ModelConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )


def ostro_step(size: str, precision: str) -> Any:
    """Return a function that does one step of ours."""
    import torch

    from ostro.machine import keep_freed_memory
    from ostro.model.mixtral import Mixtral
    from ostro.model.settings import MoeConfig
    from ostro.model.spans import spans_of
    from ostro.optim import build_optimizer
    from ostro.sections import Optim
    from ostro.weights.store import RandomReader, load_into

    keep_freed_memory()
    config = config_of(size)
    *_, sequences, length = SIZES[size]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = Mixtral(config, MoeConfig(), dtype)
    load_into(model, RandomReader(config))
    optimizer = build_optimizer(dict(model.named_parameters()), config, Optim())
    tokens = torch.randint(32000, (sequences * length,))
    weights = torch.ones(len(tokens))

    def step() -> None:
        spans = spans_of([length] * sequences, balance_scale=1 / len(tokens))
        (model.loss(tokens, spans, tokens.roll(-1), weights) / len(tokens)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def transformers_step(size: str, precision: str, experts: str) -> Any:
    """Return a function that does one step of transformers', at its own defaults: no balancing loss."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    fields = config_of(size).as_fields()
    theta = fields.pop("rope_theta")
    *_, sequences, length = SIZES[size]
    model = MixtralForCausalLM(
        MixtralConfig(
            **fields,
            rope_parameters={"rope_theta": theta, "rope_type": "default"},
            attn_implementation="sdpa",
            experts_implementation=experts,
        )
    )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(32000, (sequences, length))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def work(contender: str, size: str, precision: str) -> None:
    """Do a step for each line read, and print its seconds and the process's peak memory in bytes."""
    import torch

    torch.manual_seed(0)
    if contender == "ostro":
        step = ostro_step(size, precision)
    else:
        step = transformers_step(size, precision, contender.split()[1])
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)


def measure(size: str, precision: str, rounds: int, steps: int, warm: int = 1) -> list[dict[str, Any]]:
    """Take `steps` steps of each contender in turn, after `warm` that do not count, and do so `rounds` times.

    Each turn is a process of its own: three models of the larger size with their optimizers do not fit side by side.
    """
    from ostro.model import layout

    *_, sequences, length = SIZES[size]
    flops = layout.training_flops(config_of(size), [length] * sequences)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    shares: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    peak: dict[str, int] = dict.fromkeys(CONTENDERS, 0)
    rates = [rate(precision)]
    for _ in range(rounds):
        for name in CONTENDERS:
            command = [sys.executable, __file__, "--work", name, size, precision]
            done = subprocess.run(command, input="step\n" * (steps + warm), stdout=-1, text=True, check=True)
            lines = [line.split() for line in done.stdout.splitlines()]
            taken = [float(took) for took, _ in lines[warm:]]
            rates.append(rate(precision))
            seconds[name] += taken
            shares[name].append(flops / statistics.median(taken) / statistics.mean(rates[-2:]))
            peak[name] = max(peak[name], int(lines[-1][1]))
    return [
        {
            "size": size,
            "precision": precision,
            "contender": name,
            "tokens_per_second": sequences * length / statistics.median(seconds[name]),
            "seconds": seconds[name],
            "share_of_rate": statistics.median(shares[name]),
            "rates": rates,
            "peak_memory_bytes": peak[name],
        }
        for name in CONTENDERS
    ]


def rate(precision: str) -> float:
    """Return the FLOP/s of a product of two 4096³ matrices (1024³ of bf16 where there are no units), best of three."""
    import torch

    from ostro import device

    size = 1024 if precision == "bf16" and not device.bf16_is_fast() else 4096
    matrix = torch.ones(size, size, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    times = []
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small size, four steps")
    parser.add_argument("--bf16-anyway", action="store_true", help="wait for bf16 on a CPU that has no units for it")
    parser.add_argument("--json", help="also write the rows here")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(*options.work)

    from ostro import device

    rows = []
    print(
        f"{'size':10} {'precision':9} {'contender':24} {'tokens/s':>9} {'spread':>15} {'of the rate':>11} {'memory':>7}"
    )
    for precision in ("fp32", "bf16"):
        is_slow = precision == "bf16" and not device.bf16_is_fast()
        if is_slow and not options.bf16_anyway:
            print("bf16: not measured, this CPU has no units for it")
            continue
        turns = (1, 1, 0) if is_slow else (2, 2) if options.quick else (3, 3)
        for size in list(SIZES)[: 1 if options.quick or is_slow else None]:
            for row in measure(size, precision, *turns):
                took = row["seconds"]
                rows.append(row)
                spread = f"{min(took):.2f}–{max(took):.2f} s"
                print(
                    f"{size:10} {precision:9} {row['contender']:24} {row['tokens_per_second']:9,.1f} {spread:>15} "
                    f"{row['share_of_rate']:11.0%} {row['peak_memory_bytes'] / 1e9:4.1f} GB",
                    flush=True,
                )
            rates = row["rates"]
            print(f"{precision}: torch.mm reached {min(rates) / 1e12:.4f}–{max(rates) / 1e12:.4f} TFLOP/s", flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    return None


if __name__ == "__main__":
    main()
