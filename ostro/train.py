"""The one training loop: pretraining and fine-tuning differ by data and start weights only."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ostro import checks, log, resume
from ostro import device as devices
from ostro.batch import Batch, batch_of, require_known, why_none
from ostro.config import Config
from ostro.data import shards as token_shards
from ostro.data.loader import Loader
from ostro.data.shards import Shards
from ostro.data.tokenizer import Tokenizer, load_tokenizer
from ostro.dataset import open_data, open_loader, settled
from ostro.errors import ConfigError, DataError, Error, TrainError
from ostro.evaluate import evaluate, expert_load
from ostro.machine import keep_freed_memory
from ostro.model import layout, routing
from ostro.model.mixtral import Mixtral
from ostro.optim import build_optimizer, clip_factor, learning_rate, set_learning_rate, state_tensors
from ostro.parallel.apply import World, parallelize
from ostro.parallel.mesh import first_of_host, host_group, open_mesh
from ostro.serve.engine import tokenizer_beside
from ostro.weights import FORMATS, NO_HINTS, dcp, detect, open_reader
from ostro.weights.parts import Held, load_held, load_weights
from ostro.weights.saver import Saved, Saver, every_name
from ostro.weights.saver import newest as newest_of_all
from ostro.weights.store import RandomReader, Reader, architecture_difference


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: its directory, the last step and the last one saved, the last row of metrics, the signal.

    `is_exportable` is False where no format but a training checkpoint can say which router it is.
    """

    run_dir: Path
    step: int
    saved_step: int
    last: dict[str, Any]
    signal: int | None
    is_exportable: bool


@dataclasses.dataclass(eq=False)
class Run:
    """Everything a step needs; `step` counts the updates done, `data` says which tokens they see.

    `saved_step` is that of the newest checkpoint, `not_saved` why there is none, where that ends the run.
    """

    config: Config
    run_dir: Path
    device: torch.device
    tokenizer: Tokenizer
    loader: Loader
    eval_shards: list[Shards]
    world: World
    optimizer: torch.optim.AdamW
    total_steps: int
    data: dict[str, Any]
    saver: Saver
    step: int = 0
    num_tokens: int = 0
    saved_step: int | None = None
    not_saved: Error | None = None

    @property
    def model(self) -> Mixtral:
        """The model, or this rank's first stage of it."""
        return self.world.pipeline.stages[0].model

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def held(self) -> dict[str, Held]:
        """What this rank has of the weights and the optimizer's state."""
        return self.world.held(state_tensors(self.world.parameters(), self.optimizer))


@dataclasses.dataclass(frozen=True)
class StepStats:
    """What one update did: the mean loss in nats per label, the gradient's norm, and summed routing statistics."""

    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    flops: float
    stats_LS: Tensor


def train(config: Config) -> Outcome:
    """Run a recipe to its end, or until SIGTERM or SIGINT, and leave a checkpoint either way.

    A run directory that holds checkpoints is resumed from the newest whole one, to the same bits an undisturbed run
    gives. A loss or gradient that is not finite raises TrainError before anything is updated.
    """
    run = set_up(config)
    try:
        return _loop(run)
    finally:
        run.saver.finish()  # whatever ended the loop does not tear what is being written


def set_up(config: Config) -> Run:
    """Open data, build the model and the optimizer, load weights or the newest checkpoint."""
    if not config.data.path:
        raise ConfigError("data.path is empty: name prepared data or text, as in data.path=corpus.txt.")
    run_dir = Path(config.run.dir)
    device = devices.accelerator()
    checks.check(config, run_dir, device)
    devices.set_deterministic(device)
    torch.manual_seed(config.train.seed)
    tokenizer = load_tokenizer(config.data.tokenizer)
    with first_of_host():  # which prepares what is to be prepared; the others then find it
        loader, shards = open_loader(config, tokenizer)
        eval_shards = open_data(config, config.data.eval_path, tokenizer) if config.data.eval_path else []
    if device.type == "cpu":
        keep_freed_memory()  # not before: preparing data gives back what its encoder had
    world = parallelize(
        config,
        open_mesh(config.parallel.degrees(), device, is_tied=config.model.tie_word_embeddings),
        checks.compute_dtype(config, device),
    )
    run = Run(
        config=config,
        run_dir=run_dir,
        device=device,
        tokenizer=tokenizer,
        loader=loader,
        eval_shards=eval_shards,
        world=world,
        optimizer=build_optimizer(world.parameters(), config.model, config.optim),
        total_steps=_total_steps(config, loader),
        data=resume.data_state(config, tokenizer_sha256=tokenizer.sha256, data_sha256=token_shards.fingerprint(shards)),
        saver=Saver(
            run_dir / "checkpoints", config.checkpoint.keep, host_group(), asynchronous=config.checkpoint.asynchronous
        ),
    )
    _start_or_resume(run)
    if log.is_main_rank():
        _write_run_files(run, settled(config, shards, tokenizer))
    return run


def _start_or_resume(run: Run) -> None:
    config, run_dir = run.config, run.run_dir
    newest = newest_of_all(run.checkpoints, run.saver.group)
    if newest is not None and config.checkpoint.resume == "never":
        raise ConfigError(f"{run_dir} already holds {newest.name} and checkpoint.resume=never: choose another run.dir.")
    if newest is None and config.checkpoint.resume == "must":
        raise ConfigError(f"{run_dir} holds no whole checkpoint to resume from: check run.dir.")
    if newest is not None:
        _resume(run, newest)
    else:
        load_weights(_start_weights(config, run.tokenizer), run.world.held_parameters())


def _start_weights(config: Config, tokenizer: Tokenizer) -> Reader:
    """Open what training starts from, and refuse weights made for another model or another tokenizer."""
    path = config.weights.path
    if path is None:
        return RandomReader(config.model, config.train.seed)
    # Where hosts share no disk each has its own part of a checkpoint, and reads no other.
    is_part = config.parallel.degrees().num_ranks > 1 and "partial" in FORMATS[detect(path)].hints
    hints = dataclasses.replace(NO_HINTS, partial=is_part or None)
    if config.weights.strategy:
        hints = dataclasses.replace(hints, strategy=Path(config.weights.strategy))
    if detect(path).startswith("mindspore"):  # which seldom says its model
        hints = dataclasses.replace(hints, model=dataclasses.replace(config.model, router="softmax"))
    reader = open_reader(path, hints)
    differing = architecture_difference(config.model, reader.model)
    if differing is not None:
        name, ours, theirs = differing
        raise ConfigError(
            f"weights.path={path} has {name}={theirs} and the config says {resume.section(name)}.{name}={ours}: "
            "set model to the folder the weights come from, or to the same values."
        )
    beside = tokenizer_beside(path)
    if beside is not None and beside.sha256 != tokenizer.sha256:
        raise DataError(
            f"weights.path={path} comes with tokenizer {beside.name!r} and data.tokenizer is {tokenizer.name!r}: "
            "set data.tokenizer to the one of the weights and prepare the data with it."
        )
    return reader


def _total_steps(config: Config, loader: Loader) -> int:
    steps = config.train.steps
    if steps < 0:
        steps = int(config.train.epochs * loader.num_rows / config.train.global_batch_sequences)
        if steps < 1:
            raise DataError(
                f"the data make {loader.num_rows} sequences of {config.data.seq_length} tokens, fewer than one batch "
                f"of {config.train.global_batch_sequences}: lower train.global_batch_sequences or data.seq_length."
            )
    profiling = config.profile.range()
    if profiling and not 1 <= profiling[0] <= steps:
        raise ConfigError(f"profile.steps={config.profile.steps} begins outside steps 1..{steps} of this run.")
    return steps


def _write_run_files(run: Run, config: Config) -> None:
    try:
        run.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir={run.run_dir} cannot be made: {error.strerror}.") from None
    log.write_text(run.run_dir / "config.yaml", config.as_yaml())
    from importlib.metadata import version

    names = ("ostro", "torch", "numpy", "tokenizers", "pydantic")
    versions = {name: version(name) for name in names} | {"python": platform.python_version()}
    log.write_text(run.run_dir / "versions.json", json.dumps(versions, indent=1) + "\n")
    if not (run.run_dir / "tokenizer").exists():
        run.tokenizer.save(run.run_dir / "tokenizer.partial")
        (run.run_dir / "tokenizer.partial").rename(run.run_dir / "tokenizer")


def train_step(run: Run) -> StepStats:
    """Do one update: accumulate over micro-batches weighted by valid tokens, clip, and step.

    Every rank of the run does so at the same time; all of them return the same.
    """
    config, world, device = run.config, run.world, run.device
    mesh, train = world.mesh, config.train
    rows = run.loader.rows(run.step, train.global_batch_sequences, mesh.data_rank, mesh.num_data_ranks)
    require_known(rows, config.model.vocab_size, f"step {run.step + 1}")
    counted = rows if world.counts_data else []
    flops = layout.training_flops(config.model, [n for row in counted for n in row.document_lengths])
    totals = [sum(float(row.weights_L.sum()) for row in counted), sum(len(row.tokens_L) for row in counted), flops]
    totals_3 = torch.tensor(totals, dtype=torch.float64, device=device)
    num_labels, num_tokens, flops = world.sum_over_ranks(totals_3).tolist()
    if num_labels == 0:
        raise TrainError(f"step {run.step + 1}: no token of this batch has a label that is learned: {why_none(rows)}.")
    num_stats = routing.num_stats(config.model.num_local_experts)
    stats_LS = torch.zeros(config.model.num_hidden_layers, num_stats, dtype=torch.float64, device=device)
    batches = [
        batch_of(
            rows[first : first + train.micro_batch_sequences],
            device,
            balance_scale=1.0 / num_tokens,
            stats_LS=stats_LS,
            draws_from=_draws_from(run, first, len(rows)) if config.moe.router_jitter_noise else None,
            multiple=world.multiple,
        )
        for first in range(0, len(rows), train.micro_batch_sequences)
    ]
    sums = add_gradients(world, batches, 1.0 / num_labels, stats_LS)
    loss, grad_norm = sums[0].item(), math.sqrt(sums[1].item())
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise TrainError(
            f"step {run.step + 1}: the loss is {loss} and the gradient's norm {grad_norm}; nothing was updated. "
            "Lower optim.learning_rate, or look at this step's data."
        )
    rate = learning_rate(config.optim, run.step, run.total_steps)
    set_learning_rate(run.optimizer, rate)
    update(world, run.optimizer, clip_factor(grad_norm, config.optim.max_grad_norm))
    world.update_biases(stats_LS, config.moe.bias_update_rate)
    run.step += 1
    run.num_tokens += int(num_tokens)
    return StepStats(loss, grad_norm, rate, int(num_tokens), flops, stats_LS)


def add_gradients(world: World, batches: Sequence[Batch], scale: float, stats_LS: Tensor) -> Tensor:
    """Add up a step's gradients; return the loss and the gradient's squared norm of all ranks [2], fp64.

    Statistics, which the batches add to, are summed over the ranks as well. Nothing is waited for.
    """
    part = world.forward_backward(batches, scale)
    sums = torch.stack([part.double(), world.squared_grad_norm()])
    for each in (sums, stats_LS):
        world.sum_over_ranks(each)
    return sums


def update(world: World, optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Update the parameters by their gradients times `factor`, and drop the gradients."""
    world.scale_gradients(factor)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _draws_from(run: Run, first: int, num_rows: int) -> list[int]:
    """Return the numbers jitter is drawn from for a micro-batch of this rank's rows, other seeds far away."""
    train, mesh = run.config.train, run.world.mesh
    count = train.global_batch_sequences
    row = run.step * count + mesh.data_rank * (count // mesh.num_data_ranks) + first
    numbers = range(row, row + min(train.micro_batch_sequences, num_rows - first))
    return [(train.seed * 0x9E3779B97F4A7C15 + number * run.config.data.seq_length) % (1 << 62) for number in numbers]


def _loop(run: Run) -> Outcome:
    config = run.config
    metrics = log.Metrics(run.run_dir, run.step)
    progress = log.Progress(run.total_steps, config.run.log_every)
    rate = devices.peak_flops(run.device, run.model.compute_dtype) * run.world.mesh.degrees.num_ranks
    profiling = config.profile.range()
    profiler = None
    row: dict[str, Any] = {}
    with _Signals() as signals:
        while run.step < run.total_steps and not run.world.any_rank(signals.caught or 0):
            if profiling and profiler is None and log.is_main_rank() and profiling[0] <= run.step + 1 <= profiling[1]:
                profiler = _start_profiler()
            start = time.perf_counter()
            stats = train_step(run)
            row = _metrics_row(run, stats, time.perf_counter() - start, rate)
            if profiler is not None and profiling and run.step >= min(profiling[1], run.total_steps):
                _write_profile(run, profiler)
                profiler = None
            if run.eval_shards and config.train.eval_every and run.step % config.train.eval_every == 0:
                data = config.data
                row |= evaluate(run.world, run.eval_shards, data.seq_length, data.packing, data.pad_token_id).metrics()
            metrics.write(row)
            progress.show(row)
            _settle(run, run.saver.poll(), progress)
            if config.checkpoint.every and run.step % config.checkpoint.every == 0:
                _save(run, progress)
        if profiler is not None:  # stopped inside the range
            _write_profile(run, profiler)
        _settle(run, run.saver.finish(), progress)
        if run.saved_step != run.step:
            _save(run, progress)
            _settle(run, run.saver.finish(), progress)
            _require_saved(run)
    metrics.close()
    is_exportable = config.model.router == "softmax"
    caught = run.world.any_rank(signals.caught or 0) or None  # a signal may have come to another rank
    return Outcome(run.run_dir, run.step, run.saved_step or 0, row, caught, is_exportable)


def _metrics_row(run: Run, stats: StepStats, seconds: float, rate: float) -> dict[str, Any]:
    num_experts = run.config.model.num_local_experts
    means = stats.stats_LS[:, num_experts:].sum(dim=0) / (len(stats.stats_LS) * stats.num_tokens)
    balance, z, entropy, confidence, dropped = means.tolist()
    return {
        "step": run.step,
        "loss": stats.loss,
        "aux_loss": balance,
        "z_loss": z,
        "grad_norm": stats.grad_norm,
        "learning_rate": stats.learning_rate,
        "tokens": run.num_tokens,
        "tokens_per_second": stats.num_tokens / seconds,
        "mfu": stats.flops / seconds / rate,
        "expert_load": expert_load(stats.stats_LS, num_experts),
        "router_entropy": entropy,
        "router_confidence": confidence,
        "drop_rate": dropped / run.config.model.num_experts_per_tok,
        "seconds": seconds,
    }


class _Signals:
    """Between enter and exit, SIGTERM and SIGINT are noted in `caught`; a second one does not tear the save."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: Any) -> None:
        if self.caught is None:
            # Past Python's buffers: a signal may arrive in the middle of a print.
            os.write(2, b"\nstopping after this step, then saving; kill -9 stops without\n")
        self.caught = number

    def __enter__(self) -> _Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: whoever runs us there owns the signals
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _save(run: Run, progress: log.Progress) -> None:
    """Begin a checkpoint of the present step, after the one before has ended; without `async` it ends here."""
    _settle(run, run.saver.finish(), progress)
    _require_saved(run)
    state = resume.state_of(run.config, run.data, step=run.step, num_tokens=run.num_tokens)
    run.saver.save(run.step, run.held(), state)
    if not run.config.checkpoint.asynchronous:
        _settle(run, run.saver.finish(), progress)
        _require_saved(run)


def _settle(run: Run, ended: list[Saved], progress: log.Progress) -> None:
    """Note what was saved. A checkpoint that could not be written costs itself and not the run."""
    for saved in ended:
        if saved.error is None:
            run.saved_step = saved.step
        elif isinstance(saved.error, TrainError) or saved.step == run.total_steps or run.saved_step is None:
            run.not_saved = saved.error
        else:
            progress.newline()
            log.say(f"{saved.error} {dcp.step_folder(run.checkpoints, run.saved_step)} is kept.", style="yellow")


def _require_saved(run: Run) -> None:
    # Only where every rank comes at the same step: a thread's end is seen by one rank sooner than by another.
    if run.not_saved is not None:
        raise run.not_saved


def _resume(run: Run, folder: Path) -> None:
    """Restore step, weights, optimizer and RNG, or say what no longer agrees with the checkpoint."""
    resume.require_same(folder, dcp.read_state(folder), run.config, run.data)
    held = run.held()
    state = load_held(folder, held, every_name(held, run.saver.group))
    resume.restore_rng(state)
    run.step, run.num_tokens, run.saved_step = state["step"], state["num_tokens"], state["step"]
    done = run.step >= run.total_steps
    log.say(
        f"{run.run_dir} is at step {run.step} of {run.total_steps}: there is nothing left to do"
        if done
        else f"resuming {run.run_dir} at step {run.step}"
    )


def _start_profiler() -> Any:
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [a for a in torch.profiler.supported_activities() if a not in activities]
    profiler = torch.profiler.profile(activities=activities, record_shapes=True)
    profiler.start()
    return profiler


def _write_profile(run: Run, profiler: Any) -> None:
    profiler.stop()
    folder = run.run_dir / "profile"
    folder.mkdir(exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30)
    (folder / "slowest.txt").write_text(table + "\n", encoding="utf-8")
    log.say(f"wrote {folder / 'trace.json'} and {folder / 'slowest.txt'}")
