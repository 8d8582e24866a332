"""The tables of a run's page, which a reader sorts, searches, filters and downloads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from types import MappingProxyType
from typing import Any

from locaudit.report.style import score_title
from locaudit.report.tables import Mean, Row, Tables, place_name
from locaudit.stats.phrases import where

TITLES: Mapping[str, str] = {
    "hyperparameter": "strength", "n_missing": "judgements missing", "base": "unedited", "whole": "whole model",
    "effect": "gain", "effect_p": "p", "p_value": "p", "p_adjusted": "p adjusted for methods",
    "p_new_place": "p of the t-test", "n_at_least": "as good", "n_used": "of", "n_controls": "of",
    "true_share": "truly as good", "population": "places", "ended_early": "ended early", "can_test": "can test",
    "judged": "by the judge", "val_accuracy": "validation accuracy",
}  # fmt: skip
"""Titles of columns. A column without one is called by its key; one of a score, by the score."""
_MEAN = {"controls": "mean control (range)"}


def make_table(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    titles: Mapping[str, str] = MappingProxyType({}),
    *,
    filters: Sequence[str] = (),
    hidden: Sequence[str] = (),
    only: tuple[str, Any] | None = None,
    n: int | None = None,
    first: Sequence[str] = (),
) -> dict[str, Any]:
    """A table that a reader sorts, searches, filters and downloads; `rows` have equal keys.

    `titles` go before `TITLES`. The interval of ``x`` is in ``x_low`` and ``x_high``. `hidden` columns are only
    downloaded.
    `only` is a column and its value to which the table is filtered at first, and `n` the number of all rows. The
    `first` columns are shown before the others.
    """
    keys = list(rows[0]) if rows else []
    titles, ends = {**TITLES, **titles}, {f"{key}{end}" for key in keys for end in ("_low", "_high")}
    columns = [
        {"key": key, "title": titles.get(key) or score_title(key),
         **({"interval": [keys.index(f"{key}_low"), keys.index(f"{key}_high")]} if f"{key}_low" in keys else {}),
         **({"hidden": True} if key in hidden or key in ends else {}), **({"filter": True} if key in filters else {})}
        for key in keys
    ]  # fmt: skip
    return {
        "title": title,
        "columns": columns,
        "rows": [list(row.values()) for row in rows],
        "only": only,
        "n": len(rows) if n is None else n,
        "first": [key for key in first if key in keys],
    }


def page_tables(t: Tables, n_units: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and table of all but the trials. Probes are listed for a model of at most `n_units`."""
    v = t.verdict
    yield "arms", make_table("Claim, whole model and mean control", list(_arms(t)), filters=("method",))
    if v.methods:
        yield "effects", make_table("Gain at the claim", [_effect(t, name) for name in v.methods])
        yield "nulls", make_table("Claim against controls", list(_nulls(t)), _MEAN)
    if v.off_target:
        rows = [
            {"behaviour": o.behaviour, "n": o.n, "method": t.methods[o.method].title, "score": score_title(o.score),
             "base": o.base, "claim": o.claim, **_interval("gain", o.gain, o.gain_interval), "whole": o.whole_model,
             **_interval("controls", fmean(o.controls) if o.controls else None,
                         (min(o.controls), max(o.controls)) if o.controls else None),
             "n_at_least": f"{o.n_at_least} of {len(o.controls)}{' ' + o.among if o.among else ''}"}
            for o in v.off_target
        ]  # fmt: skip
        titles = {**_MEAN, "n": "questions", "n_at_least": "controls at or above the claim"}
        yield "off_target", make_table("Other behaviours under the same edits", rows, titles)
    if t.corrected:
        rows = [
            {"score": score_title(line.score),
             "edit": f"{t.methods[line.method].title}: {line.what}" if line.method in t.methods else line.what,
             **_interval("judged", line.judged, line.judged_interval),
             **_interval("corrected", line.corrected.value, line.corrected.interval), "n": line.corrected.n}
            for line in t.corrected.lines
        ]  # fmt: skip
        yield "labels", make_table("Corrected by trusted labels", rows, {"n": "labelled questions"})
    if t.specification.rows:
        rows = [
            asdict(row) | {"method": t.methods[row.method].title, "score": score_title(row.score)}
            for row in t.specification.rows
        ]
        yield "specification", make_table("Other choices", rows, filters=("method", "score", "null", "better"))
    if t.designs:
        rows = [asdict(d.size) | {"minutes": d.seconds / 60, "lead": d.lead} for d in t.designs.rows]
        titles = {"questions": "test questions", "lead": f"power for a lead of {t.designs.lead}"}
        yield "designs", make_table("Larger audits", rows, titles)
    if t.manifest.probes is not None and sum(map(len, t.manifest.probes.val_accuracy)) <= n_units:
        rows = [
            {"layer": layer, "unit": unit, "val_accuracy": accuracy}
            for layer, row in enumerate(t.manifest.probes.val_accuracy)
            for unit, accuracy in enumerate(row)
        ]
        yield "probes", make_table("Probes", rows, {"unit": t.manifest.probes.kind})


def _interval(name: str, value: float | None, ends: Sequence[float] | None) -> dict[str, float | None]:
    low, high = ends or (None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _effect(t: Tables, name: str) -> dict[str, Any]:
    v = t.verdict.methods[name]
    return {
        "method": t.methods[name].title, "strength": v.chosen.get("claim"), "base": v.base, "claim": v.claim,
        "whole": v.whole_model, **_interval("effect", v.effect, v.effect_interval), "effect_p": v.effect_p,
    }  # fmt: skip


def _nulls(t: Tables) -> Iterator[dict[str, Any]]:
    for name, null in ((name, null) for name, v in t.verdict.methods.items() for null in v.nulls.values()):
        scored = [x for x in null.controls if math.isfinite(x)]
        yield {
            "method": t.methods[name].title, "null": null.name,
            **_interval("controls", fmean(scored) if scored else None, (min(scored), max(scored)) if scored else None),
            "n_at_least": null.n_at_least, "n_used": null.n_used, "p_value": null.p_value,
            "p_adjusted": null.p_adjusted, "p_new_place": null.p_new_place,
            **_interval("lead", null.lead, null.lead_interval),
            **_interval("true_share", null.true_share, null.true_share_interval), "population": null.population,
            "ended_early": null.ended_early, "can_test": null.can_test,
        }  # fmt: skip


def _arms(t: Tables) -> Iterator[dict[str, Any]]:
    """The unedited model, and for each method the places other than controls, and the mean of each null's controls."""
    with_ends = {*t.judged, "worse", "better", t.verdict.score}

    def line(method: str, edit: str, row: Row | Mean | None, n: int) -> dict[str, Any]:
        strength = row.record.spec.hyperparameter if isinstance(row, Row) else None
        found: dict[str, Any] = {"method": method, "edit": edit, "n": n, "hyperparameter": strength}
        changes = row.changes if isinstance(row, Row) else None
        for name in t.columns:
            value = row.values.get(name) if row else None
            ends = row.bounds.get(name) if row else None
            ends = getattr(changes, f"{name}_interval", ends)
            found |= _interval(name, value, ends) if name in with_ends else {name: value}
        return found | {"n_missing": row.n_missing if row and t.any_missing else None}

    yield line("", place_name(t.base.place), t.base, 1)
    for method in t.verdict.methods:
        title = t.methods[method].title
        for place, row in t.arms(method).items():
            yield line(title, place_name(place), row, 1)
        for null in t.controls(method):
            mean = t.mean_control(method, null, t.columns)
            yield line(title, f"Mean of {mean.n} controls{where(null)}", mean, mean.n)
