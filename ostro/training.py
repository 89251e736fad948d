"""The verb train in one process of a run: meet the others, train, and say what became of it."""

from __future__ import annotations

from collections.abc import Callable

from ostro import device
from ostro.config import Config
from ostro.parallel import process
from ostro.serve.chat import trained_with
from ostro.train import Outcome, train


def train_here(config: Config, echo: Callable[[str], object]) -> int | None:
    """Train as the process that the environment says this is; return the signal that ended it, if one did.

    Raises TrainError that names ranks and collective where others do not come.
    """
    me = process.join(device.accelerator())
    try:
        with process.explained(me):
            outcome = train(config)
    finally:
        process.leave()
    if me.rank == 0:
        _say(outcome, echo)
    return outcome.signal


def _say(outcome: Outcome, echo: Callable[[str], object]) -> None:
    if outcome.signal is not None:
        echo(f"stopped at step {outcome.step}; the same command goes on from step {outcome.saved_step}.")
        return
    peak = device.peak_memory_bytes(device.accelerator())
    last = outcome.last
    if last:
        echo(
            f"step {outcome.step}: loss {last['loss']:.4f}, {last['tokens_per_second']:,.0f} tokens/s, "
            f"{last['mfu']:.0%} of the machine's rate, {peak / 1e9:.1f} GB at most"
        )
    echo(f'next: ostro evaluate {outcome.run_dir} DATA   ostro generate {outcome.run_dir} "PROMPT"')
    if trained_with(outcome.run_dir) is not None:
        echo(f"      ostro chat {outcome.run_dir}")
    if outcome.is_exportable:
        echo(f"      ostro convert {outcome.run_dir} DIR --to hf")
