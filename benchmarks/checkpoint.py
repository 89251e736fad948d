"""A training step of two processes while a checkpoint is written, beside one that is not disturbed.

    python benchmarks/checkpoint.py            # 84 M parameters a process, five rounds
    python benchmarks/checkpoint.py --quick    # 25 M, three rounds

Each process has a stack of matrices in fp32 with AdamW, one thread, and shares its gradients over gloo. A round times
steps alone, a save that training waits for, and steps beside a save in a thread, at its own priority and at the step's.
"Copied" is how long the step that asks for the save stands still; the cost is that and what the steps beside it take
longer.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ostro.weights import saver
from ostro.weights.parts import Held
from ostro.weights.reshard import Box
from ostro.weights.saver import Saver

RANKS = 2
WAYS = {"in a thread, nice 10": (True, 10), "in a thread, nice 0": (True, 0), "training waits": (False, 0)}


def build(width: int, layers: int, tokens: int) -> tuple[Callable[[], float], Callable[[], dict[str, Held]]]:
    """Return what does a step and says its seconds, and what gives the rank's weights and optimizer state."""
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x_TD = torch.randn(tokens, width)

    def step() -> float:
        start = time.perf_counter()
        model(x_TD).square().mean().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return time.perf_counter() - start

    def held() -> dict[str, Held]:
        rank = dist.get_rank()
        tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            tensors |= {f"optim.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
        boxes = {n: Box((rank * len(t), 0), tuple(t.shape)) if t.shape else Box((), ()) for n, t in tensors.items()}
        shapes = {n: (RANKS * len(t), width) if t.shape else () for n, t in tensors.items()}
        return {name: Held(tensor, boxes[name], shapes[name]) for name, tensor in tensors.items()}

    return step, held


def work(rank: int, folder: Path, sizes: tuple[int, int, int], rounds: int, steps: int, told: Any) -> None:
    """Be a rank; rank 0 tells what it timed."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=datetime.timedelta(minutes=10))
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    step, held = build(*sizes)
    for _ in range(3):
        step()
    found: dict[str, Any] = {name: {"copied": [], "ratio": [], "cost": [], "save": []} for name in WAYS} | {"alone": []}
    savers = {name: Saver(folder / name, 1, group, asynchronous=way[0]) for name, way in WAYS.items()}
    for writer in savers.values():  # the first makes the plan and the memory for the copies
        writer.save(1, held(), {})
        writer.finish()
    for number in range(2, rounds + 2):
        for name, writer in savers.items():
            before = [step() for _ in range(steps)]
            saver._NICE = WAYS[name][1]
            dist.barrier()
            copied, beside, last, save = save_beside(writer, number, held(), step)
            after = [step() for _ in range(steps)]
            alone = statistics.median(before + after)  # the machine's other work changes: each save has its own measure
            found["alone"] += before + after
            found[name]["copied"].append(copied)
            found[name]["ratio"] += [took / alone for took in beside]
            found[name]["cost"].append(copied + sum(beside) + last - alone * (len(beside) + bool(last)))
            found[name]["save"].append(save)
    if rank == 0:
        told.put(found)
    dist.barrier()
    dist.destroy_process_group()


def save_beside(
    writer: Saver, number: int, held: dict[str, Held], step: Callable[[], float]
) -> tuple[float, list[float], float, float]:
    """Save, stepping until all ranks have ended; return the seconds of the copy, of steps within the save, of the step
    in which it ended, and of the save."""
    start = time.perf_counter()
    writer.save(number, held, {})
    copied = time.perf_counter() - start
    beside: list[float] = []
    last = 0.0
    while not last and writer._thread is not None and any_says(writer._thread.is_alive()):
        took = step()
        if any_says(writer._thread.is_alive()):
            beside.append(took)
        else:
            last = took
    for saved in writer.finish():
        assert saved.error is None, saved.error
    return copied, beside, last, time.perf_counter() - start


def any_says(value: bool) -> bool:
    answer = torch.tensor(int(value))
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return bool(answer)


def spread(values: list[float]) -> str:
    if not values:
        return "—"
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a third of the size, three rounds")
    parser.add_argument("--dir", type=Path, help="where to write; its disk is what is measured")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    sizes, rounds, steps = ((2048, 6, 512), 3, 4) if options.quick else ((2048, 20, 512), 5, 5)
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        arguments = (Path(folder), sizes, rounds, steps, told)
        ranks = [context.Process(target=work, args=(rank, *arguments)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        found = told.get(timeout=3600)
        for process in ranks:
            process.join()
    num_bytes = 12 * sizes[0] ** 2 * sizes[1]
    print(f"{RANKS} processes, {num_bytes / 1e6:,.0f} MB of state each; seconds, medians (range), {rounds} rounds")
    print(f"a step alone: {spread(found['alone'])}\n")
    print("| saving | copied | a step meanwhile, to one alone | the whole save | what it costs the training |")
    print("|---|---|---|---|---|")
    for name in WAYS:
        row = found[name]
        print(f"| {name} | " + " | ".join(spread(row[key]) for key in ("copied", "ratio", "save", "cost")) + " |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
