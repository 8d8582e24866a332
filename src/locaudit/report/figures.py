"""Functions that draw figures from plain values: spreads, scatter plots and heat maps. Each returns a `Figure`.

`locaudit.report.drawings` and `locaudit.studies.paper.figures` decide what is drawn; `style.save` writes the files.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from locaudit.report.style import ARM_COLOURS, FAINT, INK, MIDDLE, PAPER, house_style, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 7.5
"""Width of every figure, in inches."""
N_BINS = 36
"""Number of bins over the whole axis of a histogram. Bars are equally wide in all panels."""
SMALLEST_KL = 1e-5
"""Below this KL drift (nats per token), the axis is linear instead of logarithmic, so that 0 can be shown."""
_HALO = "#fffffe"
"""White that stays white in dark mode, like the colour map behind it."""


@dataclass(frozen=True)
class Mark:
    """A score drawn as a vertical line over the distribution of the controls' scores."""

    label: str
    value: float | None
    """The score; not drawn if it is None or NaN."""
    colour: str
    style: str
    """Matplotlib's name of the line style."""


@dataclass(frozen=True)
class Spread:
    """One panel: scores at random places and the scores they are compared with."""

    title: str
    scores: Sequence[float | None]
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Series:
    """Trials with the same look in a scatter plot. A series without points is only an entry in the legend."""

    label: str
    """Text in the legend; empty for no entry."""
    colour: str
    marker: str
    points: Sequence[tuple[float, float, bool]] = ()
    """(x, y, whether validation questions chose this trial for its location). Chosen points are filled."""
    large: bool = True
    frontier: bool = False
    """Whether to connect the points of the series' Pareto frontier (`frontier`)."""
    ids: Sequence[int] = ()
    """Number of each point's trial in the table of trials of a page; empty without one."""


@dataclass(frozen=True)
class HeatMap:
    """One value for every head."""

    values: ArrayLike
    """(layers, heads)."""
    label: str
    colours: Mapping[str, Any] = field(default_factory=lambda: {"cmap": "cividis"})
    """Colour map and its limits, as arguments of `pcolormesh`."""


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


def draw_spreads(
    panels: Sequence[Spread], *, xlabel: str, what: str, colour: str, height: float = 3.4, columns: int | None = None
) -> Figure:
    """Draw scores as a histogram and as dots, and marks as lines. Panels share their axes.

    They stand in rows of `columns` panels, or in one row. Dots of equal scores hang below each other, and of equal
    marks the last is drawn on top.

    Raises `ValueError` for no panels.
    """
    if not panels:
        raise ValueError("got nothing to draw; expected at least one panel; draw this figure once a claim is scored")
    with house_style():
        columns = columns or len(panels)
        rows = -(-len(panels) // columns)
        figure = new_figure(height + (rows - 1) * (height - 1))
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        edges = _bin_edges([x for p in panels for x in (*_finite(p.scores), *_finite(m.value for m in p.marks))])
        counts = [np.histogram(_finite(panel.scores), bins=edges)[0] for panel in panels]
        tallest = max(1, int(np.max(counts)))
        dot = (edges[-1] - edges[0]) * 4.5 * columns / (0.85 * WIDTH * 72)  # width of a dot with a gap, on the x axis
        levels = [np.asarray(stack_dots(_finite(panel.scores).tolist(), dot), dtype=float) for panel in panels]
        deepest = max([2.0, *(x for one in levels for x in one)])
        step = min(0.05, 0.4 / deepest)
        for axis, panel, depth in zip(axes, panels, levels, strict=False):
            scores = _finite(panel.scores)
            axis.hist(scores, bins=edges, color=colour, alpha=0.55, linewidth=0)
            heights = -tallest * (0.06 + step * depth)
            axis.scatter(scores, heights, s=11, color=colour, linewidth=0, zorder=2.5, clip_on=False)
            axis.axhline(0, color=FAINT, linewidth=0.5)
            for i, mark in enumerate(panel.marks):
                if _finite([mark.value]).size:
                    look = {"color": mark.colour, "linestyle": mark.style, "linewidth": 1.8 - 0.3 * i}
                    axis.axvline(mark.value, zorder=3 + 0.1 * i, **look)
            axis.set_title(panel.title, loc="left", linespacing=1.4)
            axis.set(xlabel=xlabel, xlim=(edges[0], edges[-1]))
        ticker = require("matplotlib.ticker")
        axes[0].xaxis.set_major_locator(ticker.MaxNLocator(6))
        ticks = ticker.MaxNLocator(5, integer=True).tick_values(0, tallest)
        axes[0].set(
            ylim=(-(0.14 + step * deepest) * tallest, 1.06 * tallest), yticks=[y for y in ticks if 0 <= y <= tallest]
        )
        for axis in axes[::columns]:
            axis.set_ylabel(what)
        bars = require("matplotlib.patches").Patch(color=colour, alpha=0.55, linewidth=0, label=f"{what} (a dot each)")
        seen = {m.label: m for panel in panels for m in panel.marks if m.value is not None}
        lines = [line_key(mark.label, mark.colour, linestyle=mark.style) for mark in seen.values()]
        add_legend(figure, [bars, *lines])
    return figure


def _finite(values: Any) -> np.ndarray:
    return np.sort([x for x in values if x is not None and math.isfinite(x)])


def _bin_edges(values: Sequence[float]) -> np.ndarray:
    """Equal bins over all values on the axis, with a margin of two bins at each end."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    reach = max(high - low, 1e-3) / 2 * N_BINS / (N_BINS - 4)
    return np.linspace((low + high) / 2 - reach, (low + high) / 2 + reach, N_BINS + 1)


def draw_drift(series: Sequence[Series], *, ylabel: str, base: float, on: str = "") -> Figure:
    """A score (y) against KL drift (x, nats per token); the dotted line is the unedited model's score, `base`.

    `on` says what KL is measured on, if that is not running text.
    """
    with house_style():
        figure = new_figure(4.3)
        axis = figure.subplots()
        scatter(axis, series)
        axis.axhline(base, color=INK, linestyle=":", linewidth=1.2, zorder=1)
        axis.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
        _scale_kl(axis, [x for one in series for x, _, _ in one.points])
        axis.set(xlabel=f"KL drift from the unedited model{on and ' ' + on} (nats per token)", ylabel=ylabel)
        _scatter_legend(figure, series)
    return figure


def draw_shares(
    series: Sequence[Series], *, titles: tuple[str, str], base: tuple[float, float], product: str
) -> Figure:
    """Two shares of answers against each other; `titles` has the titles of the x and y axes.

    Dotted lines cross at the unedited model, `base`. On the curve, the product of the two shares is that of the
    unedited model.
    """
    with house_style():
        figure = new_figure(4.8)
        axis = figure.subplots()
        scatter(axis, series)
        axis.grid(color=FAINT, alpha=0.25, linewidth=0.6)
        axis.axvline(base[0], color=INK, linestyle=":", linewidth=1.2, zorder=1)
        axis.axhline(base[1], color=INK, linestyle=":", linewidth=1.2, zorder=1)
        xlim, ylim = (_share_limits([base[i], *(p[i] for one in series for p in one.points)]) for i in (0, 1))
        curve = base[0] * base[1]
        if curve > 0:
            across = np.linspace(max(xlim[0], 1e-3), xlim[1], 300)
            axis.plot(across, curve / across, color=FAINT, linewidth=0.9, zorder=1)
        axis.set(xlim=xlim, ylim=ylim, xlabel=f"{titles[0]} on test", ylabel=f"{titles[1]} on test")
        _scatter_legend(figure, series, [line_key(f"unedited {product}", FAINT, linewidth=0.9)] if curve > 0 else [])
    return figure


def scatter(axis: Any, series: Sequence[Series]) -> None:
    """Draw series of points. Later series are drawn over earlier ones, and chosen trials over the others.

    Raises `ValueError` if there are no points.
    """
    if not any(one.points for one in series):
        raise ValueError("got no points; expected at least one trial; draw this figure once an edit is scored")
    for depth, one in enumerate(series):
        size = 60 if one.large else 26
        filled: dict[str, Any] = {"s": size, "facecolors": one.colour, "edgecolors": PAPER, "linewidths": 0.7}
        empty = {"s": 0.6 * size, "facecolors": "none", "edgecolors": one.colour, "linewidths": 0.9, "alpha": 0.6}
        for chosen, look in ((False, empty), (True, filled)):
            points = np.reshape([p[:2] for p in one.points if p[2] is chosen], (-1, 2))
            order = 3 + depth + len(series) * chosen
            axis.scatter(*points.T, marker=one.marker, zorder=order, clip_on=False, **look)
        if one.frontier and one.points:
            edge = frontier([(x, y) for x, y, _ in one.points])
            axis.plot(*zip(*edge, strict=True), color=one.colour, linewidth=1.1, alpha=0.8, zorder=2)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats in both coordinates (the Pareto frontier), sorted by x."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(set(points), reverse=True):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best[::-1]


def _share_limits(values: Sequence[float]) -> tuple[float, float]:
    """Axis limits: the part of [0, 1] that the values cover, with room for a marker at both ends."""
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), 0.03)
    return max(low - room, -0.03), min(high + room, 1.03)


def _scale_kl(axis: Any, drifts: Sequence[float]) -> None:
    """Make the x axis logarithmic if drifts differ much. If one is below `SMALLEST_KL`, the axis is linear near 0."""
    positive = [x for x in drifts if x >= SMALLEST_KL]
    if not positive or (min(positive) == min(drifts) and max(positive) < 10 * min(positive)):
        return
    low = 10.0 ** math.floor(math.log10(min(positive)))
    if min(positive) == min(drifts):
        axis.set_xscale("log")
    else:
        axis.set_xscale("symlog", linthresh=low, linscale=0.5)
        axis.set_xlim(left=min(-0.15 * low, 1.2 * min(drifts)))


def _scatter_legend(figure: Figure, series: Sequence[Series], more: Sequence[Any] = ()) -> None:
    keys = [marker_key(one.label, one.colour, one.marker) for one in series if one.label]
    keys += [line_key("unedited model", INK, linestyle=":", linewidth=1.2), *more]
    if not all(chosen for one in series for _, _, chosen in one.points):
        keys.append(marker_key("hyperparameter not chosen", MIDDLE, "o", markerfacecolor="none"))
    add_legend(figure, keys)


def draw_heads(maps: Sequence[HeatMap], outlined: Collection[Sequence[int]], *, floor: float | None = None) -> Figure:
    """Heat maps of heads, one above the other: layers on the x axis, heads on the y axis.

    The (layer, head) pairs in `outlined` get an outline. The colour scale of the first map begins at `floor`, which is
    the accuracy of always guessing the larger class.
    """
    n_layers, n_heads = np.shape(maps[0].values)
    with house_style():
        rectangle, ticker = require("matplotlib.patches").Rectangle, require("matplotlib.ticker")
        figure = new_figure(min(6.0, len(maps) * (1.5 + 0.9 * WIDTH * n_heads / n_layers)))
        axes = figure.subplots(len(maps), 1, sharex=True, squeeze=False)[:, 0]
        cell = 0.85 * WIDTH * 72 / n_layers  # points
        line = min(1.8, max(1.0, 0.1 * cell))
        bars = []
        for axis, heat in zip(axes, maps, strict=True):
            values = np.asarray(heat.values, dtype=float)
            lowest = float(np.nanmin(values)) if floor is None else min(floor, float(np.nanmin(values)))
            mesh = axis.pcolormesh(
                np.arange(n_layers + 1) - 0.5,
                np.arange(n_heads + 1) - 0.5,
                values.T,
                edgecolors=PAPER,
                linewidth=0.5 if cell > 10 else 0,
                rasterized=values.size > 4_000,
                **{"vmin": lowest, **heat.colours},
            )
            # a pale outline under every coloured one makes it visible on dark and on light cells
            for zorder, colour, width in ((3, _HALO, 2.2 * line), (4, ARM_COLOURS["claim"], line)):
                look = {"fill": False, "edgecolor": colour, "linewidth": width, "zorder": zorder}
                for layer, head in outlined:
                    corner = (layer - 0.5, head - 0.5)
                    axis.add_patch(rectangle(corner, 1, 1, joinstyle="miter", clip_on=False, **look))
            axis.set(ylabel="head", aspect="equal" if n_heads * 3 > n_layers else "auto")
            for ticks in (axis.xaxis, axis.yaxis):
                ticks.set_major_locator(ticker.MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
            for spine in axis.spines.values():
                spine.set_visible(False)
            bars.append(figure.colorbar(mesh, ax=axis, pad=0.02, fraction=0.05, shrink=0.9))
            bars[-1].outline.set_visible(False)
            bars[-1].set_label(heat.label)
        axes[-1].set(xlabel="layer")
        keys: list[Any] = []
        if outlined:
            label = f"claimed head ({len(outlined)})"
            keys.append(rectangle((0, 0), 1, 1, fill=False, edgecolor=ARM_COLOURS["claim"], linewidth=1.5, label=label))
        if floor is not None:
            bars[0].ax.axhline(floor, color=_HALO, linewidth=1.6)
            keys.append(line_key(f"larger class alone: {floor:.3f} (pale line in the scale)", FAINT, linewidth=1.6))
        add_legend(figure, keys)
    return figure


def new_figure(height: float) -> Figure:
    """An empty figure of the standard width."""
    return require("matplotlib.figure").Figure(figsize=(WIDTH, height), layout="constrained")


def line_key(label: str, colour: str, **look: Any) -> Any:
    """An entry with a line for a legend."""
    return require("matplotlib.lines").Line2D([], [], **{"linewidth": 1.8, "color": colour, "label": label, **look})


def marker_key(label: str, colour: str, marker: str, **look: Any) -> Any:
    """An entry with a marker for a legend."""
    return line_key(label, colour, marker=marker, linestyle="", markersize=6.5, **look)


def add_legend(figure: Figure, keys: Sequence[Any]) -> None:
    """Add a legend below the figure, with up to four entries per row; no legend without entries."""
    if keys:
        columns = len(keys) if len(keys) <= 4 else 3 if len(keys) <= 6 else 4
        figure.legend(
            handles=list(keys), loc="outside lower center", ncols=columns, handletextpad=0.5, columnspacing=1.6
        )
