"""Charts as inline SVG, coloured by the page's CSS variables so that they follow its light or dark scheme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 34


def line_chart(
    lines: Mapping[str, Points], *, x_label: str, y_label: str, dotted: Mapping[str, Points] | None = None
) -> str:
    """A line per name, with `dotted` ones drawn as marked points on top. Empty when there is nothing to draw.

    Args:
        lines: name -> (x, y) pairs; colours follow the order (`--line-1`, `--line-2`, ..).
        dotted: name -> (x, y) pairs of few points, such as validation scores.
    """
    lines = {name: series for name, series in lines.items() if series}
    dotted = {name: series for name, series in (dotted or {}).items() if series}
    points = [point for series in (*lines.values(), *dotted.values()) for point in series]
    if not points:
        return ""
    x_ticks = _ticks(min(x for x, _ in points), max(x for x, _ in points), smallest=1.0)  # steps are whole
    y_ticks = _ticks(min(0.0, *(y for _, y in points)), max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * _share(x, x_ticks),
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * _share(y, y_ticks),
        )

    parts = []
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
    legend = []
    for number, (name, series) in enumerate((*lines.items(), *dotted.items()), start=1):
        colour = f"var(--line-{(number - 1) % 4 + 1})"
        placed = [place(x, y) for x, y in series]
        if name in lines:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if name in dotted or len(placed) == 1:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}" stroke="var(--card)" stroke-width="1.5"/>'
                for x, y in placed
            ]
        legend.append(f'<span><i style="background:{colour}"></i>{escape(name)}</span>')
    return (
        f'<figure><figcaption>{escape(y_label)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(y_label)}">{"".join(parts)}</svg><div class="legend">{"".join(legend)}</div></figure>'
    )


def interval_bar(value: float, low: float, high: float, *, highest: float) -> str:
    """A horizontal bar from 0 to `value` with its interval as a whisker; `highest` is the full width."""
    width, height = 120, 18
    at = [width * max(0.0, min(1.0, v / highest)) for v in (value, low, high)]
    ends = "".join(f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="5" y2="13"/>' for x in at[1:])
    return (
        f'<svg class="bar" viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-hidden="true">'
        f'<rect class="track" width="{width}" height="{height}" rx="3"/>'
        f'<rect class="value" width="{at[0]:.1f}" height="{height}" rx="3"/>'
        f'<line class="whisker" x1="{at[1]:.1f}" x2="{at[2]:.1f}" y1="9" y2="9"/>{ends}</svg>'
    )


def stage_bars(seconds: Mapping[str, float]) -> str:
    """One labelled bar per stage, longest = full width."""
    longest = max(seconds.values(), default=0.0) or 1.0
    rows = "".join(
        f'<div class="stage"><span>{escape(name)}</span><div><i style="width:{100 * value / longest:.1f}%"></i></div>'
        f"<b>{_duration(value)}</b></div>"
        for name, value in seconds.items()
    )
    return f'<div class="stages">{rows}</div>'


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _share(value: float, ticks: Sequence[float]) -> float:
    return (value - ticks[0]) / (ticks[-1] - ticks[0])


def _ticks(low: float, high: float, *, about: int = 5, smallest: float = 0.0) -> list[float]:
    """Round numbers that enclose [low, high], at least `smallest` apart."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / about))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= about)
    step = max(step, smallest)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * number, 10) for number in range(first, max(last, first + 1) + 1)]
