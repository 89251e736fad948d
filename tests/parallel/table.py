"""Runs the whole matrix of layouts and writes its table into docs/parallel.md: `make parity`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from matrix import PRODUCTS, adapted, alone, pairs, whole
from parity import TOLERANCE, difference, settings

DOCS = Path(__file__).parents[2] / "docs" / "parallel.md"
BEGIN, END = "<!-- parity: begin -->\n", "<!-- parity: end -->\n"


def row(group: str, name: str, case: dict[str, Any]) -> tuple[str, bool]:
    """Run a case; return its line of the table, and whether it agrees."""
    start = time.monotonic()
    ranks = settings(whole(case)).parallel.degrees().num_ranks
    try:
        found = difference(whole(case))
    except Exception as error:  # the table names every layout, those that fail first of all
        print(f"{name}: {error}", file=sys.stderr)
        return f"| {group} | {name} | {ranks} | FAILED | | | | |", False
    seconds = time.monotonic() - start
    worst = " | ".join(f"{value:.0e}" for value in found.values())
    is_right = max(found.values()) < TOLERANCE
    print(f"{'ok ' if is_right else 'BAD'} {name} ({seconds:.1f} s)", flush=True)
    return f"| {group} | {name} | {ranks} | {worst} |", is_right


def main() -> None:
    """Run all cases and write the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--write", action="store_true", help="write docs/parallel.md")
    asked = arguments.parse_args()
    start = time.monotonic()
    groups = (("alone", alone()), ("pair", pairs()), ("product", PRODUCTS.items()), ("LoRA", adapted()))
    rows = [row(group, name, case) for group, cases in groups for name, case in cases]
    minutes = (time.monotonic() - start) / 60
    num_wrong = sum(not is_right for _, is_right in rows)
    text = (
        f"{len(rows)} layouts in {minutes:.0f} minutes on two cores, {num_wrong} beyond {TOLERANCE:.0e}.\n\n"
        "| | layout | ranks | loss | aux loss | grad norm | gradients | weights |\n|---|---|---|---|---|---|---|---|\n"
        + "\n".join(line for line, _ in rows)
        + "\n"
    )
    if asked.write:
        before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
        DOCS.write_text(f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(text.partition("\n")[0])
    sys.exit(num_wrong > 0)


if __name__ == "__main__":
    main()
