"""The figure of power: how often a claim is called specific, by how many other places can do it too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from locaudit.report.figures import new_figure
from locaudit.report.style import ARM_COLOURS, house_style
from locaudit.studies.calibration.rates import chance_specific

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_power(n_able: Sequence[int], power: Sequence[float], *, n_heads: int, n_controls: int, level: float) -> Figure:
    """Power at `n_able` of `n_heads` heads that can do it: measured as points, what theory predicts as a line."""
    with house_style():
        figure = new_figure(3.6)
        axis = figure.subplots()
        across = np.arange(1, n_heads + 1)
        predicted = [chance_specific(int(m) - 1, n_heads - 1, n_controls, level) for m in across]
        axis.plot((across - 1) / (n_heads - 1), predicted, color="#8c8c8c", linewidth=1.2, zorder=1,
                  label=f"theory: none of {n_controls} random heads can do it")  # fmt: skip
        axis.scatter((np.asarray(n_able) - 1) / (n_heads - 1), power, color=ARM_COLOURS["claim"], s=34, zorder=3,
                     label="trained edits of planted models")  # fmt: skip
        axis.grid(axis="y", color="#8c8c8c", alpha=0.25, linewidth=0.6)
        axis.set(
            xlabel="share of the other heads that can do it too",
            ylabel="probability of the verdict “specific”",
            ylim=(-0.03, 1.03),
        )
        axis.legend()
    return figure
