"""Charts: figures for Plotly as plain values, for pages, notebooks (`plots`) and papers (`figures`).

A colour that begins with ``--`` is the name of a CSS property, so that it follows the page's light or dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from locaudit.report.style import ARM_COLOURS, FAINT, INK, MIDDLE, PAPER

Chart = dict[str, Any]
"""A Plotly figure: ``data`` (traces) and ``layout``."""
THEMED: Mapping[str, str] = {
    INK: "--ink", PAPER: "--paper", FAINT: "--faint", MIDDLE: "--faint", ARM_COLOURS["control"]: "--control",
}  # fmt: skip
SYMBOLS: Mapping[str, str] = {
    "o": "circle", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "P": "cross", "X": "x", "*": "star",
    "s": "square",
}  # fmt: skip
"""Matplotlib's markers as Plotly's symbols."""
SMALLEST_KL = 1e-5
"""Where drifts differ much, smaller ones (nats per token) are drawn at the left end of a logarithmic axis."""
_RISING = ("#00224e", "#2a406c", "#575d6d", "#7d7c78", "#a59c74", "#d2c060", "#fee838")
"""Colours from low to high that people with colour vision deficiencies can order (cividis, Nuñez et al. 2018)."""
_DIVERGING = ("#b35806", "#fdb863", "#f7f7f7", "#92c5de", "#2166ac")
"""Colours from a loss to a gain."""


_LIGHT = {name: colour for colour, name in reversed(THEMED.items())}
"""CSS property -> its colour on paper."""


@dataclass(frozen=True)
class Series:
    """Trials with the same look in a scatter plot."""

    label: str
    colour: str
    marker: str
    """A key of `SYMBOLS`."""
    points: Sequence[tuple[float, float, bool]] = ()
    """(x, y, whether validation questions chose this trial for its location). Chosen points are filled."""
    large: bool = True
    frontier: bool = False
    """Whether to connect the points of the series' Pareto frontier (`frontier`)."""
    ids: Sequence[int] = ()
    """Number of each point's trial in the table of trials of a page; empty without one."""
    intervals: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """Number of a trial -> the interval of its y, drawn as a bar."""


@dataclass(frozen=True)
class HeatMap:
    """One value for every head."""

    values: ArrayLike
    """(layers, heads); NaN where there is none."""
    label: str
    reach: float | None = None
    """Colours diverge from 0 to -reach and reach; None: they rise from the smallest to the largest value."""


def themed(colour: str) -> str:
    """The colour, or the name of its CSS property if it follows the theme."""
    return THEMED.get(colour, colour)


def css(colour: str) -> str:
    """The colour in a style sheet."""
    name = themed(colour)
    return f"var({name})" if name.startswith("--") else name


def resolve(value: Any) -> Any:
    """The value with colours in the place of the names of CSS properties."""
    if isinstance(value, dict):
        return {key: resolve(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [resolve(item) for item in value]
    return _LIGHT.get(value, value) if isinstance(value, str) else value


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats in both coordinates (the Pareto frontier), sorted by x."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(set(points), reverse=True):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best[::-1]


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
    drift, its axis is logarithmic where values differ much. Raises `ValueError` if there are no points.
    """
    if not any(one.points for one in series):
        raise ValueError("got no points; expected at least one trial; draw this once an edit is scored")
    traces, xs = [], [x for one in series for x, _, _ in one.points]
    log, floor = _log_axis(xs) if is_drift else (False, 0.0)
    for one in series:
        colour, symbol = themed(one.colour), SYMBOLS[one.marker]
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
            more: Chart = {"customdata": list(i)} if one.ids else {}
            if ends := {k: one.intervals[trial] for k, trial in enumerate(i) if trial in one.intervals}:
                more["error_y"] = _bars(y, ends)
            name, is_only = escape(one.label), chosen or not any(c for _, _, c in one.points)
            traces.append(
                {"type": "scatter", "mode": "markers", "name": name, "x": rounded(x), "y": rounded(y), "marker": look,
                 "cliponaxis": False, "legendgroup": name, "showlegend": is_only, **more}
            )  # fmt: skip
        if one.frontier and one.points:
            x, y = zip(*frontier([(max(x, floor), y) for x, y, _ in one.points]), strict=True)
            traces.append(line_trace(rounded(x), rounded(y), "", colour))
    if product and base[0] and base[1]:
        ends, top = [*xs, base[0]], max(base[1], *(y for one in series for _, y, _ in one.points))
        curve = np.linspace(max(min(ends), base[0] * base[1] / top), max(ends), 100)
        traces.append(line_trace(rounded(curve), rounded(base[0] * base[1] / curve), escape(product), "--faint"))
    shapes = [
        {"type": "line", f"{a}0": value, f"{a}1": value, f"{b}0": 0, f"{b}1": 1, f"{b}ref": "paper",
         "layer": "below", "line": {"color": "--ink", "dash": "dot", "width": 1.2}, "name": "unedited model"}
        for a, b, value in (("x", "y", base[0]), ("y", "x", base[1])) if value is not None
    ]  # fmt: skip
    across = axis_of(xlabel) | ({"type": "log", "dtick": "D2"} if log else {})
    layout = {"xaxis": across, "yaxis": axis_of(ylabel), "shapes": shapes}
    return {"data": traces, "layout": layout}


def _log_axis(drifts: Sequence[float]) -> tuple[bool, float]:
    """Whether KL needs a logarithmic axis, and the smallest value there: smaller ones are drawn at its left end."""
    positive = [x for x in drifts if x >= SMALLEST_KL]
    if not positive or max(positive) < 10 * min(positive):
        return False, -math.inf
    return True, 10.0 ** math.floor(math.log10(min(positive)))


def axis_of(title: str) -> Chart:
    """An axis with this title, which may have several lines."""
    return {"title": {"text": escape(title).replace("\n", "<br>")}}


def _bars(y: Sequence[float], ends: Mapping[int, tuple[float, float]]) -> Chart:
    """Bars from y to the ends of its interval; none where there are no ends."""
    pairs = [ends.get(k, (value, value)) for k, value in enumerate(y)]
    up, down = zip(*((high - value, value - low) for (low, high), value in zip(pairs, y, strict=True)), strict=True)
    return {"type": "data", "symmetric": False, "array": rounded(up), "arrayminus": rounded(down), "width": 0}


def line_trace(
    x: Sequence[float], y: Sequence[float], name: str, colour: str, width: float = 1.2, dash: str = ""
) -> Chart:
    """A line; without a name it is not in the legend."""
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
    intervals: Sequence[tuple[float, float]] = ()
    """The interval of each y; empty for none."""


def line_chart(lines: Sequence[Line], *, xlabel: str, ylabel: str, log: bool = False) -> Chart:
    """Lines over a common x axis. Later lines are drawn over earlier ones.

    Thin lines may leave the chart at the top, so that one outlier does not flatten the others.
    """
    traces = [
        line_trace(rounded(one.x), rounded(one.y), escape(one.label), themed(one.colour),
                   2.2 if one.wide else 1, one.dash)
        | ({"mode": "lines+markers"} if len(one.x) <= 12 else {}) | {"opacity": 1 if one.wide else 0.55}
        | ({"error_y": _bars(one.y, dict(enumerate(one.intervals)))} if one.intervals else {})
        for one in lines
    ]  # fmt: skip
    wide, thin = ([y for one in lines if one.wide is is_wide for y in one.y] for is_wide in (True, False))
    top = max(wide, default=0.0)
    low = min([*wide, *thin], default=0.0)
    cut = {"range": [low - 0.05 * (3 * top - low), 3 * top]} if top > 0 and max(thin, default=0.0) > 4 * top else {}
    layout = {"xaxis": axis_of(xlabel) | ({"type": "log"} if log else {}), "yaxis": axis_of(ylabel) | cut}
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
    low, high = (np.nanmin(values), np.nanmax(values)) if heat.reach is None else (-heat.reach, heat.reach)
    low = low if floor is None else min(floor, low)
    stops = _RISING if heat.reach is None else _DIVERGING
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
        name = {"name": f"claim ({len(cells)})", "showlegend": True} if is_claimed else {"showlegend": False}
        traces.append(
            {"type": "bar", "x": list(layers), "y": [1] * len(cells), "base": [h - 0.5 for h in heads],
             "customdata": told, "width": 1, "marker": marker, "hovertemplate": hover, **name}
        )  # fmt: skip
    axes = {
        f"{axis}axis": axis_of(title)
        | {"showgrid": False, "zeroline": False, "range": [-0.5, n - 0.5], "tick0": 0, "dtick": -(-n // 12)}
        for axis, title, n in zip("xy", ("layer", "head"), values.shape, strict=True)
    }
    return {"data": traces, "layout": {**axes, "barmode": "overlay", "bargap": 0}}
