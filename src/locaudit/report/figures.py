"""Figures of control scores and of probes. Each takes plain data and returns a matplotlib `Figure`.

`locaudit.report.scatter` has the others; `style.save` writes them all.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from locaudit.report.style import ARM_COLOURS, METHOD_TITLES, PAPER, house_style, require, score_title
from locaudit.stats import MethodVerdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 7.5
"""Inches."""
N_BINS = 36
"""Bins across the histogram's whole axis, so that a bar is as wide in each method's panel."""
_HALO = "#fffffe"
"""White that does not follow the page's colours: it lies on a colour map, which does not either."""
_LINES = {"base": ":", "claim": "-", "whole": "--"}


def draw_controls(methods: Mapping[str, MethodVerdict], score: str) -> Figure:
    """Distribution of the control scores, one panel a method, with the claim, the base and the whole model as lines.

    Raises `ValueError` for no methods.
    """
    if not methods:
        raise ValueError("got no method's verdict; expected at least one; draw this figure once a claim is scored")
    with house_style():
        figure = new_figure(3.4)
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
            axis.set(xlabel=f"{score_title(score)} on test", xlim=(edges[0], edges[-1]))
        for axis, verdict in zip(axes, methods.values(), strict=True):
            controls = np.sort([x for x in verdict.controls if not math.isnan(x)])
            # Three levels under the bars keep neighbours apart.
            heights = -tallest * (0.06 + 0.05 * (np.arange(controls.size) % 3))
            axis.scatter(controls, heights, s=11, color=ARM_COLOURS["control"], linewidth=0, zorder=4)
        ticker = require("matplotlib.ticker")
        axes[0].xaxis.set_major_locator(ticker.MaxNLocator(6))
        ticks = ticker.MaxNLocator(5, integer=True).tick_values(0, tallest)
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
        figure = new_figure(min(6.0, 1.5 + 0.9 * WIDTH * n_heads / n_layers))
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


def new_figure(height: float) -> Figure:
    """An empty figure of the house's width."""
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
