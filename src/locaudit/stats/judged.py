"""A run's records with what its judges said: raw records and judgements are stored apart and joined here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from locaudit.records import TrialRecord
from locaudit.stats.scores import JUDGED, components, judged_metrics, mean_score, score_values
from locaudit.store import Store

ASPECT_NAMES = ("truth", "info")
"""Aspects, in the order of the target and the retention judge."""


def judged_records(store: Store, judges: Mapping[str, Mapping[str, Any]] | None = None) -> list[TrialRecord]:
    """All records; those with answers have the judged scores among their metrics, as far as they are judged.

    Which judges count is the run's fact ``judges``: aspect -> ``{"name", "fingerprint"}``, unless others are given. An
    answer that has not been judged counts as missing.
    """
    chosen: Mapping[str, Mapping[str, Any]] = (store.fact("judges") or {}) if judges is None else judges
    said = {aspect: store.judgements(judge["fingerprint"]) for aspect, judge in chosen.items()}
    ids = {split: [question.id for question in store.questions(split)] for split in ("val", "test")}
    return [_with_judgements(record, said, ids) if said and record.answers else record for record in store.records()]


def _with_judgements(
    record: TrialRecord,
    said: Mapping[str, Mapping[tuple[str, str], tuple[float | None, str]]],
    ids: Mapping[str, Sequence[str]],
) -> TrialRecord:
    metrics = {split: dict(values) for split, values in record.metrics.items()}
    questions = {split: dict(values) for split, values in record.questions.items()}
    for split, answers in record.answers.items():
        keys = list(zip(ids[split], answers, strict=True))
        found = {aspect: [table.get(key, (None, ""))[0] for key in keys] for aspect, table in said.items()}
        questions[split] |= judged_metrics(found.get("truth"), found.get("info"))
        for score in JUDGED:
            if all(name in questions[split] for name in components(score)):
                metrics[split][score] = float(mean_score(score_values(questions[split], score)))
    return replace(record, metrics=metrics, questions=questions)


def count_missing(record: TrialRecord, score: str, split: str = "test") -> int:
    """Questions of the split at which a component of the score is missing."""
    values = score_values(record.questions[split], score)
    return int((values != values).any(axis=0).sum())


def count_unjudged(store: Store, records: Sequence[TrialRecord]) -> int:
    """Answers that a judge of the run has not been asked about, as in a run that was killed, not failed judgements."""
    ids = {split: [question.id for question in store.questions(split)] for split in ("val", "test")}
    said = {
        key
        for record in records
        for split, answers in record.answers.items()
        for key in zip(ids[split], answers, strict=True)
    }
    judges = (store.fact("judges") or {}).values()
    return sum(len(said - set(store.judgements(judge["fingerprint"]))) for judge in judges)


def run_score(store: Store) -> str:
    """The score of a run's verdict, by its configuration and its judges."""
    return resolve_score(store.config.score, tuple(store.fact("judges") or {}))


def resolve_score(score: str, judges: Sequence[str]) -> str:
    """What ``auto`` means when the aspects `judges` have a judge; any other score is itself."""
    if score != "auto":
        return score
    return "info_truth" if set(ASPECT_NAMES) <= set(judges) else "truth" if "truth" in judges else "mc2"
