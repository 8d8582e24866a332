"""A run as plain rows, from which page, figures, files and terminal output are made. No HTML here.

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
from locaudit.judges.degenerate import is_degenerate
from locaudit.location import Location
from locaudit.records import ARMS, NO_METHOD, TrialRecord, json_text
from locaudit.registry import SCORES
from locaudit.report.answers import Conversation, Judgements, Speaker, conversations
from locaudit.report.style import ARM_NAMES, DRIFT_TITLES
from locaudit.stats.labels import label_scores
from locaudit.stats.phrases import MethodFacts
from locaudit.stats.resample import score_intervals
from locaudit.stats.scores import components, judged_scores
from locaudit.stats.selection import Place, select
from locaudit.stats.verdict import Verdict
from locaudit.store.database import HeldOutQuestion
from locaudit.store.manifest import JudgeFacts, Manifest, ProbeFacts
from locaudit.store.run import Run, load_run


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
    """Settings that the claim file does not fix, so that they could be chosen after the run."""

    @property
    def hash(self) -> str:
        """First 16 digits of the hash, which every trial of the run carries."""
        return self.sha256[:16]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; the file's text is left out."""
        return {key: value for key, value in asdict(self).items() if key != "text"}


def read_registered(run: Run) -> Registered | None:
    """The run's claim file and what was changed since; None without one."""
    fact, config = run.manifest.registration, run.config
    if fact is None:
        return None
    if fact.values.get("score", "auto") != "auto":
        with unknown_names_kept():
            config = replace(config, score=run.score)  # what ``auto`` in the settings stands for
    changed, left_open = changed_settings(fact.values, config), open_settings(fact.values)
    return Registered(fact.sha256, fact.file, fact.text, tuple(changed), tuple(left_open))


@dataclass(frozen=True)
class Row:
    """One trial, as a row of the report's tables."""

    record: TrialRecord
    chosen: bool
    """Whether the verdict uses it, because validation chose it for its place. True for the unedited model."""
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Judged score -> 95 % bootstrap interval on the test questions."""
    seconds: float | None = None
    by_label: Mapping[str, float] = field(default_factory=dict)
    """The verdict's score by right answer (`locaudit.stats.labels.label_scores`); empty without labels."""
    degenerate: Mapping[str, float] = field(default_factory=dict)
    """``degenerate``: the share of its test answers that are (`is_degenerate`); empty if it gave no answers."""

    @property
    def place(self) -> Place:
        """(arm, number of the control)."""
        return self.record.spec.arm, self.record.spec.control

    @property
    def location(self) -> str:
        """The location as text; empty for the unedited model."""
        return str(self.record.spec.location or "")

    @property
    def values(self) -> Mapping[str, float]:
        """Scores on the test questions, the verdict's by label, the share of degenerate answers, and drift."""
        return {**self.record.metrics.get("test", {}), **self.by_label, **self.degenerate, **self.record.drift}

    @cached_property
    def missing(self) -> Mapping[str, tuple[int, int]]:
        """Judged aspect -> (missing judgements of test answers, all test answers)."""
        questions = self.record.questions.get("test", {})
        judged = [aspect for aspect in questions if f"{aspect}_probability" in questions]
        return {aspect: (sum(map(math.isnan, questions[aspect])), len(questions[aspect])) for aspect in judged}

    @property
    def n_missing(self) -> int:
        """Number of judgements of its test answers that are missing."""
        return sum(lost for lost, _ in self.missing.values())

    @property
    def n_asked(self) -> int:
        """Number of judgements of its test answers, including missing ones."""
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

    def __repr__(self) -> str:
        return f"Tables({len(self.rows)} trials of {self.manifest.model} on {self.manifest.behaviour})"

    @property
    def methods(self) -> Mapping[str, MethodFacts]:
        """The methods that were planned."""
        return self.manifest.methods

    @property
    def judges(self) -> Mapping[str, JudgeFacts]:
        """Aspect -> name and fingerprint of its judge."""
        return self.manifest.judges

    @property
    def probes(self) -> ProbeFacts | None:
        """Results of the probes of all units; None without probes."""
        return self.manifest.probes

    @property
    def base(self) -> Row:
        """The unedited model."""
        return next(row for row in self.rows if row.place[0] == "base" and row.record.status == "ok")

    @property
    def claim(self) -> Location:
        """The claimed location."""
        return self.manifest.claim

    @property
    def claimed_heads(self) -> tuple[tuple[int, int], ...]:
        """(layer, head) pairs of a claim about heads; empty for other kinds."""
        pairs = (unit for unit in self.claim.units if not isinstance(unit, str))
        return tuple((unit[0], unit[1]) for unit in pairs) if self.claim.kind == "head" else ()

    @cached_property
    def aspects(self) -> tuple[str, ...]:
        """Aspects for which answers of some trial were judged."""
        return tuple(dict.fromkeys(aspect for row in self.rows for aspect in row.missing))

    @cached_property
    def judged(self) -> tuple[str, ...]:
        """Judged scores that the unedited model has, the primary one first."""
        return judged_scores(self.base.record.questions["test"])

    def components(self, score: str) -> tuple[str, ...]:
        """The scores whose means are multiplied to give this score."""
        return components(score, self.base.record.questions["test"])

    @cached_property
    def measured(self) -> tuple[str, ...]:
        """Scores on the test questions that some trial has: judged ones, then known ones, then others by name."""
        found = {name for row in self.rows for name in (*row.record.metrics.get("test", {}), *row.by_label)}
        known = [name for name in (*self.judged, *SCORES) if name in found]
        return tuple(dict.fromkeys((*known, *sorted(found))))

    @property
    def judged_columns(self) -> tuple[str, ...]:
        """Columns of the table of judged answers: judged scores, and the share of degenerate answers."""
        return (*self.judged, *self.base.degenerate)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the table of all arms: the verdict's score, scores without a judge, and drift."""
        own = [name for name in self.measured if name not in self.judged or name == self.verdict.score]
        return (*own, *DRIFT_TITLES)

    def places(self, method: str) -> dict[Place, Row | None]:
        """The chosen trial at each place of a method, in the order of tables; None if every edit there diverged."""
        found: dict[Place, Row | None] = {}
        for row in self.rows:
            if row.record.spec.method == method:
                found[row.place] = row if row.chosen else found.get(row.place)
        return found

    def controls(self, method: str) -> dict[Place, Row | None]:
        """The controls among the places of a method."""
        return {place: row for place, row in self.places(method).items() if place[0] == "control"}

    @cached_property
    def locations(self) -> dict[Place, str]:
        """Place -> its location as text."""
        return {row.place: row.location for row in self.rows}

    def mean_control(self, method: str, columns: Sequence[str]) -> Mean:
        """Mean over the controls of a method that have a score in one of the columns."""
        rows = [row for row in self.controls(method).values() if row is not None]
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
        """Whether some row that tables show lacks judgements."""
        shown = ("none", *self.verdict.methods)
        return any(row.n_missing for row in self.rows if row.chosen and row.record.spec.method in shown)

    def missing(self, aspect: str) -> tuple[int, int]:
        """(missing judgements, all judgements) of an aspect, over the test answers of all trials."""
        counts = [row.missing[aspect] for row in self.rows if aspect in row.missing]
        return sum(lost for lost, _ in counts), sum(asked for _, asked in counts)

    @cached_property
    def conversations(self) -> list[Conversation]:
        """The models' answers to the first test questions; empty if nothing was generated."""
        speakers = [Speaker("Unedited model", self.base.record)]
        for method in self.verdict.methods:
            for place, row in self.places(method).items():
                if place[0] in ("claim", "whole") or place == ("control", 0):
                    name = f"{self.methods[method].title}: {place_name(place).lower()}"
                    speakers.append(Speaker(name, None if row is None else row.record))
        return conversations(self.questions, speakers, self.judgements)

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
        return f"{facts.title}, {place_name((spec.arm, spec.control)).lower()}{strength}"

    @cached_property
    def unfinished(self) -> list[str]:
        """Sentences about what the run still lacks, the count of trials first; empty if it is finished."""
        parts = []
        for method, facts in self.methods.items():
            judged = self.verdict.methods.get(method)
            if judged is None:
                parts.append(f"{facts.title}: the claim is not scored yet, so the method is left out below.")
                continue
            lacks = []
            if len(judged.controls) < judged.n_planned and not judged.ended_early:
                lacks.append(f"{len(judged.controls)} of {judged.n_planned} controls scored")
            if self.config.whole_model and judged.whole_model is None:
                lacks.append("whole model not scored yet")
            if lacks:
                parts.append(f"{facts.title}: {', '.join(lacks)}.")
        if len(self.rows) < self.manifest.planned:
            return [f"Unfinished: {len(self.rows)} of {self.manifest.planned} trials.", *parts]
        return [f"Unfinished: {len(self.rows)} trials so far.", *parts] if parts else []

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of all trials together."""
        return math.fsum(row.seconds for row in self.rows if row.seconds is not None)

    def verdict_json(self) -> str:
        """Text of verdict.json."""
        more: dict[str, Any] = {} if self.registered is None else {"registration": self.registered.to_dict()}
        if self.reading:
            more["reading"] = {name: {"run": own, "here": here} for name, (own, here) in self.reading.items()}
        judges = {aspect: asdict(judge) for aspect, judge in self.judges.items()}
        if self.base.degenerate:
            places = {method: {("base", 0): self.base, **self.places(method)} for method in self.verdict.methods}
            more["degenerate"] = {
                method: {
                    f"control {number}" if arm == "control" else arm: row.degenerate.get("degenerate") if row else None
                    for (arm, number), row in rows.items()
                }
                for method, rows in places.items()
            }
        extensions = [asdict(extension) for extension in self.manifest.extensions]
        return json_text({**asdict(self.verdict), "judges": judges, "extensions": extensions, **more})

    def trials_csv(self) -> str:
        """Text of trials.csv: `lines` with all digits of each number, and empty cells for what was not measured."""
        return csv_text(self.lines)

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """One dict per trial: its identity, whether validation chose it, its test scores, drift and time.

        Judged scores are followed by their 95 % bootstrap interval. `n_missing` counts the missing judgements of the
        trial's test answers.
        """
        judged = [name for name in self.measured if name in self.judged]
        lines = []
        for row in self.rows:
            spec = row.record.spec
            line: dict[str, Any] = {
                "trial_id": spec.trial_id,
                "arm": spec.arm,
                "control": spec.control,
                "method": spec.method,
                "hyperparameter": spec.hyperparameter,
                "location": row.location,
                "status": row.record.status,
                "chosen": row.chosen,
            }
            for name in self.measured:
                line[name] = row.values.get(name)
                if name in judged:
                    line[f"{name}_low"], line[f"{name}_high"] = row.bounds.get(name, (None, None))
            if judged:
                line["n_missing"] = row.n_missing if row.missing else None
            line |= {name: row.values.get(name) for name in (*self.base.degenerate, *DRIFT_TITLES)}
            lines.append({**line, "seconds": row.seconds})
        return lines


def read_tables(folder: str | Path) -> Tables:
    """Read a run folder as tables. The run may be unfinished.

    Raises `RunFolderError` for a folder that is not a run or has no scores of the unedited model.
    """
    return tabulate(load_run(folder))


def tabulate(run: Run) -> Tables:
    """Make the tables of a run."""
    verdict, records = run.verdict, sorted(run.records, key=_order((NO_METHOD, *run.manifest.methods)))
    selected = select(records, verdict.score, verdict.tolerance)
    chosen = [record for places in selected.values() for record in places.values()]
    chosen_ids = {record.spec.trial_id for record in chosen if record is not None}
    bounds = score_intervals(records, judged_scores(run.base.questions["test"]))
    rows = []
    asked = [question.text for question in run.questions["test"]]
    for record in records:
        trial = record.spec.trial_id
        broken = [*map(is_degenerate, asked, record.answers.get("test", ()))]
        by_label = label_scores(record.questions.get("test", {}), verdict.score, run.labels)
        share = {"degenerate": fmean(broken)} if broken else {}
        rows.append(Row(record, trial in chosen_ids, bounds.get(trial, {}), run.seconds.get(trial), by_label, share))
    registered = read_registered(run)
    return Tables(
        verdict, run.config, tuple(rows), run.manifest, run.judgements, run.questions["test"], registered, run.reading
    )


def _order(methods: Sequence[str]) -> Callable[[TrialRecord], tuple]:
    def key(record: TrialRecord) -> tuple:
        spec = record.spec
        strength = -math.inf if spec.hyperparameter is None else spec.hyperparameter
        return methods.index(spec.method), ARMS.index(spec.arm), spec.control, strength, spec.seed, spec.trial_id

    return key


def place_name(place: Place) -> str:
    """The name of a place in tables: ``Claim``, ``Control 3``."""
    return f"Control {place[1]}" if place[0] == "control" else ARM_NAMES[place[0]].capitalize()


def reading_words(reading: Mapping[str, tuple[Any, Any]]) -> str:
    """The settings that a reading changed, in words: ``level 0.1 (the run's: 0.05)``."""
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
