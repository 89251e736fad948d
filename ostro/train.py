"""The one training loop: pretraining and fine-tuning differ by data, start weights and LoRA only."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from ostro import checks, log, profiling, resume, samples, spikes
from ostro import device as devices
from ostro.config import Config
from ostro.data import shards as token_shards
from ostro.data.loader import Loader
from ostro.data.tokenizer import Tokenizer, load_tokenizer
from ostro.dataset import open_data, open_loader, settled
from ostro.errors import ConfigError, DataError, Error, TrainError
from ostro.evaluate import evaluate, expert_load
from ostro.interrupts import Signals
from ostro.machine import keep_freed_memory
from ostro.optim import build_optimizer
from ostro.parallel.apply import mesh_of, parallelize
from ostro.parallel.mesh import first_of_host, host_group
from ostro.report.run import picture_of_load, refresh_page
from ostro.serve.load import tokenizer_beside
from ostro.step import Run, StepStats, train_step
from ostro.stopping import Evaluations
from ostro.weights import dcp, lora_run
from ostro.weights.parts import load_held
from ostro.weights.saver import Saved, Saver, every_name
from ostro.weights.saver import newest as newest_of_all
from ostro.weights.store import Reader, architecture_difference


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
    evaluations: Evaluations
    has_best: bool
    has_adapter: bool


def train(config: Config) -> Outcome:
    """Run a recipe to its end, or until SIGTERM or SIGINT, and leave a checkpoint either way.

    A run directory that holds checkpoints is resumed from the newest whole one, to the same bits an undisturbed run
    gives. A loss or gradient that is not finite raises TrainError before anything is updated.
    """
    run = set_up(config)
    try:
        outcome = _loop(run)
    finally:
        run.saver.finish()  # whatever ended the loop does not tear what is being written
    if config.lora is not None and log.is_main_rank():
        _write_adapter(run)
    return outcome


def _write_adapter(run: Run) -> None:
    """Leave what LoRA trained, or the best of it if that is kept, in PEFT's format, too.

    Where hosts share no disk no one of them has all of it.
    """
    try:
        lora_run.export(dcp.best(run.checkpoints) or run.run_dir, run.run_dir / "adapter")
    except (Error, OSError) as error:
        log.say(f"{error} {run.run_dir / 'adapter'} is not written.", style="yellow")


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
    world = parallelize(config, mesh_of(config, device), checks.compute_dtype(config, device))
    run = Run(
        config=config,
        run_dir=run_dir,
        device=device,
        tokenizer=tokenizer,
        loader=loader,
        eval_shards=eval_shards,
        world=world,
        optimizer=build_optimizer(
            world.parameters(), config.model, config.optim, seed=config.train.seed, places=world.places()
        ),
        total_steps=_total_steps(config, loader),
        data=resume.data_state(config, tokenizer_sha256=tokenizer.sha256, data_sha256=token_shards.fingerprint(shards)),
        saver=Saver(
            run_dir / "checkpoints", config.checkpoint.keep, host_group(), asynchronous=config.checkpoint.asynchronous
        ),
        prompts=samples.read_prompts(config.train.samples) if config.train.samples else (),
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
        return
    if config.lora is not None and config.weights.path is None:
        log.say("weights.path is null, so lora corrects random weights: name the model it is for", style="yellow")
    reader = _start_weights(config, run.tokenizer)
    run.world.load(reader)
    run.world.load_fresh_adapter(reader, config.train.seed)


def _start_weights(config: Config, tokenizer: Tokenizer) -> Reader:
    """Open what training starts from, and refuse weights made for another model or another tokenizer."""
    path = config.weights.path
    # Where hosts share no disk each has its own part of a checkpoint, and reads no other.
    reader = resume.start_of(config).open(is_part=config.parallel.degrees().num_ranks > 1)
    if path is None:
        return reader
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
    for name in (spikes.FILE, samples.FILE):
        log.cut_rows(run.run_dir / name, run.step)


def _loop(run: Run) -> Outcome:
    config = run.config
    metrics = log.Metrics(run.run_dir, run.step, config.run.trackers, config.model_dump(mode="json"))
    progress = log.Progress(run.total_steps, config.run.log_every)
    rate = devices.peak_flops(run.device, run.model.compute_dtype) * run.world.mesh.degrees.num_ranks
    profiling_range = config.profile.range()
    profiler = None
    row: dict[str, Any] = {}
    with Signals() as signals:
        while not _is_over(run) and not run.world.any_rank(signals.caught or 0):
            first, last = profiling_range or (0, -1)
            if profiler is None and log.is_main_rank() and first <= run.step + 1 <= last:
                profiler = profiling.start()
            start = time.perf_counter()
            stats = train_step(run)
            row = _metrics_row(run, stats, time.perf_counter() - start, rate)
            if profiler is not None and run.step >= min(last, run.total_steps):
                profiling.write(run.run_dir, profiler)
                profiler = None
            if run.eval_shards and config.train.eval_every and run.step % config.train.eval_every == 0:
                row |= _evaluate(run)
            metrics.write(row)
            progress.show(row)
            _settle(run, run.saver.poll(), progress)
            is_best = config.checkpoint.best and run.evaluations.best_step == run.step
            is_due = is_best or (bool(config.checkpoint.every) and run.step % config.checkpoint.every == 0)
            if is_due:
                _save(run, progress, is_best)
            if is_due or "eval_loss" in row:
                refresh_page(run.run_dir, devices.peak_memory_bytes(run.device))
        if profiler is not None:  # stopped inside the range
            profiling.write(run.run_dir, profiler)
        _settle(run, run.saver.finish(), progress)
        if run.saved_step != run.step:
            _save(run, progress)
            _settle(run, run.saver.finish(), progress)
            _require_saved(run)
    metrics.close(picture_of_load(run.run_dir) if config.run.trackers else None)
    return Outcome(
        run.run_dir,
        run.step,
        run.saved_step or 0,
        row,
        run.world.any_rank(signals.caught or 0) or None,  # a signal may have come to another rank
        config.model.router == "softmax",
        run.evaluations,
        dcp.best(run.checkpoints) is not None,
        config.lora is not None,
    )


def _is_over(run: Run) -> bool:
    return run.step >= run.total_steps or run.evaluations.is_over(run.config.train.early_stop)


def _evaluate(run: Run) -> dict[str, float]:
    """Score the held-out text, complete the prompts, and return what a row of metrics says of it."""
    data, train = run.config.data, run.config.train
    found = evaluate(run.world, run.eval_shards, data.seq_length, data.packing, data.pad_token_id)
    run.evaluations = run.evaluations.after(found.loss, run.step)
    if run.prompts:
        texts = samples.complete(run.world, run.tokenizer, run.prompts, train.sample_tokens)
        samples.write(run.run_dir, run.step, run.prompts, texts)
    return found.metrics()


def _metrics_row(run: Run, stats: StepStats, seconds: float, rate: float) -> dict[str, Any]:
    num_experts = run.config.model.num_local_experts
    means = stats.stats_LS[:, num_experts:].sum(dim=0) / (len(stats.stats_LS) * stats.num_tokens)
    balance, z, entropy, confidence, dropped = means.tolist()
    scaling = {"loss_scale": stats.loss_scale, "overflow": stats.skipped == "overflow"} if run.scales_loss else {}
    spike = {"skipped": True} if stats.skipped == "spike" else {}
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
        **scaling,
        **spike,
    }


def _save(run: Run, progress: log.Progress, is_best: bool = False) -> None:
    """Begin a checkpoint of the present step, after the one before has ended; without `async` it ends here."""
    _settle(run, run.saver.finish(), progress)
    _require_saved(run)
    state = resume.state_of(run.config, run.data, step=run.step, num_tokens=run.num_tokens, loop=run.remembered())
    run.saver.save(run.step, run.held(), state, is_best=is_best)
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
    if run.config.lora is not None:  # whose checkpoints hold the adapter alone
        run.world.load(_start_weights(run.config, run.tokenizer))
    held = run.held()
    state = load_held(folder, held, every_name(held, run.saver.group))
    resume.restore_rng(state)
    run.step, run.num_tokens, run.saved_step = state["step"], state["num_tokens"], state["step"]
    run.remember(state.get("loop", {}))
    done = _is_over(run)
    log.say(
        f"{run.run_dir} is at step {run.step} of {run.total_steps}: there is nothing left to do"
        if done
        else f"resuming {run.run_dir} at step {run.step}"
    )
