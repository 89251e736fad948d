"""Which curves a run has, and how numbers are written beside them; the page and the pictures draw the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

from ostro.report.history import POINTS, Row, smooth, stretches


@dataclasses.dataclass(frozen=True)
class Series:
    """One key of a row of metrics; `kind` line is smoothed over its own faint trace, points are few and marked."""

    key: str
    label: str
    kind: Literal["line", "points", "plain"] = "line"


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves on one pair of axes; `write` makes text of a value, `only_if_any` leaves out what was zero all along."""

    name: str
    title: str
    unit: str
    series: tuple[Series, ...]
    write: Callable[[float], str]
    is_log: bool = False
    only_if_any: bool = False
    from_zero: bool = False


@dataclasses.dataclass(frozen=True)
class Curve:
    """A series as it is drawn: last step, tokens and mean of each of its stretches, and the means smoothed."""

    series: Series
    steps: list[int]
    tokens: list[float]
    values: list[float]
    smoothed: list[float]


def number(value: float) -> str:
    """Write a loss or a norm: four digits that say something."""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def rate(value: float) -> str:
    """Write a learning rate."""
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{float(mantissa):.4g}e{int(exponent)}" if value else "0"


def share(value: float) -> str:
    """Write a share in percent."""
    return f"{100 * value:.3g}%"


def count(value: float) -> str:
    """Write a number of tokens: 12.3k, 4.5M."""
    for size, word in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{word}"
    return f"{value:.3g}"


CHARTS = (
    Chart(
        "loss", "Loss", "nats a token", (Series("loss", "training"), Series("eval_loss", "held out", "points")), number
    ),
    Chart(
        "tokens_per_second",
        "Speed",
        "tokens a second",
        (Series("tokens_per_second", "tokens/s"),),
        count,
        from_zero=True,
    ),
    Chart("learning_rate", "Learning rate", "", (Series("learning_rate", "rate", "plain"),), rate, from_zero=True),
    Chart("grad_norm", "Gradient norm", "before clipping", (Series("grad_norm", "norm"),), number, is_log=True),
    Chart("aux_loss", "Balancing loss", "even is {even}", (Series("aux_loss", "balance"),), number),
    Chart("z_loss", "Router z-loss", "mean of the layers", (Series("z_loss", "z-loss"),), number),
    Chart(
        "drop_rate",
        "Dropped choices",
        "share of all",
        (Series("drop_rate", "dropped"),),
        share,
        only_if_any=True,
        from_zero=True,
    ),
)


def curves(chart: Chart, rows: list[Row]) -> list[Curve]:
    """Return the curves of a chart that the rows have something for."""
    return [_curve(series, found) for series in chart.series if (found := _rows_with(chart, series, rows))]


def _rows_with(chart: Chart, series: Series, rows: list[Row]) -> list[Row]:
    found = [row for row in rows if row.get(series.key) is not None]  # what is not finite is null in JSON
    return [] if chart.only_if_any and not any(row[series.key] for row in found) else found


def unit(chart: Chart, model: Row) -> str:
    """Return what a chart's values are counted in; `model` is that section of the config, {} where none is known."""
    if "{even}" not in chart.unit:
        return chart.unit
    return chart.unit.format(even=model["num_experts_per_tok"]) if model else ""


def _curve(series: Series, rows: list[Row]) -> Curve:
    if series.kind == "points":
        parts = [[row] for row in rows]
    else:
        parts = stretches(rows, POINTS)
    values = [sum(row[series.key] for row in part) / len(part) for part in parts]
    smoothed = smooth(values) if series.kind == "line" else values
    return Curve(series, [part[-1]["step"] for part in parts], [part[-1]["tokens"] for part in parts], values, smoothed)


def value_range(chart: Chart, found: list[Curve]) -> tuple[float, float]:
    """Return the lowest and highest value to show; the highest hundredth of a long curve may leave the picture."""
    low = min(min(curve.values) for curve in found)
    high = max(_high(curve) for curve in found)
    if chart.is_log:
        low = max(low, high * 1e-6, 1e-12)
        return low * 0.9, max(high, low) * 1.1
    if chart.from_zero:
        low = min(low, 0.0)
    gap = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if chart.from_zero else low - gap), high + gap


def _high(curve: Curve) -> float:
    ordered = sorted(curve.values)
    return ordered[max(0, math.ceil(0.99 * len(ordered)) - 1)] if len(ordered) >= 100 else ordered[-1]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round values between two, at steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.75 * rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, int(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return round values for a logarithmic axis: 1, 2 and 5 times powers of ten, or powers alone where it is long."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    within = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    whole = [value for value in within if value == 10.0 ** round(math.log10(value))]
    if len(within) > 6 and len(whole) >= 2:
        return whole
    return within if len(within) >= 2 else ticks(low, high, 4)


def y_ticks(chart: Chart, low: float, high: float) -> list[Any]:
    """Return the values that an axis names."""
    return log_ticks(low, high) if chart.is_log else ticks(low, high, 4)
