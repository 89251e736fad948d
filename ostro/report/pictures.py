"""The same as the page's charts, as PNGs; and the demo's picture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ostro.report import charts
from ostro.report.charts import Chart
from ostro.report.history import LOAD_POINTS, History, Row, mean_load, read_history, stretches

INK, FAINT, GRID, LINE, HELD_OUT = "#1d2230", "#8a90a0", "#ecece7", "#2563a8", "#c2571a"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@contextlib.contextmanager
def plotting() -> Iterator[Any]:
    """Give matplotlib's pyplot in Ostro's style, for files only, and close what was opened."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        try:
            yield plt
        finally:
            plt.close("all")


def draw_report(history: History) -> Path:
    """Write each chart of a run, and its expert load, as a PNG into RUN/report; return that folder."""
    folder = history.run_dir / "report"
    folder.mkdir(exist_ok=True)
    with plotting() as plt:
        for chart in charts.CHARTS:
            if charts.curves(chart, history.rows):
                figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
                draw_chart(axes, chart, history.rows)
                axes.set_title(chart.title)
                axes.set_ylabel(charts.unit(chart, history.model))
                figure.savefig(folder / f"{chart.name}.png", dpi=150)
        if any(row.get("expert_load") for row in history.rows):
            _layers(plt, history.rows).savefig(folder / "expert_load.png", dpi=150)
    return folder


def draw_run(run_dir: Path, file: Path, *, references: dict[str, float] | None = None) -> None:
    """Write a PNG: the loss over tokens, and how evenly each layer's experts were loaded over time.

    `references` are losses in nats per token to draw as labelled levels, such as a baseline's.
    """
    rows = read_history(run_dir).rows
    references = references or {}
    with plotting() as plt:
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 2), layout="constrained")
        draw_chart(left, charts.CHARTS[0], rows, levels=list(references.values()))
        for name, loss in references.items():
            left.axhline(loss, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
            above = loss == max(references.values())
            place = {"xytext": (0, 3 if above else -11), "textcoords": "offset points", "ha": "right", "fontsize": 8}
            left.annotate(name, (rows[-1]["tokens"], loss), color=INK, **place)
        left.set_ylabel("loss, nats a token")
        _bands(figure, right, rows)
        figure.savefig(file, dpi=150)


def draw_chart(axes: Any, chart: Chart, rows: list[Row], levels: list[float] | None = None) -> None:
    """Draw a chart's curves over tokens; `levels` are values that must be inside the picture too."""
    found = charts.curves(chart, rows)
    for curve in found:
        if curve.series.kind == "points":
            axes.plot(
                curve.tokens, curve.values, "o-", color=HELD_OUT, ms=4, lw=1.2, label=curve.series.label, zorder=3
            )
            continue
        if curve.series.kind == "line":
            axes.plot(curve.tokens, curve.values, color=LINE, linewidth=0.6, alpha=0.35)
        axes.plot(curve.tokens, curve.smoothed, color=LINE, linewidth=1.6, label=curve.series.label)
    low, high = charts.value_range(chart, found)
    axes.set_yscale("log" if chart.is_log else "linear")
    axes.set_ylim(min([low, *(levels or [])]), max([high, *(levels or [])]))
    _name_ticks(axes.yaxis, charts.y_ticks(chart, low, high), chart.write)
    _name_tokens(axes, rows)
    axes.tick_params(length=0)
    axes.grid(visible=True, axis="y")
    if len(found) > 1:
        axes.legend(frameon=False, loc="upper right")


def _name_tokens(axes: Any, rows: list[Row], most: int = 5) -> None:
    _name_ticks(axes.xaxis, charts.ticks(rows[0]["tokens"], rows[-1]["tokens"], most), charts.count)
    axes.set_xlabel("tokens")


def _name_ticks(axis: Any, values: list[float], write: Any) -> None:
    from matplotlib.ticker import NullLocator

    axis.set_ticks(values, [write(value) for value in values])
    axis.set_minor_locator(NullLocator())


def _over_time(rows: list[Row]) -> np.ndarray:
    """Return the load in even shares [stretches, layers, experts]."""
    return np.array(
        [mean_load(part) for part in stretches([row for row in rows if row.get("expert_load")], LOAD_POINTS)]
    )


def _span(rows: list[Row]) -> tuple[int, int]:
    """Return the tokens that a picture begins and ends with: a single step begins with none."""
    return rows[0]["tokens"] if len(rows) > 1 else 0, rows[-1]["tokens"]


def show_load(axes: Any, load_RC: np.ndarray, **more: Any) -> Any:
    """Draw a table of loads: blue is idle, orange busy, white an even share; return the image, for a colour bar."""
    axes.tick_params(length=0)
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("load", ["#134e94", "#6d9dd2", "#f7f7f4", "#e29a6b", "#b54a0c"])
    return axes.imshow(load_RC, aspect="auto", cmap=colors, vmin=0, vmax=2, interpolation="nearest", **more)


def bar(figure: Any, image: Any, axes: Any) -> None:
    """Draw what the colours of `show_load` mean."""
    figure.colorbar(image, ax=axes, ticks=[0, 1, 2], label="load, 1 is an even share").outline.set_visible(False)


def _bands(figure: Any, axes: Any, rows: list[Row]) -> None:
    # One row a layer and expert, in bands of layers: the eye finds an expert that starves or feasts.
    load_SLE = _over_time(rows)
    _, num_layers, num_experts = load_SLE.shape
    load_RS = load_SLE.reshape(len(load_SLE), -1).T
    image = show_load(axes, load_RS, extent=(*_span(rows), len(load_RS), 0))
    for layer in range(1, num_layers):
        axes.axhline(layer * num_experts, color="white", linewidth=2)
    axes.set_yticks([(layer + 0.5) * num_experts for layer in range(num_layers)], [str(i) for i in range(num_layers)])
    _name_tokens(axes, rows, 4)
    axes.set_ylabel(f"layer, {num_experts} experts each")
    bar(figure, image, axes)


def _layers(plt: Any, rows: list[Row]) -> Any:
    """Draw a small picture a layer: a row an expert, time to the right."""
    load_SLE = _over_time(rows)
    num_layers = load_SLE.shape[1]
    columns = min(num_layers, 8 if num_layers > 8 else 4)
    lines = -(-num_layers // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(10, 1.1 + 1.15 * lines), squeeze=False, layout="constrained", sharex=True, sharey=True
    )
    image = None
    for layer, axes in enumerate(grid.flat):
        if layer >= num_layers:
            axes.axis("off")
            continue
        image = show_load(axes, load_SLE[:, layer].T, extent=(*_span(rows), load_SLE.shape[2], 0))
        axes.set_title(f"layer {layer}", fontsize=8, fontweight="normal", pad=3)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_yticks([])
        _name_ticks(axes.xaxis, charts.ticks(rows[0]["tokens"], rows[-1]["tokens"], 2), charts.count)
    figure.suptitle(
        "Expert load: a row an expert, tokens to the right", x=0.01, ha="left", fontsize=11, fontweight="bold"
    )
    bar(figure, image, grid)
    return figure
