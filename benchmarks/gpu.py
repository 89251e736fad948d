"""The experts of a Mixtral on one GPU, beside a dense product of equal FLOPs and beside other programs' experts.

Contenders take turns in one process; times are medians of single calls, waited for, with their spread. Every contender
is first held against the fp32 oracle at the same dims with fewer tokens, and one that fails is not timed. Backward is
all gradients: rows, weights, routing. It needs torch and `ostro.model`; transformers and ScatterMoE join in if they are
there. The LoRA row, the whole 8x7B in bf16, waits for LoRA itself.

    python benchmarks/gpu.py [--quick] [--cpu] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare GPU machine has Ostro's folder, not its wheel

from ostro import device
from ostro.model import kernels, layout, ops
from ostro.model.attention import ATTENTION
from ostro.model.kernels.grouped import run_ordered_output_weighted
from ostro.model.kernels.order import order_by_expert
from ostro.model.mixtral import Mixtral
from ostro.model.moe import dispatch, dispatch_grouped, dispatch_loop
from ostro.model.routing import Routing, route_softmax
from ostro.model.settings import ModelConfig, MoeConfig
from ostro.model.spans import spans_of

Layer = Callable[[Tensor, Routing, Tensor, Tensor], Tensor]
REAL = ModelConfig()
TINY = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)
BF16_TOLERANCE, FP8_TOLERANCE = 0.02, 0.1  # of the norm of the fp32 result


@dataclasses.dataclass
class Bench:
    """What all measurements share: where, at which size, how often; rows gather here as they are printed."""

    where: torch.device
    config: ModelConfig
    tokens: tuple[int, ...]
    rounds: int
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, part: str, name: str, **values: Any) -> None:
        self.rows.append({"part": part, "name": name, **values})
        print(
            f"{part:28} {name:24} " + "  ".join(f"{key} {_shown(value)}" for key, value in values.items()), flush=True
        )

    def wait(self) -> None:
        if self.where.type != "cpu":
            torch.accelerator.synchronize()

    def start_peak(self) -> int:
        """Forget the peak so far and return what is held now; the cache stays, as it does from step to step."""
        if self.where.type == "cpu":
            return 0
        torch.accelerator.reset_peak_memory_stats()
        return torch.accelerator.memory_allocated()

    def peak_gb(self, held: int = 0) -> float:
        return (device.peak_memory_bytes(self.where) - held) / 1e9

    def release(self) -> None:
        """Give back what is cached, for a part that wants the memory in other pieces."""
        if self.where.type != "cpu":
            torch.accelerator.empty_cache()


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"{min(value):.3f}–{max(value):.3f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def timed(bench: Bench, run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the milliseconds of one call, waited for, and its result."""
    bench.wait()
    start = time.perf_counter()
    result = run()
    bench.wait()
    return (time.perf_counter() - start) * 1e3, result


def measure(
    bench: Bench, part: str, contenders: dict[str, Callable[[], Tensor]], leaves: tuple[Tensor, ...], flops: float
) -> None:
    """Time forward and backward of all contenders in turn, and print each beside the first one.

    The peak is what a call adds to the inputs and weights: activations, results, gradients.
    """
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in contenders}
    peaks: dict[str, float] = {}
    for turn in range(bench.rounds + 2):
        for name, run in contenders.items():
            held = bench.start_peak()
            forward, out = timed(bench, run)
            direction = torch.ones_like(out)
            backward, grads = timed(
                bench, functools.partial(torch.autograd.grad, out, leaves, direction, allow_unused=True)
            )
            peaks[name] = bench.peak_gb(held)
            del out, grads, direction
            if turn >= 2:
                times[name][0].append(forward)
                times[name][1].append(backward)
    first = [statistics.median(each) for each in next(iter(times.values()))]
    for name, (forward, backward) in times.items():
        ahead, back = statistics.median(forward), statistics.median(backward)
        bench.add(
            part, name, forward_ms=ahead, spread=forward, backward_ms=back, backward_spread=backward,
            forward_ratio=ahead / first[0], backward_ratio=back / first[1],
            both_ratio=(ahead + back) / sum(first), tflops=3 * flops / (ahead + back) / 1e9, peak_gb=peaks[name],
        )  # fmt: skip


def experts_inputs(bench: Bench, num_tokens: int, balanced: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    """Return x, a random router's routing or one of equal loads, its weights a leaf, w13 and w2."""
    config, where = bench.config, bench.where
    torch.manual_seed(0)
    num_experts, choices = config.num_local_experts, config.num_experts_per_tok
    x = torch.randn(num_tokens, config.hidden_size, device=where)
    gate = torch.randn(num_experts, config.hidden_size, device=where) * config.hidden_size**-0.5
    routing = route_softmax(x @ gate.t(), choices)
    if balanced:
        each = torch.arange(num_tokens * choices, device=where) % num_experts
        routing = dataclasses.replace(routing, experts_TA=each.view(num_tokens, choices))
    routing = dataclasses.replace(routing, weights_TA=routing.weights_TA.detach().requires_grad_())
    shape = (num_experts, 2, config.intermediate_size, config.hidden_size)
    w13 = torch.empty(shape, device=where, dtype=dtype).normal_(0, 0.02).requires_grad_()
    shape = (num_experts, config.hidden_size, config.intermediate_size)
    w2 = torch.empty(shape, device=where, dtype=dtype).normal_(0, 0.02).requires_grad_()
    return x.to(dtype).requires_grad_(), routing, w13, w2


def output_weighted(x_TD: Tensor, routing: Routing, w13: Tensor, w2: Tensor) -> Tensor:
    """Ours, with the routing weights applied in un-permute."""
    order = order_by_expert(routing.experts_TA, None, len(w2))
    passes = kernels.choose("auto", x_TD.device)
    return run_ordered_output_weighted(x_TD, routing.weights_TA, order, w13, w2, passes)


def transformers_experts(bench: Bench) -> Layer:
    """Transformers' own experts, implementation grouped_mm, on our weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = bench.config
    grouped: dict[str, Any] = {"experts_implementation": "grouped_mm"}
    theirs = MixtralConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_local_experts=config.num_local_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        **grouped,
    )
    with torch.device("meta"):
        experts = MixtralExperts(theirs)

    def run(x_TD: Tensor, routing: Routing, w13: Tensor, w2: Tensor) -> Tensor:
        weights = {"gate_up_proj": w13.flatten(1, 2), "down_proj": w2}
        arguments = (x_TD, routing.experts_TA, routing.weights_TA.to(x_TD.dtype))
        return torch.func.functional_call(experts, weights, arguments)

    return run


def scattermoe_experts(bench: Bench) -> Layer:
    """ScatterMoE's GLUMLP on our weights; it takes up first, gate second."""
    from scattermoe.mlp import GLUMLP  # pyright: ignore[reportMissingImports]

    config = bench.config
    sizes = (config.hidden_size, config.intermediate_size, config.num_local_experts, config.num_experts_per_tok)
    with torch.device("meta"):
        experts = GLUMLP(*sizes, activation=torch.nn.SiLU())

    def run(x_TD: Tensor, routing: Routing, w13: Tensor, w2: Tensor) -> Tensor:
        weights = {"experts.weight": w13.flip(1).flatten(1, 2), "output_experts.weight": w2}
        arguments = (x_TD, routing.weights_TA.to(x_TD.dtype), routing.experts_TA)
        return torch.func.functional_call(experts, weights, arguments)

    return run


def layers(bench: Bench) -> dict[str, tuple[Layer, float]]:
    """Return each contender with the error it may have; who is not installed is told and left out."""
    found: dict[str, tuple[Layer, float]] = {
        "ostro": (dispatch, BF16_TOLERANCE),
        "ostro, torch passes": (
            functools.partial(dispatch_grouped, kernels_named="torch"), BF16_TOLERANCE,
        ),
        "ostro, weighed last": (output_weighted, BF16_TOLERANCE),
        "ostro, fp8": (functools.partial(dispatch_grouped, use_fp8=True), FP8_TOLERANCE),
    }  # fmt: skip
    for name, build in (("transformers grouped_mm", transformers_experts), ("ScatterMoE", scattermoe_experts)):
        try:
            found[name] = (build(bench), BF16_TOLERANCE)
        except ImportError as missing:
            bench.add("experts", name, left_out=f"not installed ({missing.name})")
    return found


def error_of(run: Callable[..., Tensor], exact_run: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> float:
    """Return the largest distance of result and gradients to `exact_run`'s in fp32, over the norm of those."""
    wide = tuple(leaf.detach().float().requires_grad_() for leaf in leaves)
    sides = []
    for each, inputs in ((run, leaves), (exact_run, wide)):
        out = each(*inputs)
        sides.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    return largest_distance(*sides)


def largest_distance(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest `‖found − exact‖ / ‖exact‖`; NaN if any is, which Python's max might overlook."""
    each = [(a.float() - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)]
    return torch.stack(each).max().item()


def layer_error(run: Layer, exact: list[Tensor], inputs: tuple[Any, ...]) -> float:
    """Return the largest distance of output and gradients (x, w13, w2, weights) to the fp32 ones."""
    x, routing, w13, w2 = inputs
    leaves = (x, w13, w2, routing.weights_TA)
    out = run(x, routing, w13, w2)
    found = [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]
    return largest_distance(found, exact)


def checked(bench: Bench, contenders: dict[str, tuple[Layer, float]]) -> dict[str, Layer]:
    """Hold every contender against the fp32 loop over experts; return those that are right."""
    inputs = experts_inputs(bench, min(512, bench.tokens[0]), False, torch.bfloat16)
    wide = [t.detach().float().requires_grad_() for t in (inputs[0], inputs[2], inputs[3])]
    out = dispatch_loop(wide[0], inputs[1], wide[1], wide[2])
    exact = [out, *torch.autograd.grad(out, (*wide, inputs[1].weights_TA), torch.ones_like(out))]
    right: dict[str, Layer] = {}
    for name, (run, tolerance) in contenders.items():
        try:
            largest = layer_error(run, exact, inputs)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as failure:
            # Others may not run on this machine; that ours do not is a wrong result.
            ours = {"right": False} if name.startswith("ostro") else {}
            bench.add("experts, against fp32", name, left_out=str(failure).splitlines()[0][:120], **ours)
            continue
        bench.add("experts, against fp32", name, error=largest, right=largest <= tolerance)
        if largest <= tolerance:
            right[name] = run
    return right


def bench_experts(bench: Bench) -> None:
    """The layer's products and passes, beside one dense product of as many FLOPs."""
    right = checked(bench, layers(bench))
    config = bench.config
    num_rows_per_token, hidden, ffn = config.num_experts_per_tok, config.hidden_size, config.intermediate_size
    for num_tokens in bench.tokens:
        for balanced in (False, True):
            x, routing, w13, w2 = experts_inputs(bench, num_tokens, balanced, torch.bfloat16)
            num_rows = num_tokens * num_rows_per_token
            rows = torch.randn(num_rows, hidden, device=bench.where, dtype=torch.bfloat16, requires_grad=True)
            dense = torch.randn(3 * ffn, hidden, device=bench.where, dtype=torch.bfloat16, requires_grad=True)
            runs: dict[str, Callable[[], Tensor]] = {
                "dense product": functools.partial(torch.nn.functional.linear, rows, dense)
            }
            runs |= {name: functools.partial(run, x, routing, w13, w2) for name, run in right.items()}
            part = f"experts {num_tokens} {'balanced' if balanced else 'real'}"
            measure(bench, part, runs, (x, w13, w2, routing.weights_TA, rows, dense), 6.0 * num_rows * hidden * ffn)


def bench_attention(bench: Bench) -> None:
    """Causal attention of one document: flash attention over lengths (on a GPU) against SDPA."""
    config, where = bench.config, bench.where
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    kinds = ["documents"] if where.type == "cpu" else ["documents", "varlen"]

    def qkv(num_tokens: int) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        options = {"device": where, "dtype": torch.bfloat16, "requires_grad": True}
        return tuple(torch.randn(num_tokens, n, config.head_dim, **options) for n in heads)

    short = min(1024, bench.tokens[0])
    one = {"spans": spans_of([short], device=where), "window": None}
    for kind in kinds:
        error = error_of(
            functools.partial(ATTENTION[kind], **one), functools.partial(ATTENTION["masked"], **one), qkv(short)
        )
        bench.add("attention, against fp32", kind, error=error, right=error <= BF16_TOLERANCE)
    for num_tokens in bench.tokens:
        leaves = qkv(num_tokens)
        spans = spans_of([num_tokens], device=where)
        runs = {kind: functools.partial(ATTENTION[kind], *leaves, spans, None) for kind in kinds}
        flops = 2.0 * num_tokens**2 * config.num_attention_heads * config.head_dim
        measure(bench, f"attention {num_tokens}", runs, leaves, flops)


def whole_cross_entropy(x_TD: Tensor, head_VD: Tensor, labels_T: Tensor, weights_T: Tensor) -> Tensor:
    return ops.cross_entropy(ops.linear(x_TD, head_VD), labels_T, weights_T)


def bench_cross_entropy(bench: Bench) -> None:
    """The loss from hidden states: with whole logits, and chunk by chunk."""
    config, where = bench.config, bench.where
    for num_tokens in bench.tokens:
        torch.manual_seed(0)
        x = torch.randn(num_tokens, config.hidden_size, device=where, dtype=torch.bfloat16)
        head = torch.empty(config.vocab_size, config.hidden_size, device=where, dtype=torch.bfloat16).normal_(0, 0.02)
        labels = torch.randint(config.vocab_size, (num_tokens,), device=where)
        weights = torch.full((num_tokens,), 1 / num_tokens, device=where)
        leaves = (x.requires_grad_(), head.requires_grad_())
        whole = functools.partial(whole_cross_entropy, labels_T=labels, weights_T=weights)
        chunks = functools.partial(ops.linear_cross_entropy, labels_T=labels, weights_T=weights)
        runs = {}
        for name, run in (("whole logits", whole), ("by chunks", chunks)):
            error = error_of(run, whole, leaves)
            bench.add("cross-entropy, against fp32", name, error=error, right=error <= BF16_TOLERANCE)
            runs[name] = functools.partial(run, *leaves)
        flops = 2.0 * num_tokens * config.vocab_size * config.hidden_size
        measure(bench, f"cross-entropy {num_tokens}", runs, leaves, flops)


def train_step(bench: Bench, num_layers: int, num_tokens: int) -> None:
    """Forward, backward, clip and AdamW of a model with fp32 masters.

    Checked is the median token's hidden state: rounding sends a few tokens to other experts, and those may differ.
    """
    config = dataclasses.replace(bench.config, num_hidden_layers=num_layers)
    torch.manual_seed(0)
    with bench.where:
        model = Mixtral(config, MoeConfig(), torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    lengths = [min(4096, num_tokens)] * max(1, num_tokens // 4096)
    tokens = torch.randint(config.vocab_size, (sum(lengths),), device=bench.where)
    spans = spans_of(lengths, balance_scale=1 / len(tokens), device=bench.where)
    weights = torch.full((len(tokens),), 1 / len(tokens), device=bench.where)
    with torch.no_grad():
        hidden = []
        for model.compute_dtype in (torch.float32, torch.bfloat16):
            hidden.append(model(tokens, spans).float())
        error = ((hidden[1] - hidden[0]).norm(dim=1) / hidden[0].norm(dim=1)).median().item()
        del hidden
    bench.add("training step, against fp32", f"{num_layers} layers", error=error, right=error <= 0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        model.loss(tokens, spans, tokens.roll(-1), weights).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    bench.start_peak()
    took = [timed(bench, step)[0] for _ in range(bench.rounds)]
    middle = statistics.median(took)
    flops = layout.training_flops(config, lengths)
    bench.add(
        f"training step {len(tokens)}", f"{num_layers} layers", ms=middle, spread=took,
        tokens_per_second=len(tokens) / middle * 1e3, tflops=flops / middle / 1e9, peak_gb=bench.peak_gb(),
    )  # fmt: skip


def bench_training(bench: Bench) -> None:
    """As many layers of the real size as fit beside their fp32 masters, gradients and two moments, and bf16 copies.

    It runs as `ostro train` does, deterministically; it is the last part, since that stays switched on.
    """
    device.set_deterministic(bench.where)
    one, two = (layout.num_parameters(dataclasses.replace(bench.config, num_hidden_layers=n)) for n in (1, 2))
    room = device.memory_bytes(bench.where) * 0.9 / 18
    fitting = max(1, int((room - (2 * one - two)) // (two - one)))
    most = bench.config.num_hidden_layers if bench.where.type == "cpu" else fitting
    for num_layers in range(most, 0, -1):
        bench.release()
        try:
            train_step(bench, num_layers, bench.tokens[0])
            return
        except torch.OutOfMemoryError:
            bench.add(f"training step {bench.tokens[0]}", f"{num_layers} layers", left_out="does not fit")


PARTS = (bench_experts, bench_attention, bench_cross_entropy, bench_training)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, 4,096 tokens only")
    parser.add_argument("--cpu", action="store_true", help="the same rows at tiny dims on the CPU: a test of this file")
    parser.add_argument("--json", help="also write the rows here")
    options = parser.parse_args()
    where = torch.device("cpu") if options.cpu else device.accelerator()
    if not options.cpu and not device.is_cuda(where):
        print("There is no GPU here: nothing is measured (--cpu runs the same rows at tiny dims).")
        return
    if options.cpu:
        bench = Bench(where, TINY, (64,) if options.quick else (64, 192), 1)
    else:
        bench = Bench(where, REAL, (4096,) if options.quick else (4096, 16384), 5 if options.quick else 20)
    print(f"{device.name(where)}, torch {torch.__version__}, bf16")
    for part in PARTS:
        part(bench)
        bench.release()
    bench.add("LoRA on 8x7B, random, bf16", "ostro", left_out="comes with LoRA")
    wrong = [row for row in bench.rows if not row.get("right", True)]
    print("Every result was right against fp32." if not wrong else f"{len(wrong)} results were wrong against fp32.")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"device": device.name(where), "torch": torch.__version__, "rows": bench.rows}, file, indent=1)
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
