"""Bootstrap over questions, for all edits at once.

How often each question is drawn in each resample is a matrix W (resamples, questions), drawn once. The mean of x over a
resample, missing values left out, is then

    mean_b = (W (there * x)) / (W there)

so that one matrix product gives the means of every edit on the *same* resamples, and differences of edits are paired.
Percentile intervals: Efron and Tibshirani 1993, chapter 13. The resamples are those of SciPy's `bootstrap`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from locaudit.records import TrialRecord
from locaudit.stats.scores import has_score, score_values

N_RESAMPLES = 9_999
"""Resamples of bootstraps and permutation tests."""
_BLOCK = 4_000_000
"""Numbers in a block of a matrix of resamples: what bounds the memory."""
_ARMS = 64
"""Edits of which all resamples are held at a time."""


def blocks(n: int, total: int = N_RESAMPLES) -> Iterator[slice]:
    """`total` rows of `n` numbers each, a block at a time."""
    size = max(1, _BLOCK // max(n, 1))
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


@lru_cache(maxsize=8)
def weights(n: int, seed: int = 0) -> NDArray[np.uint16]:
    """How often each of `n` questions is drawn in each resample: (resamples, n), read-only."""
    rng = np.random.default_rng(seed)
    out = np.empty((N_RESAMPLES, n), dtype=np.uint16)
    for rows in blocks(n):
        size = rows.stop - rows.start
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        out[rows] = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
    out.flags.writeable = False
    return out


def resampled_means(values: NDArray[np.float64], seed: int = 0) -> NDArray[np.float64]:
    """Means of (..., questions) over each resample: (..., resamples); NaN where a resample has no value."""
    there = ~np.isnan(values)
    n = values.shape[-1]
    filled, known = (x.reshape(-1, n) for x in (np.where(there, values, 0.0), there.astype(float)))
    out = np.empty((len(filled), N_RESAMPLES))
    drawn = weights(n, seed)
    for rows in blocks(n):
        w = drawn[rows].astype(float).T  # (questions, resamples)
        counts = n if there.all() else known @ w
        with np.errstate(invalid="ignore"):  # 0 / 0
            out[:, rows] = (filled @ w) / counts
    return out.reshape(*values.shape[:-1], N_RESAMPLES)


def resampled_scores(values: NDArray[np.float64], seed: int = 0) -> NDArray[np.float64]:
    """Scores of (components, ..., questions) on each resample: (..., resamples)."""
    return np.prod(resampled_means(values, seed), axis=0)


def arms_of(values: ArrayLike | Sequence[ArrayLike]) -> list[NDArray[np.float64]]:
    """One edit's values, or those of a list of edits, as (components, questions) each.

    An edit has one value a question, or (components, questions) of a score that is a product of means.
    """
    several = isinstance(values, list | tuple) and np.ndim(values[0]) > 0
    return [np.atleast_2d(np.asarray(x, dtype=float)) for x in (values if several else [values])]  # type: ignore[list-item]


def mean_of_scores(arms: Sequence[NDArray[np.float64]], seed: int = 0) -> NDArray[np.float64]:
    """Mean over edits of their scores on each resample: (resamples,)."""
    total = np.zeros(N_RESAMPLES)
    for start in range(0, len(arms), _ARMS):
        total += resampled_scores(np.stack(arms[start : start + _ARMS], axis=1), seed).sum(axis=0)
    return total / len(arms)


def resampled_differences(
    after: ArrayLike, before: ArrayLike | Sequence[ArrayLike], seed: int = 0
) -> NDArray[np.float64]:
    """Score of `after` minus that of `before`, or the mean over a list of them, on each resample with a value."""
    drawn = resampled_scores(arms_of(after)[0], seed) - mean_of_scores(arms_of(before), seed)
    return drawn[~np.isnan(drawn)]


def percentiles(drawn: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """The middle `confidence` of a bootstrap distribution, without what is NaN; NaN for an empty one."""
    drawn = drawn[~np.isnan(drawn)]
    if not drawn.size:
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_interval(
    after: ArrayLike, before: ArrayLike | Sequence[ArrayLike], *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the score of `after` minus that of `before`, resampling questions.

    Shapes as in `arms_of`; `before` may be a list, of whose scores the mean is taken.
    """
    return percentiles(resampled_differences(after, before, seed), confidence)


def score_interval(values: ArrayLike, *, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a score, resampling questions; NaN when a component has no value."""
    return percentiles(resampled_scores(arms_of(values)[0], seed), confidence)


def score_intervals(
    records: Sequence[TrialRecord], scores: Sequence[str], *, confidence: float = 0.95, seed: int = 0
) -> dict[str, dict[str, tuple[float, float]]]:
    """Trial id -> score -> `score_interval` on the test questions, for the trials that have all the scores."""
    scored = [r for r in records if scores and all(has_score(r.questions.get("test", {}), score) for score in scores)]
    out: dict[str, dict[str, tuple[float, float]]] = {r.spec.trial_id: {} for r in scored}
    for score, start in product(scores, range(0, len(scored), _ARMS)):
        chunk = scored[start : start + _ARMS]
        values = np.stack([score_values(r.questions["test"], score) for r in chunk], axis=1)
        for record, drawn in zip(chunk, resampled_scores(values, seed), strict=True):
            out[record.spec.trial_id][score] = percentiles(drawn, confidence)
    return out
