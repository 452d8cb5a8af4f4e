"""Line charts as SVG text: colours come from the page's style sheet, so they follow its theme."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup, escape

from sl_jax.eval._format import number

_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 10, 34
_MAX_POINTS = 400  # more than one point a pixel only makes the page heavy
_COLOURS = 6


@dataclass(frozen=True)
class Series:
    """One line: y over x, with an optional band from low to high; nan or None leaves a gap."""

    name: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()

    def __post_init__(self) -> None:
        lengths = {len(self.x), len(self.y)} | {len(v) for v in (self.low, self.high) if len(v)}
        if len(lengths) > 1 or bool(len(self.low)) != bool(len(self.high)):
            raise ValueError(
                f"series {self.name!r}: x, y and (both or neither) low and high need one length"
            )


@dataclass(frozen=True)
class Curve:
    """One chart: its series share the axes."""

    title: str
    series: tuple[Series, ...]
    x_label: str = "epoch"
    y_label: str = ""
    note: str = ""


class _Axes(NamedTuple):
    """The data ranges that the plot area shows."""

    x0: float
    x1: float
    y0: float
    y1: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x0) / (self.x1 - self.x0)
        up = (y - self.y0) / (self.y1 - self.y0)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )


def line_chart(curve: Curve) -> Markup:
    """The chart as one `<svg>` element; its data ride along for the page's read-out.

    Series i has the classes `series c<i mod 6>`. A curve without any finite value gives an empty
    plot that says so.
    """
    series = [_thinned(line) for line in curve.series]
    axes = _axes(series)
    label = escape(f"{curve.title}: {', '.join(line.name for line in series)}")
    head = (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}" '
        f'data-chart="{escape(_data(series, axes))}">'
    )
    if axes is None:
        middle = f'<text x="{_WIDTH / 2}" y="{_HEIGHT / 2}" class="mid">nothing measured yet</text>'
        return Markup(f"{head}{middle}</svg>")
    parts = [head, *_grid(axes, curve.x_label)]
    parts += [_band(line, axes, index) for index, line in enumerate(series)]
    parts += [_line(line, axes, index) for index, line in enumerate(series)]
    parts += [f'<line class="cursor" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>', "</svg>"]
    return Markup("".join(parts))


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _axes(series: Sequence[Series]) -> _Axes | None:
    xs = [float(x) for line in series for x, y in zip(line.x, line.y, strict=True) if _finite(x, y)]
    ys = [float(y) for line in series for y in (*line.y, *line.low, *line.high) if _finite(y)]
    if not xs:
        return None
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))
    if x0 == x1:
        x0, x1 = x0 - 0.5, x1 + 0.5
    margin = 0.06 * (y1 - y0) or 0.1 * abs(y1) or 0.5
    return _Axes(x0, x1, y0 - margin, y1 + margin)


def _grid(axes: _Axes, x_label: str) -> list[str]:
    parts = []
    bottom = _HEIGHT - _BOTTOM
    for tick in nice_ticks(axes.y0, axes.y1, 6):
        _, y = axes.place(axes.x0, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" {_at(y, "y")}/>')
        parts.append(f'<text class="end" x="{_LEFT - 6}" y="{y + 4:.1f}">{_tick(tick)}</text>')
    for tick in filter(_whole, nice_ticks(axes.x0, axes.x1)):  # epochs, updates
        x, _ = axes.place(tick, axes.y0)
        parts.append(f'<text class="mid" x="{x:.1f}" y="{bottom + 15}">{_tick(tick)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="mid axis" x="{middle}" y="{_HEIGHT - 3}">{escape(x_label)}</text>')
    return parts


def _at(value: float, axis: str) -> str:
    return f'{axis}1="{value:.1f}" {axis}2="{value:.1f}"'


def _whole(value: float) -> bool:
    return math.isclose(value, round(value), abs_tol=1e-9)


def _tick(value: float) -> str:
    return re.sub(r"e([+-])0*", r"e\1", f"{value:.6g}").replace("e+", "e").replace("-", "−")


def _line(line: Series, axes: _Axes, index: int) -> str:
    css = f"series c{index % _COLOURS}"
    path, dots = [], []
    runs = _runs(list(zip(line.x, line.y, strict=True)))
    for run in runs:
        points = [axes.place(x, y) for x, y in run]
        if len(points) == 1:
            dots.append(f'<circle class="{css}" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}"/>')
        path.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points))
    return f'<path class="{css}" d="{"".join(path)}"/>{"".join(dots)}' if path else ""


def _band(line: Series, axes: _Axes, index: int) -> str:
    if not len(line.low):
        return ""
    path = []
    for run in _runs(list(zip(line.x, line.low, line.high, strict=True))):
        below = [axes.place(x, low) for x, low, _ in run]
        above = [axes.place(x, high) for x, _, high in run][::-1]
        path.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in below + above) + "Z")
    return f'<path class="band c{index % _COLOURS}" d="{"".join(path)}"/>'


def _runs(points: list[tuple[float, ...]]) -> list[list[tuple[float, ...]]]:
    """Stretches of finite points."""
    runs: list[list[tuple[float, ...]]] = [[]]
    for point in points:
        if _finite(*point):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _thinned(line: Series) -> Series:
    """The series with neighbours averaged until at most _MAX_POINTS are left."""
    size = math.ceil(len(line.x) / _MAX_POINTS)
    if size <= 1:
        return line
    columns = [_bin_means(values, size) for values in (line.x, line.y, line.low, line.high)]
    return Series(line.name, *columns)


def _bin_means(values: Sequence[float | None], size: int) -> list[float]:
    means = []
    for start in range(0, len(values), size):
        kept = [value for value in values[start : start + size] if _finite(value)]
        means.append(sum(kept) / len(kept) if kept else math.nan)
    return means


def _data(series: Sequence[Series], axes: _Axes | None) -> str:
    """What the page needs to read a value off under the pointer."""
    if axes is None:
        return "{}"
    lines = [
        {
            "x": [_short(x) for x in line.x],
            "y": [number(y) if _finite(y) else None for y in line.y],
        }
        for line in series
    ]
    scale = {"x0": axes.x0, "x1": axes.x1, "left": _LEFT, "right": _WIDTH - _RIGHT, "width": _WIDTH}
    return json.dumps({**scale, "series": lines}, separators=(",", ":"))


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if _finite(value) else None


def _finite(*values: float | None) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)
