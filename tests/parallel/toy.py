"""A worker that trains nothing in earnest, and a launcher for it: what tests of the launcher start.

    toy.py launch STEPS SECONDS FOLDER -- launcher options as JSON      toy.py work STEPS SECONDS FOLDER

A step adds up a number from every rank; rank 0 then writes step and sum to FOLDER/state.json, whole or not at all, and
a later start goes on from there. `expected` is what an undisturbed run ends with.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def term(rank: int, step: int) -> float:
    """Return what a rank adds in a step; sums of these round, so that a lost or doubled step shows."""
    return 1.0 / (1 + rank + 3 * step)


def expected(num_ranks: int, num_steps: int) -> float:
    """Return the state after `num_steps` steps of `num_ranks` ranks, the sums taken in fp32 like the workers'."""
    import torch

    state = torch.zeros(1)
    for step in range(num_steps):
        total = torch.zeros(1)
        for rank in range(num_ranks):
            total += term(rank, step)
        state = state * 0.9 + total
    return state.item()


def read(folder: Path) -> tuple[int, float]:
    """Return step and state of the newest checkpoint."""
    path = folder / "state.json"
    return tuple(json.loads(path.read_text())) if path.exists() else (0, 0.0)


def work(num_steps: int, step_seconds: float, folder: Path) -> int:
    import torch
    import torch.distributed as dist

    from ostro.errors import DataError, Error
    from ostro.parallel import process

    try:
        me = process.join(torch.device("cpu"))
        with process.explained(me):
            step, value = read(folder)
            state = torch.tensor([value])
            dist.barrier()
            print(f"rank {me.rank} of {me.world_size} goes on from step {step}", flush=True)
            while step < num_steps:
                time.sleep(step_seconds)
                total = torch.tensor([term(me.rank, step)])
                dist.all_reduce(total)
                state = state * 0.9 + total
                step += 1
                if me.rank == 0:
                    (folder / "state.partial").write_text(json.dumps([step, state.item()]))
                    (folder / "state.partial").replace(folder / "state.json")
                if (folder / f"kill{me.rank}-{step}").exists() and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                    os.kill(os.getpid(), 9)
                if (folder / f"fail{me.rank}-{step}").exists():
                    raise DataError(f"rank {me.rank} read something bad.")
        return 0
    except Error as error:
        print(f"ostro: {error}", flush=True)
        return error.exit_code
    finally:
        process.leave()


def launch(arguments: list[str], options: dict) -> int:
    from ostro.errors import Error
    from ostro.parallel.launch import LaunchOptions
    from ostro.parallel.launch import launch as run

    options["log_dir"] = Path(options["log_dir"])
    try:
        return run([sys.executable, __file__, "work", *arguments], LaunchOptions(**options))
    except Error as error:
        print(f"ostro: {error}", flush=True)
        return error.exit_code


if __name__ == "__main__":
    if sys.argv[1] == "work":
        sys.exit(work(int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4])))
    sys.exit(launch(sys.argv[2:5], json.loads(sys.argv[6])))
