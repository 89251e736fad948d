"""Training steps of two processes beside one with as many threads, layout by layout.

    python benchmarks/parallel.py            # 256 wide, four layers, five rounds
    python benchmarks/parallel.py --quick    # two layers, two rounds

Every contender works on the same global batch with the whole step of `ostro.train`: forward, backward, clipping, AdamW.
One process has two threads, each of two has one; they take turns, and a round times each once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LAYOUTS: dict[str, list[str]] = {
    "one process": [],
    "fsdp 2, ep 2": ["parallel.fsdp=2", "parallel.ep=2"],
    "fsdp 2": ["parallel.fsdp=2"],
    "dp 2": ["parallel.dp=2"],
    "tp 2, etp 2": ["parallel.tp=2", "parallel.etp=2"],
    "cp 2": ["parallel.cp=2"],
    "pp 2, 1f1b": ["parallel.pp=2"],
    "pp 2, zero bubble": ["parallel.pp=2", "parallel.schedule=zero_bubble"],
}
SETTINGS = [
    "model.hidden_size=256",
    "model.intermediate_size=896",
    "model.num_attention_heads=8",
    "model.num_key_value_heads=2",
    "model.max_position_embeddings=1024",
    "data.seq_length=512",
    "train.global_batch_sequences=8",
    "train.micro_batch_sequences=1",
    "train.dtype=fp32",
]
TOKENS = 8 * 512
STEPS = 2  # a round


def worker(rank: int, size: int, words: list[str], store: str, pipe: Connection) -> None:
    """Stand by, and time steps whenever asked."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from ostro import train
    from ostro.config import load_config
    from ostro.data.loader import Row
    from ostro.machine import keep_freed_memory
    from ostro.optim import build_optimizer
    from ostro.parallel.apply import parallelize
    from ostro.parallel.mesh import open_mesh
    from ostro.weights.parts import load_weights
    from ostro.weights.store import RandomReader

    class Rows:
        def rows(self, step: int, count: int, rank: int = 0, num_ranks: int = 1) -> list[Row]:
            draw = np.random.default_rng((step, rank))
            length, share = config.data.seq_length, count // num_ranks
            tokens = draw.integers(3, config.model.vocab_size, (share, length))
            return [Row(t, np.roll(t, -1), np.ones(length, np.float32), (length,)) for t in tokens]

    torch.set_num_threads(2 // size)
    if size > 1:
        dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    config = load_config("tiny", words)
    keep_freed_memory()
    device = torch.device("cpu")
    world = parallelize(config, open_mesh(config.parallel.degrees(), device), torch.float32)
    load_weights(RandomReader(config.model), world.held_parameters())
    optimizer = build_optimizer(world.parameters(), config.model, config.optim)
    rows: Any = Rows()
    nothing: Any = None
    run = train.Run(config, Path(), device, nothing, rows, [], world, optimizer, 1000, {}, nothing)
    train.train_step(run)
    pipe.send("ready")
    while pipe.recv():
        start = time.perf_counter()
        for _ in range(STEPS):
            train.train_step(run)
        pipe.send((time.perf_counter() - start) / STEPS)


class Contender:
    """The processes of a layout, which wait between their turns."""

    def __init__(self, words: list[str], folder: Path) -> None:
        size = 2 if any(word.startswith("parallel.") for word in words) else 1
        spawn = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = spawn.Pipe()
            job = spawn.Process(target=worker, args=(rank, size, words, str(folder / "store"), theirs), daemon=True)
            job.start()
            self.pipes.append(ours)
            self.processes.append(job)
        for pipe in self.pipes:
            pipe.recv()

    def seconds(self) -> float:
        """Time a turn: the slowest process counts."""
        for pipe in self.pipes:
            pipe.send(True)
        return max(pipe.recv() for pipe in self.pipes)

    def end(self) -> None:
        for pipe, job in zip(self.pipes, self.processes, strict=True):
            pipe.send(False)
            job.join()


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--json", type=Path)
    asked = arguments.parse_args()
    rounds, layers = (2, 2) if asked.quick else (5, 4)
    settings = [*SETTINGS, f"model.num_hidden_layers={layers}"]
    with tempfile.TemporaryDirectory() as folder:
        contenders = {}
        for number, (name, words) in enumerate(LAYOUTS.items()):
            place = Path(folder) / str(number)
            place.mkdir()
            contenders[name] = Contender([*settings, *words], place)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, contender in contenders.items():
                times[name].append(contender.seconds())
        for contender in contenders.values():
            contender.end()
    rows = []
    print(f"| {'layout':18} | tokens/s | of one process | spread |\n|---|---|---|---|")
    for name, seconds in times.items():
        rates = [TOKENS / each for each in seconds]
        ratios = [one / each for one, each in zip(times["one process"], seconds, strict=True)]
        row = {"layout": name, "tokens_per_second": statistics.median(rates), "ratio": statistics.median(ratios)}
        rows.append(row | {"lowest": min(ratios), "highest": max(ratios)})
        spread = f"{min(ratios):.2f}–{max(ratios):.2f}"
        print(f"| {name:18} | {row['tokens_per_second']:,.0f} | {row['ratio']:.2f} | {spread} |")
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
