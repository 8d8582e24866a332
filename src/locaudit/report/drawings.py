"""Draw the figures of a report. Their captions are in `template.html`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from locaudit.report.figures import HeatMap, Mark, Series, Spread, draw_drift, draw_heads, draw_shares, draw_spreads
from locaudit.report.style import ARM_COLOURS, ARM_NAMES, MARKERS, MIDDLE, save, score_title
from locaudit.report.tables import Tables
from locaudit.stats.phrases import MethodFacts
from locaudit.stats.scores import resolve_score
from locaudit.stats.verdict import MethodVerdict, NullResult, Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = ("controls", "effect_vs_kl", "truth_info", "kl_mc", "probes")
"""Names of the figures that a report may have, in order. ``truth_info`` shows the first two aspects."""
UNJUDGED = resolve_score("auto", ())
"""The default score of a run without judges. If judges give the verdict's score, this score is drawn as well."""
_BACK_TO_FRONT = ("control", "rest", "whole", "placebo", "claim")


@dataclass(frozen=True)
class Drawing:
    """A figure as it is embedded in the page."""

    svg: str
    n: int = 0
    """Number of trials in the figure."""
    n_chosen: int = 0
    """How many of these trials were chosen on validation questions."""


def draw_all(tables: Tables, folder: Path) -> dict[str, Drawing]:
    """Draw all figures for which there are data, and save them in `folder` as PNG and SVG.

    Figures of an earlier report are deleted if they no longer have data, for example because a judge was removed.
    """
    verdict, base, drawn = tables.verdict, tables.base.values, {}

    def keep(name: str, figure: Figure, series: list[Series] | None = None) -> None:
        points = [point for one in series or () for point in one.points]
        drawn[name] = Drawing(save(figure, folder, name), len(points), sum(chosen for _, _, chosen in points))

    if any(map(math.isfinite, (x for v in verdict.methods.values() for x in (v.base, v.claim, *_controls(v))))):
        keep("controls", draw_controls(verdict, tables.methods))
    effects = {"effect_vs_kl": verdict.score} | ({"kl_mc": UNJUDGED} if verdict.score in tables.judged else {})
    for name, score in effects.items():
        if series := trial_series(tables, "kl", score, minus=base.get(score, math.nan)):
            title = f"{score_title(score)} on test, minus unedited"
            keep(name, draw_drift(series, ylabel=title, base=0.0), series)
    if len(tables.aspects) > 1:
        y, x = (f"{aspect}_probability" for aspect in tables.aspects[:2])
        series = trial_series(tables, x, y)
        if series and math.isfinite(base[x]) and math.isfinite(base[y]):
            names, ours = (score_title(x), score_title(y)), (base[x], base[y])
            keep(
                "truth_info",
                draw_shares(series, titles=names, base=ours, product=score_title(tables.judged[0])),
                series,
            )
    if (probes := tables.probes) is not None:
        heat = HeatMap(probes.val_accuracy, "validation accuracy")
        keep("probes", draw_heads([heat], tables.claimed_heads, floor=probes.majority))
    for name, ending in product(set(NAMES) - set(drawn), ("png", "svg")):
        (folder / f"{name}.{ending}").unlink(missing_ok=True)
    return drawn


def draw_controls(verdict: Verdict, methods: Mapping[str, MethodFacts]) -> Figure:
    """Scores of the controls, one panel per method and null; a row per method if there are several nulls.

    Lines mark the claim, the unedited model and the whole model.
    """
    panels = [
        Spread(
            _controls_title(methods[name], v, null),
            null.controls,
            [
                Mark("claim", v.claim, ARM_COLOURS["claim"], "-"),
                Mark("unedited model", v.base, ARM_COLOURS["base"], ":"),
                Mark("whole model edited", v.whole_model, ARM_COLOURS["whole"], "--"),
            ],
        )
        for name, v in verdict.methods.items()
        for null in v.nulls.values()
    ]
    columns = max((len(v.nulls) for v in verdict.methods.values()), default=1)
    xlabel = f"{score_title(verdict.score)} on test"
    look = {"what": "controls", "colour": ARM_COLOURS["control"], "columns": columns if columns > 1 else None}
    return draw_spreads(panels, xlabel=xlabel, **look)


def _controls(verdict: MethodVerdict) -> list[float]:
    return [x for null in verdict.nulls.values() for x in null.controls]


def _controls_title(method: MethodFacts, verdict: MethodVerdict, null: NullResult) -> str:
    # Not "diverged": a score is also missing if judgements are missing.
    n, unscored = len(null.controls), sum(map(math.isnan, null.controls))
    if math.isnan(verdict.claim):
        return f"{method.title}\nno edit at the claim has a score"
    if not n:
        return f"{method.title}\nno control{null.where} scored yet"
    lost = f" ({unscored} without a score)" if unscored else ""
    reached = f"{null.n_at_least} of {n}{null.where or ' controls'} {method.reaches} the claim{lost}"
    return f"{method.title}: p = {null.p_value:.3f}\n{reached}"


def trial_series(tables: Tables, x: str, y: str, *, minus: float = 0.0) -> list[Series]:
    """Points (x, y - `minus`) of every edit that has both values, with colours for arms and markers for methods.

    Rests of controls are left out.

    At the end of the list are series without points, which are the entries of the legend. The list is empty if no edit
    has both values.
    """
    points: dict[tuple[str, str], list[tuple[float, float, bool]]] = {}
    for row in tables.rows:
        spec, values = row.record.spec, row.values
        at = values.get(x, math.nan), values.get(y, math.nan) - minus
        is_shown = spec.arm != "base" and not spec.place.is_rest_of_control
        if is_shown and all(map(math.isfinite, at)):
            points.setdefault((spec.arm, spec.method), []).append((*at, row.chosen))
    markers = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(tables.methods)}
    series = [
        Series("", ARM_COLOURS[arm], markers[method], points[arm, method], large=arm != "control")
        for arm, method in product(_BACK_TO_FRONT, markers)
        if (arm, method) in points
    ]
    # entries for the legend: arms by colour, methods by shape
    arms = [arm for arm in ARM_NAMES if any(arm == found for found, _ in points)]
    methods = [name for name in markers if any(name == found for _, found in points)]
    keys = [Series(ARM_NAMES[arm], ARM_COLOURS[arm], "s") for arm in arms]
    keys += [Series(tables.methods[name].title, MIDDLE, markers[name]) for name in methods]
    return [*series, *keys] if series else []
