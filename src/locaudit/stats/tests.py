"""The three numbers under a verdict: a Monte-Carlo p, a paired test of an effect, a paired bootstrap interval."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from locaudit.stats.scores import mean_score, reaches

N_RESAMPLES = 9_999
"""Resamples of the sign-flip test and the bootstrap."""


def monte_carlo_p(claim: float, controls: Sequence[float]) -> float:
    """One-sided Monte-Carlo p-value of a claim against random controls.

    p = (1 + #{i : control_i >= claim}) / (1 + N). Valid (P(p <= t) <= t) when claim and controls are exchangeable under
    the null; ties count against the claim (`reaches`). A control that is NaN (its edit diverged) reaches the claim.
    Source: Davison and Hinkley (1997), section 4.2.
    """
    return float((1 + np.sum(reaches(controls, claim))) / (1 + len(controls)))


def t_test_p(claim: float, controls: Sequence[float]) -> float:
    """One-sided p of a one-sample t-test that the controls' mean is not below the claim's score; SciPy's.

    It takes the claim's score as known without error and asks about the *mean* of the controls, so that it falls with
    their number even if many of them beat the claim: beside `monte_carlo_p` to compare with papers, never for a
    verdict. NaN for fewer than two finite controls, or equal ones.
    """
    scores = _finite_scores(controls)
    if scores.size < 2 or not np.ptp(scores):
        return float("nan")
    return float(stats.ttest_1samp(scores, claim, alternative="less").pvalue)  # type: ignore[attr-defined]


def normal_tail_p(claim: float, controls: Sequence[float]) -> float:
    """One-sided p of the claim as a draw from a normal distribution with the controls' mean and standard deviation.

    It supposes normal scores, and mean and deviation known: beside `monte_carlo_p` to compare with papers only. NaN as
    in `t_test_p`.
    """
    scores = _finite_scores(controls)
    if scores.size < 2 or not np.ptp(scores):
        return float("nan")
    return float(stats.norm.sf((claim - scores.mean()) / scores.std(ddof=1)))


def paired_gain_p(after: ArrayLike, before: ArrayLike, *, seed: int = 0) -> float:
    """One-sided p-value that the score of `after` is not above that of `before`, by exchanging them at questions.

    `after` and `before` are one value a question, or (components, questions) of a score that is a product of means
    (`locaudit.stats.scores`). Under the null, a question's two values may be exchanged; for a plain mean this is the
    sign-flip test. Questions missing in either are left out. Exact when 2^n is at most `N_RESAMPLES`, else Monte
    Carlo; SciPy's `permutation_test` does the work.
    """
    a, b = _complete_pairs(after, before)
    n = a.shape[1]
    if n == 0 or not (a - b).any():
        return 1.0
    if n == 1:  # SciPy wants two: the pair as it is, and exchanged
        return 0.5 if mean_score(a) > mean_score(b) else 1.0
    rng = np.random.default_rng(seed)
    data: tuple[NDArray, ...]
    if len(a) == 1:
        data, statistic = (a[0] - b[0],), _mean_of_flipped
    else:
        both = np.concatenate([a, b], axis=1)
        data = (np.arange(n), np.arange(n, 2 * n))  # questions by number: SciPy exchanges numbers, we look them up
        statistic = partial(_difference_of_exchanged, both)
    result = stats.permutation_test(
        data,
        statistic,
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=N_RESAMPLES,
        batch=_batch(a.size),
        rng=rng,
    )
    return float(result.pvalue)


def paired_interval(
    after: ArrayLike, before: ArrayLike | Sequence[ArrayLike], *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the score of `after` minus that of `before`, resampling questions.

    Shapes as in `paired_gain_p`; `before` may be a list, of whose scores the mean is taken. SciPy's `bootstrap`.
    """
    return percentiles(resampled_differences(after, before, seed), confidence)


def score_interval(values: ArrayLike, *, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a score, resampling questions; NaN when no question has a value."""
    v = np.atleast_2d(np.asarray(values, dtype=float))
    if np.isnan(mean_score(v)):
        return float("nan"), float("nan")
    return percentiles(_resampled(lambda i: mean_score(v[:, i]), v.shape[1], v.size, seed), confidence)


def _finite_scores(controls: Sequence[float]) -> NDArray[np.float64]:
    scores = np.asarray(controls, dtype=float)
    return scores[np.isfinite(scores)]


def resampled_differences(after: ArrayLike, before: ArrayLike | Sequence[ArrayLike], seed: int) -> NDArray[np.float64]:
    """Score of `after` minus that of `before` on each bootstrap resample of the questions; as in `paired_interval`."""
    a = np.atleast_2d(np.asarray(after, dtype=float))
    others = before if isinstance(before, list | tuple) and np.ndim(before[0]) > 0 else [before]
    b = np.stack([np.atleast_2d(np.asarray(x, dtype=float)) for x in others], axis=1)  # components, arms, questions
    return _resampled(
        lambda i: mean_score(a[:, i]) - np.mean(mean_score(np.moveaxis(b[:, :, i], 1, -2)), axis=-1),
        a.shape[1],
        (1 + b.shape[1]) * a.size,
        seed,
    )


def _resampled(
    statistic: Callable[[NDArray[np.int_]], NDArray[np.float64]], n: int, size: int, seed: int
) -> NDArray[np.float64]:
    """A statistic of question numbers on bootstrap resamples of them, without those that hold no judged question."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            (np.arange(n),),
            lambda i, axis: statistic(i.astype(int)),
            method="percentile",
            n_resamples=N_RESAMPLES,
            vectorized=True,
            batch=_batch(size),
            rng=np.random.default_rng(seed),
        )
    return result.bootstrap_distribution[~np.isnan(result.bootstrap_distribution)]


def percentiles(drawn: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """The middle `confidence` of a bootstrap distribution; NaN for an empty one."""
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2]) if drawn.size else (np.nan, np.nan)
    return float(low), float(high)


def _mean_of_flipped(gains: NDArray, axis: int) -> NDArray:
    return np.mean(gains, axis=axis)


def _difference_of_exchanged(values: NDArray, after: NDArray, before: NDArray, axis: int) -> NDArray:
    return mean_score(values[:, after.astype(int)]) - mean_score(values[:, before.astype(int)])


def _complete_pairs(after: ArrayLike, before: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = (np.atleast_2d(np.asarray(x, dtype=float)) for x in (after, before))
    there = ~(np.isnan(a) | np.isnan(b)).any(axis=0)
    return a[:, there], b[:, there]


def _batch(size: int) -> int:
    """Resamples at a time, so that a batch holds some ten million numbers."""
    return max(1, min(N_RESAMPLES, 10_000_000 // max(size, 1)))
