"""Strips: the scores of edits at random places as dots, and the scores that they are compared with as lines.

`strip_chart` makes a chart; `draw_strip` makes SVG of it, which a page shows without script.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeGuard

from locaudit.report.charts import Chart, axis_of, css, themed
from locaudit.report.style import ARM_COLOURS

_DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
"""Matplotlib's line styles as Plotly's."""
_SVG_DASHES = {"solid": "", "dash": "6 3", "dot": "2 3", "dashdot": "6 3 2 3"}
_GLYPHS = {
    "diamond": "M0-5L5 0L0 5L-5 0Z", "circle": "M0-4A4 4 0 1 1 0 4A4 4 0 1 1 0-4Z", "square": "M-4-4H4V4H-4Z",
    "triangle-up": "M0-5L5 4H-5Z",
}  # fmt: skip
"""Symbols of marks in their order, with their outlines in SVG."""
_ROW, _TITLE, _DOTS, _AXIS = 16, 18, 80, 36
"""Heights in pixels: the label of a mark, a panel's title, the most for its dots, and the axis."""
_NARROW = 300
"""Width in pixels at which dots still do not overlap."""
_LABEL = 0.36
"""Share of the width that a mark's label may take."""
_MARGIN = 0.04
"""Share of the width that is free at each end."""
_FAR = 2.5
"""A mark that would make the axis so many times as long is named at the edge."""


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


def span_of(panels: Sequence[Spread]) -> tuple[float, float]:
    """The axis of all scores, marks and intervals, with a margin.

    A mark is left out if with it the axis were more than `_FAR` times as long: the dots could not be told apart.
    """
    marks = [mark for panel in panels for mark in panel.marks if _is_finite(mark.value)]
    scores = [x for panel in panels for x in panel.scores if _is_finite(x)]
    others = [[*scores, *(x.value for x in marks if x.value and x.value != mark.value)] for mark in marks]
    near = [mark for mark, rest in zip(marks, others, strict=True) if not _is_far(mark.value or 0.0, rest)]
    values = [*scores, *(x for mark in near for x in (mark.value, *mark.interval) if _is_finite(x))]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    room = _MARGIN * (high - low) / (1 - 2 * _MARGIN)
    return low - room, high + room


def _is_far(x: float, others: Sequence[float]) -> bool:
    width = max(others) - min(others) if others else 0.0
    return width > 0 and max(*others, x) - min(*others, x) > _FAR * width


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


def strip_chart(
    panels: Sequence[Spread],
    *,
    xlabel: str,
    what: str = "control",
    colour: str = ARM_COLOURS["control"],
    span: tuple[float, float] | None = None,
) -> Chart:
    """One dot per score in each panel, and lines for the marks of the first panel through all of them.

    Heights are pixels from the top. The labels of marks stand at different heights, so that equal marks stay visible.
    `span` are the ends of the axis, for several strips with the same one (`span_of`). A mark beyond them has only its
    label, with an arrow.
    """
    low, high = span or span_of(panels)
    marks = [(mark, x) for mark in panels[0].marks if _is_finite(x := mark.value)]
    largest = max(len(panel.scores) for panel in panels)
    radius = 4.0 if largest <= 60 else 2.5 if largest <= 300 else 1.5
    look = {"color": themed(colour), "size": 2 * radius, "line": {"color": "--paper", "width": 0.5}}
    top, dots, lines, notes = _ROW * len(marks) + 6.0, list[Chart](), list[Chart](), list[Chart]()
    for panel in panels:
        scores = sorted((x, i) for i, x in enumerate(panel.scores) if _is_finite(x))
        levels = stack_dots([(x - low) / (high - low) for x, _ in scores], 2 * radius / _NARROW)
        step = min(2 * radius + 0.5, (_DOTS - 2 * radius) / max(1, max(levels, default=0)))
        bottom = top + _TITLE + 2 * radius + step * max(levels, default=0) + 4
        heights = [round(bottom - radius - 1 - step * level, 1) for level in levels]
        dots.append(
            {"type": "scatter", "mode": "markers", "x": [x for x, _ in scores], "y": heights,
             "customdata": [i for _, i in scores], "marker": look, "showlegend": False, "cliponaxis": False,
             "hovertemplate": f"{what} %{{customdata}}: %{{x:.4g}}<extra></extra>"}
        )  # fmt: skip
        lines.append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": bottom, "y1": bottom, "layer": "below",
                      "line": {"color": "--faint", "width": 0.8}})  # fmt: skip
        notes.append({"text": escape(panel.title), "xref": "paper", "x": 0, "xanchor": "left", "y": top + _TITLE / 2,
                      "showarrow": False})  # fmt: skip
        top = bottom + 8
    traces, bottom = [], lines[-1]["y1"]
    for i, (mark, x) in enumerate(marks):
        own, y = themed(mark.colour), 9 + _ROW * i
        if not low <= x <= high:
            text, side, end = (
                ("\N{LEFTWARDS ARROW} {}", "left", low) if x < low else ("{} \N{RIGHTWARDS ARROW}", "right", high)
            )
            notes.append({"text": f"<b>{text.format(f'{escape(mark.label)} {_number(x)}')}</b>", "x": end, "y": y,
                          "xanchor": side, "xshift": 0, "showarrow": False})  # fmt: skip
            continue
        ends = mark.interval if all(map(math.isfinite, mark.interval)) else (x, x)
        at, is_left = _beside(x, ends, low, high)
        bar = {"type": "data", "symmetric": False, "array": [ends[1] - x, 0], "arrayminus": [x - ends[0], 0],
               "color": own, "thickness": 2, "width": 0}  # fmt: skip
        traces.append(
            {"type": "scatter", "mode": "lines+markers", "x": [x, x], "y": [y, bottom], "error_x": bar,
             "line": {"color": own, "width": 2, "dash": _DASHES[mark.style]}, "hoverinfo": "skip", "showlegend": False,
             "marker": {"color": own, "symbol": list(_GLYPHS)[i % len(_GLYPHS)], "size": [9, 0], "opacity": 1},
             "cliponaxis": False}
        )  # fmt: skip
        side, gap = ("right", -9) if is_left else ("left", 9)
        notes.append({"text": f"<b>{escape(mark.label)} {_number(x)}</b>", "x": at, "y": y, "xanchor": side,
                      "xshift": gap, "showarrow": False})  # fmt: skip
    axis = {**axis_of(xlabel), "range": [low, high], "zeroline": False, "showgrid": False, "showline": True}
    hidden = {"range": [bottom, 0], "visible": False, "fixedrange": True}
    layout = {"xaxis": axis, "yaxis": hidden, "shapes": lines[:-1], "annotations": notes, "height": round(bottom)}
    return {"data": [*traces, *dots], "layout": layout}


def _beside(x: float, ends: tuple[float, float], low: float, high: float) -> tuple[float, bool]:
    """Where the label of a mark begins, and whether it stands to the left: beside the bar, or over a long bar."""
    room = {True: (ends[0] - low) / (high - low), False: (high - ends[1]) / (high - low)}
    is_left = (x - low) / (high - low) >= 0.6
    side = next((left for left in (is_left, not is_left) if room[left] >= _LABEL), None)
    return (x, is_left) if side is None else (ends[0] if side else ends[1], side)


def draw_strip(panels: Sequence[Spread], *, xlabel: str, what: str = "control", alt: str = "") -> str:
    """The strip as SVG. Positions across are percentages, so that a page of any width shows text of the same size."""
    chart = strip_chart(panels, xlabel=xlabel, what=what)
    layout, (low, high) = chart["layout"], chart["layout"]["xaxis"]["range"]
    bottom, parts = layout["height"], list[str]()

    def across(x: float) -> str:
        return f"{100 * (x - low) / (high - low):.6g}%"

    for y in (*(shape["y0"] for shape in layout["shapes"]), bottom):
        parts.append(f'<line class="axis" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
    for trace in chart["data"]:
        if "error_x" in trace:
            parts.append(_svg_mark(trace, across))
            continue
        for x, y, i in zip(trace["x"], trace["y"], trace["customdata"], strict=True):
            at = f'cx="{across(x)}" cy="{y}" r="{trace["marker"]["size"] / 2}"'
            parts.append(f'<circle class="dot" {at}><title>{what} {i}: {x:.4g}</title></circle>')
    for note in layout["annotations"]:
        is_title, text = "xref" in note, note["text"].removeprefix("<b>").removesuffix("</b>")
        look = 'class="title"' if is_title else f'class="mark" dx="{note["xshift"]}"'
        anchor = "end" if note["xanchor"] == "right" else "start"
        at = "0" if is_title else across(note["x"])
        parts.append(f'<text {look} x="{at}" y="{note["y"] + 4:.1f}" text-anchor="{anchor}">{text}</text>')
    for x in nice_ticks(low, high):
        parts.append(f'<text class="tick" x="{across(x)}" y="{bottom + 16}">{_number(x)}</text>')
    parts.append(f'<text class="tick" x="50%" y="{bottom + 31}">{escape(xlabel)}</text>')
    look = f'role="img" aria-label="{escape(alt, quote=True)}" width="100%" height="{bottom + _AXIS}"'
    return f'<svg class="strip" {look}>{"".join(parts)}</svg>'


def _svg_mark(trace: Mapping[str, Any], across: Callable[[float], str]) -> str:
    """A vertical line from the mark's label down, and its interval. The symbol tells it apart without colour."""
    x, y, bar, colour = trace["x"][0], trace["y"], trace["error_x"], css(trace["line"]["color"])
    ends = across(x - bar["arrayminus"][0]), across(x + bar["array"][0])
    line = f'x1="{across(x)}" x2="{across(x)}" y1="{y[0]}" y2="{y[1]:.1f}"'
    return (
        f'<g class="mark"><line {line} stroke="{colour}" stroke-dasharray="{_SVG_DASHES[trace["line"]["dash"]]}"/>'
        f'<line x1="{ends[0]}" x2="{ends[1]}" y1="{y[0]}" y2="{y[0]}" stroke="{colour}"/>'
        f'<svg x="{across(x)}" y="{y[0]}"><path d="{_GLYPHS[trace["marker"]["symbol"]]}" fill="{colour}"/></svg></g>'
    )


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
