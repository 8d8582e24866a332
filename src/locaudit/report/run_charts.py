"""The charts of a run: for its page, for notebooks (`plots`) and as files for papers (`figures`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from statistics import fmean

from locaudit.records import Place
from locaudit.report.charts import Chart, HeatMap, Line, Series, heat_chart, line_chart, scatter_chart
from locaudit.report.strip import Mark, Spread, draw_strip, span_of, strip_chart
from locaudit.report.style import ARM_COLOURS, ARM_NAMES, MARKERS, MIDDLE, score_title
from locaudit.report.tables import Row, Tables
from locaudit.stats.intervals import score_intervals
from locaudit.stats.phrases import MethodFacts, say, short_p
from locaudit.stats.scores import resolve_score
from locaudit.stats.verdict import MethodVerdict, Verdict
from locaudit.store.manifest import Manifest

UNJUDGED = resolve_score("auto", ())
"""The default score of a run without judges. If judges give the verdict's score, this score is drawn as well."""
_Points = tuple[Sequence[float], Sequence[float], Sequence[tuple[float, float]]]
"""x, y and the interval of each y; no intervals if there are none."""
_BACK_TO_FRONT = ("control", "rest", "whole", "placebo", "claim")
_GAINS = {"claim": "works", "whole": "moves"}
"""Arm -> the question whose estimate is the arm's gain."""


def run_charts(
    t: Tables,
    rows: Sequence[Row] | None = None,
    *,
    n_lines: int | None = None,
    n_steps: int = 100,
    n_windows: int = 8,
    n_units: int | None = None,
) -> Iterator[tuple[str, Chart]]:
    """Name and chart of all for which there are data. Points name their trials by their places in `rows` (None: all).

    drift_SCORE     gain of each edit against KL
    truth_info      the first two judged aspects against each other
    probes          probe accuracy of each head, in a model of at most `n_units` (None: any number)
    effects_METHOD  gain of each single head's edit
    tuning_METHOD   validation score by strength, for claim, whole model and the `n_lines` nearest controls (None: all)
    loss_METHOD     training loss by step, at most `n_windows` points an epoch and `n_steps` in all
    """
    base, score, n = t.base.values, t.verdict.score, t.verdict.n_questions
    for name in [score, UNJUDGED] if score in t.judged else [score]:
        intervals = _gain_intervals(t, t.rows if rows is None else rows) if name == score else {}
        if series := _trial_series(t, "kl", name, minus=base.get(name, math.nan), rows=rows, intervals=intervals):
            drift = f"KL from the unedited model{t.manifest.drift_on and ' ' + t.manifest.drift_on} (nats per token)"
            bars = ", 95\u00a0% intervals" if intervals else ""
            title = f"{score_title(name)} minus unedited,\n{n} questions{bars}"
            yield f"drift_{name}", scatter_chart(series, xlabel=drift, ylabel=title, base=(None, 0.0), is_drift=True)
    if len(t.aspects) > 1:
        y, x = (f"{aspect}_probability" for aspect in t.aspects[:2])
        ours = base.get(x, math.nan), base.get(y, math.nan)
        if (series := _trial_series(t, x, y, rows=rows)) and all(map(math.isfinite, ours)):
            titles = score_title(x), f"{score_title(y)}, {n} questions"
            curve = f"unedited {score_title(t.judged[0])}"
            yield "truth_info", scatter_chart(series, xlabel=titles[0], ylabel=titles[1], base=ours, product=curve)
    if t.manifest.probes is not None and (n_units is None or sum(map(len, t.manifest.probes.val_accuracy)) <= n_units):
        heat = HeatMap(t.manifest.probes.val_accuracy, f"probe accuracy, {t.manifest.probes.n_val} examples")
        yield "probes", heat_chart(heat, t.claimed_heads, floor=t.manifest.probes.majority)
    for method in t.verdict.methods:
        if effects := single_effects(t, method):
            yield f"effects_{method}", heat_chart(effects, t.claimed_heads)
    for method in t.verdict.methods:
        shown = [*[place for place, _ in nearest(t, method)][:n_lines][::-1], Place("whole"), Place("claim")]
        if lines := _as_lines({place: _tuning(t, method, place) for place in shown}):
            log = min(x for one in lines for x in one.x) > 0
            title = f"{score_title(score)}, 95\u00a0% intervals,\n{t.manifest.n_questions['val']} validation questions"
            chart = line_chart(lines, xlabel=f"strength {t.methods[method].symbol}".rstrip(), ylabel=title, log=log)
            tried = sorted({x for one in lines for x in one.x})
            chart["layout"]["xaxis"] |= {"tickvals": tried, "ticktext": [f"{x:g}" for x in tried]}
            yield f"tuning_{method}", chart
        epochs = (t.methods[method].training or {}).get("epochs")
        if lines := _losses(t, method, shown, min(n_steps, n_windows * (epochs if isinstance(epochs, int) else 1))):
            yield f"loss_{method}", line_chart(lines, xlabel="step", ylabel="training loss / that of no edit")


# --- random places


def null_panels(v: MethodVerdict, method: MethodFacts, noun: str) -> list[Spread]:
    """A panel for each null of a method, in the verdict's words; `noun` is the plural of a place: ``heads``."""
    places = method.terms["controls"].format(noun=noun)
    marks = [
        Mark("claim", v.claim, ARM_COLOURS["claim"], "-", _interval(v, "claim")),
        Mark("whole model", v.whole_model, ARM_COLOURS["whole"], "--", _interval(v, "whole")),
        Mark("unedited", v.base, ARM_COLOURS["base"], ":"),
    ]
    panels = []
    for null in v.nulls.values():
        seen = say("seen", "null", g=null.n_at_least, n=null.n_used, p=short_p(null.p_value), lead="")
        lost = sum(map(math.isnan, null.controls))  # not "diverged": a score also lacks if judgements are missing
        title = f"{places}{null.where}: {seen}" + (f" ({lost} without a score)" if lost else "")
        panels.append(Spread(title, null.controls, marks))
    return panels


def null_strip(verdict: Verdict, manifest: Manifest) -> str:
    """SVG of the main method's null distributions, with claim, whole model and unedited model; empty without any."""
    v = verdict.methods.get(verdict.main)
    panels = [] if v is None else null_panels(v, manifest.methods[v.method], manifest.kind_plural)
    if not panels:
        return ""
    alt = f"{score_title(verdict.score)}: " + "; ".join(panel.title for panel in panels)
    alt += "".join(
        f"; {mark.label} {mark.value:.3g}"
        for mark in panels[0].marks
        if mark.value is not None and math.isfinite(mark.value)
    )
    return draw_strip(panels, xlabel=f"{score_title(verdict.score)}, {verdict.n_questions} test questions", alt=alt)


def null_charts(t: Tables, methods: Sequence[str]) -> Iterator[Chart]:
    """The null distributions of each method, with one axis for all; a method without controls is left out."""
    panels = {name: null_panels(t.verdict.methods[name], t.methods[name], t.manifest.kind_plural) for name in methods}
    panels = {name: found for name, found in panels.items() if found}
    span = span_of([panel for found in panels.values() for panel in found]) if panels else None
    xlabel = (
        f"{score_title(t.verdict.score)}, {t.verdict.n_questions} test questions\nbars: 95\u00a0% intervals of gains"
    )
    for name, found in panels.items():
        chart = strip_chart(found, xlabel=xlabel, span=span)
        chart["layout"]["title"] = {"text": t.methods[name].title}
        yield chart


def _interval(v: MethodVerdict, arm: str) -> tuple[float, float]:
    """The 95 % interval of an arm's gain, added to the unedited score."""
    low, high = next((q.interval for q in v.questions if q.name == _GAINS[arm]), (math.nan, math.nan))
    return v.base + low, v.base + high


# --- single trials


def _gain_intervals(t: Tables, rows: Sequence[Row]) -> dict[int, tuple[float, float]]:
    """Number of the row of each claim and whole model that the verdict uses -> the 95 % interval of its gain."""
    found = {}
    for i, row in enumerate(rows):
        spec, v = row.record.spec, t.verdict.methods.get(row.record.spec.method)
        if v is not None and row.chosen and spec.arm in _GAINS:
            low, high = (x - v.base for x in _interval(v, spec.arm))
            if math.isfinite(low) and math.isfinite(high):
                found[i] = low, high
    return found


def _trial_series(
    t: Tables,
    x: str,
    y: str,
    *,
    minus: float = 0.0,
    rows: Sequence[Row] | None = None,
    intervals: Mapping[int, tuple[float, float]] | None = None,
) -> list[Series]:
    """Points (x, y - `minus`) of every edit that has both values, with colours for arms and markers for methods.

    Their ids are their places in `rows` (None: all rows). Rests of controls are left out. The list is empty if no edit
    has both values.
    """
    points: dict[tuple[str, str], list[tuple[int, tuple[float, float, bool]]]] = {}
    for i, row in enumerate(t.rows if rows is None else rows):
        spec, values = row.record.spec, row.values
        at = values.get(x, math.nan), values.get(y, math.nan) - minus
        is_shown = spec.arm != "base" and not spec.place.is_rest_of_control
        if is_shown and all(map(math.isfinite, at)):
            points.setdefault((spec.arm, spec.method), []).append((i, (*at, row.chosen)))
    markers = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(t.methods)}
    several = len({method for _, method in points}) > 1
    series = []
    for arm, method in product(_BACK_TO_FRONT, markers):
        if (arm, method) in points:
            ids, found = zip(*points[arm, method], strict=True)
            label = f"{t.methods[method].title}: {ARM_NAMES[arm]}" if several else ARM_NAMES[arm]
            look = ARM_COLOURS[arm], markers[method], found
            series.append(Series(label, *look, large=arm != "control", ids=ids, intervals=intervals or {}))
    return series


def single_effects(t: Tables, method: str) -> HeatMap | None:
    """What the edit of each single head gains over the unedited model, NaN where none was run; None if none was."""
    shape = t.manifest.shape
    values = [[math.nan] * shape.n_heads for _ in range(shape.n_layers)]
    gains = []
    for row in t.places(method).values():
        where = row.record.spec.location if row else None
        if row is None or where is None or (where.kind, where.scope, len(where.units)) != ("head", "listed", 1):
            continue
        (unit,) = where.units
        gain = row.values.get(t.verdict.score, math.nan) - t.base.values.get(t.verdict.score, math.nan)
        if not isinstance(unit, str) and math.isfinite(gain):
            values[unit[0]][unit[1]] = gain
            gains.append(abs(gain))
    title = f"gain in {score_title(t.verdict.score)}, {t.verdict.n_questions} questions"
    return HeatMap(values, title, reach=max([*gains, 1e-6])) if gains else None


# --- strengths and training


def nearest(t: Tables, method: str) -> list[tuple[Place, Row]]:
    """The scored controls of a method, by how near their score is to the claim's."""
    claim = t.verdict.methods[method].claim
    found = [(place, row) for rows in t.controls(method).values() for place, row in rows.items() if row is not None]

    def distance(pair: tuple[Place, Row]) -> float:
        x = abs(pair[1].values.get(t.verdict.score, math.nan) - claim)
        return x if math.isfinite(x) else math.inf

    return sorted(found, key=distance)


def _tuning(t: Tables, method: str, place: Place) -> _Points:
    """The strengths tried at a place, with scores on validation questions and their 95 % intervals."""
    found, name = [], t.verdict.score
    for row in t.rows:
        record, strength = row.record, row.record.spec.hyperparameter
        score = record.metrics.get("val", {}).get(name, math.nan)
        if (record.spec.method, row.place) == (method, place) and strength is not None and math.isfinite(score):
            interval = score_intervals([record], [name], split="val").get(record.spec.trial_id, {})
            found.append((strength, score, interval.get(name, (score, score))))
    x, y, intervals = zip(*sorted(found), strict=True) if found else ((), (), ())
    return x, y, intervals


def _losses(t: Tables, method: str, shown: Sequence[Place], most: int) -> list[Line]:
    """Training losses in at most `most` windows of steps, as shares of the first step's, and a line at 1."""
    places = t.places(method)
    losses = {place: row.record.training.get("loss", ()) for place in shown if (row := places.get(place))}
    # the loss of the first step is that of the unedited model
    shares = {place: [x / loss[0] for x in loss] for place, loss in losses.items() if len(loss) > 1 and loss[0]}
    lines = _as_lines({place: (*in_windows(share, most), ()) for place, share in shares.items()})
    ends = 1.0, float(max(map(len, losses.values()), default=1))
    return [Line("no edit", MIDDLE, ends, (1.0, 1.0), dash="dot", wide=False), *lines] if lines else []


def _as_lines(found: Mapping[Place, _Points]) -> list[Line]:
    """A line for each place with two points or more. Each arm is named once. Controls have no intervals."""
    lines: dict[Place, Line] = {}
    for place, (x, y, intervals) in found.items():
        if len(x) > 1:
            label = "" if place.arm in {one.arm for one in lines} else ARM_NAMES[place.arm]
            wide = place.arm != "control"
            lines[place] = Line(label, ARM_COLOURS[place.arm], x, y, wide=wide, intervals=intervals if wide else ())
    return list(lines.values())


def in_windows(values: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    """The middles of at most `most` equally long windows of the values, counted from 1, and the mean in each window."""
    width = -(-len(values) // most)
    parts = [values[i : i + width] for i in range(0, len(values), width)]
    return [i * width + (len(part) + 1) / 2 for i, part in enumerate(parts)], [fmean(part) for part in parts]
