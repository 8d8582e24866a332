"""Choose hyperparameters on validation questions; only the chosen edit's test score is compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from locaudit.errors import RunFolderError
from locaudit.records import Place, TrialRecord
from locaudit.stats.scores import TIE, has_score, mean_score, missing_share, reaches, score_values

BASE, CLAIM, WHOLE, REST = Place("base"), Place("claim"), Place("whole"), Place("rest")


class PlaceScore(NamedTuple):
    """The result of all trials at one place."""

    mean: float
    """Test score of the chosen trial; NaN if all trials diverged or none of its answers could be judged."""
    missing: float
    """Largest share of missing judgements among the chosen trial's test and any trial's validation questions."""
    lost: bool
    """Whether the chosen trial has no score although it did not diverge."""


def select(
    records: Iterable[TrialRecord], score: str, tolerance: float = TIE
) -> Mapping[str, Mapping[Place, TrialRecord | None]]:
    """Method -> place -> the trial with the best validation mean of `score`; None if all trials there diverged."""
    return {
        method: {place: choose(trials, score, tolerance) for place, trials in places.items()}
        for method, places in group_trials(records).items()
    }


def find_unedited(records: Iterable[TrialRecord], source: str) -> TrialRecord:
    """The record of the unedited model. Raises `RunFolderError`, which names the `source`, if it has no scores yet."""
    found = next((r for r in records if r.spec.arm == "base" and r.status == "ok"), None)
    if found is None:
        raise RunFolderError(
            got=f"{source}, in which the unedited model has no scores yet",
            expected="at least the record of the unedited model",
            remedy="run the audit; if it was stopped, run the same command again",
        )
    return found


def group_trials(records: Iterable[TrialRecord]) -> dict[str, dict[Place, list[TrialRecord]]]:
    """Method -> place -> its trials. Methods keep the order of the records; places are sorted."""
    groups: dict[str, dict[Place, list[TrialRecord]]] = {}
    for record in records:
        groups.setdefault(record.spec.method, {}).setdefault(record.spec.place, []).append(record)
    return {method: dict(sorted(places.items())) for method, places in groups.items()}


def fewest_samples(records: Iterable[TrialRecord], score: str, tolerance: float, n_strengths: Mapping[str, int]) -> int:
    """The smallest number of sampled answers to a test question that the trials chosen by `score` have.

    `n_strengths` has the number of strengths of each method. Places where some were not tried are left out.
    """
    chosen = [
        choose(trials, score, tolerance)
        for method, places in group_trials(records).items()
        for trials in places.values()
        if len(trials) >= n_strengths.get(method, 1)
    ]
    return min((len(record.samples.get("test", ())) for record in chosen if record is not None), default=0)


def choose(trials: Sequence[TrialRecord], score: str, tolerance: float = TIE) -> TrialRecord | None:
    """The trial of one place with the best validation mean of `score`; None if all trials diverged.

    A place with a single finite trial needs no validation score. Trials that reach the best mean (`reaches`) are tied:
    of them the one with the smallest KL drift is chosen, or of equal drifts the one with the smallest hyperparameter.
    """
    finite = [record for record in trials if record.status == "ok"]
    if len(finite) <= 1:
        return finite[0] if finite else None

    means = [record.metrics["val"].get(score, math.nan) for record in finite]
    means = [-math.inf if math.isnan(x) else x for x in means]  # NaN: none of its answers could be judged
    tied = [record for record, is_tied in zip(finite, reaches(means, max(means), tolerance), strict=True) if is_tied]

    def key(record: TrialRecord) -> tuple[float, float]:
        strength = record.spec.hyperparameter
        return record.drift.get("kl", math.inf), -math.inf if strength is None else strength

    return min(tied, key=key)


def is_at_edge(tried: Iterable[float | None], best: float | None) -> bool:
    """Whether the best of several strengths is the smallest or the largest of them."""
    known = {x for x in tried if x is not None}
    return len(known) > 1 and best in (min(known), max(known))


def widened(trials: Sequence[TrialRecord], score: str, tolerance: float, n_grid: int, widen: int) -> float | None:
    """The `next_strength` at the place of these trials, or None."""
    chosen = choose(trials, score, tolerance)
    if chosen is None or chosen.spec.hyperparameter is None:
        return None
    tried = [x for record in trials if (x := record.spec.hyperparameter) is not None]
    return next_strength(tried, chosen.spec.hyperparameter, n_grid, widen)


def next_strength(tried: Sequence[float], best: float, n_grid: int, widen: int) -> float | None:
    """The next strength to try at a place, or None: the grid widens while its best strength is at an edge.

    The new one continues the grid beyond that edge by the geometric step there: from 0.1, 0.2, 0.4 with the best 0.1 it
    is 0.05. `tried` has the `n_grid` strengths of the grid and those added since, at most `widen`. None also while the
    grid is not done, beyond 0, and for a grid of a single strength.
    """
    if not n_grid <= len(tried) < n_grid + widen or not is_at_edge(tried, best):
        return None
    edge, inner = sorted(tried, key=lambda x: abs(x - best))[:2]
    return float(f"{edge * edge / inner:.6g}") if edge * inner > 0 else None


def score_place(trials: Sequence[TrialRecord], score: str, tolerance: float = TIE) -> PlaceScore:
    """Score of the chosen trial of a place, and the share of judgements missing; input of `Monitor.add`."""
    chosen = choose(trials, score, tolerance)
    tested = [] if chosen is None else [score_values(chosen.questions["test"], score)]
    tried = [trial.questions.get("val", {}) for trial in trials]
    tried = [score_values(questions, score) for questions in tried if has_score(questions, score)]
    mean = float(mean_score(tested[0])) if tested else math.nan
    missing = max(map(missing_share, [*tested, *tried]), default=0.0)
    return PlaceScore(mean, missing, bool(tested) and math.isnan(mean))
