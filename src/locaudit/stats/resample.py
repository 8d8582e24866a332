"""Bootstrap over questions, for all edits at once, as a matrix product.

A bootstrap resample draws n questions with replacement. Let W[b, i] count how often resample b draws question i:
W is (resamples, questions). For values x[i] and the indicator there[i] (1 if x[i] is known, 0 if missing), the mean
over resample b is

    mean_b = sum_i W[b, i] there[i] x[i] / sum_i W[b, i] there[i]

One product with W gives this for every edit. All edits have the *same* resamples, so that differences between edits are
paired. Percentile intervals: Efron and Tibshirani 1993, chapter 13. The resamples are those of SciPy's `bootstrap`.
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
"""Number of resamples in a bootstrap, and of arrangements in a Monte-Carlo permutation test."""
_BLOCK = 4_000_000
"""Largest number of values in memory at a time when a matrix of resamples is made or used."""
_ARMS = 64
"""Number of edits whose resampled scores are in memory at a time."""


def blocks(n: int, total: int = N_RESAMPLES) -> Iterator[slice]:
    """Slices that cut `total` rows of `n` numbers each into blocks of at most `_BLOCK` numbers."""
    size = max(1, _BLOCK // max(n, 1))
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


@lru_cache(maxsize=8)
def weights(n: int, seed: int = 0) -> NDArray[np.uint16]:
    """The matrix W (resamples, n), read-only: how often each resample draws each of the `n` questions."""
    rng = np.random.default_rng(seed)
    out = np.empty((N_RESAMPLES, n), dtype=np.uint16)
    for rows in blocks(n):
        size = rows.stop - rows.start
        # (size, n): the n questions that each resample draws, shifted by n per row so that rows do not overlap
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        # one bincount over the flattened block counts within each row: (size * n,) -> (size, n)
        out[rows] = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
    out.flags.writeable = False
    return out


def resampled_scores(values: NDArray[np.float64], seed: int = 0) -> NDArray[np.float64]:
    """Score on each resample: `values` (components, ..., questions) -> (..., resamples).

    Missing values (NaN) are left out. The score is NaN on a resample that draws no known value of a component.
    """
    there = ~np.isnan(values)
    n = values.shape[-1]
    # two arrays (rows, questions), leading axes flattened: values with 0 for missing ones, and 1 for known values
    filled, known = (x.reshape(-1, n) for x in (np.where(there, values, 0.0), there.astype(float)))
    out = np.empty((len(filled), N_RESAMPLES))
    drawn = weights(n, seed)
    for rows in blocks(n):
        w = drawn[rows].astype(float).T  # (questions, resamples)
        counts = n if there.all() else known @ w  # (rows, resamples): known values drawn
        with np.errstate(invalid="ignore"):  # 0 / 0: the resample has no known value
            out[:, rows] = (filled @ w) / counts
    return np.prod(out.reshape(*values.shape[:-1], N_RESAMPLES), axis=0)


def arms_of(values: ArrayLike | Sequence[ArrayLike]) -> list[NDArray[np.float64]]:
    """The values of one edit, or of each edit in a list, as arrays (components, questions).

    The values of an edit have the shape (questions,) if its score is a plain mean, and (components, questions) if it is
    a product of means. An array is one edit; a list or tuple of arrays is several edits.
    """
    several = isinstance(values, list | tuple) and np.ndim(values[0]) > 0
    return [np.atleast_2d(np.asarray(x, dtype=float)) for x in (values if several else [values])]  # type: ignore[list-item]


def mean_of_scores(arms: Sequence[NDArray[np.float64]], seed: int = 0) -> NDArray[np.float64]:
    """Mean score of several edits on each resample, (resamples,). Each edit has values (components, questions)."""
    total = np.zeros(N_RESAMPLES)
    for start in range(0, len(arms), _ARMS):
        total += resampled_scores(np.stack(arms[start : start + _ARMS], axis=1), seed).sum(axis=0)
    return total / len(arms)


def resampled_differences(
    after: ArrayLike, before: ArrayLike | Sequence[ArrayLike], seed: int = 0
) -> NDArray[np.float64]:
    """Score of `after` minus score of `before` on each resample. If `before` is a list, its mean score is subtracted.

    Returns (resamples,), without the resamples on which the difference is NaN.
    """
    drawn = resampled_scores(arms_of(after)[0], seed) - mean_of_scores(arms_of(before), seed)
    return drawn[~np.isnan(drawn)]


def percentiles(drawn: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """Percentile interval: the central `confidence` of a bootstrap distribution without NaN; (NaN, NaN) if empty."""
    drawn = drawn[~np.isnan(drawn)]
    if not drawn.size:
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_interval(
    after: ArrayLike, before: ArrayLike | Sequence[ArrayLike], *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the score of `after` minus the score of `before`, resampling questions.

    Shapes are as in `arms_of`. If `before` is a list, its mean score is subtracted.
    """
    return percentiles(resampled_differences(after, before, seed), confidence)


def score_interval(values: ArrayLike, *, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a score, resampling questions; NaN if a component has no value."""
    return percentiles(resampled_scores(arms_of(values)[0], seed), confidence)


def score_intervals(
    records: Sequence[TrialRecord], scores: Sequence[str], *, confidence: float = 0.95, seed: int = 0
) -> dict[str, dict[str, tuple[float, float]]]:
    """Trial id -> score -> `score_interval` on the test questions. Trials that lack a score are left out."""
    scored = [r for r in records if scores and all(has_score(r.questions.get("test", {}), score) for score in scores)]
    out: dict[str, dict[str, tuple[float, float]]] = {r.spec.trial_id: {} for r in scored}
    for score, start in product(scores, range(0, len(scored), _ARMS)):
        chunk = scored[start : start + _ARMS]
        # (components, trials, questions)
        values = np.stack([score_values(r.questions["test"], score) for r in chunk], axis=1)
        for record, drawn in zip(chunk, resampled_scores(values, seed), strict=True):
            out[record.spec.trial_id][score] = percentiles(drawn, confidence)
    return out
