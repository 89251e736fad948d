"""Dry runs of the shipped layouts, as tables: what a rank holds and sends in one step of the whole model.

    python benchmarks/dry_runs.py --write docs/parallel.md

writes them between the marks in that file. `--quick` takes one layout at a quarter of its layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from ostro import plan
from ostro.config import load_config
from ostro.parallel.counting import CATEGORIES
from ostro.parallel.memory import estimate

LAYOUTS = tuple(f"mixtral-8x7b/pretrain-{name}" for name in ("16", "16-ep8", "32k", "64", "1024"))
BEGIN, END = "<!-- dry runs: written by benchmarks/dry_runs.py -->", "<!-- end of the dry runs -->"


@dataclasses.dataclass(frozen=True)
class Layout:
    """One layout's dry runs, what arithmetic had said of its fullest device, and how long they took together."""

    name: str
    num_ranks: int
    estimated_bytes: int
    runs: list[plan.DryRun]
    seconds: float


def take(name: str, overrides: Sequence[str]) -> Layout:
    """Dry-run a recipe's first and last stage."""
    config = load_config(name, overrides)
    start = time.perf_counter()
    runs = plan.dry_runs(config, plan.end_ranks(config))
    seconds = time.perf_counter() - start
    return Layout(name, config.parallel.degrees().num_ranks, estimate(config).total, runs, seconds)


def markdown(layouts: Sequence[Layout]) -> str:
    """Return the tables of memory and of messages."""
    lines = [
        "GB at the moment at which most is held:",
        "",
        "| recipe | devices | rank (stage) | " + " | ".join(CATEGORIES) + " | all | arithmetic | both took |",
        "|---|---|---|" + "---|" * (len(CATEGORIES) + 3),
    ]
    for layout in layouts:
        for run in layout.runs:
            cells = [f"{run.peak[category] / 1e9:.2f}" for category in CATEGORIES]
            cells += [f"{run.peak_bytes / 1e9:.2f}", f"{layout.estimated_bytes / 1e9:.2f}", f"{layout.seconds:.0f} s"]
            place = f"{run.rank} ({run.stage})"
            lines.append(f"| {layout.name} | {layout.num_ranks:,} | {place} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Messages of the first rank in a step:",
        "",
        "| recipe | collective | group | count | bytes |",
        "|---|---|---|---|---|",
    ]
    for layout in layouts:
        for sent in layout.runs[0].sent:
            size = plan.size(sent.num_bytes)
            lines.append(f"| {layout.name} | {sent.kind} | {sent.group} | {sent.count:,} | {size} |")
    return "\n".join(lines)


def main() -> None:
    """Run the layouts, print the tables, and write them where it is asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one layout with few layers")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--write", type=Path, help="put the tables between the marks in this file")
    options = parser.parse_args()
    names = LAYOUTS[:1] if options.quick else LAYOUTS
    layouts = [take(name, ["model.num_hidden_layers=8"] if options.quick else []) for name in names]
    text = markdown(layouts)
    print(text)
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(layout) for layout in layouts], indent=1) + "\n")
    if options.write:
        before, _, rest = options.write.read_text("utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        options.write.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
