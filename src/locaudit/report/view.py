"""What a report shows, as plain values: progress, table rows, figure points, failures. No HTML here.

`locaudit.report.judged` and `locaudit.report.answers` do the same for judged scores and for answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from locaudit.config import AuditConfig, changed_settings, open_settings
from locaudit.errors import LocationError
from locaudit.location import parse_location
from locaudit.records import TrialRecord
from locaudit.report.scatter import Point
from locaudit.report.style import ARM_NAMES, METHOD_TITLES
from locaudit.stats import JUDGED, MethodVerdict, Verdict, select
from locaudit.stats.selection import Place

METRICS = ("mc1", "mc2", "mc3", "preference_accuracy", "reward_accuracy", "reward_margin")
"""Columns of the table, in this order; metrics with other names follow, sorted. Judged scores have a table
of their own; of them, only the score of the verdict is in this one, first."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a location's chosen edit on the test questions."""

    name: str
    hyperparameter: float | None
    values: tuple[float | None, ...]
    """One a column; None where nothing was measured."""
    note: str = ""
    """Location of a control, or why there are no values."""


@dataclass(frozen=True)
class MethodRows:
    """The table's lines of one method: claim, whole model and mean control, then each control."""

    title: str
    symbol: str
    main: tuple[Row, ...]
    controls: tuple[Row, ...]


@dataclass(frozen=True)
class Failure:
    """A trial that diverged."""

    trial: str
    message: str


@dataclass(frozen=True)
class Registered:
    """What was fixed before the run, and what has become of it."""

    sha256: str
    """Of the claim file."""
    file: str
    text: str
    changed: tuple[str, ...]
    """Settings that the claim file names and that are others now, a phrase each."""
    left_open: tuple[str, ...]
    """Settings that could be chosen after the run, since the claim file does not name them."""

    @property
    def hash(self) -> str:
        """What every record of the run carries."""
        return self.sha256[:16]


def registered(fact: Mapping[str, Any] | None, config: AuditConfig, score: str) -> Registered | None:
    """The run's claim file, from the store's fact ``registration``; None without one.

    `score` is what the run's verdict compares, which ``auto`` in the settings may stand for.
    """
    if fact is None:
        return None
    values = fact["values"]
    if values.get("score", "auto") != "auto":
        config = replace(config, score=score)
    return Registered(
        fact["sha256"],
        fact["file"],
        fact["text"],
        tuple(changed_settings(values, config)),
        tuple(open_settings(values)),
    )


def hyperparameter_symbol(method: str, config: AuditConfig) -> str:
    """Greek letter of the method's hyperparameter."""
    return "α" if method == "iti" else {"ipo": "τ", "dpo": "β"}[config.optimal.objective]


def missing_parts(
    records: Sequence[TrialRecord], verdict: Verdict, config: AuditConfig, planned: int | None
) -> list[str]:
    """What an unfinished run still lacks, a sentence each, the count of trials first; empty when it is finished."""
    parts = []
    for method in config.methods:
        title, judged = METHOD_TITLES[method], verdict.methods.get(method)
        if judged is None:
            parts.append(f"{title}: the claim is not scored yet, so the method is left out below.")
            continue
        lacks = []
        if len(judged.controls) < judged.n_planned and not judged.ended_early:
            lacks.append(f"{len(judged.controls)} of {judged.n_planned} controls scored")
        if config.whole_model and judged.whole_model is None:
            lacks.append("whole model not scored yet")
        if lacks:
            parts.append(f"{title}: {', '.join(lacks)}.")
    if planned is not None and len(records) < planned:
        return [f"Unfinished: {len(records)} of {planned} trials.", *parts]
    return [f"Unfinished: {len(records)} trials so far.", *parts] if parts else []


def claimed_heads(claim: str) -> list[tuple[int, int]]:
    """(layer, head) pairs of a claim about heads; empty for neurons and for no claim."""
    try:
        location = parse_location(claim)
    except LocationError:
        return []
    return list(location.units) if location.kind == "heads" else []


def base_record(records: Sequence[TrialRecord]) -> TrialRecord:
    """The unedited model's record."""
    return next(r for r in records if r.spec.arm == "base" and r.status == "ok")


def chosen_ids(records: Sequence[TrialRecord], score: str) -> frozenset[str]:
    """Trials that validation chose for their location, and the unedited model: those that the verdict compares."""
    chosen = (record for places in select(records, score).values() for record in places.values())
    return frozenset(record.spec.trial_id for record in chosen if record is not None)


def effect_points(records: Sequence[TrialRecord], score: str, chosen: frozenset[str]) -> list[Point]:
    """Every edit with a test score and a KL drift: its effect against its drift."""
    base = base_record(records).metrics["test"][score]

    def effect(record: TrialRecord) -> float | None:
        after = record.metrics["test"].get(score)
        return None if after is None else after - base

    return _points(records, chosen, lambda record: record.drift.get("kl"), effect)


def truth_info_points(records: Sequence[TrialRecord], chosen: frozenset[str]) -> list[Point]:
    """Every edit with judged test answers: its Truth against its Info."""
    return _points(
        records,
        chosen,
        lambda record: record.metrics["test"].get("info"),
        lambda record: record.metrics["test"].get("truth"),
    )


def _points(
    records: Sequence[TrialRecord],
    chosen: frozenset[str],
    x: Callable[[TrialRecord], float | None],
    y: Callable[[TrialRecord], float | None],
) -> list[Point]:
    points = []
    for record in records:
        spec = record.spec
        if spec.arm != "base" and record.status == "ok":
            across, up = x(record), y(record)
            if across is not None and up is not None and math.isfinite(across) and math.isfinite(up):
                points.append(Point(spec.arm, spec.method, across, up, spec.trial_id in chosen))
    return points


def columns(records: Sequence[TrialRecord], score: str) -> list[str]:
    """Metrics of the table; drift last."""
    found = {metric for record in records for metric in record.metrics.get("test", {})}
    first = [score] if score in JUDGED else []
    return [*first, *METRICS, *sorted(found - {*METRICS, *JUDGED}), "kl", "ce"]


def base_row(records: Sequence[TrialRecord], names: Sequence[str]) -> Row:
    """The unedited model."""
    return Row("Unedited model", None, _values(base_record(records), names))


def method_rows(
    records: Sequence[TrialRecord], verdict: Verdict, config: AuditConfig, names: Sequence[str]
) -> list[MethodRows]:
    """The table's lines of each method that has a verdict."""
    chosen = select(records, verdict.score)
    locations = {(r.spec.arm, r.spec.control): r.spec.location for r in records}
    out = []
    for method in verdict.methods:
        places = chosen[method]  # type: ignore[index]
        rows = {
            place: Row(
                name=place_name(place),
                hyperparameter=None if record is None else record.spec.hyperparameter,
                values=_values(record, names),
                note=("" if record else "diverged; ")
                + (short_location(locations[place]) if place[0] == "control" else ""),
            )
            for place, record in places.items()
        }
        controls = tuple(row for place, row in sorted(rows.items()) if place[0] == "control")
        main = [row for arm in ("claim", "whole", "rest") for place, row in rows.items() if place[0] == arm]
        if controls:
            main.append(_mean_row(controls))
        out.append(MethodRows(METHOD_TITLES[method], hyperparameter_symbol(method, config), tuple(main), controls))
    return out


def place_name(place: Place) -> str:
    """What a line about the place is called."""
    return f"Control {place[1]}" if place[0] == "control" else ARM_NAMES[place[0]].capitalize()


def failures(records: Sequence[TrialRecord], config: AuditConfig) -> list[Failure]:
    """The diverged trials, by method, arm and hyperparameter."""
    bad = [r for r in records if r.status == "diverged"]
    bad.sort(key=lambda r: (r.spec.method, r.spec.arm, r.spec.control, r.spec.hyperparameter or 0.0, r.spec.seed))
    return [Failure(_trial_name(record, config), record.message or "no message") for record in bad]


def control_range(verdict: MethodVerdict) -> tuple[float, float, float] | None:
    """Mean, lowest and highest score of the controls that did not diverge; None without any."""
    finite = [x for x in verdict.controls if not math.isnan(x)]
    return (math.fsum(finite) / len(finite), min(finite), max(finite)) if finite else None


def short_location(text: str, units: int = 40) -> str:
    """The location's text, its tail replaced by a count when it has more than `units` units."""
    parts = text.split(",")
    return text if len(parts) <= units else f"{','.join(parts[:units])}, and {len(parts) - units} more"


def spell_duration(seconds: float) -> str:
    """Seconds as people say them: ``42 s``, ``3 min 5 s``, ``2 h 4 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


def _trial_name(record: TrialRecord, config: AuditConfig) -> str:
    spec = record.spec
    if spec.method == "none":
        return "Unedited model"
    arm = f"control {spec.control}" if spec.arm == "control" else ARM_NAMES[spec.arm]
    return f"{METHOD_TITLES[spec.method]}, {arm}, {hyperparameter_symbol(spec.method, config)} = {spec.hyperparameter}"


def _values(record: TrialRecord | None, names: Sequence[str]) -> tuple[float | None, ...]:
    if record is None:
        return (None,) * len(names)
    measured: Mapping[str, Any] = {**record.metrics.get("test", {}), **record.drift}
    return tuple(measured.get(name) for name in names)


def _mean_row(rows: Sequence[Row]) -> Row:
    scored = [row for row in rows if any(_finite(x) for x in row.values)]
    means = []
    for values in zip(*(row.values for row in scored), strict=True):
        finite = [x for x in values if x is not None and math.isfinite(x)]
        means.append(math.fsum(finite) / len(finite) if finite else None)
    return Row(f"Mean of {len(scored)} controls", None, tuple(means) or (None,) * len(rows[0].values))


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
