"""What a layout will need, before any of it is there: one rank of the real model, taken through one step on paper.

The ranks' process group and the tensors are fake: every operation runs, with shapes and without values. What a rank
holds and sends is counted as in a real run (`parallel.counting`); the tests hold the one against the other.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode  # torch has no public name for these two
from torch.utils._python_dispatch import _disable_current_modes

from ostro import log
from ostro.batch import Batch, batch_of
from ostro.config import Config
from ostro.data.loader import Row
from ostro.errors import LayoutError
from ostro.machine import usable_cores
from ostro.model import ops, routing
from ostro.optim import build_optimizer
from ostro.parallel import memory
from ostro.parallel.apply import mesh_of, parallelize
from ostro.parallel.counting import CATEGORIES, Category, Footprint, Sent, Traffic
from ostro.parallel.mesh import Mesh
from ostro.step import add_gradients, update

ASSUMED = (
    "Assumed: routing is balanced and drops nothing, every row is one document, what is sent has arrived; kernels' own "
    "workspace and what the allocator loses between tensors are not counted."
)


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What one rank holds and sends in one step; everything in bytes.

    `peak` divides the moment at which most is held, `most` is the largest that each category ever is.
    """

    rank: int
    stage: int
    parameters: int
    gradients: int
    optimizer: int
    peak: dict[Category, int]
    most: dict[Category, int]
    sent: tuple[Sent, ...]
    seconds: float

    @property
    def peak_bytes(self) -> int:
        """The most that is held at one time."""
        return sum(self.peak.values())


def end_ranks(config: Config) -> list[int]:
    """Return the first rank of the first pipeline stage, which has most micro-batches in flight, and of the last.

    The last has the head and the loss. All ranks of a stage do the same; the stages between hold less than the first.
    """
    degrees = config.parallel.degrees()
    last = degrees.num_ranks - degrees.num_ranks // degrees.pp
    return [0, last] if last else [0]


def dry_run(config: Config, rank: int, *, as_accelerator: bool = True) -> DryRun:
    """Take one rank of a run through one step, without its memory and without the other ranks.

    Steps are an accelerator's, or with `as_accelerator` False those of a CPU. Raises LayoutError for a layout that does
    not divide, as a run would.
    """
    degrees = config.parallel.degrees()
    if not 0 <= rank < degrees.num_ranks:
        raise LayoutError(f"rank {rank} is not among this layout's ranks 0 to {degrees.num_ranks - 1}.")
    degrees.check(config.model, for_run=True)
    start = time.perf_counter()
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(config.train.dtype, torch.bfloat16)
    with _fake_ranks(rank, degrees.num_ranks):
        mesh = mesh_of(config, torch.device("cpu"))
        with FakeTensorMode(allow_non_fake_inputs=True), ops.without_values(as_accelerator):
            return _one_step(config, mesh, dtype, start)


def _one_step(config: Config, mesh: Mesh, dtype: torch.dtype, start: float) -> DryRun:
    world = parallelize(config.model_copy(update={"train": _uncompiled(config)}), mesh, dtype)
    optimizer = build_optimizer(world.parameters(), config.model, config.optim, places=world.places())
    with Footprint(world, optimizer) as memory, Traffic(mesh) as traffic:
        held = dict(memory.live)
        num_stats = routing.num_stats(config.model.num_local_experts)
        stats_LS = torch.zeros(config.model.num_hidden_layers, num_stats, dtype=torch.float64)
        world.sum_over_ranks(torch.zeros(3, dtype=torch.float64))  # labels, tokens, FLOPs
        add_gradients(world, _batches(config, world.mesh, world.multiple, stats_LS), 1.0, stats_LS)
        gradients = memory.gradients()
        update(world, optimizer, 1.0)
        world.update_biases(stats_LS, config.moe.bias_update_rate)
    return DryRun(
        rank=mesh.rank,
        stage=mesh.pp_rank,
        parameters=held["parameters"],
        gradients=gradients,
        optimizer=held["optimizer"],
        peak=memory.peak,
        most=memory.most,
        sent=tuple(traffic.sent()),
        seconds=time.perf_counter() - start,
    )


def _uncompiled(config: Config) -> Any:
    return config.train.model_copy(update={"compile": False})


def _batches(config: Config, mesh: Mesh, multiple: int, stats_LS: Tensor) -> list[Batch]:
    """Return this rank's micro-batches of a step: shapes of whole rows, each one document."""
    train, length = config.train, config.data.seq_length
    num_rows = train.global_batch_sequences // mesh.num_data_ranks
    row = Row(np.zeros(length, np.int64), np.zeros(length, np.int64), np.ones(length, np.float32), (length,))
    batches = []
    for first in range(0, num_rows, train.micro_batch_sequences):
        count = min(train.micro_batch_sequences, num_rows - first)
        with _real_tensors():
            draws = [0] * count if config.draws else None
            batch = batch_of([row] * count, mesh.device, draws_from=draws, multiple=multiple)
        spans = dataclasses.replace(_shapes(batch.spans), balance_scale=1.0, stats_LS=stats_LS)
        batches.append(dataclasses.replace(_shapes(batch), spans=spans))
    return batches


def _shapes(record: Any) -> Any:
    """Return a dataclass with its tensors replaced by new ones like them."""
    tensors = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return dataclasses.replace(
        record, **{k: torch.empty(t.shape, dtype=t.dtype) for k, t in tensors.items() if isinstance(t, Tensor)}
    )


def _real_tensors() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which tensors have values."""
    return _disable_current_modes()


@contextlib.contextmanager
def _fake_ranks(rank: int, num_ranks: int) -> Iterator[None]:
    """Be one rank of a process group whose other ranks do not exist: what is sent arrives nowhere."""
    if num_ranks == 1:
        yield
        return
    if dist.is_initialized():
        raise LayoutError("a dry run has a process group of its own: run it outside of torchrun, in one process.")
    dist.init_process_group("fake", rank=rank, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def plan(config: Config, ranks: Sequence[int] | None, *, is_dry_run: bool, json_file: Path | None) -> None:
    """Print what a device needs, by arithmetic and, if it is asked for, by a dry run; write it as JSON as well."""
    import rich

    found, num_ranks = memory.estimate(config), config.parallel.degrees().num_ranks
    log.say(f"{num_ranks} devices, {found}")
    told: dict[str, Any] = {"devices": num_ranks, "estimate": dataclasses.asdict(found)}
    if is_dry_run:
        runs = dry_runs(config, ranks or end_ranks(config))
        for table in tables(runs):
            rich.print(table)
        log.say(ASSUMED)
        told |= as_json(runs)
    if json_file is not None:
        log.write_text(json_file, json.dumps(told, indent=1) + "\n")


def dry_runs(config: Config, ranks: Sequence[int]) -> list[DryRun]:
    """Take several ranks through a step, in as many processes."""
    if len(ranks) == 1:
        return [dry_run(config, ranks[0])]
    processes = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(len(ranks), usable_cores()), processes) as pool:
        return list(pool.map(dry_run, [config] * len(ranks), ranks))


def tables(runs: Sequence[DryRun]) -> list[Any]:
    """Return the memory and the messages of dry runs as rich tables, a column a rank."""
    from rich.table import Table

    memory = Table("bytes a rank, at its peak", *[f"rank {r.rank} (stage {r.stage})" for r in runs], title="Memory")
    for category in CATEGORIES:
        memory.add_row(category, *[size(run.peak[category]) for run in runs])
    memory.add_row("all", *[size(run.peak_bytes) for run in runs], style="bold")
    memory.add_section()
    memory.add_row("gradients, reduced", *[size(run.gradients) for run in runs])
    memory.add_row("activations, at most", *[size(run.most["activations"]) for run in runs])
    memory.add_row("this took", *[f"{run.seconds:.0f} s" for run in runs])
    messages = Table("collective", "group", title="Sent by a rank in a step")
    for run in runs:
        messages.add_column(f"rank {run.rank}: count", justify="right")
        messages.add_column("bytes", justify="right")
    for kind, group in sorted({(sent.kind, sent.group) for run in runs for sent in run.sent}):
        cells = []
        for run in runs:
            found = next((sent for sent in run.sent if (sent.kind, sent.group) == (kind, group)), None)
            cells += [f"{found.count:,}", size(found.num_bytes)] if found else ["", ""]
        messages.add_row(kind, group, *cells)
    return [memory, messages]


def size(num_bytes: int) -> str:
    """Return a number of bytes as people read it."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.2f} {unit}"
    return f"{num_bytes} B"


def as_json(runs: Sequence[DryRun]) -> dict[str, Any]:
    """Return dry runs as a JSON object."""
    return {"assumed": ASSUMED, "ranks": [dataclasses.asdict(run) | {"peak_bytes": run.peak_bytes} for run in runs]}
