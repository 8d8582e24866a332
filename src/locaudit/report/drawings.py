"""What the figures of a run show, for its page and for PNG and SVG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from locaudit.report.figures import HeatMap, Mark, Series, Spread, draw_drift, draw_heads, draw_shares, draw_spreads
from locaudit.report.style import ARM_COLOURS, ARM_NAMES, MARKERS, save, score_title
from locaudit.report.tables import Row, Tables
from locaudit.stats.phrases import MethodFacts, say, short_p
from locaudit.stats.scores import resolve_score
from locaudit.stats.verdict import MethodVerdict, NullResult, Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = ("controls", "effect_vs_kl", "truth_info", "kl_mc", "probes")
"""Names of the files that a report may have, in order. ``truth_info`` shows the first two aspects."""
UNJUDGED = resolve_score("auto", ())
"""The default score of a run without judges. If judges give the verdict's score, this score is drawn as well."""
_BACK_TO_FRONT = ("control", "rest", "whole", "placebo", "claim")


def draw_all(tables: Tables, folder: Path) -> list[str]:
    """Draw all figures for which there are data, and save them in `folder` as PNG and SVG; returns their names.

    Figures of an earlier report are deleted if they no longer have data, for example because a judge was removed.
    """
    verdict, base, drawn = tables.verdict, tables.base.values, []

    def keep(name: str, figure: Figure) -> None:
        save(figure, folder, name)
        drawn.append(name)

    if any(map(math.isfinite, (x for v in verdict.methods.values() for x in (v.base, v.claim, *_controls(v))))):
        keep("controls", draw_controls(verdict, tables.methods))
    effects = {"effect_vs_kl": verdict.score} | ({"kl_mc": UNJUDGED} if verdict.score in tables.judged else {})
    for name, score in effects.items():
        if series := trial_series(tables, "kl", score, minus=base.get(score, math.nan)):
            title = f"{score_title(score)} on test, minus unedited"
            keep(name, draw_drift(series, ylabel=title, base=0.0, on=tables.manifest.drift_on))
    if len(tables.aspects) > 1:
        y, x = (f"{aspect}_probability" for aspect in tables.aspects[:2])
        series = trial_series(tables, x, y)
        if series and math.isfinite(base[x]) and math.isfinite(base[y]):
            names, ours = (score_title(x), score_title(y)), (base[x], base[y])
            keep("truth_info", draw_shares(series, titles=names, base=ours, product=score_title(tables.judged[0])))
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
        Spread(_controls_title(methods[name], v, null), null.controls, _marks(v))
        for name, v in verdict.methods.items()
        for null in v.nulls.values()
    ]
    columns = max((len(v.nulls) for v in verdict.methods.values()), default=1)
    xlabel = f"{score_title(verdict.score)} on test"
    look = {"what": "controls", "colour": ARM_COLOURS["control"], "columns": columns if columns > 1 else None}
    return draw_spreads(panels, xlabel=xlabel, **look)


def _marks(v: MethodVerdict) -> list[Mark]:
    return [
        Mark("claim", v.claim, ARM_COLOURS["claim"], "-"),
        Mark("whole model", v.whole_model, ARM_COLOURS["whole"], "--"),
        Mark("unedited", v.base, ARM_COLOURS["base"], ":"),
    ]


def null_panels(v: MethodVerdict, method: MethodFacts, noun: str) -> list[Spread]:
    """A panel for each null of a method, in the verdict's words; `noun` is the plural of a place: ``heads``."""
    places = method.terms["controls"].format(noun=noun)
    panels = []
    for null in v.nulls.values():
        seen = say("seen", "null", g=null.n_at_least, n=null.n_used, p=short_p(null.p_value), lead="")
        panels.append(Spread(f"{places}{null.where}: {seen}{_lost(null)}", null.controls, _marks(v)))
    return panels


def _controls(verdict: MethodVerdict) -> list[float]:
    return [x for null in verdict.nulls.values() for x in null.controls]


def _lost(null: NullResult) -> str:
    # Not "diverged": a score is also missing if judgements are missing.
    n = sum(map(math.isnan, null.controls))
    return f" ({n} without a score)" if n else ""


def _controls_title(method: MethodFacts, verdict: MethodVerdict, null: NullResult) -> str:
    n = len(null.controls)
    if math.isnan(verdict.claim):
        return f"{method.title}\nno edit at the claim has a score"
    if not n:
        return f"{method.title}\nno control{null.where} scored yet"
    reached = f"{null.n_at_least} of {n}{null.where or ' controls'} {method.reaches} the claim{_lost(null)}"
    return f"{method.title}: p = {null.p_value:.3f}\n{reached}"


def trial_series(
    tables: Tables, x: str, y: str, *, minus: float = 0.0, rows: Sequence[Row] | None = None
) -> list[Series]:
    """Points (x, y - `minus`) of every edit that has both values, with colours for arms and markers for methods.

    Their ids are their places in `rows` (None: all rows). Rests of controls are left out. The list is empty if no edit
    has both values.
    """
    points: dict[tuple[str, str], list[tuple[int, tuple[float, float, bool]]]] = {}
    for i, row in enumerate(tables.rows if rows is None else rows):
        spec, values = row.record.spec, row.values
        at = values.get(x, math.nan), values.get(y, math.nan) - minus
        is_shown = spec.arm != "base" and not spec.place.is_rest_of_control
        if is_shown and all(map(math.isfinite, at)):
            points.setdefault((spec.arm, spec.method), []).append((i, (*at, row.chosen)))
    markers = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(tables.methods)}
    several = len({method for _, method in points}) > 1
    series = []
    for arm, method in product(_BACK_TO_FRONT, markers):
        if (arm, method) in points:
            ids, found = zip(*points[arm, method], strict=True)
            label = f"{tables.methods[method].title}: {ARM_NAMES[arm]}" if several else ARM_NAMES[arm]
            look = ARM_COLOURS[arm], markers[method], found
            series.append(Series(label, *look, large=arm != "control", ids=ids))
    return series
