"""A run folder as it is read: typed, whole, without a model, and without side effects."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from locaudit.config import AuditConfig, merge_config, unknown_names_kept
from locaudit.errors import ConfigError, RunFolderError
from locaudit.records import TrialRecord
from locaudit.stats.decide import decide
from locaudit.stats.growth import describe_extensions
from locaudit.stats.measured import Design
from locaudit.stats.repeats import Repeat
from locaudit.stats.scores import MAX_MISSING, Judgements, add_judgements, find_score, resolve_score
from locaudit.stats.verdict import Verdict
from locaudit.store.database import HeldOutQuestion, Store
from locaudit.store.folder import read_run
from locaudit.store.manifest import JudgeFacts, Manifest


@dataclass(frozen=True, eq=False)
class Run:
    """What a run folder holds. Made by `load_run`."""

    folder: Path
    config: AuditConfig
    """Settings of the run, with the score, level and margin of this reading."""
    manifest: Manifest
    trials: tuple[TrialRecord, ...]
    """As they were measured, without judgements."""
    questions: Mapping[str, tuple[HeldOutQuestion, ...]]
    """Split -> questions, in order."""
    judgements: Mapping[str, Judgements]
    """Aspect -> what its judge said."""
    seconds: Mapping[str, float]
    """Wall-clock seconds of each trial, by id."""
    reading: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Setting -> (the run's value, this reading's), for each that `read_with` chose otherwise."""

    def __repr__(self) -> str:
        m, n = self.manifest, len(self.trials)
        return f"Run({str(self.folder)!r}: {m.model} on {m.behaviour}, {n} of {m.planned} trials)"

    def _repr_html_(self) -> str:
        return self.verdict._repr_html_()

    def read_with(self, score: str | None = None, level: float | None = None, margin: float | None = None) -> Run:
        """The same trials, read with another score, level or margin; None keeps the run's.

        Raises `ConfigError` for a score that the run does not have, or a level or margin out of range.
        """
        own = {"score": self.score, "level": self.config.level, "margin": self.config.margin}
        chosen = {"score": score, "level": level, "margin": margin}
        given = {name: value for name, value in chosen.items() if value is not None}
        if not given:
            return self
        with unknown_names_kept():
            config = merge_config(self.config, given, source="this reading")
        score = resolve_score(config.score, tuple(self.manifest.judges))
        if score not in self.base.metrics["test"]:
            raise ConfigError(
                got=f"score {score}, which {self.folder} does not have",
                expected=f"one of {', '.join(sorted(self.base.metrics['test']))}",
                remedy="choose another score; those of answers need a judge: name one and run the audit again",
            )
        new = {"score": score, "level": config.level, "margin": config.margin}
        reading = {name: (own[name], value) for name, value in new.items() if value != own[name]}
        return replace(self, config=config, reading={**self.reading, **reading})

    @cached_property
    def records(self) -> list[TrialRecord]:
        """The trials with the judged scores of their answers."""
        return judged(self.trials, self.judgements, self.questions)

    @property
    def score(self) -> str:
        """What the verdict compares, by the settings and the judges."""
        return resolve_score(self.config.score, tuple(self.manifest.judges))

    @property
    def base(self) -> TrialRecord:
        """The unedited model's record; `RunFolderError` while there is none."""
        found = next((r for r in self.records if r.spec.arm == "base" and r.status == "ok"), None)
        if found is None:
            raise RunFolderError(
                got=f"{self.folder} without scores of the unedited model, so that nothing is scored yet",
                expected="at least the record of the unedited model",
                remedy="run the audit first, or again if it was stopped",
            )
        return found

    @cached_property
    def design(self) -> Design:
        """How controls were planned, and what one of them took."""
        return Design(
            rule=self.config.stopping,
            n_planned=self.manifest.n_controls,
            population=self.manifest.population,
            margin=self.config.margin,
            matched=self.config.match != "none",
            seconds=_seconds_per_control(self.trials, self.seconds),
        )

    @cached_property
    def verdict(self) -> Verdict:
        """The verdict, computed once for this reading."""
        return self.decide()

    def decide(self, records: list[TrialRecord] | None = None, score: str | None = None, *, graded=True) -> Verdict:
        """The verdict by another score, on records judged by others, or without grades."""
        verdict = decide(
            self.records if records is None else records,
            score=score or self.score,
            level=self.config.level,
            design=replace(self.design, graded=graded),
            methods=self.manifest.methods,
        )
        extensions, rule = self.manifest.extensions, self.config.stopping
        return replace(verdict, extended=describe_extensions(extensions, rule, self.config.level))

    @cached_property
    def said(self) -> set[tuple[str, str]]:
        """(question id, answer) of each distinct answer."""
        return {
            (question.id, answer)
            for record in self.trials
            for split, answers in record.answers.items()
            for question, answer in zip(self.questions[split], answers, strict=True)
        }

    @property
    def n_unjudged(self) -> int:
        """Answers that a judge has not been asked about, as in a run that was killed; failed judgements are none."""
        return sum(len(self.said - set(table)) for table in self.judgements.values())

    @property
    def lacking(self) -> dict[str, tuple[int, int, str]]:
        """Judged aspects of the score that lack more than `MAX_MISSING` of their judgements.

        Aspect -> (distinct answers without one, distinct answers, why the first of them has none).
        """
        needs, found = find_score(self.score).needs, {}
        for aspect, table in self.judgements.items():
            reasons = [reason for p, reason in (table.get(key, (None, "not yet asked")) for key in sorted(self.said))
                       if p is None]  # fmt: skip
            if (aspect in needs or "*" in needs) and len(reasons) > MAX_MISSING * len(self.said):
                found[aspect] = (len(reasons), len(self.said), reasons[0])
        return found

    @property
    def is_finished(self) -> bool:
        """Whether every planned trial has a record and every answer was judged."""
        return len(self.trials) >= self.manifest.planned and not self.n_unjudged

    def as_repeat(self) -> Repeat:
        """One of several audits, without grades."""
        places = {r.spec.control: r.spec.location for r in self.trials if r.spec.arm == "control"}
        controls = tuple(place for _, place in sorted(places.items()) if place is not None)
        questions = tuple(sorted(question.id for question in self.questions["test"]))
        return Repeat(self.decide(graded=False), self.manifest.claim, controls, questions)


def load_run(folder: str | Path) -> Run:
    """Read a run folder. Raises `RunFolderError` for one that is none, or that has no trial yet."""
    with read_run(folder) as store:
        manifest = store.manifest
        if manifest is None:
            raise RunFolderError(
                got=f"{folder}, a run that did not come as far as its first trial",
                expected="at least the record of the unedited model",
                remedy="run the same command again",
            )
        return Run(
            store.folder,
            store.config,
            manifest,
            tuple(store.records()),
            {split: tuple(store.questions(split)) for split in ("val", "test")},
            read_judgements(store, manifest.judges),
            store.seconds(),
        )


def read_judgements(
    store: Store, judges: Mapping[str, JudgeFacts], answers: Collection[tuple[str, str]] | None = None
) -> dict[str, Judgements]:
    """Aspect -> (question id, answer) -> what its judge said; of these answers only, unless None."""
    return {aspect: store.judgements(judge.fingerprint, answers) for aspect, judge in judges.items()}


def judged(
    trials: tuple[TrialRecord, ...] | list[TrialRecord],
    said: Mapping[str, Judgements],
    questions: Mapping[str, tuple[HeldOutQuestion, ...]],
) -> list[TrialRecord]:
    """Trials with the judged scores of their answers; an answer that has not been judged counts as missing."""
    ids = {split: [question.id for question in part] for split, part in questions.items()}
    return [add_judgements(r, said, ids) if said and r.answers else r for r in trials]


def _seconds_per_control(trials: tuple[TrialRecord, ...], seconds: Mapping[str, float]) -> dict[str, float]:
    total: Counter[str] = Counter()
    places: dict[str, set[int]] = defaultdict(set)
    for record in trials:
        spec = record.spec
        if spec.arm == "control":
            total[spec.method] += seconds[spec.trial_id]  # type: ignore[assignment]
            places[spec.method].add(spec.control)
    return {method: total[method] / len(found) for method, found in places.items()}
