"""The three figures of a report. Each takes plain data and returns a matplotlib `Figure`; `style.save` writes it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from locaudit.records import Arm, Method
from locaudit.report.style import ARM_COLOURS, ARM_NAMES, INK, METHOD_TITLES, PAPER, house_style, require
from locaudit.stats import MethodVerdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 7.5
"""Inches."""
N_BINS = 36
"""Bins across the histogram's whole axis, so that a bar is as wide in each method's panel."""
SMALLEST_KL = 1e-5
"""Nats per token: below this the axis of the KL drift is linear, so that 0 has a place on it."""
MARKERS: Mapping[str, str] = {"iti": "o", "optimal": "D"}
_HALO = "#fffffe"
"""White that does not follow the page's colours: it lies on a colour map, which does not either."""
_LINES = {"base": ":", "claim": "-", "whole": "--"}


@dataclass(frozen=True)
class EffectPoint:
    """One trial in the figure of effect against drift."""

    arm: Arm
    method: Method
    kl: float
    """Nats per token."""
    effect: float
    """Test score minus the unedited model's."""
    chosen: bool
    """Whether validation chose this hyperparameter for its location."""


def draw_controls(methods: Mapping[str, MethodVerdict], score: str) -> Figure:
    """Distribution of the control scores, one panel a method, with the claim, the base and the whole model as lines.

    Raises `ValueError` for no methods.
    """
    if not methods:
        raise ValueError("got no method's verdict; expected at least one; draw this figure once a claim is scored")
    with house_style():
        figure = _figure(3.4)
        axes = figure.subplots(1, len(methods), sharex=True, sharey=True, squeeze=False)[0]
        edges = _bin_edges(methods.values())
        tallest = 1
        for axis, (name, verdict) in zip(axes, methods.items(), strict=True):
            controls = np.sort([x for x in verdict.controls if not math.isnan(x)])
            counts, _, _ = axis.hist(controls, bins=edges, color=ARM_COLOURS["control"], alpha=0.55, linewidth=0)
            tallest = max(tallest, int(counts.max()))
            for arm, value in (("base", verdict.base), ("whole", verdict.whole_model), ("claim", verdict.claim)):
                if value is not None and not math.isnan(value):
                    width = 2.2 if arm == "claim" else 1.4
                    axis.axvline(value, color=ARM_COLOURS[arm], linestyle=_LINES[arm], linewidth=width, zorder=3)
            axis.axhline(0, color="#8c8c8c", linewidth=0.5)
            axis.set_title(_controls_title(name, verdict), loc="left", linespacing=1.4)
            axis.set(xlabel=f"{score} on test", xlim=(edges[0], edges[-1]))
        for axis, verdict in zip(axes, methods.values(), strict=True):
            controls = np.sort([x for x in verdict.controls if not math.isnan(x)])
            # Three levels under the bars keep neighbours apart.
            heights = -tallest * (0.06 + 0.05 * (np.arange(controls.size) % 3))
            axis.scatter(controls, heights, s=11, color=ARM_COLOURS["control"], linewidth=0, zorder=4)
        ticks = require("matplotlib.ticker").MaxNLocator(5, integer=True).tick_values(0, tallest)
        axes[0].set(ylim=(-0.24 * tallest, 1.06 * tallest), yticks=[y for y in ticks if 0 <= y <= tallest])
        axes[0].set_ylabel("controls")
        _controls_legend(figure, any(v.whole_model is not None for v in methods.values()))
    return figure


def draw_probes(val_accuracy: Sequence[Sequence[float]], majority: float | None, claimed: Collection) -> Figure:
    """Heat map of probe accuracy, layers across and heads up; `claimed` (layer, head) pairs are outlined."""
    accuracy = np.asarray(val_accuracy, dtype=float)
    n_layers, n_heads = accuracy.shape
    with house_style():
        rectangle = require("matplotlib.patches").Rectangle
        cell = 0.85 * WIDTH * 72 / n_layers  # points
        figure = _figure(min(6.0, 1.5 + 0.9 * WIDTH * n_heads / n_layers))
        axis = figure.subplots()
        mesh = axis.pcolormesh(
            np.arange(n_layers + 1) - 0.5,
            np.arange(n_heads + 1) - 0.5,
            accuracy.T,
            cmap="cividis",
            vmin=float(np.nanmin(accuracy)) if majority is None else min(majority, float(np.nanmin(accuracy))),
            edgecolors=PAPER,
            linewidth=0.5 if cell > 10 else 0,
            rasterized=accuracy.size > 4_000,
        )
        line = min(1.8, max(1.0, 0.1 * cell))
        # A pale outline under every coloured one keeps both ends of the scale apart from it.
        for zorder, colour, width in ((3, _HALO, 2.2 * line), (4, ARM_COLOURS["claim"], line)):
            for layer, head in claimed:
                axis.add_patch(
                    rectangle(
                        (layer - 0.5, head - 0.5), 1, 1, fill=False, edgecolor=colour, linewidth=width, zorder=zorder,
                        joinstyle="miter", clip_on=False,
                    )
                )  # fmt: skip
        axis.set(xlabel="layer", ylabel="head", aspect="equal" if n_heads * 3 > n_layers else "auto")
        ticker = require("matplotlib.ticker")
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_locator(ticker.MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
        for spine in axis.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(mesh, ax=axis, pad=0.02, fraction=0.05, shrink=0.9)
        bar.outline.set_visible(False)
        bar.set_label("validation accuracy")
        handles: list[Any] = []
        if claimed:
            label = f"claimed head ({len(claimed)})"
            handles.append(
                rectangle((0, 0), 1, 1, fill=False, edgecolor=ARM_COLOURS["claim"], linewidth=1.5, label=label)
            )
        if majority is not None:
            bar.ax.axhline(majority, color=_HALO, linewidth=1.6)
            label = f"larger class alone: {majority:.3f} (pale line in the scale)"
            handles.append(require("matplotlib.lines").Line2D([], [], color="#8c8c8c", linewidth=1.6, label=label))
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=2, columnspacing=2.5)
    return figure


def draw_effect(points: Sequence[EffectPoint], score: str) -> Figure:
    """Effect on the test score against KL drift: every trial a point, the chosen ones filled.

    Raises `ValueError` for no points.
    """
    if not points:
        raise ValueError("got no points; expected at least one trial; draw this figure once an edit is scored")
    with house_style():
        figure = _figure(4.3)
        axis = figure.subplots()
        axis.axhline(0, color=INK, linestyle=":", linewidth=1.2, zorder=1)
        axis.grid(axis="y", color="#8c8c8c", alpha=0.25, linewidth=0.6)
        # The many controls lie at the back, chosen trials before those that were not.
        for depth, (arm, chosen) in enumerate((a, c) for c in (False, True) for a in ("control", "whole", "claim")):
            for method, marker in MARKERS.items():
                group = [p for p in points if (p.arm, p.chosen, p.method) == (arm, chosen, method)]
                axis.scatter(
                    [p.kl for p in group], [p.effect for p in group], marker=marker, zorder=2 + depth,
                    **_mark(arm, chosen, 60 if arm != "control" else 26),
                )  # fmt: skip
        _scale_kl(axis, [p.kl for p in points])
        axis.set(xlabel="KL drift from the unedited model (nats per token)", ylabel=f"{score} on test, minus unedited")
        _effect_legend(figure, points)
    return figure


def _figure(height: float) -> Figure:
    return require("matplotlib.figure").Figure(figsize=(WIDTH, height), layout="constrained")


def _bin_edges(verdicts: Collection[MethodVerdict]) -> np.ndarray:
    """Equal bins over everything that the axis shows, with a margin of two bins at each end."""
    values = [x for v in verdicts for x in (v.base, v.claim, *v.controls, v.whole_model) if x is not None]
    finite = [x for x in values if not math.isnan(x)]
    low, high = min(finite), max(finite)
    span = max(high - low, 1e-3)
    middle = (low + high) / 2
    reach = span / 2 * N_BINS / (N_BINS - 4)
    return np.linspace(middle - reach, middle + reach, N_BINS + 1)


def _controls_title(name: str, verdict: MethodVerdict) -> str:
    title, n = METHOD_TITLES[name], len(verdict.controls)
    diverged = sum(map(math.isnan, verdict.controls))
    if math.isnan(verdict.claim):
        return f"{title}\nevery edit at the claim diverged"
    if not n:
        return f"{title}\nno control scored yet"
    lost = f" ({diverged} diverged)" if diverged else ""
    return f"{title}: p = {verdict.p_value:.3f}\n{verdict.n_at_least} of {n} controls at or above the claim{lost}"


def _controls_legend(figure: Figure, whole: bool) -> None:
    lines, patches = require("matplotlib.lines"), require("matplotlib.patches")
    handles: list[Any] = [
        lines.Line2D([], [], color=ARM_COLOURS["claim"], linewidth=2.2, label="claim"),
        patches.Patch(color=ARM_COLOURS["control"], alpha=0.55, linewidth=0, label="controls (a dot each)"),
        lines.Line2D([], [], color=ARM_COLOURS["base"], linestyle=":", linewidth=1.4, label="unedited model"),
    ]
    if whole:
        handles.append(lines.Line2D([], [], color=ARM_COLOURS["whole"], linestyle="--", label="whole model edited"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, handlelength=2.4, columnspacing=1.8)


def _mark(arm: str, chosen: bool, size: float) -> dict[str, Any]:
    colour = ARM_COLOURS[arm]
    if chosen:
        return {"s": size, "facecolors": colour, "edgecolors": PAPER, "linewidths": 0.7}
    return {"s": 0.6 * size, "facecolors": "none", "edgecolors": colour, "linewidths": 0.9, "alpha": 0.6}


def _scale_kl(axis: Any, drifts: Sequence[float]) -> None:
    positive = [x for x in drifts if x >= SMALLEST_KL]
    if not positive or (min(positive) == min(drifts) and max(positive) < 10 * min(positive)):
        return
    low = 10.0 ** math.floor(math.log10(min(positive)))
    if min(positive) == min(drifts):
        axis.set_xscale("log")
    else:
        axis.set_xscale("symlog", linthresh=low, linscale=0.5)
        axis.set_xlim(left=min(-0.15 * low, 1.2 * min(drifts)))


def _effect_legend(figure: Figure, points: Sequence[EffectPoint]) -> None:
    line = require("matplotlib.lines").Line2D
    base: dict[str, Any] = {"linestyle": "", "markersize": 6.5}
    handles = [
        line([], [], marker="s", color=ARM_COLOURS[arm], label=ARM_NAMES[arm], **base)
        for arm in ("claim", "control", "whole")
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
    figure.legend(handles=handles, loc="outside lower center", ncols=6, handletextpad=0.2, columnspacing=1.4)
