"""Line charts as inline SVG: no script, no network, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

# About the width of a column of the page, so that text has the size it says.
_WIDTH, _HEIGHT = 280, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 10, 26
# Fewer points than this are marked one by one; more are drawn faint behind their running mean.
_SMOOTH_FROM = 30

Point = tuple[float, float]


def line_chart(
    points: Sequence[Point], *, label: str, bottom: float | None = None, until: float = 0.0
) -> str:
    """An SVG of (x, y) points, or a note where there are none.

    Args:
        points: in the order of x; points with a y that is not finite are left out.
        label: what is shown, for screen readers.
        bottom: where the y axis starts; None lets it follow the data.
        until: how far the x axis reaches at least, so that charts of one run can be compared.
    """
    shown = [(x, y) for x, y in points if math.isfinite(y)]
    if not shown:
        return '<p class="none">not measured in this run</p>'
    x_ticks = ticks(shown[0][0], max(shown[-1][0], until))
    low, high = min(y for _, y in shown), max(y for _, y in shown)
    if bottom is not None:
        # Nothing but the bottom itself: an axis around it would show what cannot be.
        low, high = bottom, high if high > bottom else bottom + 1.0
    y_ticks = ticks(low, high)
    x_span, y_span = (x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1])
    parts = [_grid(x_ticks, y_ticks, x_span, y_span)]
    if len(shown) > _SMOOTH_FROM:
        parts.append(_line(shown, x_span, y_span, "raw"))
        parts.append(_line(running_mean(shown), x_span, y_span, "curve"))
    else:
        parts.append(_line(shown, x_span, y_span, "curve"))
        parts += [_dot(point, x_span, y_span) for point in shown]
    last_x, last_y = _place(shown[-1], x_span, y_span)
    parts.append(f'<circle class="last" cx="{last_x:.1f}" cy="{last_y:.1f}" r="3.5"/>')
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def ticks(low: float, high: float, n: int = 4) -> list[float]:
    """About `n` round numbers that enclose [low, high]; at least two, ascending."""
    if high - low <= 1e-12 * max(abs(high), abs(low)):
        pad = 0.5 * abs(high) or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / n
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def running_mean(points: Sequence[Point]) -> list[Point]:
    """Each y replaced by the mean of its neighbourhood, a twentieth of all points wide."""
    reach = max(1, len(points) // 40)
    smooth = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - reach) : i + reach + 1]]
        smooth.append((x, sum(near) / len(near)))
    return smooth


def short(value: float) -> str:
    """A number as a reader wants it: 0.912, 3.1e-07, 12,400."""
    if value == 0:
        return "0"
    if abs(value) >= 1e3:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def _place(point: Point, x_span: Point, y_span: Point) -> Point:
    x = (point[0] - x_span[0]) / (x_span[1] - x_span[0])
    y = (point[1] - y_span[0]) / (y_span[1] - y_span[0])
    return (
        _LEFT + x * (_WIDTH - _LEFT - _RIGHT),
        _HEIGHT - _BOTTOM - y * (_HEIGHT - _TOP - _BOTTOM),
    )


def _grid(xs: Sequence[float], ys: Sequence[float], x_span: Point, y_span: Point) -> str:
    parts = []
    for y in ys:
        _, at = _place((x_span[0], y), x_span, y_span)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 6}" y="{at + 4:.1f}">{short(y)}</text>')
    for x in xs:
        at, _ = _place((x, y_span[0]), x_span, y_span)
        parts.append(f'<text class="x" x="{at:.1f}" y="{_HEIGHT - 8}">{short(x)}</text>')
    return "".join(parts)


def _line(points: Sequence[Point], x_span: Point, y_span: Point, kind: str) -> str:
    places = (_place(point, x_span, y_span) for point in points)
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return f'<path class="{kind}" d="M{path}"/>'


def _dot(point: Point, x_span: Point, y_span: Point) -> str:
    x, y = _place(point, x_span, y_span)
    title = f"step {short(point[0])}: {short(point[1])}"
    return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>{title}</title></circle>'
