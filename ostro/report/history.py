"""What a run directory tells of the run: its metrics, thinned out where it was long, and everything beside them."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ostro import log
from ostro.errors import DataError

# Rows of a long run that are read; what is drawn of them are at most `POINTS` stretches.
_ROWS = 4000
POINTS = 480
LOAD_POINTS = 96
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class History:
    """A run as far as it has come.

    `rows` are lines of metrics.jsonl: each `every`-th of the `num_rows`, all with an evaluation, and the last one.
    `summary` is what `headline` makes of them, and the peak memory where it is known. `samples` are written by the
    model while it trained, `spikes` steps that were skipped, newest last.
    """

    run_dir: Path
    rows: list[Row]
    num_rows: int
    every: int
    config: str
    versions: dict[str, str]
    summary: Row
    samples: list[Row]
    spikes: list[Row]

    @functools.cached_property
    def model(self) -> Row:
        """What the config says of the model; empty where the run directory has no config."""
        return (yaml.safe_load(self.config) or {}).get("model", {})


def read_history(run_dir: Path, peak_memory_bytes: int | None = None) -> History:
    """Read a run directory; DataError where no step was made in it or a file of it is damaged.

    `peak_memory_bytes` is kept from the last summary.json where nobody says it.
    """
    file = run_dir / "metrics.jsonl"
    rows, num_rows, every = _read_rows(file)
    if not rows:
        raise DataError(f"{file} has no step to draw: train first.")
    if peak_memory_bytes is None:
        peak_memory_bytes = _read_json(run_dir / "summary.json").get("peak_memory_bytes")
    config = run_dir / "config.yaml"
    return History(
        run_dir=run_dir,
        rows=rows,
        num_rows=num_rows,
        every=every,
        config=config.read_text(encoding="utf-8") if config.exists() else "",
        versions=_read_json(run_dir / "versions.json"),
        summary=headline(rows) | ({"peak_memory_bytes": peak_memory_bytes} if peak_memory_bytes else {}),
        samples=_read_lines(run_dir / "samples.jsonl"),
        spikes=_read_lines(run_dir / "spikes.jsonl"),
    )


def headline(rows: list[Row]) -> Row:
    """Return a run's numbers: loss at the end (mean of its last twentieth) and at best, evaluation, speed.

    Speeds are medians of the second half: the first steps compile, allocate and read for the first time.
    """
    last = rows[-1]
    settled = rows[len(rows) // 2 :]
    evaluations = [row for row in rows if row.get("eval_loss") is not None]
    finite = [row for row in rows if row.get("loss") is not None]
    found = {"step": last["step"], "tokens": last["tokens"]}
    if finite:
        best = min(finite, key=lambda row: row["loss"])
        found["loss"] = statistics.fmean(row["loss"] for row in finite[-max(1, len(finite) // 20) :])
        found |= {"best_loss": best["loss"], "best_loss_step": best["step"]}
    for name in ("tokens_per_second", "mfu"):
        values = [row[name] for row in settled if row.get(name) is not None]
        if values:
            found[name] = statistics.median(values)
    if evaluations:
        best = min(evaluations, key=lambda row: row["eval_loss"])
        found |= {"eval_loss": evaluations[-1]["eval_loss"], "best_eval_loss": best["eval_loss"]}
        found["best_eval_step"] = best["step"]
    return found


def stretches(rows: list[Row], count: int) -> list[list[Row]]:
    """Cut rows into at most `count` stretches of equally many."""
    size = max(1, -(-len(rows) // count))
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def mean_load(rows: list[Row]) -> list[list[float]]:
    """Return each layer's load per expert over some rows, in even shares: 1 is an expert with its fair part."""
    load_LE = np.mean([row["expert_load"] for row in rows], axis=0)
    return (load_LE * load_LE.shape[1]).tolist()


def smooth(values: list[float]) -> list[float]:
    """Return the course of the values: around each, over a twentieth of the run, a median for outliers, then a mean.

    Both look less far at the start, where a loss falls fast.
    """
    windows = [(i - min(len(values) // 40, i), i + min(len(values) // 40, i) + 1) for i in range(len(values))]
    medians = [statistics.median(values[first:end]) for first, end in windows]
    return [statistics.fmean(medians[first:end]) for first, end in windows]


def _read_rows(file: Path) -> tuple[list[Row], int, int]:
    """Return some of the rows, how many there are, and that each so-manieth is read.

    A row of a deep model is kilobytes: parsing all of a long run would take minutes and gigabytes.
    """
    if not file.exists():
        return [], 0, 1
    with file.open("rb") as lines:
        num_rows = sum(1 for _ in lines)
    every = max(1, -(-num_rows // _ROWS))
    if every == 1:
        return log.read_metrics(file), num_rows, every
    rows = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number % every == 1 or number >= num_rows - 1 or b'"eval_loss"' in line:
                rows += _parsed(file, number, line, is_last=number == num_rows)
    return rows, num_rows, every


def _parsed(file: Path, number: int, line: bytes, is_last: bool) -> Iterator[Row]:
    try:
        yield json.loads(line)
    except ValueError:
        if not is_last:  # a kill cuts only the last line short
            raise DataError(f"{file} line {number} is not JSON: the file was edited or damaged.") from None


def _read_lines(file: Path) -> list[Row]:
    return log.read_metrics(file) if file.exists() else []


def _read_json(file: Path) -> Row:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError:
        raise DataError(f"{file} is not JSON: the file was edited or damaged; remove it.") from None
