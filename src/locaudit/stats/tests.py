"""Hypothesis tests of the claim against controls (Monte Carlo) and of gains (permutation), and multiple testing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from locaudit.stats.resample import N_RESAMPLES, arms_of, blocks
from locaudit.stats.scores import TIE, reaches


def monte_carlo_p(claim: float, controls: Sequence[float], tolerance: float = TIE) -> float:
    """One-sided Monte-Carlo p-value of a claim against random controls.

        p = (1 + #{i : control_i >= claim}) / (1 + N)

    It is valid, that is, P(p <= t) <= t, if claim and controls are exchangeable under the null hypothesis. A tie (a
    difference within `tolerance`) counts against the claim (`reaches`). So does a control that is NaN because its edit
    diverged. Source: Davison and Hinkley (1997), section 4.2.
    """
    return float((1 + np.sum(reaches(controls, claim, tolerance))) / (1 + len(controls)))


def t_test_p(claim: float, controls: Sequence[float], tolerance: float = 0.0) -> float:
    """One-sided p of a one-sample t-test of whether the mean of the controls is below the claim's score.

    This is only for comparison with papers, never for a verdict. The test treats the claim's score as exact, and tests
    the *mean* of the controls. Therefore p becomes smaller with more controls, even if many of them beat the claim. NaN
    for fewer than two finite controls, or if all are equal up to rounding. Computed by SciPy's `ttest_1samp`.
    """
    scores = _varying(controls, tolerance)
    if not scores.size:
        return math.nan
    return float(stats.ttest_1samp(scores, claim, alternative="less").pvalue)  # type: ignore[attr-defined]


def normal_tail_p(claim: float, controls: Sequence[float], tolerance: float = 0.0) -> float:
    """One-sided p of the claim's score under a normal distribution with the controls' mean and standard deviation.

    This is only for comparison with papers. It assumes that scores are normal, and treats their mean and standard
    deviation as known exactly. NaN for fewer than two finite controls, or if all are equal up to rounding.
    """
    scores = _varying(controls, tolerance)
    return float(stats.norm.sf((claim - scores.mean()) / scores.std(ddof=1))) if scores.size else math.nan


def _varying(controls: Sequence[float], tolerance: float) -> NDArray[np.float64]:
    """The finite scores; an empty array if there are fewer than two, or all are equal up to rounding."""
    scores = np.asarray(controls, dtype=float)
    scores = scores[np.isfinite(scores)]
    return scores if scores.size > 1 and np.ptp(scores) > max(tolerance, 1e-14 * np.abs(scores).max()) else scores[:0]


def paired_gain_p(after: ArrayLike, before: ArrayLike, *, seed: int = 0, tolerance: float = TIE) -> float:
    """One-sided p of a paired permutation test of whether the score of `after` is above the score of `before`.

    Under the null hypothesis, the two values of each question are exchangeable. An arrangement exchanges them for some
    of the questions. For a plain mean, this is the sign-flip test; for a product of means, all components of a question
    are exchanged together. p is the share of arrangements with a gain at least as large as the observed gain, up to
    `tolerance` (`reaches`). If there are at most `N_RESAMPLES` arrangements (2^n), all are used and p is exact.
    Otherwise `N_RESAMPLES` arrangements are sampled, and the observed one is counted too.

    Shapes are as in `locaudit.stats.resample.arms_of`. A question that is missing in one of the two is left out. The
    arrangements are those of SciPy's `permutation_test`.
    """
    a, b = arms_of(after)[0], arms_of(before)[0]
    there = ~(np.isnan(a) | np.isnan(b)).any(axis=0)
    a, b = a[:, there], b[:, there]  # (components, questions)
    n = a.shape[1]
    if n == 0:
        return 1.0
    exchanged = _exchanges(n, seed)
    gain = float(np.prod(a.mean(axis=1)) - np.prod(b.mean(axis=1)))
    n_reach = 0
    for rows in blocks(n, len(exchanged)):
        moved = exchanged[rows] @ (b - a).T  # (arrangements, components): what `after` gains by the exchange
        gains = np.prod((a.sum(axis=1) + moved) / n, axis=1) - np.prod((b.sum(axis=1) - moved) / n, axis=1)
        n_reach += int(reaches(gains, gain, tolerance).sum())
    seen = 2**n > N_RESAMPLES  # the observed arrangement is added to a sample; all 2^n contain it
    return (n_reach + seen) / (len(exchanged) + seen)


@lru_cache(maxsize=8)
def _exchanges(n: int, seed: int) -> NDArray[np.bool_]:
    """Boolean mask (arrangements, n), read-only: True if the arrangement exchanges the question's two values."""
    if 2**n <= N_RESAMPLES:
        out = (np.arange(2**n)[:, None] >> np.arange(n)) % 2 == 1  # the binary digits of 0 to 2^n - 1
    else:
        rng = np.random.default_rng(seed)
        out = np.empty((N_RESAMPLES, n), dtype=bool)
        for rows in blocks(2 * n):
            pairs = np.tile(np.arange(2, dtype=np.int8), (rows.stop - rows.start, n, 1))
            out[rows] = rng.permuted(pairs, axis=-1)[..., 0] == 1
    out.flags.writeable = False
    return out


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979). If those <= alpha are rejected, the family-wise error is at most alpha.

    They are valid under any dependence of the tests, for example if edits are compared with one reference on the same
    questions.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(p.size, 0, -1) * p[order]))
    return adjusted.tolist()


def max_t_p(claim: ArrayLike, controls: ArrayLike, tolerances: ArrayLike = TIE) -> list[float]:
    """Monte-Carlo p-values of several tests of one claim, adjusted for their number (max-T, Westfall and Young 1993).

    `claim` (tests,) and `controls` (N, tests) are scores by several metrics or methods; higher is better. With scores z
    standardised over claim and controls, test t has

        p_t = (1 + #{i : max_s z(control_i, s) >= z(claim, t)}) / (1 + N)

    The family-wise error is controlled exactly if claim and controls are exchangeable. If the tests are correlated,
    power is higher than with `holm`. A NaN control counts against the claim; a NaN claim has p = 1. `tolerances`
    (tests,) says up to which difference scores are equal (`reaches`). Scores of a test that differ only by rounding are
    not divided by their standard deviation.
    """
    own, others = np.asarray(claim, dtype=float), np.atleast_2d(np.asarray(controls, dtype=float))
    arms = np.concatenate([own[None], others])
    centre, spread = np.nanmean(arms, axis=0), np.nanstd(arms, axis=0)
    scale = np.maximum(1.0, np.abs(centre)) * np.asarray(tolerances)  # (tests,): what rounding may change
    spread = np.where(spread > scale, spread, 1.0)
    z = (arms - centre) / spread
    # (N,): the largest standardised score of each control over all tests
    largest = np.where(np.isnan(others), np.inf, z[1:]).max(axis=1)
    ties = np.maximum(scale / spread, TIE).tolist()
    return [
        monte_carlo_p(x, largest.tolist(), tie / max(1.0, abs(x))) if np.isfinite(x) else 1.0
        for x, tie in zip(z[0].tolist(), ties, strict=True)
    ]


def rank_correlation(x: Sequence[float], y: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """Spearman's rank correlation and its two-sided permutation p, by SciPy's `permutation_test`.

    Pairs with a missing value are left out. Returns (NaN, NaN) for fewer than 3 pairs, or if one side is constant.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    there = np.isfinite(a) & np.isfinite(b)
    a, b = stats.rankdata(a[there]), stats.rankdata(b[there])
    if a.size < 3 or not np.ptp(a) or not np.ptp(b):
        return math.nan, math.nan
    b = stats.zscore(b)
    result = stats.permutation_test(
        (stats.zscore(a),),
        lambda ranks, axis: (ranks * b).mean(axis=axis),  # mean product of z-scores: the correlation
        permutation_type="pairings",
        vectorized=True,
        n_resamples=N_RESAMPLES,
        rng=np.random.default_rng(seed),
    )
    return float(result.statistic), float(result.pvalue)
