"""Small plots as inline SVG. Colours are classes (`line`, `thin`, `dot`, `whisker`, `rule`, `grid`) of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 300, 170
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 26

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A point with its interval; a browser shows `label` when the mouse is over it."""

    x: float
    mean: float
    low: float
    high: float
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The rectangle of a plot in data units."""

    x: tuple[float, float]
    y: tuple[float, float]

    def px(self, x: float) -> float:
        """Convert to pixels from the left."""
        return LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def py(self, y: float) -> float:
        """Convert to pixels from the top."""
        return HEIGHT - BOTTOM - (y - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)


def estimates_plot(estimates: Sequence[Estimate], *, x_ticks: Sequence[tuple[float, str]], name: str) -> str:
    """Plot estimates in [0, 1] with their intervals, joined by a line."""
    last = max((tick for tick, _ in x_ticks), default=1.0)
    axes = Axes(x=(0.5, max(last, 1.0) + 0.5), y=(0.0, 1.0))
    parts = [_frame(axes, x_ticks, [(v, f"{v:g}") for v in (0, 0.25, 0.5, 0.75, 1)])]
    parts.append(_line(axes, [(e.x, e.mean) for e in estimates], "line"))
    for e in estimates:
        x = axes.px(e.x)
        parts.append(f'<path class="whisker" d="M{x:.1f} {axes.py(e.low):.1f}V{axes.py(e.high):.1f}"/>')
        parts.append(_dot(x, axes.py(e.mean), e.label))
    return _svg(parts, name)


def curves_plot(curves: Sequence[Points], mean: Points, *, x_label: str, name: str) -> str:
    """Plot thin curves and their mean, with x in [0, 1]."""
    values = [y for curve in curves for _, y in curve]
    low, high = nice_range(min(values), max(values))
    axes = Axes(x=(0.0, 1.0), y=(low, high))
    ticks = [(0.0, "start"), (0.5, x_label), (1.0, "end")]
    parts = [_frame(axes, ticks, [(v, f"{v:.3g}") for v in (low, (low + high) / 2, high)])]
    parts += [_line(axes, curve, "thin") for curve in curves]
    parts.append(_line(axes, mean, "line"))
    return _svg(parts, name)


def strip_plot(rows: Sequence[tuple[str, Sequence[tuple[float, str]]]], *, rules: Sequence[float], name: str) -> str:
    """Plot labelled values in a column for each row of the input, with horizontal rules, the first of them labelled."""
    values = [value for _, row in rows for value, _ in row] + list(rules)
    low, high = nice_range(min(0.0, *values), max(values))
    axes = Axes(x=(0.5, len(rows) + 0.5), y=(low, high))
    y_ticks = sorted({low, high, *rules[:1]})
    x_ticks = [(float(i), label) for i, (label, _) in enumerate(rows, start=1)]
    parts = [_frame(axes, x_ticks, [(v, f"{v:.3g}") for v in y_ticks])]
    parts += [f'<path class="rule" d="M{LEFT} {axes.py(rule):.1f}H{WIDTH - RIGHT}"/>' for rule in rules]
    for column, (_, row) in enumerate(rows, start=1):
        for index, (value, label) in enumerate(row):
            spread = (index % 9 - min(4, len(row) // 2)) * 0.05
            parts.append(_dot(axes.px(column + spread), axes.py(value), label))
    return _svg(parts, name)


def interval_bar(mean: float, low: float, high: float) -> str:
    """Draw a share in [0, 1] and its interval, as wide as a table cell."""
    width, middle = 120, 7
    return (
        f'<svg class="bar" viewBox="0 0 {width} 14" width="{width}" height="14" role="img" '
        f'aria-label="{mean:.3f}, from {low:.3f} to {high:.3f}"><path class="grid" d="M0 {middle}H{width}"/>'
        f'<path class="band" d="M{low * width:.1f} {middle}H{max(high, low + 0.01) * width:.1f}"/>'
        f'<circle class="dot" cx="{min(max(mean * width, 3), width - 3):.1f}" cy="{middle}" r="3"/></svg>'
    )


def nice_range(low: float, high: float) -> tuple[float, float]:
    """Round a range outwards, so that its ends make good axis labels."""
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    step = 10 ** math.floor(math.log10(high - low))
    for part in (0.1, 0.2, 0.5, 1):
        if (high - low) / (step * part) <= 12:
            step *= part
            break
    return math.floor(low / step) * step, math.ceil(high / step) * step


def _frame(axes: Axes, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]]) -> str:
    """Draw the grid and the labels; labels that would touch are thinned out."""
    parts = []
    for value, label in y_ticks:
        y = axes.py(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{escape(label)}</text>')
    every = max(1, math.ceil(sum(len(label) * 6 + 8 for _, label in x_ticks) / (WIDTH - LEFT - RIGHT)))
    for value, label in list(x_ticks)[::every]:
        anchor = "start" if value == axes.x[0] else "end" if value == axes.x[1] else "middle"
        parts.append(f'<text x="{axes.px(value):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{escape(label)}</text>')
    return "".join(parts)


def _line(axes: Axes, points: Points, css: str) -> str:
    path = "L".join(f"{axes.px(x):.1f} {axes.py(y):.1f}" for x, y in points)
    return f'<path class="{css}" d="M{path}"/>' if path else ""


def _dot(x: float, y: float, label: str) -> str:
    return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escape(label)}</title></circle>'


def _svg(parts: Sequence[str], name: str) -> str:
    label = f'role="img" aria-label="{escape(name, quote=True)}"'
    return f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" {label}>{"".join(parts)}</svg>'
