"""Figures of trials as points: what an edit gains against what it costs, and truth against information."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from locaudit.records import Arm, Method
from locaudit.report.figures import new_figure
from locaudit.report.style import (
    ARM_COLOURS,
    ARM_NAMES,
    INK,
    METHOD_TITLES,
    PAPER,
    house_style,
    require,
    score_title,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALLEST_KL = 1e-5
"""Nats per token: below this the axis of the KL drift is linear, so that 0 has a place on it."""
MARKERS: Mapping[str, str] = {"iti": "o", "optimal": "D"}


@dataclass(frozen=True)
class Point:
    """One edit in a figure."""

    arm: Arm
    method: Method
    x: float
    y: float
    chosen: bool
    """Whether validation chose this hyperparameter for its location."""


def draw_effect(points: Sequence[Point], score: str) -> Figure:
    """Effect on the test score (`y`) against KL drift (`x`, nats per token): every trial a point, chosen ones filled.

    Raises `ValueError` for no points.
    """
    with house_style():
        figure, axis = _scatter(points)
        axis.axhline(0, color=INK, linestyle=":", linewidth=1.2, zorder=1)
        axis.grid(axis="y", color="#8c8c8c", alpha=0.25, linewidth=0.6)
        scale_kl(axis, [p.x for p in points])
        axis.set(
            xlabel="KL drift from the unedited model (nats per token)",
            ylabel=f"{score_title(score)} on test, minus unedited",
        )
        _legend(figure, points, [])
    return figure


def draw_truth_info(points: Sequence[Point], base: tuple[float, float]) -> Figure:
    """Truth (`y`) against Info (`x`) on the test questions; `base` is the unedited model's (info, truth).

    The curve holds what has the unedited model's product of the two. Raises `ValueError` for no points.
    """
    with house_style():
        figure, axis = _scatter(points, height=4.8)
        axis.grid(color="#8c8c8c", alpha=0.25, linewidth=0.6)
        info, truth = base
        axis.axvline(info, color=INK, linestyle=":", linewidth=1.2, zorder=1)
        axis.axhline(truth, color=INK, linestyle=":", linewidth=1.2, zorder=1)
        limits = [share_limits([value, *values]) for value, values in ((info, [p.x for p in points]),
                                                                  (truth, [p.y for p in points]))]  # fmt: skip
        line = require("matplotlib.lines").Line2D
        handles = [line([], [], color=INK, linestyle=":", linewidth=1.2, label="unedited model")]
        if info * truth > 0:
            across = np.linspace(max(limits[0][0], 1e-3), limits[0][1], 300)
            axis.plot(across, info * truth / across, color="#8c8c8c", linewidth=0.9, zorder=1)
            handles.append(line([], [], color="#8c8c8c", linewidth=0.9, label="its Info*Truth"))
        axis.set(xlim=limits[0], ylim=limits[1], xlabel="Info on test", ylabel="Truth on test")
        _legend(figure, points, handles)
    return figure


def _scatter(points: Sequence[Point], height: float = 4.3) -> tuple[Figure, Any]:
    """Every trial a point: arms by colour, methods by marker, chosen ones filled."""
    if not points:
        raise ValueError("got no points; expected at least one trial; draw this figure once an edit is scored")
    figure = new_figure(height)
    axis = figure.subplots()
    # The many controls lie at the back, chosen trials before those that were not.
    for depth, (arm, chosen) in enumerate((a, c) for c in (False, True) for a in ("control", "rest", "whole", "claim")):
        for method, marker in MARKERS.items():
            group = [p for p in points if (p.arm, p.chosen, p.method) == (arm, chosen, method)]
            axis.scatter(
                [p.x for p in group], [p.y for p in group], marker=marker, zorder=2 + depth,
                **_mark(arm, chosen, 60 if arm != "control" else 26),
            )  # fmt: skip
    return figure, axis


def share_limits(values: Sequence[float]) -> tuple[float, float]:
    """The part of 0 .. 1 that is needed, with room for a marker at both ends."""
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), 0.03)
    return max(low - room, -0.03), min(high + room, 1.03)


def _mark(arm: str, chosen: bool, size: float) -> dict[str, Any]:
    colour = ARM_COLOURS[arm]
    if chosen:
        return {"s": size, "facecolors": colour, "edgecolors": PAPER, "linewidths": 0.7}
    return {"s": 0.6 * size, "facecolors": "none", "edgecolors": colour, "linewidths": 0.9, "alpha": 0.6}


def scale_kl(axis: Any, drifts: Sequence[float]) -> None:
    """A logarithmic axis for drifts that differ much, with a place for 0 if one is below `SMALLEST_KL`."""
    positive = [x for x in drifts if x >= SMALLEST_KL]
    if not positive or (min(positive) == min(drifts) and max(positive) < 10 * min(positive)):
        return
    low = 10.0 ** math.floor(math.log10(min(positive)))
    if min(positive) == min(drifts):
        axis.set_xscale("log")
    else:
        axis.set_xscale("symlog", linthresh=low, linscale=0.5)
        axis.set_xlim(left=min(-0.15 * low, 1.2 * min(drifts)))


def _legend(figure: Figure, points: Sequence[Point], more: Sequence[Any]) -> None:
    line = require("matplotlib.lines").Line2D
    base: dict[str, Any] = {"linestyle": "", "markersize": 6.5}
    handles = [
        line([], [], marker="s", color=ARM_COLOURS[arm], label=ARM_NAMES[arm], **base)
        for arm in ("claim", "control", "whole", "rest")
        if any(p.arm == arm for p in points)
    ]
    handles += [
        line([], [], marker=marker, color="#7d7d7d", label=METHOD_TITLES[method], **base)
        for method, marker in MARKERS.items()
        if any(p.method == method for p in points)
    ]
    if not all(p.chosen for p in points):
        handles.append(
            line([], [], marker="o", markerfacecolor="none", color="#7d7d7d", label="hyperparameter not chosen", **base)
        )
    columns = 6 if not more else 4
    figure.legend(
        handles=[*handles, *more], loc="outside lower center", ncols=columns, handletextpad=0.3, columnspacing=1.4
    )
