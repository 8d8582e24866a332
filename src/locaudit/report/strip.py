"""Strips: the scores of edits at random places as dots, and the scores that they are compared with as lines.

`draw_strip` makes SVG, which a page shows without script, and `strip_chart` a chart. `_lay_out` places both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeGuard

from locaudit.report.charts import Chart, axis_of, css, themed
from locaudit.report.style import ARM_COLOURS

_DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
_SVG_DASHES = {"-": "", "--": "6 3", ":": "2 3", "-.": "6 3 2 3"}
"""Line styles of marks as Plotly's and as SVG's."""
_SYMBOLS = ("diamond", "circle", "square", "triangle-up")
_GLYPHS = ("M0-5L5 0L0 5L-5 0Z", "M0-4A4 4 0 1 1 0 4A4 4 0 1 1 0-4Z", "M-4-4H4V4H-4Z", "M0-5L5 4H-5Z")
"""Symbols of marks in their order, and their outlines in SVG."""
_ROW, _TITLE, _DOTS, _AXIS = 16, 18, 56, 32
"""Heights in pixels: the label of a mark, a panel's title, the most for its dots, and the axis."""
_NARROW = 300
"""Width in pixels at which dots still do not overlap."""
_MARGIN = 0.04
"""Share of the width that is free at each end."""


@dataclass(frozen=True)
class Mark:
    """A score drawn as a vertical line over the dots of the controls."""

    label: str
    value: float | None
    """The score; not drawn if it is None or NaN."""
    colour: str
    style: str
    """``-``, ``--``, ``:`` or ``-.``."""
    interval: tuple[float, float] = (math.nan, math.nan)
    """A bar across the line, such as a confidence interval; not drawn if an end is NaN."""


@dataclass(frozen=True)
class Spread:
    """One panel: scores at random places and the scores they are compared with."""

    title: str
    scores: Sequence[float | None]
    marks: Sequence[Mark]


@dataclass(frozen=True)
class _Label:
    """A mark that is drawn, and where."""

    mark: Mark
    value: float
    y: float
    is_left: bool
    """Whether the label stands left of the line."""

    @property
    def ends(self) -> tuple[float, float]:
        """The interval, or twice the value without one."""
        low, high = self.mark.interval
        return (low, high) if _is_finite(low) and _is_finite(high) else (self.value, self.value)

    @property
    def text(self) -> str:
        return f"{self.mark.label} {_number(self.value)}"


@dataclass(frozen=True)
class _Panel:
    title: str
    top: float
    bottom: float
    dots: Sequence[tuple[float, float, int]]
    """Score, height, and number of each place."""


@dataclass(frozen=True)
class _Layout:
    labels: Sequence[_Label]
    panels: Sequence[_Panel]
    span: tuple[float, float]
    """Scores at the left and the right end."""
    radius: float
    """Radius of a dot."""
    bottom: float

    def share(self, x: float) -> float:
        """Where a score stands, as a share of the width."""
        low, high = self.span
        return (x - low) / (high - low)


def span_of(panels: Sequence[Spread]) -> tuple[float, float]:
    """The axis of all scores, marks and intervals, with a margin."""
    marks = [x for panel in panels for mark in panel.marks for x in (mark.value, *mark.interval)]
    values = [x for x in (*marks, *(x for panel in panels for x in panel.scores)) if _is_finite(x)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    room = _MARGIN * (high - low) / (1 - 2 * _MARGIN)
    return low - room, high + room


def stack_dots(at: Sequence[float], width: float) -> list[int]:
    """The level of each dot, so that dots on one level are at least `width` apart. Ties stand on top of each other.

    `at` is sorted. The number of levels is the smallest possible.
    """
    ends: list[float] = []
    levels = []
    for x in at:
        level = next((i for i, end in enumerate(ends) if x - end >= width), len(ends))
        ends[level : level + 1] = [x]
        levels.append(level)
    return levels


def _lay_out(panels: Sequence[Spread], span: tuple[float, float] | None) -> _Layout:
    """Labels of marks stand at different heights, so that equal marks stay visible; below them come the panels."""
    low, high = span or span_of(panels)
    marks = [(mark, x) for mark in panels[0].marks if _is_finite(x := mark.value)]
    labels = [_Label(mark, x, 9.0 + _ROW * i, (x - low) / (high - low) >= 0.6) for i, (mark, x) in enumerate(marks)]
    largest = max(len(panel.scores) for panel in panels)
    radius = 4.0 if largest <= 60 else 2.5 if largest <= 300 else 1.5
    y, placed = _ROW * len(marks) + 6.0, []
    for panel in panels:
        dots = sorted((x, i) for i, x in enumerate(panel.scores) if _is_finite(x))
        levels = stack_dots([(x - low) / (high - low) for x, _ in dots], 2 * radius / _NARROW)
        highest = max(levels, default=0)
        step = min(2 * radius + 0.5, (_DOTS - 2 * radius) / max(1, highest))
        bottom = y + _TITLE + 2 * radius + step * highest + 4
        heights = [bottom - radius - 1 - step * level for level in levels]
        placed.append(_Panel(panel.title, y, bottom, [(x, h, i) for (x, i), h in zip(dots, heights, strict=True)]))
        y = bottom + 8
    return _Layout(labels, placed, (low, high), radius, y)


def draw_strip(panels: Sequence[Spread], *, xlabel: str, what: str = "control", alt: str = "") -> str:
    """SVG with one dot per score in each panel, and lines for the marks of the first panel through all of them.

    Positions across are percentages, so that a page of any width shows it with text of the same size.
    """
    layout = _lay_out(panels, None)

    def across(x: float) -> str:
        return f"{100 * layout.share(x):.6g}%"

    parts = []
    for i, label in enumerate(layout.labels):
        x, y, (low, high), colour = across(label.value), label.y, map(across, label.ends), css(label.mark.colour)
        dash, end = _SVG_DASHES[label.mark.style], f"{layout.panels[-1].bottom:.1f}"
        anchor, at, shift = ("end", low, -9) if label.is_left else ("start", high, 9)
        text = (
            f'<text class="mark" x="{at}" dx="{shift}" y="{y + 4}" text-anchor="{anchor}">{escape(label.text)}</text>'
        )
        parts.append(
            f'<g class="mark"><line x1="{x}" x2="{x}" y1="{y}" y2="{end}" stroke="{colour}" stroke-dasharray="{dash}"/>'
            f'<line x1="{low}" x2="{high}" y1="{y}" y2="{y}" stroke="{colour}"/>'
            f'<svg x="{x}" y="{y}"><path d="{_GLYPHS[i % len(_GLYPHS)]}" fill="{colour}"/></svg>{text}</g>'
        )
    for panel in layout.panels:
        parts.append(f'<line class="axis" x1="0" x2="100%" y1="{panel.bottom:.1f}" y2="{panel.bottom:.1f}"/>')
        for x, y, i in panel.dots:
            at = f'cx="{across(x)}" cy="{y:.1f}" r="{layout.radius}"'
            parts.append(f'<circle class="dot" {at}><title>{what} {i}: {x:.4g}</title></circle>')
        parts.append(f'<text class="title" x="0" y="{panel.top + _TITLE - 5:.1f}">{escape(panel.title)}</text>')
    for x in nice_ticks(*layout.span):
        parts.append(f'<text class="tick" x="{across(x)}" y="{layout.bottom + 8:.1f}">{_number(x)}</text>')
    parts.append(f'<text class="tick" x="50%" y="{layout.bottom + 23:.1f}">{escape(xlabel)}</text>')
    label, height = escape(alt, quote=True), layout.bottom + _AXIS - 4
    return (
        f'<svg class="strip" role="img" aria-label="{label}" width="100%" height="{height:.0f}">{"".join(parts)}</svg>'
    )


def strip_chart(
    panels: Sequence[Spread],
    *,
    xlabel: str,
    what: str = "control",
    colour: str = ARM_COLOURS["control"],
    span: tuple[float, float] | None = None,
) -> Chart:
    """The strip as a chart. `span` are the ends of its axis, for several strips with the same one (`span_of`)."""
    layout = _lay_out(panels, span)
    bottom, traces = layout.panels[-1].bottom, list[Chart]()
    for i, label in enumerate(layout.labels):
        own, (low, high) = themed(label.mark.colour), label.ends
        line = {"color": own, "width": 2, "dash": _DASHES[label.mark.style]}
        bar = {"type": "data", "symmetric": False, "array": [high - label.value], "arrayminus": [label.value - low],
               "color": own, "thickness": 2, "width": 0}  # fmt: skip
        common = {"type": "scatter", "hoverinfo": "skip", "showlegend": False, "cliponaxis": False}
        traces += [
            {**common, "mode": "lines", "x": [label.value] * 2, "y": [label.y, bottom], "line": line},
            {**common, "mode": "markers", "x": [label.value], "y": [label.y], "error_x": bar,
             "marker": {"color": own, "symbol": _SYMBOLS[i % len(_SYMBOLS)], "size": 9}},
            {**common, "mode": "text", "x": [low if label.is_left else high], "y": [label.y],
             "text": [f"\u00a0\u00a0{escape(label.text)}\u00a0\u00a0"],
             "textposition": "middle left" if label.is_left else "middle right"},
        ]  # fmt: skip
    look = {"color": themed(colour), "size": 2 * layout.radius, "line": {"color": "--paper", "width": 0.5}}
    for panel in layout.panels:
        x, y, i = zip(*panel.dots, strict=True) if panel.dots else ((), (), ())
        traces.append(
            {"type": "scatter", "mode": "markers", "x": list(x), "y": list(y), "customdata": list(i), "marker": look,
             "showlegend": False, "cliponaxis": False,
             "hovertemplate": f"{what} %{{customdata}}: %{{x:.4g}}<extra></extra>"}
        )  # fmt: skip
    axes = [
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": panel.bottom, "y1": panel.bottom, "layer": "below",
         "line": {"color": "--faint", "width": 0.8}}
        for panel in layout.panels[:-1]
    ]  # fmt: skip
    titles = [
        {"text": escape(panel.title), "xref": "paper", "x": 0, "xanchor": "left", "y": panel.top + _TITLE / 2,
         "yanchor": "middle", "showarrow": False}
        for panel in layout.panels
    ]  # fmt: skip
    return {
        "data": traces,
        "layout": {
            "xaxis": {
                **axis_of(xlabel),
                "range": list(layout.span),
                "zeroline": False,
                "showgrid": False,
                "showline": True,
                "linecolor": "--faint",
            },
            "yaxis": {"range": [bottom, 0], "visible": False, "fixedrange": True},
            "shapes": axes,
            "annotations": titles,
            "height": round(bottom),
        },
    }


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` round numbers within [low, high], at equal steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    scale = 10.0 ** math.floor(math.log10(span / most))
    step = next(x for x in (scale, 2 * scale, 5 * scale, 10 * scale) if span / x <= most - 1 or x == 10 * scale)
    return [float(f"{i * step:.12g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _number(x: float) -> str:
    return f"{0.0 if abs(x) < 1e-9 else x:.3g}".replace("-", "−")


def _is_finite(x: float | None) -> TypeGuard[float]:
    return x is not None and math.isfinite(x)
