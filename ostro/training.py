"""The verb train in one process of a run: meet the others, train, and say what became of it."""

from __future__ import annotations

from collections.abc import Callable

from ostro import device
from ostro.config import Config
from ostro.errors import Error
from ostro.parallel import process
from ostro.report.run import closing_lines, write_report
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
    if outcome.last:
        try:
            memory = device.peak_memory_bytes(device.accelerator())
            history = write_report(outcome.run_dir, memory, least_rows=10)  # fewer make no picture
            echo("\n".join(closing_lines(history)))
        except (Error, OSError) as error:  # the run is whole without it
            echo(f"the report could not be written: {error}")
    if outcome.signal is not None:
        echo(f"stopped at step {outcome.step}; the same command goes on from step {outcome.saved_step}.")
        return
    path = outcome.run_dir / "checkpoints" / "best" if outcome.has_best else outcome.run_dir
    echo(f'next: ostro evaluate {path} DATA   ostro generate {path} "PROMPT"')
    if trained_with(outcome.run_dir) is not None:
        echo(f"      ostro chat {path}")
    if outcome.has_adapter:
        echo(f"      ostro merge-lora BASE {outcome.run_dir} DIR --to hf")
    elif outcome.is_exportable:
        echo(f"      ostro convert {path} DIR --to hf")
