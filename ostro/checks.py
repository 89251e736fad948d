"""What is certain to fail is refused before anything is loaded: another's folder, missing data, too little memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ostro import device as devices
from ostro import log, trackers
from ostro.config import Config
from ostro.errors import ConfigError, OutOfMemory
from ostro.model import kernels
from ostro.parallel import memory
from ostro.parallel.mesh import num_started


def check(config: Config, run_dir: Path, device: torch.device) -> None:
    """Refuse what is certain to fail later: other ranks than the layout's, another's run directory, no memory."""
    config.parallel.degrees().require_ranks(num_started())
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run.dir={run_dir} is a file: choose a folder.")
    others = [path for path in run_dir.iterdir() if path.name != "logs"] if run_dir.is_dir() else []  # the launcher's
    if others and not (run_dir / "config.yaml").exists():
        raise ConfigError(f"run.dir={run_dir} is not empty and not an earlier run: choose another folder.")
    _check_evaluations(config)
    if config.optim.offload and device.type == "cpu":
        raise ConfigError("optim.offload=true means nothing where the device is a CPU: leave it out.")
    trackers.require(config.run.trackers or ())
    reason = kernels.why_not(config.moe.settings(), config.model, compute_dtype(config, device), device)
    if reason is not None:
        raise ConfigError(reason)
    _check_memory(config, device)


def _check_evaluations(config: Config) -> None:
    """Refuse what waits for evaluations that will not come, and samples where the layout cannot make them."""
    train, parallel = config.train, config.parallel
    if train.eval_every and not config.data.eval_path:
        raise ConfigError(f"train.eval_every={train.eval_every} needs data.eval_path: name the held-out text.")
    waiting = {
        "train.early_stop": train.early_stop,
        "train.samples": train.samples,
        "checkpoint.best": config.checkpoint.best,
    }
    for name, value in waiting.items():
        if value and not train.eval_every:
            raise ConfigError(f"{name}={value} waits for evaluations: set train.eval_every too.")
    if train.samples and (max(parallel.tp, parallel.cp, parallel.pp) > 1 or train.exact):
        raise ConfigError(
            "train.samples are made where a rank has every layer and whole tokens: leave it out with tp, cp, pp or "
            "train.exact, and complete the prompts from a checkpoint with ostro generate."
        )


def _check_memory(config: Config, device: torch.device) -> None:
    """Say what a device will need, and refuse what cannot fit; on a CPU all processes share the machine's memory."""
    dtype = "fp32" if compute_dtype(config, device) == torch.float32 else "bf16"
    known = config.model_copy(update={"train": config.train.model_copy(update={"dtype": dtype})})
    num_ranks, there = config.parallel.degrees().num_ranks, devices.memory_bytes(device)
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks)) if device.type == "cpu" else 1

    def needed(changed: Config) -> float:
        more = changed.parallel.degrees().num_ranks / num_ranks if device.type == "cpu" else 1
        return memory.estimate(changed).total * sharing * more

    found = memory.estimate(known)
    here = f"{devices.name(device)}, {there / 1e9:,.1f} GB" + f" for {sharing} processes" * (sharing > 1)
    copies = 3 * found.parameters * sharing if config.checkpoint.asynchronous and device.type == "cpu" else 0
    log.say(f"needs {found}; there are {here}" + (f"; a checkpoint's copy {copies / 1e9:,.2f} GB" if copies else ""))
    if copies and needed(known) <= there < needed(known) + copies:
        raise OutOfMemory(
            f"this run needs {found}, beside it {copies / 1e9:,.2f} GB for the copy that is being saved, and there are "
            f"{here}: set checkpoint.async=false."
        )
    if needed(known) * (1 - memory.UNCERTAIN) > there:
        helpful = "; ".join(memory.changes(known, lambda changed: needed(changed) <= there)) or "a smaller model"
        raise OutOfMemory(f"this run needs {found} and there are {here}: any one of these would fit: {helpful}.")


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Return the dtype of activations; `auto` is bf16 where the hardware has it and fp32 elsewhere."""
    if config.train.dtype == "auto":
        is_slow = device.type == "cpu" and not devices.bf16_is_fast()
        return torch.float32 if is_slow else torch.bfloat16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.train.dtype]
