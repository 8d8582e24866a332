"""Hypothesis tests of the claim against controls (Monte Carlo) and of gains (permutation), and multiple testing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from locaudit.stats.intervals import arms_of, estimate
from locaudit.stats.resample import N_RESAMPLES, blocks
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


def new_place_p(claim: float, controls: Sequence[float], tolerance: float = 0.0) -> float:
    """One-sided p that the claim scores no higher than a new place drawn like the controls, if scores are normal.

        t = (claim - mean) / (sd sqrt(1 + 1 / N)),    N - 1 degrees of freedom

    This is the test behind a prediction interval: it counts the spread of places in the claim's own score, and the
    uncertainty of mean and sd. Noise from questions is in both, so the size is right for normal scores. It has no
    smallest value, unlike `monte_carlo_p`, but relies on the normal distribution out in its tail: it is reported beside
    the Monte-Carlo p, and decides nothing in an audit. In the paper's study, claims that the probed heads are better
    need both. Places without a score (NaN) are left out. NaN for fewer than two finite
    controls, or if all are equal up to rounding.
    """
    scores = _varying(controls, tolerance)
    if not scores.size:
        return math.nan
    spread = scores.std(ddof=1) * math.sqrt(1 + 1 / scores.size)
    return float(special.stdtr(scores.size - 1, (scores.mean() - claim) / spread))


def _varying(controls: Sequence[float], tolerance: float) -> NDArray[np.float64]:
    """The finite scores; an empty array if there are fewer than two, or all are equal up to rounding."""
    scores = np.asarray(controls, dtype=float)
    scores = scores[np.isfinite(scores)]
    return scores if scores.size > 1 and np.ptp(scores) > max(tolerance, 1e-14 * np.abs(scores).max()) else scores[:0]


def paired_gain_p(
    after: ArrayLike, before: ArrayLike, *, seed: int = 0, tolerance: float = TIE, n_resamples: int = N_RESAMPLES
) -> float:
    """Paired exchange test, one-sided: p that the score of `after` is not above that of `before`.

    Each arrangement exchanges the two at some of the questions, all components of a question together. p is the share
    of arrangements with a gain at least as large as the observed one, up to `tolerance` (`reaches`). If there are at
    most `n_resamples` arrangements (2^n), all are used; otherwise that many are sampled, and the observed one is
    counted too. Shapes as in `locaudit.stats.intervals.arms_of`. Questions missing in either are left out.

    For a plain mean this is the sign-flip test. It is exact if the two values of a question are exchangeable.

    For a product of means, equal scores do not make the two exchangeable: Truth may rise while Info falls. Raw gains of
    the arrangements then have another variance than the observed gain, and rejected in up to 11 % of such cases at
    level 5 %. Therefore each gain is also divided by its own standard error (delta method), which makes the test exact
    as n grows (Janssen 1997; Chung and Romano 2013). The observed one is that of a sample, with n - 1, which matters
    for few questions only. p is the larger of the two, because with few events the standard error is itself uncertain.
    For a plain mean, where both order arrangements alike, only raw gains are used. Sizes: docs/calibration.md.
    """
    a, b = arms_of(after)[0], arms_of(before)[0]
    there = ~(np.isnan(a) | np.isnan(b)).any(axis=0)
    a, b = a[:, there], b[:, there]  # (components, questions)
    n = a.shape[1]
    if n == 0:
        return 1.0
    exchanged, gains = _exchanges(n, seed, n_resamples), _Gains(a, b)
    gain, sd = (x.item() for x in gains(np.zeros((1, n), dtype=bool)))
    sd *= math.sqrt(n / max(n - 1, 1))
    several = np.sum(np.ptp(np.concatenate([a, b], axis=1), axis=1) > 0) > 1
    n_reach = np.zeros(2, dtype=int)
    for rows in blocks(n, len(exchanged)):
        found, sds = gains(exchanged[rows])
        n_reach[0] += reaches(found, gain, tolerance).sum()
        if several:  # two gains that differ by the tolerance tie, whatever their standard errors
            slack = tolerance * (1 / sds + 1 / sd)
            n_reach[1] += reaches(found / sds + slack, gain / sd).sum()
    seen = 2**n > n_resamples  # a sample needs the observed arrangement added; all 2^n contain it
    return (int(n_reach.max()) + seen) / (len(exchanged) + seen)


def gain_p(
    after: ArrayLike,
    before: ArrayLike,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    tolerance: float = TIE,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> float:
    """One-sided p that the score of `after` is not above that of `before`: the test of a gain in a verdict.

    The larger of two p. `paired_gain_p` is exact if an edit does nothing. If it does something, but its mean gain is 0
    because a few questions lose what many gain, that test rejects in up to 14 % at level 5 %. `Estimate.p_above`, the
    interval inverted, takes account of such skewness. Sizes of both: docs/calibration.md.
    """
    p = paired_gain_p(after, before, seed=seed, tolerance=tolerance, n_resamples=n_resamples)
    gain = estimate(after, before, bounds=bounds, tolerance=tolerance)
    return max(p, gain.p_above()) if gain.variance else p


class _Gains:
    """Gains of arrangements, with the standard deviation of their pseudo-values (standard error times sqrt(n)).

    Let h = a + b and d = a - b (components, questions). An exchange turns the sign s of d and leaves h, so with mean
    exchanged values A = (mean h + mean s d) / 2 and B = (mean h - mean s d) / 2 the gain is prod A - prod B. Its
    pseudo-values are p h + q s d, where p and q are half the difference and half the sum of the gradients of prod A and
    prod B. Their second moment needs only sums over questions of s d, s h d', h h' and d d': one matrix product for all
    arrangements.
    """

    def __init__(self, a: NDArray[np.float64], b: NDArray[np.float64]):
        self.n, self.mean = a.shape[1], (a + b).mean(axis=1)
        h, d = a + b - self.mean[:, None], a - b
        self.hh, self.dd = h @ h.T / self.n, d @ d.T / self.n
        # (questions, components + components^2): d, then every h times every d
        self.turned = np.concatenate([d, (h[:, None] * d).reshape(-1, self.n)]).T / self.n

    def __call__(self, exchanged: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(arrangements, questions) -> gain and standard deviation of each, (arrangements,)."""
        k = len(self.mean)
        sums = self.turned.sum(axis=0) - 2 * (exchanged @ self.turned)
        moved, hd = sums[:, :k], sums[:, k:].reshape(-1, k, k)
        after, before = (self.mean + moved) / 2, (self.mean - moved) / 2  # (arrangements, components)
        gains = np.prod(after, axis=1) - np.prod(before, axis=1)
        up, down = (
            np.stack([np.prod(np.delete(x, c, axis=1), axis=1) for c in range(k)], axis=1) for x in (after, before)
        )
        p, q = (up - down) / 2, (up + down) / 2
        square = ((p @ self.hh) * p + (q @ self.dd) * q).sum(axis=1) + 2 * np.einsum("rh,rhd,rd->r", p, hd, q)
        # never exactly 0, where rounding would decide
        return gains, np.sqrt(np.maximum(square - (q * moved).sum(axis=1) ** 2, 1e-12 * square + 1e-24))


@lru_cache(maxsize=8)
def _exchanges(n: int, seed: int, n_resamples: int) -> NDArray[np.bool_]:
    """Boolean mask (arrangements, n), read-only: True where an arrangement swaps a question's two scores."""
    if 2**n <= n_resamples:
        out = (np.arange(2**n)[:, None] >> np.arange(n)) % 2 == 1  # the binary digits of 0 to 2^n - 1
    else:
        rng = np.random.default_rng(seed)
        out = np.empty((n_resamples, n), dtype=bool)
        for rows in blocks(2 * n, n_resamples):
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
    others = np.atleast_2d(np.asarray(controls, dtype=float))
    z, ties = _standardised(claim, others, tolerances)
    # (N,): the largest standardised score of each control over all tests
    largest = np.where(np.isnan(others), np.inf, z[1:]).max(axis=1)
    return [
        monte_carlo_p(x, largest.tolist(), tie) if np.isfinite(x) else 1.0
        for x, tie in zip(z[0].tolist(), ties.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class Contrast:
    """Whether a claim stands out more by one method than by another (`contrast_methods`)."""

    value: float
    """Standardised score by the first method minus that by the second."""
    p_value: float
    """Two-sided Monte-Carlo p."""
    p_first: float
    """One-sided Monte-Carlo p that the claim stands out more by the first method."""


def contrast_methods(claim: ArrayLike, controls: ArrayLike, tolerances: ArrayLike = TIE) -> Contrast:
    """Compare how far a claim stands out by two methods: `claim` (2,) and `controls` (N, 2) are their scores.

    With scores z standardised for each method over claim and controls, the contrast of a place is c = z_1 - z_2, and

        p = (1 + #{i : |c_i| >= |c_claim|}) / (1 + N),    one-sided without the absolute values

    This is one test of the difference. "Significant by the first, not by the second" is none: two p-values on two sides
    of the level may differ by chance. p is exact if claim and controls are exchangeable. A control without a score
    (NaN) counts against a contrast; a claim without one has p = 1. `tolerances` as in `max_t_p`.
    """
    z, ties = _standardised(claim, np.atleast_2d(np.asarray(controls, dtype=float)), tolerances)
    own, *others = (z[:, 0] - z[:, 1]).tolist()
    if not math.isfinite(own):
        return Contrast(math.nan, 1.0, 1.0)
    tie = float(ties.sum())
    return Contrast(own, monte_carlo_p(abs(own), np.abs(others).tolist(), tie), monte_carlo_p(own, others, tie))


def _standardised(
    claim: ArrayLike, controls: NDArray[np.float64], tolerances: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores standardised over claim and controls (1 + N, tests), the claim first, and the tolerance of each test."""
    arms = np.concatenate([np.asarray(claim, dtype=float)[None], controls])
    centre, spread = np.nanmean(arms, axis=0), np.nanstd(arms, axis=0)
    scale = np.maximum(np.asarray(tolerances), TIE * np.abs(centre))  # (tests,): what rounding may change
    spread = np.where(spread > scale, spread, 1.0)
    return (arms - centre) / spread, np.maximum(scale / spread, TIE)


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
