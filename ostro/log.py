"""What a run tells: lines on the console, one JSON line a step in metrics.jsonl, and trackers.

Only rank 0 speaks. On a terminal progress is one line that renews itself; elsewhere it is plain lines.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ostro import trackers
from ostro.errors import DataError

_PLAIN_SECONDS = 10.0  # between plain lines of a job measured in bytes


def is_main_rank() -> bool:
    """Whether this process is the one that speaks and writes (torchrun's RANK, or the only one)."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str, style: str = "") -> None:
    """Print a line, on rank 0 only; nothing in it is markup, so paths print as they are."""
    if is_main_rank():
        import rich
        from rich.text import Text

        # Unbroken: a path that is cut at the window's edge cannot be copied.
        rich.get_console().print(Text(text, style), soft_wrap=True)


def size(num_bytes: float) -> str:
    """Return a number of bytes as a person reads it."""
    for word, unit in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {word}"
    return f"{num_bytes:.0f} B"


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all: beside its place, then renamed."""
    beside = path.with_name(path.name + ".partial")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def cut_rows(path: Path, step: int) -> None:
    """Cut a file of one JSON object a line back to those of the steps up to `step`, if it is there."""
    if path.exists():
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    rows = []
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # texts may hold other line ends
    for number, line in enumerate(lines, start=1):
        try:
            rows += [json.loads(line)] if line else []
        except ValueError:
            if number < len(lines):
                raise DataError(f"{path} line {number} is not JSON: the file was edited or damaged.") from None
    return rows


class Metrics:
    """metrics.jsonl and the trackers of one run, on rank 0; opening it cuts the file back to the steps up to `step`."""

    def __init__(
        self, run_dir: Path, step: int, names: Sequence[str] | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        self._file: IO[str] | None = None
        self._trackers: list[trackers.Tracker] = []
        if not is_main_rank():
            return
        self.path = run_dir / "metrics.jsonl"
        cut_rows(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")
        self._trackers = trackers.open_trackers(names, trackers.Place(run_dir, step, config or {}))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one step's row; the trackers get it too."""
        if self._file is None:
            return
        # What is not finite, as where a gradient overflows, has no word in JSON.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        for tracker in list(self._trackers):
            try:
                tracker.write(row)
            except Exception as error:  # a service that is away costs its curves, not the run
                self._trackers.remove(tracker)
                say(f"a tracker failed and is left out from here on: {error}", style="yellow")

    def close(self, picture: Path | None = None) -> None:
        """Flush and close everything; `picture` is a PNG of the experts' load, for who keeps pictures."""
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            try:
                tracker.close(picture)
            except Exception as error:
                say(f"a tracker could not be closed: {error}", style="yellow")


class Progress:
    """The progress line: step, loss, learning rate, routing, tokens/s, share of the machine's rate, time left.

    Of the routing it says how busy the busiest expert of any layer is, over an even share, and what part of the
    choices was dropped.
    """

    def __init__(self, total_steps: int, log_every: int) -> None:
        self.total_steps, self.log_every = total_steps, log_every
        self.is_terminal = sys.stdout.isatty()
        self.start = time.monotonic()
        self.done = 0

    def show(self, row: Mapping[str, Any]) -> None:
        """Show one step's row of metrics."""
        if not is_main_rank():
            return
        self.done += 1
        step = row["step"]
        left = (self.total_steps - step) * (time.monotonic() - self.start) / self.done
        text = (
            f"step {step}/{self.total_steps}  loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}  "
            + (f"held out {row['eval_loss']:.4f}  " if "eval_loss" in row else "")
            + _routing(row)
            + f"{row['tokens_per_second']:,.0f} tokens/s  {row['mfu']:.0%} of the machine's rate  {duration(left)} left"
        )
        if self.is_terminal:
            end = "\n" if step == self.total_steps else ""
            print(f"\r\x1b[2K{text}", end=end, flush=True)
        elif step % self.log_every == 0 or step == self.total_steps:
            print(text, flush=True)

    def newline(self) -> None:
        """Leave the renewing line, so that something else can be printed below it."""
        if self.is_terminal and is_main_rank():
            print(flush=True)


def _routing(row: Mapping[str, Any]) -> str:
    loads = row.get("expert_load", ())
    if not loads:
        return ""
    text = f"busiest expert {max(max(layer) * len(layer) for layer in loads):.1f}×  "
    return text + (f"dropped {row['drop_rate']:.1%}  " if row.get("drop_rate") else "")


class ByteProgress:
    """The progress line of a job that is measured in bytes: how much of how much, GB/s, time left."""

    def __init__(self, total_bytes: int | None, verb: str) -> None:
        self._total, self._verb = total_bytes, verb
        self._is_terminal = sys.stdout.isatty()
        self._start = time.monotonic()
        self._shown = self._start if self._is_terminal else self._start + _PLAIN_SECONDS
        self._is_open = False

    def show(self, num_bytes: int) -> None:
        """Show the bytes done so far, a few times a second on a terminal and seldom elsewhere."""
        now = time.monotonic()
        if now < self._shown or not is_main_rank():
            return
        rate = num_bytes / max(now - self._start, 1e-9)
        text = f"{size(num_bytes)} {self._verb}  {size(rate)}/s"
        if self._total is not None and rate:
            left = duration(max(0, self._total - num_bytes) / rate)
            text = f"{size(num_bytes)} of {size(self._total)} {self._verb}  {size(rate)}/s  {left} left"
        self._shown = now + (0.2 if self._is_terminal else _PLAIN_SECONDS)
        self._is_open = self._is_terminal
        print(f"\r\x1b[2K{text}" if self._is_terminal else text, end="" if self._is_terminal else "\n", flush=True)

    def close(self) -> None:
        """Clear the renewing line."""
        if self._is_open:
            print("\r\x1b[2K", end="", flush=True)
        self._is_open = False


def duration(seconds: float) -> str:
    """Return seconds as m:ss or h:mm:ss."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
