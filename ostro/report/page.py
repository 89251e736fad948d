"""report.html: a run on one page that needs nothing beside itself."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from ostro import log
from ostro.report import charts
from ostro.report.charts import Chart, Curve
from ostro.report.history import LOAD_POINTS, History, mean_load, read_history, stretches

# A curve is drawn in a square of this side, which the page stretches to where it belongs.
_SIDE = 1000
# Above and below an even share; as strong as far from it, so that they lie on a light page and on a dark one.
BUSY, IDLE = (206, 96, 28), (44, 112, 190)


def write_page(run_dir: Path, peak_memory_bytes: int | None = None) -> History:
    """Write report.html and summary.json into a run directory from what it holds so far; return what was read.

    Raises DataError where no step was made.
    """
    history = read_history(run_dir, peak_memory_bytes)
    log.write_text(run_dir / "summary.json", json.dumps(history.summary, indent=1) + "\n")
    log.write_text(run_dir / "report.html", render("run.html", **_content(history)))
    return history


def render(template: str, **content: Any) -> str:
    """Fill a template of this room; whatever is put in is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ostro.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**content)


def heat(load_RC: list[list[float]]) -> str:
    """Return a table of loads, in even shares, as the address of a small PNG: a pixel a cell, made to be enlarged."""
    from PIL import Image  # comes with matplotlib

    load = np.clip(np.asarray(load_RC, dtype=np.float64) - 1, -1, 1)
    pixels = np.where(load[..., None] > 0, BUSY, IDLE)
    alpha = np.round(255 * np.abs(load) ** 0.9)[..., None]
    file = io.BytesIO()
    Image.fromarray(np.concatenate([pixels, alpha], axis=-1).astype(np.uint8), "RGBA").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _content(history: History) -> dict[str, Any]:
    return {
        "name": history.run_dir.resolve().name,
        "facts": _facts(history),
        "tiles": tiles(history.summary),
        "every": history.every,
        "charts": [chart for each in charts.CHARTS if (chart := _chart(each, history))],
        "load": _load(history),
        "samples": _samples(history),
        "spikes": [_spike(row) for row in reversed(history.spikes)],
        "config": history.config,
        "versions": history.versions,
    }


def _facts(history: History) -> list[str]:
    facts, model = [], history.model
    if model:
        facts.append(
            f"{model['num_hidden_layers']} layers of {model['num_local_experts']} experts, "
            f"{model['num_experts_per_tok']} a token"
        )
        facts.append(f"{model['hidden_size']:,} wide")
    seconds = [row["seconds"] for row in history.rows if "seconds" in row]
    if seconds:
        facts.append(f"{log.duration(sum(seconds) / len(seconds) * history.num_rows)} of training")
    facts.append(f"step {history.summary['step']:,}")
    return facts


def tiles(summary: dict[str, Any]) -> list[dict[str, str]]:
    """Return a run's headline numbers as label, value and what is to be known of it."""
    found = [("Loss", charts.number(summary["loss"]), f"best {charts.number(summary['best_loss'])}")]
    if "best_eval_loss" in summary:
        found.append(
            ("Best held out", charts.number(summary["best_eval_loss"]), f"at step {summary['best_eval_step']:,}")
        )
    found.append(("Tokens", charts.count(summary["tokens"]), f"in {summary['step']:,} steps"))
    if "tokens_per_second" in summary:
        found.append(("Tokens a second", f"{summary['tokens_per_second']:,.0f}", "median"))
    if "mfu" in summary:
        found.append(("MFU", charts.share(summary["mfu"]), "of the machine's rate"))
    if "peak_memory_bytes" in summary:
        found.append(("Peak memory", log.size(summary["peak_memory_bytes"]), "of the first rank"))
    return [dict(zip(("label", "value", "note"), tile, strict=True)) for tile in found]


def _chart(chart: Chart, history: History) -> dict[str, Any] | None:
    found = charts.curves(chart, history.rows)
    if not found:
        return None
    low, high = charts.value_range(chart, found)
    first, last = history.rows[0]["tokens"], history.rows[-1]["tokens"]

    def across(tokens: float) -> float:
        return (tokens - first) / ((last - first) or 1)

    def down(value: float) -> float:
        if chart.is_log:
            low_, high_, value = np.log(low), np.log(high), np.log(max(value, low))
            return float(1 - (value - low_) / (high_ - low_))
        return 1 - (value - low) / (high - low)

    return {
        "name": chart.name,
        "title": chart.title,
        "unit": charts.unit(chart, history.model),
        "y_ticks": [(f"{100 * down(y):.2f}", chart.write(y)) for y in charts.y_ticks(chart, low, high)],
        "x_ticks": [(f"{100 * across(x):.2f}", charts.count(x)) for x in charts.ticks(first, last, 5)],
        "curves": [
            {
                "label": curve.series.label,
                "kind": curve.series.kind,
                "now": chart.write(curve.smoothed[-1]),
                "path": _path(curve.tokens, curve.smoothed, across, down),
                "trace": _path(curve.tokens, curve.values, across, down) if curve.series.kind == "line" else "",
                "dots": "".join(
                    f"M{_SIDE * across(x):.0f} {_SIDE * down(y):.0f}h0"
                    for x, y in zip(curve.tokens, curve.values, strict=True)
                    if curve.series.kind == "points"
                ),
            }
            for curve in found
        ],
        "points": _points(chart, found, across, down),
    }


def _path(tokens: list[float], values: list[float], across: Any, down: Any) -> str:
    places = [f"{_SIDE * across(x):.1f} {_SIDE * down(y):.1f}" for x, y in zip(tokens, values, strict=True)]
    return "M" + "L".join(places if len(places) > 1 else places * 2)


def _points(chart: Chart, found: list[Curve], across: Any, down: Any) -> list[list[Any]]:
    """Return what the pointer tells at each stretch: place, height, where, and each curve's value there."""
    main = found[0]
    said = [[f"{main.series.label} {chart.write(value)}"] for value in main.values]
    for curve in found[1:]:
        for tokens, value in zip(curve.tokens, curve.values, strict=True):
            place = next((i for i, end in enumerate(main.tokens) if end >= tokens), len(said) - 1)
            said[place].append(f"{curve.series.label} {chart.write(value)}")
    return [
        [round(across(x), 4), round(down(y), 4), f"step {step:,} · {charts.count(x)} tokens", lines]
        for x, y, step, lines in zip(main.tokens, main.smoothed, main.steps, said, strict=True)
    ]


def _load(history: History) -> dict[str, Any] | None:
    rows = [row for row in history.rows if row.get("expert_load")]
    if not rows:
        return None
    parts = stretches(rows, LOAD_POINTS)
    load_SLE = np.array([mean_load(part) for part in parts])
    moments = sorted({round(i * (len(parts) - 1) / 3) for i in range(4)})
    num_layers, num_experts = load_SLE.shape[1:]
    return {
        "num_layers": num_layers,
        "num_experts": num_experts,
        "layers": [
            {"image": heat(load_SLE[:, i].T.tolist()), "busiest": f"{load_SLE[-1, i].max():.1f}"}
            for i in range(num_layers)
        ],
        "moments": [{"image": heat(load_SLE[i].tolist()), "index": i, "step": parts[i][-1]["step"]} for i in moments],
        "steps": [part[-1]["step"] for part in parts],
        "load_SLE": np.round(load_SLE, 2).tolist(),
    }


def _samples(history: History) -> list[dict[str, Any]]:
    """Return what was written at each step, the last first."""
    steps: dict[int, list[dict[str, Any]]] = {}
    for row in history.samples:
        steps.setdefault(row["step"], []).append(row)
    return [{"step": step, "texts": steps[step]} for step in sorted(steps, reverse=True)]


def _spike(row: dict[str, Any]) -> dict[str, str]:
    return {key: _plain(value) for key, value in row.items()}


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(" ".join(map(str, each)) if isinstance(each, list) else _plain(each) for each in value)
    if isinstance(value, dict):
        return " ".join(f"{key} {_plain(each)}" for key, each in value.items())
    return charts.number(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
