"""What edits do to behaviours that they were not made for: scores by log-probability, claim against controls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from locaudit.records import OFF, TrialRecord
from locaudit.stats.intervals import estimate
from locaudit.stats.phrases import where
from locaudit.stats.scores import find_score, reaches, tolerance
from locaudit.stats.selection import CLAIM, WHOLE, find_unedited, select

if TYPE_CHECKING:
    from locaudit.stats.verdict import Verdict

SHOWN = ("mc2", "preference_accuracy", "reward_margin")
"""Scores of off-target behaviours."""


@dataclass(frozen=True)
class OffTarget:
    """One method's edits on an off-target behaviour, at the strengths chosen by the verdict's own score."""

    null: str
    """Name of the null that the controls belong to; empty if no control has run."""

    behaviour: str
    method: str
    score: str
    n: int
    """Number of its test questions."""
    base: float
    """Score of the unedited model."""
    claim: float
    gain: float
    """claim - base."""
    gain_interval: tuple[float, float]
    """95 % interval of `gain` over questions."""
    whole_model: float | None
    """Score of the edit of the whole model; None if it was not tried."""
    controls: tuple[float, ...]
    """Score at each control that did not diverge."""
    n_at_least: int
    """Number of these controls whose score is at least the claim's."""
    among: str = ""
    """What the controls have in common with the claim, to follow "controls": ``in its layers``. Controls of the null
    ``anywhere`` are called so only beside those of another null."""


def measure_off_target(verdict: Verdict, records: Iterable[TrialRecord], dtype: str) -> tuple[OffTarget, ...]:
    """Every off-target behaviour, method and score. Methods without a score at the claim are left out."""
    records = list(records)
    chosen = select(records, verdict.score, verdict.tolerance)
    base = find_unedited(records, "a run")
    found = []
    for split in (name for name in base.questions if name.startswith(OFF)):
        for method in verdict.methods:
            places = chosen[method]
            if (claim := places.get(CLAIM)) is None:
                continue
            nulls = dict.fromkeys(place.null for place in places if place.arm == "control") or ("",)
            for null, score in product(nulls, (name for name in SHOWN if name in base.questions[split])):
                others = [r for place, r in places.items() if (place.arm, place.null) == ("control", null) and r]
                before, after = (np.asarray(r.questions[split][score]) for r in (base, claim))
                means = tuple(float(np.mean(r.questions[split][score])) for r in others)
                whole, mean = places.get(WHOLE), float(after.mean())
                found.append(
                    OffTarget(
                        null=null,
                        behaviour=split.removeprefix(OFF),
                        method=method,
                        score=score,
                        n=len(after),
                        base=float(before.mean()),
                        claim=mean,
                        gain=mean - float(before.mean()),
                        gain_interval=estimate(after, before, bounds=find_score(score).bounds).interval(),
                        whole_model=None if whole is None else float(np.mean(whole.questions[split][score])),
                        controls=means,
                        n_at_least=int(np.sum(reaches(means, mean, tolerance(score, dtype)))),
                        among=where(null).strip() if where(null) or len(nulls) == 1 else null,
                    )
                )
    return tuple(found)
