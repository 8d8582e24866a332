"""Tests of a claim: Monte Carlo against its controls, exchange of questions for its gain, and several at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from locaudit.stats.resample import N_RESAMPLES, arms_of, blocks
from locaudit.stats.scores import TIE, reaches


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
    verdict. NaN for fewer than two finite controls, or ones that are equal up to rounding.
    """
    scores = _varying(controls)
    if not scores.size:
        return math.nan
    return float(stats.ttest_1samp(scores, claim, alternative="less").pvalue)  # type: ignore[attr-defined]


def normal_tail_p(claim: float, controls: Sequence[float]) -> float:
    """One-sided p of the claim as a draw from a normal distribution with the controls' mean and standard deviation.

    It supposes normal scores, and mean and deviation known: beside `monte_carlo_p` to compare with papers only. NaN as
    in `t_test_p`.
    """
    scores = _varying(controls)
    return float(stats.norm.sf((claim - scores.mean()) / scores.std(ddof=1))) if scores.size else math.nan


def _varying(controls: Sequence[float]) -> NDArray[np.float64]:
    """The finite scores; none if there are fewer than two, or all are equal up to rounding (of which SciPy warns)."""
    scores = np.asarray(controls, dtype=float)
    scores = scores[np.isfinite(scores)]
    return scores if scores.size > 1 and np.ptp(scores) > 1e-14 * np.abs(scores).max() else scores[:0]


def paired_gain_p(after: ArrayLike, before: ArrayLike, *, seed: int = 0) -> float:
    """One-sided p-value that the score of `after` is not above that of `before`, by exchanging them at questions.

    Shapes as in `locaudit.stats.resample.arms_of`. Under the null, a question's two values may be exchanged; for a
    plain mean this is the sign-flip test. p is the share of the arrangements whose gain reaches the one that is seen:
    of all 2^n where these are at most `N_RESAMPLES`, else Monte Carlo, the seen one counted. Questions missing in
    either are left out. The arrangements are those of SciPy's `permutation_test`.
    """
    a, b = arms_of(after)[0], arms_of(before)[0]
    there = ~(np.isnan(a) | np.isnan(b)).any(axis=0)
    a, b = a[:, there], b[:, there]
    n = a.shape[1]
    if n == 0:
        return 1.0
    exchanged = _exchanges(n, seed)
    gain = float(np.prod(a.mean(axis=1)) - np.prod(b.mean(axis=1)))
    n_reach = 0
    for rows in blocks(n, len(exchanged)):
        moved = exchanged[rows] @ (b - a).T  # (arrangements, components): what goes over to `after`
        gains = np.prod((a.sum(axis=1) + moved) / n, axis=1) - np.prod((b.sum(axis=1) - moved) / n, axis=1)
        n_reach += int(reaches(gains, gain).sum())
    seen = 2**n > N_RESAMPLES  # all arrangements hold the seen one
    return (n_reach + seen) / (len(exchanged) + seen)


@lru_cache(maxsize=8)
def _exchanges(n: int, seed: int) -> NDArray[np.bool_]:
    """Which questions are exchanged in each arrangement: (arrangements, n), read-only."""
    if 2**n <= N_RESAMPLES:
        out = (np.arange(2**n)[:, None] >> np.arange(n)) % 2 == 1
    else:
        rng = np.random.default_rng(seed)
        out = np.empty((N_RESAMPLES, n), dtype=bool)
        for rows in blocks(2 * n):
            pairs = np.tile(np.arange(2, dtype=np.int8), (rows.stop - rows.start, n, 1))
            out[rows] = rng.permuted(pairs, axis=-1)[..., 0] == 1
    out.flags.writeable = False
    return out


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979): those at most alpha are rejected with a family-wise error of at most alpha.

    Valid under any dependence, such as that of edits compared with one reference on the same questions.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(p.size, 0, -1) * p[order]))
    return adjusted.tolist()


def max_t_p(claim: ArrayLike, controls: ArrayLike) -> list[float]:
    """Monte-Carlo p of each of several tests of one claim, adjusted for their number (max-T, Westfall and Young 1993).

    `claim` (tests,) and `controls` (N, tests) are scores, higher is better: several metrics, or ways of editing. Each
    is standardised over claim and controls; a test's p is the share of the N + 1 arms whose largest value is at least
    the claim's value in that test. Exact family-wise error wherever the claim is exchangeable with its controls, and
    less severe than Holm where tests agree. NaN: at a control it reaches the claim, at the claim it reaches nothing.
    """
    own, others = np.asarray(claim, dtype=float), np.atleast_2d(np.asarray(controls, dtype=float))
    arms = np.concatenate([own[None], others])
    centre, spread = np.nanmean(arms, axis=0), np.nanstd(arms, axis=0)
    z = (arms - centre) / np.where(spread > TIE * np.maximum(1.0, np.abs(centre)), spread, 1.0)
    largest = np.where(np.isnan(others), np.inf, z[1:]).max(axis=1)
    return [monte_carlo_p(x, largest.tolist()) if np.isfinite(x) else 1.0 for x in z[0].tolist()]


def rank_correlation(x: Sequence[float], y: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """Spearman's rank correlation and its two-sided permutation p (SciPy); NaN for fewer than 3 pairs or equal values.

    Pairs with a missing value are left out.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    there = np.isfinite(a) & np.isfinite(b)
    a, b = stats.rankdata(a[there]), stats.rankdata(b[there])
    if a.size < 3 or not np.ptp(a) or not np.ptp(b):
        return math.nan, math.nan
    b = stats.zscore(b)
    result = stats.permutation_test(
        (stats.zscore(a),),
        lambda ranks, axis: (ranks * b).mean(axis=axis),  # of standard scores: the correlation
        permutation_type="pairings",
        vectorized=True,
        n_resamples=N_RESAMPLES,
        rng=np.random.default_rng(seed),
    )
    return float(result.statistic), float(result.pvalue)
