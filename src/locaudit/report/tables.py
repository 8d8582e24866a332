"""A run as rows of plain values, from which page, figures, files and terminal output are made. It makes no HTML.

`read_tables` reads a run folder; `tabulate` takes a `Run`.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from locaudit.config import AuditConfig, changed_settings, open_settings, unknown_names_kept
from locaudit.records import ARMS, NO_METHOD, OFF, Place, TrialRecord, json_text
from locaudit.registry import SCORES
from locaudit.report.answers import Judgements, Speech, speech
from locaudit.report.design import Designs, read_designs, read_verdict
from locaudit.report.style import ARM_NAMES, DRIFT_TITLES, FIT_TITLES
from locaudit.stats.changes import Changes, count_changes
from locaudit.stats.degenerate import share_degenerate
from locaudit.stats.intervals import score_intervals
from locaudit.stats.labels import label_scores
from locaudit.stats.phrases import MethodFacts, where
from locaudit.stats.scores import GREEDY, components, has_score, judged_scores, score_values
from locaudit.stats.selection import BASE, select
from locaudit.stats.specification import Specification
from locaudit.stats.verdict import Verdict
from locaudit.store.database import HeldOutQuestion
from locaudit.store.manifest import Manifest
from locaudit.store.run import Run, load_run
from locaudit.store.trusted import Corrected
from locaudit.text import plural


@dataclass(frozen=True)
class Registered:
    """A claim file that was registered before the run, and the settings that were changed since."""

    sha256: str
    """Hash of the claim file."""
    file: str
    text: str
    changed: tuple[str, ...]
    """Settings of the claim file whose values are different now, one phrase each."""
    left_open: tuple[str, ...]
    """Settings that the claim file does not fix. They could be chosen after the run."""
    reason: str = ""
    """Why the margin is what it is, in the words of the claim file; empty if it does not say."""

    @property
    def hash(self) -> str:
        """First 16 digits of the hash. They are stored with every trial of the run."""
        return self.sha256[:16]

    def to_dict(self) -> dict[str, Any]:
        """The values, ready for JSON, without the file's text."""
        return {key: value for key, value in asdict(self).items() if key != "text"}


def read_registered(run: Run) -> Registered | None:
    """The run's claim file, and what was changed since; None without a claim file."""
    fact, config = run.manifest.registration, run.config
    if fact is None:
        return None
    if fact.values.get("score", "auto") != "auto":
        with unknown_names_kept():
            config = replace(config, score=run.score)  # what ``auto`` in the settings stands for
    changed, left_open = changed_settings(fact.values, config), open_settings(fact.values)
    return Registered(fact.sha256, fact.file, fact.text, tuple(changed), tuple(left_open), fact.reason)


@dataclass(frozen=True)
class Row:
    """One trial, as a row of the report's tables."""

    record: TrialRecord
    chosen: bool
    """Whether the verdict uses the trial, because validation questions chose it. True for the unedited model."""
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Judged score -> 95 % interval on the test questions."""
    seconds: float | None = None
    by_label: Mapping[str, float] = field(default_factory=dict)
    """The verdict's score by right answer (`locaudit.stats.labels.label_scores`); empty without labels."""
    changes: Changes | None = None
    """How many test questions it made worse and better than unedited; None for the unedited model."""
    degenerate: Mapping[str, float] = field(default_factory=dict)
    """``degenerate``: the share of its test answers that are (`is_degenerate`); empty if it gave no answers."""

    @property
    def place(self) -> Place:
        """What the trial is used for."""
        return self.record.spec.place

    @property
    def location(self) -> str:
        """The location as text; empty for the unedited model."""
        return str(self.record.spec.location or "")

    @property
    def values(self) -> Mapping[str, float]:
        """Scores on the test questions, the verdict's by label, shares of questions and answers, drift, fit numbers."""
        c = self.changes
        changed = {} if c is None else {"worse": c.worse, "better": c.better}
        fit = {name: x[0] for name, x in self.record.training.items() if name in FIT_TITLES}
        shares = {**self.by_label, **changed, **self.degenerate}
        return {**self.record.metrics.get("test", {}), **shares, **self.record.drift, **fit}

    @cached_property
    def missing(self) -> Mapping[str, tuple[int, int]]:
        """Judged aspect -> (missing judgements of test answers, all test answers)."""
        questions = self.record.questions.get("test", {})
        judged = [aspect for aspect in questions if f"{aspect}_probability" in questions]
        return {aspect: (sum(map(math.isnan, questions[aspect])), len(questions[aspect])) for aspect in judged}

    @property
    def n_missing(self) -> int:
        """Number of missing judgements of the trial's test answers."""
        return sum(lost for lost, _ in self.missing.values())

    @property
    def n_asked(self) -> int:
        """Number of judgements of the trial's test answers, including missing ones."""
        return sum(asked for _, asked in self.missing.values())


@dataclass(frozen=True)
class Mean:
    """Means over those controls of a method that have a score. Fields are named as in `Row`."""

    n: int
    values: Mapping[str, float]
    bounds: Mapping[str, tuple[float, float]]
    """Score -> (lowest, highest) value of these controls."""
    n_missing: int
    n_asked: int


@dataclass(frozen=True, eq=False)
class Tables:
    """Everything that the report of a run shows."""

    verdict: Verdict
    config: AuditConfig
    rows: tuple[Row, ...]
    """Every trial, by method, arm, control and strength; the unedited model first."""
    manifest: Manifest
    judgements: Mapping[str, Judgements] = field(default_factory=dict)
    """Aspect -> judgements of its judge."""
    questions: Sequence[HeldOutQuestion] = ()
    """The test questions."""
    registered: Registered | None = None
    reading: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Setting -> (value of the run, value chosen), for each setting that `Run.read_with` changed."""
    corrected: Corrected | None = None
    """The judged scores corrected by trusted labels; None without labels."""
    specification: Specification = Specification(())
    """The claim's result under every combination of choices that the trials allow."""
    designs: Designs | None = None
    """Larger audits and their power; None if the run cannot say."""

    def __repr__(self) -> str:
        return f"Tables({plural(len(self.rows), 'trial')} of {self.manifest.model} on {self.manifest.behaviour})"

    @property
    def methods(self) -> Mapping[str, MethodFacts]:
        """The methods that were planned."""
        return self.manifest.methods

    @property
    def base(self) -> Row:
        """The unedited model."""
        return next(row for row in self.rows if row.place[0] == "base" and row.record.status == "ok")

    @property
    def claimed_heads(self) -> tuple[tuple[int, int], ...]:
        """(layer, head) pairs of a claim about heads; empty for other kinds."""
        pairs = (unit for unit in self.manifest.claim.units if not isinstance(unit, str))
        return tuple((unit[0], unit[1]) for unit in pairs) if self.manifest.claim.kind == "head" else ()

    @cached_property
    def aspects(self) -> tuple[str, ...]:
        """Aspects for which answers of some trial were judged."""
        return tuple(dict.fromkeys(aspect for row in self.rows for aspect in row.missing))

    @cached_property
    def judged(self) -> tuple[str, ...]:
        """Judged scores that the unedited model has, the primary one first; of greedy answers only the primary one."""
        found = judged_scores(self.base.record.questions["test"])
        return tuple(x for x in found if not x.endswith(GREEDY) or x == f"{found[0]}{GREEDY}")

    def components(self, score: str) -> tuple[str, ...]:
        """The scores whose means are multiplied to give this score."""
        return components(score, self.base.record.questions["test"])

    @cached_property
    def measured(self) -> tuple[str, ...]:
        """All scores of trials on test questions: scores from judges, other known scores, then the rest by name."""
        found = {name for row in self.rows for name in (*row.record.metrics.get("test", {}), *row.by_label)}
        known = [name for name in (*self.judged, *SCORES) if name in found]
        return tuple(dict.fromkeys((*known, *sorted(found))))

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the table of all arms: scores (the verdict's first), changes, degenerate answers, drift, fits."""
        own = dict.fromkeys((self.verdict.score, *self.measured, "worse", "better", *self.base.degenerate))
        return (*own, *DRIFT_TITLES, *self.fit_columns)

    @cached_property
    def fit_columns(self) -> tuple[str, ...]:
        """The numbers about fits (`FIT_TITLES`) that some trial has."""
        return tuple(name for name in FIT_TITLES if any(name in row.record.training for row in self.rows))

    def places(self, method: str) -> dict[Place, Row | None]:
        """The chosen trial at each place of a method, in the tables' order; None if every edit there diverged."""
        found: dict[Place, Row | None] = {}
        for row in self.rows:
            if row.record.spec.method == method:
                found[row.place] = row if row.chosen else found.get(row.place)
        return found

    def arms(self, method: str) -> dict[Place, Row | None]:
        """The places of a method other than controls and the rests of controls."""
        found = self.places(method).items()
        return {place: row for place, row in found if place.arm != "control" and not place.is_rest_of_control}

    def rests(self, method: str) -> dict[Place, Row | None]:
        """The rests of controls among the places of a method."""
        return {place: row for place, row in self.places(method).items() if place.is_rest_of_control}

    def controls(self, method: str) -> dict[str, dict[Place, Row | None]]:
        """Null -> the controls among the places of a method."""
        found: dict[str, dict[Place, Row | None]] = {}
        for place, row in self.places(method).items():
            if place.arm == "control":
                found.setdefault(place.null, {})[place] = row
        return found

    @cached_property
    def locations(self) -> dict[Place, str]:
        """Place -> its location as text."""
        return {row.place: row.location for row in self.rows}

    def mean_control(self, method: str, null: str, columns: Sequence[str]) -> Mean:
        """Mean over those controls of a method and null that have a score in one of the columns."""
        rows = [row for row in self.controls(method)[null].values() if row is not None]
        found = [{name: x for name, x in row.values.items() if name in columns and math.isfinite(x)} for row in rows]
        by_name = {name: [values[name] for values in found if name in values] for name in columns}
        scored = {name: values for name, values in by_name.items() if values}
        return Mean(
            sum(map(bool, found)),
            {name: fmean(values) for name, values in scored.items()},
            {name: (min(values), max(values)) for name, values in scored.items()},
            sum(row.n_missing for row in rows),
            sum(row.n_asked for row in rows),
        )

    @property
    def any_missing(self) -> bool:
        """Whether a row that is shown lacks judgements."""
        shown = ("none", *self.verdict.methods)
        return any(row.n_missing for row in self.rows if row.chosen and row.record.spec.method in shown)

    def missing(self, aspect: str) -> tuple[int, int]:
        """(missing judgements, all judgements) of an aspect, over the test answers of all trials."""
        counts = [row.missing[aspect] for row in self.rows if aspect in row.missing]
        return sum(lost for lost, _ in counts), sum(asked for _, asked in counts)

    @cached_property
    def said(self) -> dict[str, Speech | None]:
        """The greedy answers of the unedited model, of claims, whole models and first controls, by name.

        None if every edit tried at the place diverged. Empty if nothing was generated.
        """
        rows: dict[str, Row | None] = {"Unedited model": self.base}
        for method in self.verdict.methods:
            first = next((p for p in self.places(method) if (p.arm, p.control) == ("control", 0)), None)
            for place, row in self.places(method).items():
                if place.arm in ("claim", "whole") or place == first:
                    rows[f"{self.methods[method].title}: {place_name(place).lower()}"] = row
        greedy = {name: None if row is None else row.record.answers.get("test", ()) for name, row in rows.items()}
        return {
            name: None if answers is None else speech({}, self.questions, answers, self.judgements)
            for name, answers in greedy.items()
            if greedy["Unedited model"] and answers != ()
        }

    @cached_property
    def failures(self) -> list[tuple[str, str]]:
        """Name and message of each trial that diverged."""
        return [
            (self._trial_name(row.record), row.record.message or "no message")
            for row in self.rows
            if row.record.status == "diverged"
        ]

    def _trial_name(self, record: TrialRecord) -> str:
        spec = record.spec
        if spec.arm == "base":
            return "Unedited model"
        facts = self.methods[spec.method]
        strength = "" if spec.hyperparameter is None else f", {facts.symbol} = {spec.hyperparameter}"
        return f"{facts.title}, {place_name(spec.place).lower()}{strength}"

    @cached_property
    def unfinished(self) -> list[str]:
        """Sentences about what the run still lacks, with the number of trials first. Empty if it is finished."""
        parts = []
        for method, facts in self.methods.items():
            judged = self.verdict.methods.get(method)
            if judged is None:
                parts.append(f"{facts.title}: the claim is not scored yet, so the method is left out below.")
                continue
            lacks = [
                f"{len(null.controls)} of {null.n_planned} controls{null.where} scored"
                for null in judged.nulls.values()
                if len(null.controls) < null.n_planned and not null.ended_early
            ]
            if self.config.whole_model and judged.whole_model is None:
                lacks.append("whole model not scored yet")
            if lacks:
                parts.append(f"{facts.title}: {', '.join(lacks)}.")
        if len(self.rows) < self.manifest.planned:
            return [f"Unfinished: {len(self.rows)} of {self.manifest.planned} trials.", *parts]
        return [f"Unfinished: {plural(len(self.rows), 'trial')} so far.", *parts] if parts else []

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of all trials together."""
        return math.fsum({row.record.spec.trial_id: row.seconds or 0.0 for row in self.rows}.values())

    def verdict_json(self) -> str:
        """Text of verdict.json."""
        more: dict[str, Any] = {} if self.registered is None else {"registration": self.registered.to_dict()}
        if self.reading:
            more["reading"] = {name: {"run": own, "here": here} for name, (own, here) in self.reading.items()}
        if self.corrected is not None:
            more["labels"] = asdict(self.corrected)
        judges = {aspect: asdict(judge) for aspect, judge in self.manifest.judges.items()}
        if self.base.degenerate:
            places = {method: {BASE: self.base, **self.places(method)} for method in self.verdict.methods}
            more["degenerate"] = {
                method: {place.label: row.degenerate.get("degenerate") if row else None for place, row in rows.items()}
                for method, rows in places.items()
            }
        if self.specification.rows:
            more["specification"] = {"summary": self.specification.sentence, "rows": "specification.csv"}
        extensions = [asdict(extension) for extension in self.manifest.extensions]
        return json_text(
            {
                "outcome": self.verdict.outcome,
                **asdict(self.verdict),
                "judges": judges,
                "extensions": extensions,
                **more,
            }
        )

    def trials_csv(self) -> str:
        """Text of trials.csv: `lines` with all digits of each number. Cells are empty if nothing was measured."""
        return csv_text(self.lines)

    def specification_csv(self) -> str:
        """Text of specification.csv: one row per `Combination`, with all digits of each number."""
        return csv_text([asdict(row) for row in self.specification.rows])

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """One dict per trial: its identity, whether validation questions chose it, its test scores, drift and time.

        After each score from judges comes its 95 % interval. ``worse`` and ``better`` are the shares of test
        questions whose score fell and rose, with their 95 % Wilson intervals. `n_missing` is the number of missing
        judgements of the trial's test answers.
        """
        judged = [name for name in self.measured if name in self.judged]
        lines = []
        for row in self.rows:
            line = {**identify(row.record), "status": row.record.status, "chosen": row.chosen}
            for name in self.measured:
                line[name] = row.values.get(name)
                if name in judged:
                    line[f"{name}_low"], line[f"{name}_high"] = row.bounds.get(name, (None, None))
            c = row.changes
            for name in ("worse", "better"):
                line[name] = row.values.get(name)
                line[f"{name}_low"], line[f"{name}_high"] = getattr(c, f"{name}_interval", (None, None))
            if judged:
                line["n_missing"] = row.n_missing if row.missing else None
            names = (*self.base.degenerate, *DRIFT_TITLES, *self.fit_columns)
            line |= {name: row.values.get(name) for name in names}
            for off in dict.fromkeys((o.behaviour, o.score) for o in self.verdict.off_target):
                line[" ".join(off)] = row.record.metrics.get(f"{OFF}{off[0]}", {}).get(off[1])
            lines.append({**line, "seconds": row.seconds})
        return lines


def identify(record: TrialRecord) -> dict[str, Any]:
    """The columns that say which trial a row is about."""
    names = ("trial_id", "arm", "null", "control", "method", "hyperparameter")
    return {name: getattr(record.spec, name) for name in names} | {"location": str(record.spec.location or "")}


def read_tables(folder: str | Path) -> Tables:
    """Read a run folder as tables. The run may be unfinished.

    Raises `RunFolderError` for a folder that is not a run or has no scores of the unedited model.
    """
    return tabulate(load_run(folder))


def tabulate(run: Run) -> Tables:
    """Make the tables of a run."""
    order = _order((NO_METHOD, *run.manifest.methods), ("", *run.manifest.nulls))
    verdict, records = read_verdict(run), sorted(run.records, key=order)
    selected = select(records, verdict.score, verdict.tolerance)
    chosen = [record for places in selected.values() for record in places.values()]
    chosen_ids = {record.spec.trial_id for record in chosen if record is not None}
    bounds = score_intervals(records, judged_scores(run.base.questions["test"]))
    before, rows = score_values(run.base.questions["test"], verdict.score), []
    asked, labels = [question.text for question in run.questions["test"]], run.labels
    for record in records:
        trial = record.spec.trial_id
        broken = share_degenerate(record, asked)
        by_label = label_scores(record.questions.get("test", {}), verdict.score, labels)
        changes, own = None, record.questions.get("test", {})
        if record.spec.arm != "base" and has_score(own, verdict.score):
            changes = count_changes(score_values(own, verdict.score), before, verdict.tolerance)
        share = {} if broken is None else {"degenerate": broken}
        seconds = run.seconds.get(trial)
        rows.append(Row(record, trial in chosen_ids, bounds.get(trial, {}), seconds, by_label, changes, share))
    registered = read_registered(run)
    return Tables(
        verdict, run.config, tuple(rows), run.manifest, run.judgements, run.questions["test"], registered, run.reading,
        run.corrected, run.specification, read_designs(run, verdict.main) if verdict.main else None,
    )  # fmt: skip


def _order(methods: Sequence[str], nulls: Sequence[str]) -> Callable[[TrialRecord], tuple]:
    def key(record: TrialRecord) -> tuple:
        spec = record.spec
        strength = -math.inf if spec.hyperparameter is None else spec.hyperparameter
        place = ARMS.index(spec.arm), nulls.index(spec.null), spec.control
        return methods.index(spec.method), *place, strength, spec.seed, spec.trial_id

    return key


def place_name(place: Place) -> str:
    """The name of a place in tables: ``Claim``, ``Control 3 in its layers``, ``All but control 3``, ``Placebo 0``."""
    name = "All but control" if place.is_rest_of_control else ARM_NAMES[place.arm].capitalize()
    return name if place.control < 0 else f"{name} {place.control}{where(place.null)}"


def reading_words(reading: Mapping[str, tuple[Any, Any]]) -> str:
    """The settings that were changed for this reading, in words: ``level 0.1 (the run's: 0.05)``."""
    return "; ".join(f"{name} {here} (the run's: {own})" for name, (own, here) in reading.items())


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with equal keys as CSV. Numbers keep all digits, None and NaN are empty, booleans are lower case."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    # NaN is the only value that differs from itself
    words: dict[Any, str] = {None: "", True: "true", False: "false"}
    for row in rows:
        cells = {key: words[x] if x is None or isinstance(x, bool) else "" if x != x else x for key, x in row.items()}
        writer.writerow(cells)
    return text.getvalue()
