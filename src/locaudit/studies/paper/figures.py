"""The drawing of a study's figures, from its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from locaudit.report.figures import N_BINS, new_figure
from locaudit.report.scatter import scale_kl, share_limits
from locaudit.report.style import ARM_COLOURS, INK, PAPER, house_style, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Numbers = Mapping[str, Any]
LOCALIZED, RANDOM, WHOLE = ARM_COLOURS["claim"], ARM_COLOURS["control"], ARM_COLOURS["whole"]
SINGLE, BEST = "#CC79A7", "#E69F00"
"""More of Okabe and Ito's palette."""


@dataclass(frozen=True)
class Series:
    """Trials that belong together in a scatter plot."""

    label: str
    colour: str
    marker: str
    points: tuple[tuple[float, float, bool], ...]
    """(x, y, whether validation chose it for its location)."""
    large: bool = True
    frontier: bool = False
    """Connect the points that no other of the series beats in both coordinates."""


def draw_truth_info(n: Numbers, series: Sequence[Series]) -> Figure:
    """Truth against Info."""
    with house_style():
        figure = new_figure(4.8)
        axis = figure.subplots()
        info, truth = n["base"]["info"], n["base"]["truth"]
        _scatter(axis, series)
        axis.axvline(info, color=INK, linestyle=":", linewidth=1.2, zorder=1)
        axis.axhline(truth, color=INK, linestyle=":", linewidth=1.2, zorder=1)
        x = share_limits([info, *(p[0] for s in series for p in s.points)])
        y = share_limits([truth, *(p[1] for s in series for p in s.points)])
        if info * truth > 0:
            across = np.linspace(max(x[0], 1e-3), x[1], 300)
            axis.plot(across, info * truth / across, color="#8c8c8c", linewidth=0.9, zorder=1)
        axis.grid(color="#8c8c8c", alpha=0.25, linewidth=0.6)
        axis.set(xlim=x, ylim=y, xlabel="Info on test", ylabel="Truth on test")
        _legend(figure, series, has_curve=info * truth > 0)
    return figure


def draw_kl_mc(n: Numbers, series: Sequence[Series]) -> Figure:
    """MC2 against KL."""
    with house_style():
        figure = new_figure(4.3)
        axis = figure.subplots()
        _scatter(axis, series)
        axis.axhline(n["base"]["mc2"], color=INK, linestyle=":", linewidth=1.2, zorder=1)
        axis.grid(axis="y", color="#8c8c8c", alpha=0.25, linewidth=0.6)
        scale_kl(axis, [p[0] for s in series for p in s.points])
        axis.set(xlabel="KL drift from the unedited model (nats per token)", ylabel="MC2 on test")
        _legend(figure, series)
    return figure


def _scatter(axis: Any, series: Sequence[Series]) -> None:
    for depth, one in enumerate(series):
        size = 60 if one.large else 26
        for chosen in (False, True):
            points = [p for p in one.points if p[2] is chosen]
            style: dict[str, Any] = (
                {"s": size, "facecolors": one.colour, "edgecolors": PAPER, "linewidths": 0.7}
                if chosen
                else {"s": 0.6 * size, "facecolors": "none", "edgecolors": one.colour, "linewidths": 0.9, "alpha": 0.7}
            )
            axis.scatter(
                [p[0] for p in points], [p[1] for p in points], marker=one.marker,
                zorder=3 + 2 * depth + chosen, **style,
            )  # fmt: skip
        if one.frontier:
            edge = frontier([(x, y) for x, y, _ in one.points])
            axis.plot(*zip(*edge, strict=True), color=one.colour, linewidth=1.1, alpha=0.8, zorder=2) if edge else None


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in one coordinate without losing in the other, by the first coordinate."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(set(points), reverse=True):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best[::-1]


def _legend(figure: Figure, series: Sequence[Series], *, has_curve: bool = False) -> None:
    line = require("matplotlib.lines").Line2D
    handles = [
        line([], [], linestyle="", markersize=6.5, marker=s.marker, color=s.colour, label=s.label) for s in series
    ]
    handles.append(line([], [], color=INK, linestyle=":", linewidth=1.2, label="unedited model"))
    if has_curve:
        handles.append(line([], [], color="#8c8c8c", linewidth=0.9, label="its Info*Truth"))
    if any(not p[2] for s in series for p in s.points):
        mark: dict[str, Any] = {"linestyle": "", "markersize": 6.5, "marker": "o", "color": "#7d7d7d"}
        handles.append(line([], [], markerfacecolor="none", label="hyperparameter not chosen", **mark))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, handletextpad=0.4, columnspacing=1.6)


def draw_histogram(n: Numbers, method: Numbers, what: str, title: str) -> Figure:
    """Scores at random sets, with the localized heads, the whole model and the unedited model as lines."""
    lines = [
        ("unedited model", n["base"]["info_truth"], INK, ":"),
        ("whole model", _chosen(method["whole"]), WHOLE, "--"),
        (f"{n['setup']['n_localized']} probed heads", method["localized_score"], LOCALIZED, "-"),
    ]
    return _histogram_of(method["random_scores"], lines, RANDOM, what, title)


def draw_single_heads(n: Numbers) -> Figure:
    """Scores at random single heads, with lines as in `draw_histogram` and one for the best probed head."""
    single = n["single"]
    lines = [
        ("unedited model", n["base"]["info_truth"], INK, ":"),
        ("whole model", single["whole_score"], WHOLE, "--"),
        ("best probed head", single["best_probed"]["score"], BEST, "-."),
        (f"{n['setup']['n_localized']} probed heads", single["localized_score"], LOCALIZED, "-"),
    ]
    scores = [row["score"] for row in single["random"]]
    return _histogram_of(scores, lines, SINGLE, "random single heads", "Optimal edit")


def _histogram_of(
    scores: Sequence[float | None], lines: Sequence[tuple[str, float | None, str, str]], colour: str, what: str,
    title: str,
) -> Figure:  # fmt: skip
    """Scores at random locations as bars and a dot each, other arms as lines."""
    with house_style():
        figure = new_figure(3.6)
        axis = figure.subplots()
        finite = np.sort([x for x in scores if x is not None and math.isfinite(x)])
        known = [(label, x, c, style) for label, x, c, style in lines if x is not None and math.isfinite(x)]
        values = [*finite, *(x for _, x, _, _ in known)]
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        room = max(high - low, 1e-3) / N_BINS * 2
        edges = np.linspace(low - room, high + room, N_BINS + 1)
        counts, _, _ = axis.hist(finite, bins=edges.tolist(), color=colour, alpha=0.55, linewidth=0)
        tallest = max(1, int(np.max(counts)))
        heights = -tallest * (0.06 + 0.05 * (np.arange(finite.size) % 3))
        axis.scatter(finite, heights, s=11, color=colour, linewidth=0, zorder=4)
        axis.axhline(0, color="#8c8c8c", linewidth=0.5)
        patches, line = require("matplotlib.patches"), require("matplotlib.lines").Line2D
        handles: list[Any] = [patches.Patch(color=colour, alpha=0.55, linewidth=0, label=f"{what} (a dot each)")]
        for label, x, c, style in known:
            axis.axvline(x, color=c, linestyle=style, linewidth=1.8, zorder=3)
            handles.append(line([], [], color=c, linestyle=style, linewidth=1.8, label=label))
        ticker = require("matplotlib.ticker")
        ticks = ticker.MaxNLocator(5, integer=True).tick_values(0, tallest)
        axis.set(
            xlabel="Info*Truth on test", ylabel=what, xlim=(edges[0], edges[-1]),
            ylim=(-0.24 * tallest, 1.06 * tallest), yticks=[y for y in ticks if 0 <= y <= tallest],
        )  # fmt: skip
        axis.set_title(title, loc="left")
        columns = len(handles) if len(handles) <= 4 else 3
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.6)
    return figure


def draw_probe_effect(n: Numbers) -> Figure:
    """Effect of single heads' edits against the accuracy of their probes."""
    with house_style():
        figure = new_figure(3.6)
        best = n["single"]["best_probed"]["head"]
        for axis, (score, title) in zip(
            figure.subplots(1, 2), (("info_truth", "Info*Truth"), ("mc2", "MC2")), strict=True
        ):
            found = n["probe_effect"][score]
            colours = [BEST if head == best else SINGLE for head in found["heads"]]
            axis.scatter(found["val_accuracy"], found["effects"], c=colours, s=34, edgecolors=PAPER, linewidths=0.7)
            axis.axhline(0, color=INK, linestyle=":", linewidth=1.2, zorder=1)
            axis.set(xlabel="probe accuracy on validation", ylabel=f"{title}, edited minus unedited")
            words = f"Spearman {small(found['spearman'])}, p = {small(found['p'])}"
            axis.set_title(f"{title}: {words}, n = {found['n']}", loc="left")
            axis.grid(color="#8c8c8c", alpha=0.25, linewidth=0.6)
        line = require("matplotlib.lines").Line2D
        handles = [
            line([], [], linestyle="", marker="o", color=colour, label=label)
            for colour, label in ((SINGLE, "random single heads"), (BEST, "best probed head"))
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def draw_landscape(n: Numbers) -> Figure:
    """Two heat maps, layers across: probe accuracy, and effect of the optimal edit."""
    with house_style():
        accuracy = np.asarray(n["setup"]["probes"]["val_accuracy"], dtype=float)
        effects = np.asarray(n["landscape"]["info_truth"]["effects"], dtype=float)
        figure = new_figure(6.4)
        reach = max(float(np.nanmax(np.abs(effects))), 1e-6)
        rectangle = require("matplotlib.patches").Rectangle
        axes = figure.subplots(2, 1, sharex=True)
        for axis, values, label, style in zip(
            axes, (accuracy, effects), ("probe accuracy", "Info*Truth gained"),
            ({"cmap": "cividis"}, {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach}), strict=True,
        ):  # fmt: skip
            mesh = axis.pcolormesh(values.T, edgecolors=PAPER, linewidth=0.4, **style)
            for layer, head in claimed_heads(n["setup"]):
                axis.add_patch(rectangle((layer, head), 1, 1, fill=False, edgecolor=LOCALIZED, linewidth=1.6))
            axis.set(ylabel="head")
            bar = figure.colorbar(mesh, ax=axis, pad=0.02, fraction=0.05)
            bar.outline.set_visible(False)
            bar.set_label(label)
        axes[-1].set(xlabel="layer")
    return figure


def claimed_heads(setup: Numbers) -> list[tuple[int, int]]:
    """(layer, head) pairs of the localized heads."""
    pairs = (row["head"].split(".") for row in setup["localized"])
    return [(int(layer), int(head)) for layer, head in pairs]


def _chosen(block: Numbers | None) -> float | None:
    return None if block is None or block["chosen"] is None else block["chosen"]["info_truth"]


def small(value: float | None) -> str:
    """Two digits for reading."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.2g}".replace("-", "−")
