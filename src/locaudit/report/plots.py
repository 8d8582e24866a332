"""The charts of a run as Plotly figures, for notebooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from locaudit.errors import ConfigError, import_extra
from locaudit.report.charts import Chart, resolve
from locaudit.report.run_charts import null_charts, run_charts
from locaudit.report.tables import Tables

if TYPE_CHECKING:
    from plotly.graph_objects import Figure  # type: ignore[reportMissingImports]


@dataclass(frozen=True)
class Plots:
    """Figures of a run: ``result.plot.null()``. Each is a `plotly.graph_objects.Figure`.

    `method` is a name such as ``optimal``; without one, it is the method that decides. All raise `ConfigError` if the
    package plotly is missing, or if the run has no data for the figure.
    """

    tables: Tables

    def null(self, method: str | None = None) -> Figure:
        """Scores at random places, with those of claim, whole model and unedited model."""
        return _show(next(null_charts(self.tables, [self._method(method)]), None), "null", "a scored control")

    def effect_kl(self) -> Figure:
        """What each edit gains, against the KL divergence from the unedited model."""
        return self._chart(f"drift_{self.tables.verdict.score}", "a scored edit")

    def tuning(self, method: str | None = None) -> Figure:
        """Score on validation questions by strength."""
        return self._chart(f"tuning_{self._method(method)}", "two strengths or more")

    def heads(self) -> Figure:
        """Probe accuracy of every head, with the claim outlined."""
        return self._chart("probes", "probes of every head")

    def _method(self, method: str | None) -> str:
        verdict = self.tables.verdict
        name = method or verdict.main
        if name not in verdict.methods:
            known = ", ".join(verdict.methods) or "none yet"
            raise ConfigError(
                got=f"the method {name!r}", expected=f"one with a scored claim ({known})", remedy="name one"
            )
        return name

    def _chart(self, name: str, needed: str) -> Figure:
        return _show(dict(run_charts(self.tables)).get(name), name, needed)


def _show(chart: Chart | None, name: str, needed: str) -> Figure:
    if chart is None:
        raise ConfigError(
            got=f"a run without data for the figure {name}", expected=needed, remedy="draw another figure"
        )
    figures = import_extra("plotly.graph_objects", extra="notebook")
    layout = resolve(chart["layout"])
    if "height" in layout:
        layout = {**layout, "height": layout["height"] + 120}
    figure = figures.Figure(data=resolve(chart["data"]), layout=layout)
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    margin = {"l": 60, "r": 20, "t": 50, "b": 70}
    return figure.update_layout(template="plotly_white", margin=margin, hovermode="closest", legend=legend)
