"""A profile of some steps: a trace, and a table of the slowest operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ostro import log


def start() -> Any:
    """Begin to profile, and return what `write` takes."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [a for a in torch.profiler.supported_activities() if a not in activities]
    profiler = torch.profiler.profile(activities=activities, record_shapes=True)
    profiler.start()
    return profiler


def write(run_dir: Path, profiler: Any) -> None:
    """End a profile and write it into the run directory."""
    profiler.stop()
    folder = run_dir / "profile"
    folder.mkdir(exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30)
    (folder / "slowest.txt").write_text(table + "\n", encoding="utf-8")
    log.say(f"wrote {folder / 'trace.json'} and {folder / 'slowest.txt'}")
