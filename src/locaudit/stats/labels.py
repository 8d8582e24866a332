"""Scores by label, for questions with the same possible answers, such as (A) and (B).

The label of a question is its right answer. An edit that makes the model say (A) to everything raises the score of
questions with label (A) and lowers it for label (B). If more questions have label (A), the mean over questions rises.
The balanced mean does not: it is the mean over labels of the mean score at each label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from locaudit.records import TrialRecord
from locaudit.stats.phrases import say
from locaudit.stats.scores import SIGNS, find_score, has_score, mean_score, score_values
from locaudit.stats.selection import CLAIM, WHOLE, select
from locaudit.stats.tests import gain_p
from locaudit.stats.verdict import Verdict


def wanted(questions: Sequence[Any]) -> tuple[str, ...]:
    """The right answer of each question. Empty unless all questions have the same possible answers and one right one.

    Questions have the attributes ``true`` and ``false`` with their answers.
    """
    options = {frozenset((*question.true, *question.false)) for question in questions}
    is_labelled = len(options) == 1 and all(len(question.true) == 1 for question in questions)
    return tuple(question.true[0] for question in questions) if is_labelled else ()


def label_scores(values: Mapping[str, Sequence[float]], score: str, labels: Sequence[str]) -> dict[str, float]:
    """The score at each label, its balanced mean, and how often the model prefers the first of two labels.

    `values` has metrics per question, and `labels` the questions' labels. Empty if there are fewer than two labels or
    if the score is missing.
    """
    names, at = sorted(set(labels)), np.asarray(labels)
    if len(names) < 2 or not has_score(values, score):
        return {}
    found = {f"{score} where {name}": float(mean_score(score_values(values, score)[:, at == name])) for name in names}
    found[f"{score} balanced"] = float(np.mean(list(found.values())))
    if len(names) == 2 and "mc1" in values:
        is_right = np.asarray(values["mc1"], dtype=float)
        found[f"prefers {names[0]}"] = float(np.where(at == names[0], is_right, 1 - is_right).mean())
    return found


def describe_labels(verdict: Verdict, records: Sequence[TrialRecord], labels: Sequence[str]) -> tuple[str, ...]:
    """A sentence for each edit (at the claim, of the whole model) that gains significantly, but not at every label."""
    score, tie, notes = verdict.score, verdict.tolerance, []
    base = next(record.questions["test"] for record in records if record.spec.arm == "base" and record.status == "ok")
    before = label_scores(base, score, labels)
    for method, places in select(records, score, tie).items() if before else ():
        for place in (CLAIM, WHOLE):
            if method not in verdict.methods or (record := places.get(place)) is None:
                continue
            found, sign = verdict.methods[method], SIGNS[verdict.methods[method].supports]
            own = label_scores(record.questions["test"], score, labels)
            pair = score_values(record.questions["test"], score), score_values(base, score)
            bounds = find_score(score).bounds
            p = gain_p(*(pair if sign > 0 else pair[::-1]), bounds=bounds, tolerance=tie)
            rises = [sign * (own[name] - before[name]) for name in own if " where " in name]
            if p <= verdict.level and min(rises) <= tie:
                title = find_score(score).title
                moved = [f"{name.replace(score, title, 1)} {before[name]:.3f} to {own[name]:.3f}" for name in own]
                where = "at the claim" if place == CLAIM else "of the whole model"
                notes.append(say("labels", "one_sided", title=found.title, where=where, moved=", ".join(moved)))
    return tuple(notes)
