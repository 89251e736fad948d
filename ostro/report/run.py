"""What a run leaves to look at, written while it trains, at its end, or later from its directory alone."""

from __future__ import annotations

import time
from pathlib import Path

from ostro import log
from ostro.errors import Error
from ostro.report.history import History, read_history
from ostro.report.page import write_page
from ostro.report.pictures import draw_report

_SECONDS = 30  # between pages of a run that goes on


def write_report(run_dir: Path, peak_memory_bytes: int | None = None, *, least_rows: int = 1) -> History:
    """Write report.html, summary.json and, of at least so many rows, report/*.png into a run directory.

    Returns what they show. Raises DataError where no step was made or a file of the run is damaged.
    """
    history = write_page(run_dir, peak_memory_bytes)
    if history.num_rows >= least_rows:
        draw_report(history)
    return history


def refresh_page(run_dir: Path, peak_memory_bytes: int) -> None:
    """Write the page of a run that goes on, on rank 0, unless it was just now; a fault is said and ends nothing."""
    page = run_dir / "report.html"
    if log.is_main_rank() and not (page.exists() and time.time() - page.stat().st_mtime < _SECONDS):
        try:
            write_page(run_dir, peak_memory_bytes)
        except (Error, OSError) as error:
            log.say(f"report.html could not be written: {error}", style="yellow")


def picture_of_load(run_dir: Path) -> Path | None:
    """Write the picture of a run's expert load, on rank 0, and return its file; None where there is nothing to draw."""
    if not log.is_main_rank():
        return None
    try:
        file = draw_report(read_history(run_dir)) / "expert_load.png"
    except (Error, OSError):  # the end of the run says it
        return None
    return file if file.exists() else None


def closing_lines(history: History) -> list[str]:
    """Return a run's end as the console tells it."""
    found = history.summary
    loss = f" loss {found['loss']:.4f}," if "loss" in found else ""
    lines = [f"step {found['step']:,}:{loss} {found['tokens']:,} tokens"]
    if "best_eval_loss" in found:
        best = f"held out {found['best_eval_loss']:.4f} at best, at step {found['best_eval_step']:,}"
        lines.append(best + f", {found['eval_loss']:.4f} at the end")
    speed = f"{found.get('tokens_per_second', 0):,.0f} tokens/s, {found.get('mfu', 0):.0%} of the machine's rate"
    if "peak_memory_bytes" in found:
        speed += f", {log.size(found['peak_memory_bytes'])} of memory at most"
    lines.append(speed)
    return [*lines, f"look at {history.run_dir / 'report.html'}"]
