"""The verb train in one process of a run: meet the others, train, and say what became of it."""

from __future__ import annotations

from collections.abc import Callable

from ostro import device
from ostro.config import Config
from ostro.parallel import process
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
    best = outcome.evaluations
    if outcome.last:
        echo(
            f"step {outcome.step}: loss {outcome.last['loss']:.4f}; {outcome.tokens_per_second:,.0f} tokens/s and "
            f"{outcome.mfu:.0%} of the machine's rate, all in all; {peak / 1e9:.1f} GB at most"
        )
    if best.best_loss is not None:
        echo(f"best evaluation: {best.best_loss:.4f} at step {best.best_step}")
    path = outcome.run_dir / "checkpoints" / "best" if outcome.has_best else outcome.run_dir
    echo(f'next: ostro evaluate {path} DATA   ostro generate {path} "PROMPT"')
    if outcome.is_exportable:
        echo(f"      ostro convert {path} DIR --to hf")
