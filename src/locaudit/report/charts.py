"""Charts of a page: strips of scores as SVG, which need no script, and figures for Plotly as plain values.

A colour that begins with ``--`` is the name of a CSS property, so that it follows the page's light or dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeGuard

import numpy as np

from locaudit.report.figures import SMALLEST_KL, HeatMap, Mark, Series, Spread, frontier, stack_dots
from locaudit.report.style import ARM_COLOURS, FAINT, INK, MIDDLE, PAPER

Chart = dict[str, Any]
"""A Plotly figure: ``data`` (traces) and ``layout``."""
THEMED: Mapping[str, str] = {
    INK: "--ink", PAPER: "--paper", FAINT: "--faint", MIDDLE: "--faint", ARM_COLOURS["control"]: "--control",
}  # fmt: skip
_SYMBOLS = {"o": "circle", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "P": "cross", "X": "x",
            "*": "star", "s": "square"}  # fmt: skip
"""Matplotlib's markers as Plotly's symbols."""
_DASHES = {"-": "", "--": "6 3", ":": "2 3", "-.": "6 3 2 3"}
"""Matplotlib's line styles as SVG's."""
_GLYPHS = ("M0-5L5 0L0 5L-5 0Z", "M0-4A4 4 0 1 1 0 4A4 4 0 1 1 0-4Z", "M-4-4H4V4H-4Z", "M0-5L5 4H-5Z")
"""Outlines of the marks of a strip, in their order."""
_ROW, _TITLE, _DOTS, _AXIS = 16, 18, 56, 32
"""Heights in a strip, in pixels: the label of a mark, a panel's title, the most for its dots, and the axis."""
_RISING = ("#00224e", "#2a406c", "#575d6d", "#7d7c78", "#a59c74", "#d2c060", "#fee838")
"""Colours from low to high that people with colour vision deficiencies can order (cividis, Nuñez et al. 2018)."""
_DIVERGING = ("#b35806", "#fdb863", "#f7f7f7", "#92c5de", "#2166ac")
"""Colours from a loss to a gain."""
_NARROW = 330
"""Width in pixels at which dots still do not overlap."""


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` round numbers within [low, high], at equal steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    scale = 10.0 ** math.floor(math.log10(span / most))
    step = next(x for x in (scale, 2 * scale, 5 * scale, 10 * scale) if span / x <= most - 1 or x == 10 * scale)
    return [float(f"{i * step:.12g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def draw_strip(panels: Sequence[Spread], *, xlabel: str, what: str = "control", alt: str = "") -> str:
    """SVG with one dot per score in each panel, and lines for the marks of the first panel through all of them.

    Positions across are percentages, so that a page of any width shows it with text of the same size. The labels of
    marks stand at different heights, and the last mark is drawn on top, so that equal ones stay visible.
    """
    marks = [(mark, x) for mark in panels[0].marks if _is_finite(x := mark.value)]
    scores = [[(x, i) for i, x in enumerate(panel.scores) if _is_finite(x)] for panel in panels]
    values = [x for _, x in marks] + [x for one in scores for x, _ in one]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5

    def across(x: float) -> float:
        return round(4 + 92 * (x - low) / (high - low), 3)

    largest = max((len(panel.scores) for panel in panels), default=0)
    radius = 4.0 if largest <= 60 else 2.5 if largest <= 300 else 1.5
    y = _ROW * len(marks) + 6.0
    parts, bottoms = [], []
    for dots in map(sorted, scores):
        levels = stack_dots([across(x) for x, _ in dots], 100 * 2 * radius / _NARROW)
        step = min(2 * radius + 0.5, (_DOTS - 2 * radius) / max(1, max(levels, default=0)))
        bottom = y + _TITLE + 2 * radius + step * max(levels, default=0) + 4
        parts.append(f'<line class="axis" x1="0" x2="100%" y1="{bottom:.1f}" y2="{bottom:.1f}"/>')
        for (x, i), level in zip(dots, levels, strict=True):
            at = f'cx="{across(x)}%" cy="{bottom - radius - 1 - step * level:.1f}" r="{radius}"'
            parts.append(f'<circle class="dot" {at}><title>{what} {i}: {x:.4g}</title></circle>')
        bottoms.append((y, bottom))
        y = bottom + 8
    lines = [_draw_mark(mark, x, i, across(x), bottoms[-1][1]) for i, (mark, x) in enumerate(marks)]
    titles = [
        f'<text class="title" x="0" y="{top + _TITLE - 5:.1f}">{escape(panel.title)}</text>'
        for panel, (top, _) in zip(panels, bottoms, strict=True)
    ]
    axis = [f'<text class="tick" x="{across(x)}%" y="{y + 8:.1f}">{_number(x)}</text>' for x in nice_ticks(low, high)]
    axis.append(f'<text class="tick" x="50%" y="{y + 23:.1f}">{escape(xlabel)}</text>')
    body = "".join([*parts, *lines, *titles, *axis])
    label = escape(alt, quote=True)
    return f'<svg class="strip" role="img" aria-label="{label}" width="100%" height="{y + _AXIS - 4:.0f}">{body}</svg>'


def _draw_mark(mark: Mark, value: float, row: int, x: float, bottom: float) -> str:
    """A vertical line at `x` percent from the mark's label down to `bottom`. Its outline tells it without colour."""
    colour, y = css(mark.colour), 9 + _ROW * row
    anchor, shift = ("start", 9) if x < 60 else ("end", -9)
    dash = _DASHES[mark.style]
    line = f'<line x1="{x}%" x2="{x}%" y1="{y}" y2="{bottom:.1f}" stroke="{colour}" stroke-dasharray="{dash}"/>'
    glyph = f'<svg x="{x}%" y="{y}"><path d="{_GLYPHS[row % len(_GLYPHS)]}" fill="{colour}"/></svg>'
    text = f'<text class="mark" x="{x}%" dx="{shift}" y="{y + 4}" text-anchor="{anchor}">'
    return f'<g class="mark">{line}{glyph}{text}{escape(mark.label)} {_number(value)}</text></g>'


def css(colour: str) -> str:
    """The colour in a style sheet."""
    name = THEMED.get(colour, colour)
    return f"var({name})" if name.startswith("--") else name


def _number(x: float) -> str:
    return f"{0.0 if abs(x) < 1e-9 else x:.3g}".replace("-", "−")


def _is_finite(x: float | None) -> TypeGuard[float]:
    return x is not None and math.isfinite(x)


def rounded(values: Iterable[float]) -> list[float]:
    """The values with six significant digits, which is more than a figure shows."""
    return [float(f"{x:.6g}") for x in values]


def scatter_chart(
    series: Sequence[Series],
    *,
    xlabel: str,
    ylabel: str,
    base: tuple[float | None, float | None] = (None, None),
    product: str = "",
    is_drift: bool = False,
) -> Chart:
    """Points of trials. Dotted lines stand at `base`; filled points are those that validation questions chose.

    With `product`, a curve through the crossing of the lines has the same product of x and y, and this name. If x is
    drift, its axis is logarithmic where values differ much.
    """
    traces, xs = [], [x for one in series for x, _, _ in one.points]
    log, floor = _log_axis(xs) if is_drift else (False, 0.0)
    for one in series:
        colour, symbol = THEMED.get(one.colour, one.colour), _SYMBOLS[one.marker]
        ids = one.ids or [-1] * len(one.points)
        for chosen in (False, True):
            found = [(max(x, floor), y, i) for (x, y, c), i in zip(one.points, ids, strict=True) if c is chosen]
            if not found:
                continue
            x, y, i = zip(*found, strict=True)
            size = (11 if one.large else 8) if chosen else 7
            edge = {"color": "--paper", "width": 1} if chosen else {"color": colour, "width": 1.3}
            look = {"color": colour, "symbol": symbol if chosen else f"{symbol}-open", "size": size, "line": edge,
                    "opacity": 1 if one.large else 0.8}  # fmt: skip
            more = {"customdata": list(i)} if one.ids else {}
            name, is_only = escape(one.label), chosen or not any(c for _, _, c in one.points)
            traces.append(
                {"type": "scatter", "mode": "markers", "name": name, "x": rounded(x), "y": rounded(y), "marker": look,
                 "cliponaxis": False, "legendgroup": name, "showlegend": is_only, **more}
            )  # fmt: skip
        if one.frontier and one.points:
            x, y = zip(*frontier([(max(x, floor), y) for x, y, _ in one.points]), strict=True)
            traces.append(_line(rounded(x), rounded(y), "", colour))
    if product and base[0] and base[1]:
        ends = [*xs, base[0]]
        curve = np.linspace(max(min(ends), 1e-3), max(ends), 100)
        traces.append(_line(rounded(curve), rounded(base[0] * base[1] / curve), escape(product), "--faint"))
    shapes = [
        {"type": "line", f"{a}0": value, f"{a}1": value, f"{b}0": 0, f"{b}1": 1, f"{b}ref": "paper",
         "layer": "below", "line": {"color": "--ink", "dash": "dot", "width": 1.2}}
        for a, b, value in (("x", "y", base[0]), ("y", "x", base[1])) if value is not None
    ]  # fmt: skip
    across = _axis(xlabel) | ({"type": "log", "dtick": "D2"} if log else {})
    layout = {"xaxis": across, "yaxis": _axis(ylabel), "shapes": shapes}
    return {"data": traces, "layout": layout}


def _log_axis(drifts: Sequence[float]) -> tuple[bool, float]:
    """Whether KL needs a logarithmic axis, and the smallest value there: smaller ones are drawn at its left end."""
    positive = [x for x in drifts if x >= SMALLEST_KL]
    if not positive or max(positive) < 10 * min(positive):
        return False, -math.inf
    return True, 10.0 ** math.floor(math.log10(min(positive)))


def _axis(title: str) -> Chart:
    return {"title": {"text": escape(title)}}


def _line(x: Sequence[float], y: Sequence[float], name: str, colour: str, width: float = 1.2, dash: str = "") -> Chart:
    """A trace; without a name it is not in the legend."""
    look = {"color": colour, "width": width, **({"dash": dash} if dash else {})}
    return {"type": "scatter", "mode": "lines", "x": list(x), "y": list(y), "name": name, "line": look,
            "showlegend": bool(name), "hoverinfo": "name" if name else "skip"}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One line of `line_chart`."""

    label: str
    """Text in the legend; empty for no entry."""
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    dash: str = ""
    wide: bool = True


def line_chart(lines: Sequence[Line], *, xlabel: str, ylabel: str, log: bool = False) -> Chart:
    """Lines over a common x axis. Later lines are drawn over earlier ones.

    Thin lines may leave the chart at the top, so that one outlier does not flatten the others.
    """
    traces = [
        _line(rounded(one.x), rounded(one.y), escape(one.label), THEMED.get(one.colour, one.colour),
              2.2 if one.wide else 1, one.dash)
        | ({"mode": "lines+markers"} if len(one.x) <= 12 else {}) | {"opacity": 1 if one.wide else 0.55}
        for one in lines
    ]  # fmt: skip
    wide, thin = ([y for one in lines if one.wide is is_wide for y in one.y] for is_wide in (True, False))
    top = max(wide, default=0.0)
    low = min([*wide, *thin], default=0.0)
    cut = {"range": [low - 0.05 * (3 * top - low), 3 * top]} if top > 0 and max(thin, default=0.0) > 4 * top else {}
    layout = {"xaxis": _axis(xlabel) | ({"type": "log"} if log else {}), "yaxis": _axis(ylabel) | cut}
    return {"data": traces, "layout": layout}


def _blend(stops: Sequence[str], x: float) -> str:
    """The colour at a share x of the scale between its stops."""
    known = np.asarray([[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in stops], dtype=float)
    rgb = (round(float(np.interp(x, np.linspace(0, 1, len(stops)), channel))) for channel in known.T)
    return "#" + "".join(f"{channel:02x}" for channel in rgb)


def heat_chart(heat: HeatMap, outlined: Collection[Sequence[int]], *, floor: float | None = None) -> Chart:
    """A value for every head: layers across, heads upwards. `outlined` heads have a border.

    The colour scale begins at `floor` if that is given. Cells are bars of height 1, since Plotly's smallest bundle has
    no heat maps. Heads without a value are left out.
    """
    values = np.asarray(heat.values, dtype=float)
    diverges = "vmin" in heat.colours
    low, high = (heat.colours[x] for x in ("vmin", "vmax")) if diverges else (np.nanmin(values), np.nanmax(values))
    low = low if floor is None else min(floor, low)
    stops = _DIVERGING if diverges else _RISING
    scale = [[i / (len(stops) - 1), stop] for i, stop in enumerate(stops)]
    bar = {"title": {"text": escape(heat.label), "side": "right"}, "thickness": 12, "outlinewidth": 0}
    marker = {"color": [float(low)], "cmin": float(low), "cmax": float(high), "colorscale": scale, "colorbar": bar}
    traces: list[Chart] = [{"type": "scatter", "mode": "markers", "x": [None], "y": [None], "showlegend": False,
                            "hoverinfo": "skip", "marker": {**marker, "showscale": True}}]  # fmt: skip
    border = {tuple(one) for one in outlined}
    for is_claimed in (False, True):
        cells = [at for at in np.ndindex(*values.shape) if (at in border) is is_claimed and math.isfinite(values[at])]
        if not cells:
            continue
        layers, heads = zip(*cells, strict=True)
        at = [float((values[cell] - low) / (high - low or 1)) for cell in cells]
        edge = {"color": ARM_COLOURS["claim"], "width": 3} if is_claimed else {"color": "--paper", "width": 0.5}
        marker = {"color": [_blend(stops, x) for x in at], "line": edge}
        hover = "layer %{x}, head %{customdata[0]}: %{customdata[1]}<extra></extra>"
        told = [[head, f"{values[cell]:.3f}"] for head, cell in zip(heads, cells, strict=True)]
        traces.append(
            {"type": "bar", "x": list(layers), "y": [1] * len(cells), "base": [h - 0.5 for h in heads],
             "customdata": told, "width": 1, "marker": marker, "hovertemplate": hover, "showlegend": False}
        )  # fmt: skip
    axes = {
        f"{axis}axis": _axis(title)
        | {"showgrid": False, "zeroline": False, "range": [-0.5, n - 0.5], "tick0": 0, "dtick": -(-n // 12)}
        for axis, title, n in zip("xy", ("layer", "head"), values.shape, strict=True)
    }
    return {"data": traces, "layout": {**axes, "barmode": "overlay", "bargap": 0}}
