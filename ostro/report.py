"""Pictures of a run, from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ostro import log
from ostro.errors import DataError

_INK, _FAINT, _LINE, _HELD_OUT = "#1f2430", "#8a90a0", "#2563a8", "#c2571a"


def draw_run(run_dir: Path, file: Path, *, references: dict[str, float] | None = None) -> None:
    """Write a PNG: the loss over tokens, and how evenly each layer's experts were loaded over time.

    `references` are losses in nats per token to draw as labelled levels, such as a baseline's.
    """
    rows = log.read_metrics(run_dir / "metrics.jsonl")
    if not rows:
        raise DataError(f"{run_dir / 'metrics.jsonl'} has no step to draw: train first.")
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {
        "font.size": 9,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _FAINT,
        "xtick.color": _FAINT,
        "ytick.color": _FAINT,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with plt.rc_context(style):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 2), layout="constrained")
        _draw_loss(left, rows, references or {})
        _draw_load(figure, right, rows)
        figure.savefig(file, dpi=150)
        plt.close(figure)


def _draw_loss(axes: Any, rows: list[dict[str, Any]], references: dict[str, float]) -> None:
    tokens = [row["tokens"] / 1e3 for row in rows]
    losses = [row["loss"] for row in rows]
    axes.plot(tokens, losses, color=_LINE, linewidth=0.6, alpha=0.35)
    axes.plot(tokens, _smooth(losses), color=_LINE, linewidth=1.6, label="training")
    held_out = [(row["tokens"] / 1e3, row["eval_loss"]) for row in rows if "eval_loss" in row]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color=_HELD_OUT, markersize=4, linewidth=1.2, label="held out")
        axes.legend(frameon=False, loc="upper right")
    for name, loss in references.items():
        axes.axhline(loss, color=_FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
        above = loss == max(references.values())
        place = {"xytext": (0, 3 if above else -11), "textcoords": "offset points", "ha": "right", "fontsize": 8}
        axes.annotate(name, (tokens[-1], loss), color=_INK, **place)
    axes.set_xlabel("thousand tokens")
    axes.set_ylabel("loss, nats a token")


def _draw_load(figure: Any, axes: Any, rows: list[dict[str, Any]]) -> None:
    num_experts = len(rows[0]["expert_load"][0])
    # One row a layer and expert, in bands of layers: the eye finds an expert that starves or feasts.
    columns = [rows[i : i + _stride(rows)] for i in range(0, len(rows), _stride(rows))]
    load = [
        [num_experts * sum(row["expert_load"][layer][e] for row in column) / len(column) for column in columns]
        for layer, e in _cells(rows[0])
    ]
    extent = (rows[0]["tokens"] / 1e3, rows[-1]["tokens"] / 1e3, len(load), 0)
    image = axes.imshow(
        load, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, extent=extent, interpolation="nearest", rasterized=True
    )
    num_layers = len(rows[0]["expert_load"])
    for layer in range(1, num_layers):
        axes.axhline(layer * num_experts, color="white", linewidth=2)
    axes.set_yticks([(layer + 0.5) * num_experts for layer in range(num_layers)], [str(i) for i in range(num_layers)])
    axes.tick_params(length=0)
    axes.set_xlabel("thousand tokens")
    axes.set_ylabel(f"layer, {num_experts} experts each")
    bar = figure.colorbar(image, ax=axes, ticks=[0, 1, 2], label="load, 1 is an even share")
    bar.outline.set_visible(False)


def _smooth(values: list[float]) -> list[float]:
    """Return the mean over the twentieth of the run around each step."""
    reach = len(values) // 40
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _stride(rows: list[dict[str, Any]]) -> int:
    return max(1, len(rows) // 120)


def _cells(row: dict[str, Any]) -> list[tuple[int, int]]:
    return [(layer, expert) for layer, loads in enumerate(row["expert_load"]) for expert in range(len(loads))]
