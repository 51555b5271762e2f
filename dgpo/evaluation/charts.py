"""Charts as inline SVG, coloured by the page's CSS variables so that they follow its light or dark scheme."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
Place = Callable[[float, float], tuple[float, float]]

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 34
NUM_COLOURS = 6  # --line-1 .. of the style sheet
MAX_STEPS = 5  # between the ticks of an axis
MAX_POINTS = 300  # a line with more would be finer than the screen
SMOOTH_FROM = 60  # points from which a line is drawn as a moving average, with the points themselves behind it
RADIUS = 120.0  # a radar's
# Of a chart that no page's style sheet reaches: --line-1 .. of the light scheme
FILE_COLOURS = ("#2f6fde", "#e07b1a", "#1b8a4b", "#9a4fc7", "#0f8a8a", "#c2417a")
FILE_STYLE = ".grid{stroke:#dfe4ea}.tick{fill:#5b6675;font-size:11px}"


def line_chart(
    lines: Mapping[str, Points],
    *,
    x_label: str,
    y_label: str,
    dotted: Mapping[str, Points] | None = None,
    marks: Mapping[str, Sequence[float]] | None = None,
) -> str:
    """A line per name, with `dotted` ones drawn as marked points on top. Empty when there is nothing to draw.

    Args:
        lines: name -> (x, y) pairs; colours follow the order (`--line-1`, `--line-2`, ..), counting names without
            points. A point that is not finite is left out.
        dotted: name -> (x, y) pairs of few points, such as validation scores; a name of `lines` keeps its colour.
        marks: name -> places on the x axis with a vertical mark, such as alarms.
    """
    names = list(dict.fromkeys((*lines, *(dotted or {}))))
    lines, dotted = _drawable(lines), _drawable(dotted or {})
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

    parts = _grid(x_ticks, y_ticks, place, x_label)
    for name, steps in (marks or {}).items():
        for step in steps:
            x, _ = place(step, y_ticks[0])
            parts.append(
                f'<line class="alarm" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
                f"<title>{escape(name)} at {step:g}</title></line>"
            )
    colours = {name: colour for name, colour in _colours(names).items() if name in lines or name in dotted}
    for name, colour in colours.items():
        parts += _line(lines.get(name, ()), colour, place)
        few = dotted.get(name, lines.get(name, ()))
        if name in dotted or len(few) == 1:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}" stroke="var(--card)" stroke-width="1.5"/>'
                for x, y in (place(*point) for point in few)
            ]
    return f"<figure>{_drawing(y_label, parts, colours, height=HEIGHT)}"


def radar_chart(axes: Sequence[str], shapes: Mapping[str, Sequence[float | None]], *, title: str) -> str:
    """A polygon per name over `axes` that all run from 0 at the centre; a missing value is a gap at its axis.

    The rim is the lowest of 0.25, 0.5, 0.75 and 1 that encloses every value, and is told in the title.

    Args:
        axes: labels, clockwise from the top; at least three. A comma in a label starts a second line.
        shapes: name -> a value for each axis, from 0 to 1, or None.

    Raises:
        ValueError: fewer than three axes, or a shape with another number of values.
    """
    if len(axes) < 3:
        raise ValueError(f"a radar of {len(axes)} axes is no polygon: use at least three, or a table")
    height = 2 * RADIUS + 90
    known_values = [value for values in shapes.values() for value in values if value is not None]
    rim = max(0.25, math.ceil(4 * max(known_values, default=1.0)) / 4)

    def place(axis: int, value: float) -> tuple[float, float]:
        angle = 2 * math.pi * axis / len(axes)
        return WIDTH / 2 + RADIUS * value * math.sin(angle), height / 2 - RADIUS * value * math.cos(angle)

    def polygon(places: Sequence[tuple[float, float]], attributes: str) -> str:
        return f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}" {attributes}/>'

    parts = [
        polygon([place(axis, ring) for axis in range(len(axes))], 'class="grid" fill="none"')
        for ring in (0.25, 0.5, 0.75, 1.0)
    ]
    for axis, label in enumerate(axes):
        (x, y), (label_x, label_y) = place(axis, 1.0), place(axis, 1.12)
        anchor = "middle" if abs(label_x - WIDTH / 2) < 1 else "start" if label_x > WIDTH / 2 else "end"
        parts.append(
            f'<line class="grid" x1="{WIDTH / 2}" y1="{height / 2}" x2="{x:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" y="{label_y - 2:.1f}" text-anchor="{anchor}">{_two_lines(label, label_x)}</text>'
        )
    colours = _colours(shapes)
    for name, values in shapes.items():
        if len(values) != len(axes):
            raise ValueError(f"{name} has {len(values)} values for {len(axes)} axes")
        colour = colours[name]
        known = [(axis, value) for axis, value in enumerate(values) if value is not None]
        places = [place(axis, value / rim) for axis, value in known]
        parts.append(polygon(places, f'fill="{colour}" fill-opacity=".1" stroke="{colour}" stroke-width="2"'))
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{escape(name)}, {escape(axes[axis])}: '
            f"{value:.3f}</title></circle>"
            for (axis, value), (x, y) in zip(known, places, strict=True)
        ]
    drawing = _drawing(title, parts, colours, height=height, note=f" <small>rim: {rim:g}</small>")
    return f'<figure class="radar">{drawing}'


def _colours(names: Iterable[str]) -> dict[str, str]:
    return {name: f"var(--line-{number % NUM_COLOURS + 1})" for number, name in enumerate(names)}


def _drawing(title: str, parts: Sequence[str], colours: Mapping[str, str], *, height: float, note: str = "") -> str:
    """The inside of a figure, and its end: title, drawing and legend."""
    legend = "".join(f'<span><i style="background:{colours[name]}"></i>{escape(name)}</span>' for name in colours)
    return (
        f'<figcaption>{escape(title)}{note}</figcaption><svg viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg><div class="legend">{legend}</div></figure>'
    )


def _grid(x_ticks: Sequence[float], y_ticks: Sequence[float], place: Place, x_label: str) -> list[str]:
    parts = []
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
    return parts


def _two_lines(label: str, x: float) -> str:
    lines = label.split(", ", 1)
    return "".join(f'<tspan x="{x:.1f}" dy="{14 * min(i, 1)}">{escape(line)}</tspan>' for i, line in enumerate(lines))


def _drawable(lines: Mapping[str, Points]) -> dict[str, Points]:
    finite = {name: [(x, y) for x, y in series if math.isfinite(y)] for name, series in lines.items()}
    return {name: series for name, series in finite.items() if series}


def _line(series: Points, colour: str, place: Place) -> list[str]:
    """The line itself; a long one as its moving average, over itself in a faint colour."""
    if not series:
        return []
    thinned = series[:: math.ceil(len(series) / MAX_POINTS)]
    window = len(thinned) // 20 if len(thinned) >= SMOOTH_FROM else 0
    parts = [_polyline(thinned, colour, place, opacity=0.28 if window else 1.0)]
    if window:
        parts.append(_polyline(_moving_average(thinned, window), colour, place, opacity=1.0))
    return parts


def _polyline(series: Points, colour: str, place: Place, *, opacity: float) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in series))
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" opacity="{opacity:g}"/>'


def _moving_average(series: Points, window: int) -> Points:
    """Mean of each value with up to `window` neighbours on either side."""
    values = [y for _, y in series]
    near = [values[max(0, i - window) : i + window + 1] for i in range(len(values))]
    return [(x, sum(group) / len(group)) for (x, _), group in zip(series, near, strict=True)]


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


def dot_chart(
    rows: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    x_label: str,
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> str:
    """A figure in a file of its own: a line per row, in it a point per value and a bar at the mean of each measure.

    Args:
        rows: label -> measure -> values from 0 to 1; the measures are the same in all rows.
        intervals: label -> measure -> its ends, drawn as a line; of those that have one.
    """
    intervals = intervals or {}
    width, left, line, top = 720, 230, 34, 34
    bottom = top + line * len(rows)
    measures = list(next(iter(rows.values())))
    drawn = [*rows.values(), *intervals.values()]
    ticks = _ticks(0.0, max(value for row in drawn for values in row.values() for value in values))

    def x(value: float) -> float:
        return left + (width - left - 20) * _share(value, ticks)

    parts = [
        f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{bottom}" stroke="#dfe4ea"/>'
        f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle" fill="#5b6675">{tick:g}</text>'
        for tick in ticks
    ]
    for number, measure in enumerate(measures):
        at = left + 170 * number
        parts.append(f'<circle cx="{at + 5}" cy="14" r="5" fill="{FILE_COLOURS[number]}"/>')
        parts.append(f'<text x="{at + 15}" y="18">{escape(measure)}</text>')
    for place, (label, row) in enumerate(rows.items()):
        middle = top + line * (place + 0.5)
        parts.append(f'<text x="{left - 12}" y="{middle + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        for number, measure in enumerate(measures):
            y, colour = middle + 11 * (number - (len(measures) - 1) / 2), FILE_COLOURS[number]
            parts += [
                f'<circle cx="{x(value):.1f}" cy="{y:.1f}" r="3.5" fill="{colour}" fill-opacity=".5"/>'
                for value in row[measure]
            ]
            if between := intervals.get(label, {}).get(measure):
                low, high = (x(end) for end in between)
                parts.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"/>')
            mean = x(sum(row[measure]) / len(row[measure]))
            parts.append(f'<rect x="{mean - 1.5:.1f}" y="{y - 5:.1f}" width="3" height="10" fill="{colour}"/>')
    parts.append(f'<text x="{width - 20}" y="{bottom + 34}" text-anchor="end" fill="#5b6675">{escape(x_label)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 42}" font-family="sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def line_file(lines: Mapping[str, Points], *, x_label: str, y_label: str) -> str:
    """`line_chart` as a file of its own, with the legend below it."""
    drawing = line_chart(lines, x_label=x_label, y_label=y_label)
    inside = drawing[drawing.index("<svg") : drawing.index("</svg>")].partition(">")[2]
    height = HEIGHT + 18 * math.ceil(len(lines) / 2) + 8
    for number, (name, colour) in enumerate(_colours(lines).items()):
        x, y = LEFT + 235 * (number % 2), HEIGHT + 14 + 18 * (number // 2)
        inside += f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{colour}"/>'
        inside += f'<text x="{x + 16}" y="{y}" font-size="12">{escape(name)}</text>'
    for number, colour in enumerate(FILE_COLOURS, start=1):
        inside = inside.replace(f"var(--line-{number})", colour)
    inside = inside.replace("var(--card)", "#fff")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -22 {WIDTH} {height + 22}" font-family="sans-serif" '
        f"><style>{FILE_STYLE}</style>"
        f'<rect y="-22" width="100%" height="100%" fill="#fff"/>'
        f'<text x="{LEFT}" y="-6" font-size="13">{escape(y_label)}</text>{inside}</svg>\n'
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


def _ticks(low: float, high: float, *, smallest: float = 0.0) -> list[float]:
    """Round numbers that enclose [low, high], at least `smallest` apart."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / MAX_STEPS))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= MAX_STEPS)
    step = max(step, smallest)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * number, 10) for number in range(first, max(last, first + 1) + 1)]
