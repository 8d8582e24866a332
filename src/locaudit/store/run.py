"""Read a run folder into a `Run`, without a model and without writing anything."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from locaudit.config import AuditConfig, merge_config, unknown_names_kept
from locaudit.errors import ConfigError, RunFolderError
from locaudit.records import TrialRecord
from locaudit.stats.agreement import describe_chance
from locaudit.stats.decide import decide
from locaudit.stats.growth import describe_extensions
from locaudit.stats.labels import describe_labels, wanted
from locaudit.stats.measured import Design
from locaudit.stats.off_target import measure_off_target
from locaudit.stats.repeats import Repeat
from locaudit.stats.scores import (
    MAX_MISSING,
    Judgements,
    add_judgements,
    find_score,
    is_judged,
    resolve_score,
    tolerance,
)
from locaudit.stats.selection import fewest_samples, find_unedited, group_trials, widened
from locaudit.stats.specification import Specification, specify
from locaudit.stats.verdict import Verdict
from locaudit.store.database import HeldOutQuestion, Store, said_in
from locaudit.store.folder import read_run
from locaudit.store.manifest import JudgeFacts, Manifest
from locaudit.store.trusted import Corrected, Labelled, correct, read_labels


@dataclass(frozen=True, eq=False)
class Run:
    """The contents of a run folder. Made by `load_run`."""

    folder: Path
    config: AuditConfig
    """Settings of the run, with the score, level and margin chosen by `read_with`."""
    manifest: Manifest
    trials: tuple[TrialRecord, ...]
    """The trials as they were measured, without judgements."""
    questions: Mapping[str, tuple[HeldOutQuestion, ...]]
    """Split -> questions, in order."""
    judgements: Mapping[str, Judgements]
    """Aspect -> judgements of its judge."""
    seconds: Mapping[str, float]
    """Wall-clock seconds of each trial, by id."""
    parts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Trial id -> part of its work -> seconds (`locaudit.store.database.Store.parts`)."""
    reading: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Setting -> (value of the run, value chosen), for each setting that `read_with` changed."""
    trusted: tuple[str, tuple[Labelled, ...]] | None = None
    """(file, its rows) of the trusted labels that `read_with` was given."""

    def __repr__(self) -> str:
        m, n = self.manifest, len(self.trials)
        return f"Run({str(self.folder)!r}: {m.model} on {m.behaviour}, {n} of {m.planned} trials)"

    def _repr_html_(self) -> str:
        return self.verdict._repr_html_()

    def read_with(
        self,
        score: str | None = None,
        level: float | None = None,
        margin: float | None = None,
        labels: str | Path | None = None,
    ) -> Run:
        """The same trials, evaluated with another score, level or margin; None keeps the run's value.

        `labels` is a file of trusted labels of the run's answers, which correct the judged scores (`corrected`).

        Raises `ConfigError` for a score that the run does not have, or a level or margin out of range. Raises
        `DataError` for labels that cannot be used.
        """
        if labels is not None:
            rows = read_labels(labels, tuple(self.manifest.judges))
            found = replace(self.read_with(score, level, margin), trusted=(str(labels), rows))
            _ = found.corrected  # computed now, so that labels of another run are refused here
            return found
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
                remedy="choose another score; for a judged one, add a judge and run the audit again",
            )
        new = {"score": score, "level": config.level, "margin": config.margin}
        reading = {name: (own[name], value) for name, value in new.items() if value != own[name]}
        return replace(self, config=config, reading={**self.reading, **reading})

    @cached_property
    def records(self) -> list[TrialRecord]:
        """The trials with the judged scores of their answers.

        They count as many samples of each answer as all trials have that the score chooses.
        """
        return self._judged(self.score)

    def _judged(self, score: str) -> list[TrialRecord]:
        found = judged(self.trials, self.judgements, self.questions)
        fewest = self._fewest(found, score)
        if all(len(samples) <= fewest for record in self.trials for samples in record.samples.values()):
            return found
        return judged(self.trials, self.judgements, self.questions, fewest)

    def _fewest(self, records: list[TrialRecord], score: str) -> int:
        n_strengths = {name: facts.n_strengths for name, facts in self.manifest.methods.items()}
        return fewest_samples(records, score, tolerance(score, self.manifest.dtype), n_strengths)

    @property
    def labels(self) -> tuple[str, ...]:
        """The right answer of each test question, if all have the same possible answers; else nothing."""
        return wanted(self.questions["test"])

    @property
    def score(self) -> str:
        """Name of the score that the verdict compares; ``auto`` is resolved by the judges that the run has."""
        return resolve_score(self.config.score, tuple(self.manifest.judges))

    @property
    def base(self) -> TrialRecord:
        """The record of the unedited model. Raises `RunFolderError` if there is none yet."""
        return find_unedited(self.records, str(self.folder))

    @cached_property
    def design(self) -> Design:
        """How the controls were planned."""
        return Design(
            rule=self.config.stopping,
            nulls=self.manifest.nulls,
            margin=self.config.margin,
            dtype=self.manifest.dtype,
            noun=self.manifest.kind_plural,
        )

    @cached_property
    def verdict(self) -> Verdict:
        """The verdict with this score, level and margin; computed once."""
        return self.decide()

    def decide(self, records: list[TrialRecord] | None = None, score: str | None = None) -> Verdict:
        """Compute the verdict, optionally with other judgements in `records` or another score."""
        score = score or self.score
        if records is None:
            records = self.records if score == self.score else self._judged(score)
        verdict = decide(
            records,
            score=score,
            level=self.config.level,
            design=self.design,
            methods=self.manifest.methods,
            questions=[question.text for question in self.questions["test"]],
        )
        extensions, first = self.manifest.extensions, self.manifest.stopping
        rule = first if first == self.config.stopping else "fixed"
        return replace(
            verdict,
            subject=self._describe_subject(verdict),
            extended=describe_extensions(extensions, rule, self.config.level),
            notes=(
                *describe_labels(verdict, records, self.labels),
                *self._describe_samples(records, score),
                *(describe_chance(self.corrected.agreement) if self.corrected else ()),
            ),
            off_target=measure_off_target(verdict, records, self.manifest.dtype),
        )

    def _describe_subject(self, verdict: Verdict) -> str:
        """What was tried: ``sentiment on smollm2-135m · claim: 8 probed heads · score: ...``."""
        manifest, n = self.manifest, len(self.manifest.claim)
        noun = manifest.kind_plural if n != 1 else manifest.kind_plural.removesuffix("s")
        controls = " + ".join(str(null.n_planned) for null in manifest.nulls.values())
        return (
            f"{manifest.behaviour} on {manifest.model} · claim: {n} {noun} ({manifest.claim_source}) · "
            f"score: {verdict.score}, {verdict.n_questions} test questions, {controls} controls"
        )

    @cached_property
    def specification(self) -> Specification:
        """The claim's result under every combination of choices that the trials allow."""

        @cache
        def read(most: int | None) -> list[TrialRecord]:
            return judged(self.trials, self.judgements, self.questions, most)

        return specify(read, self.manifest.methods, self.design, score=self.score, level=self.config.level)

    def _describe_samples(self, records: list[TrialRecord], score: str) -> list[str]:
        wanted, fewest = self.manifest.samples, self._fewest(records, score)
        if fewest >= wanted or not is_judged(score):
            return []
        return [f"Scores count {fewest} of {wanted} sampled answers to a question: a chosen edit has no more."]

    @cached_property
    def said(self) -> set[tuple[str, str]]:
        """(question id, answer) of each distinct answer."""
        return set(said_in(self.trials, self.questions))

    @cached_property
    def corrected(self) -> Corrected | None:
        """The judged scores corrected by the trusted labels; None without labels."""
        return None if self.trusted is None else correct(self, *self.trusted)

    @property
    def n_unjudged(self) -> int:
        """Number of answers that a judge was never asked about, as in a run that was killed."""
        return sum(len(self.said - set(table)) for table in self.judgements.values())

    @property
    def lacking(self) -> dict[str, tuple[int, int, str]]:
        """The aspects of the score for which more than the share `MAX_MISSING` of judgements is missing.

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
        """Whether every trial has a record, also those by which grids widen; and every chosen one all samples.

        All answers are judged, too.
        """
        own = self.reading.get("score", (self.score,))[0]
        sampled = self._fewest(self.records, own) >= self.manifest.samples
        tie, methods = tolerance(own, self.manifest.dtype), self.manifest.methods
        wide = all(
            widened(trials, own, tie, methods[name].n_strengths, self.manifest.widen) is None
            for name, places in group_trials(self.records).items()
            if name in methods
            for trials in places.values()
        )
        return len(self.trials) >= self.manifest.planned and wide and sampled and not self.n_unjudged

    def as_repeat(self) -> Repeat:
        """The run as one of several repeats."""
        places = {r.spec.place: r.spec.location for r in self.trials if r.spec.arm == "control"}
        controls = {
            name: tuple(where for place, where in sorted(places.items()) if where and place.null == name)
            for name in self.manifest.nulls
        }
        questions = tuple(sorted(question.id for question in self.questions["test"]))
        return Repeat(self.verdict, self.manifest.claim, controls, questions)


def load_run(folder: str | Path) -> Run:
    """Read a run folder. Raises `RunFolderError` if it is not one, or if it has no manifest yet."""
    with read_run(folder) as store:
        manifest = store.manifest
        if manifest is None:
            raise RunFolderError(
                got=f"{folder}, a run that was stopped before its first trial",
                expected="at least the record of the unedited model",
                remedy="run the audit that started it again",
            )
        records, methods = store.records(), manifest.methods
        added = sum(
            max(len(trials) - methods[name].n_strengths, 0)
            for name, places in group_trials(records).items()
            if name in methods
            for trials in places.values()
        )
        return Run(
            store.folder,
            store.config,
            replace(manifest, planned=manifest.planned + added),  # with the trials by which grids were widened
            tuple(records),
            {split: tuple(store.questions(split)) for split in store.splits},
            read_judgements(store, manifest.judges),
            store.seconds(),
            store.parts(),
        )


def read_judgements(
    store: Store, judges: Mapping[str, JudgeFacts], answers: Collection[tuple[str, str]] | None = None
) -> dict[str, Judgements]:
    """Aspect -> (question id, answer) -> judgement, of all answers or of `answers` only."""
    return {aspect: store.judgements(judge.fingerprint, answers) for aspect, judge in judges.items()}


def judged(
    trials: tuple[TrialRecord, ...] | list[TrialRecord],
    said: Mapping[str, Judgements],
    questions: Mapping[str, tuple[HeldOutQuestion, ...]],
    most: int | None = None,
) -> list[TrialRecord]:
    """Add the judged scores to each trial, of at most `most` samples (None: all).

    An answer that has not been judged counts as missing.
    """
    ids = {split: [question.id for question in part] for split, part in questions.items()}
    return [add_judgements(r, said, ids, most) if said and r.answers else r for r in trials]
