"""Does one edit do as well as another? A difference, its interval, and a margin: never a bare comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from locaudit.stats.scores import TIE, mean_score, reaches
from locaudit.stats.tests import N_RESAMPLES, percentiles, resampled_differences

CONFIDENCE = 0.90
"""Of the interval: a test of "worse by more than the margin" at 5 %."""
LEAST_DIFFERING = 10
"""Questions that must differ between two edits for a bootstrap of their difference."""
Outcome = Literal["not worse", "worse", "undecided"]


@dataclass(frozen=True)
class Match:
    """How an edit compares with a reference, on the same questions."""

    difference: float
    """Score of the edit minus that of the reference."""
    interval: tuple[float, float]
    """90 % bootstrap interval of the difference over questions, hyperparameters and locations held fixed."""
    p: float
    """One-sided p that the edit is worse by the margin or more: the share of resamples in which it is, with one more
    counted. `holm` corrects several of them."""
    p_equivalent: float
    """p of two one-sided tests that the edits differ by the margin or more, in either direction."""
    outcome: Outcome
    """``not worse`` by more than the margin: the interval lies above -margin; ``worse``: it lies below; ``undecided``:
    -margin is inside, so that the questions are too few to tell."""
    equivalent: bool
    """The interval lies between -margin and margin: equivalent at 5 %."""
    below: bool
    """The interval lies below margin: not better by it."""
    few: bool
    """Too few questions differ for the bootstrap to be trusted, and too many for their number alone to exclude the
    margin: nothing is decided then."""


def compare_edits(
    values: ArrayLike,
    reference: ArrayLike | Sequence[ArrayLike],
    *,
    margin: float,
    seed: int = 0,
    drawn: NDArray[np.float64] | None = None,
) -> Match:
    """`values` against `reference` (or the mean over a list of them), shapes as in `paired_interval`.

    Two one-sided tests (TOST, Schuirmann 1987), of which `outcome` is the lower half: non-inferiority. Nothing is
    decided where a score is missing. `drawn` are the differences on resamples of the questions, where they are known.
    """
    several = isinstance(reference, list | tuple) and np.ndim(reference[0]) > 0
    found: Sequence[ArrayLike] = reference if several else [reference]  # type: ignore[assignment]
    others = [np.atleast_2d(np.asarray(x, dtype=float)) for x in found]
    means = [float(mean_score(x)) for x in others]
    difference = float(mean_score(np.atleast_2d(np.asarray(values, dtype=float)))) - float(np.mean(means))
    if math.isnan(difference):
        return Match(difference, (math.nan, math.nan), 1.0, 1.0, "undecided", False, False, True)
    drawn = resampled_differences(values, others, seed) if drawn is None else drawn
    low, high = percentiles(drawn, CONFIDENCE)
    below, above = (float((1 + np.sum(~(x < margin))) / (1 + drawn.size)) for x in (-drawn, drawn))
    few = differ_too_little(values, others, margin)
    if few:
        return Match(difference, (low, high), max(below, 0.5), max(below, above, 0.5), "undecided", False, False, True)
    outcome: Outcome = "not worse" if low > -margin else "worse" if high < -margin else "undecided"
    equivalent = -margin < low and high < margin
    return Match(difference, (low, high), below, max(below, above), outcome, equivalent, high < margin, False)


def differ_too_little(values: ArrayLike, others: Sequence[ArrayLike], margin: float) -> bool:
    """Whether so few questions differ that a resample may hold none, though the true difference is the margin.

    With scores of 0 and 1, a difference of the margin shows in at least that share of the questions: where d of n
    differ and P(Bin(n, margin) <= d) is at most 5 %, it is excluded without a bootstrap.
    """
    a = np.atleast_2d(np.asarray(values, dtype=float))
    differ = np.zeros(a.shape[1], dtype=bool)
    for x in (np.atleast_2d(np.asarray(other, dtype=float)) for other in others):
        differ |= (a != x).any(axis=0) & ~(np.isnan(a) | np.isnan(x)).any(axis=0)
    d, n = int(differ.sum()), differ.size
    return d < LEAST_DIFFERING and float(stats.binom.cdf(d, n, min(margin, 1.0))) > (1 - CONFIDENCE) / 2


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979): those at most alpha are rejected with a family-wise error of at most alpha.

    Valid under any dependence, such as that of edits compared with one reference on the same questions.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, floor = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = floor
    return adjusted


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
    return [float((1 + np.sum(reaches(largest, x))) / (1 + len(others))) if np.isfinite(x) else 1.0 for x in z[0]]


def rank_correlation(x: Sequence[float], y: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """Spearman's rank correlation and its two-sided permutation p (SciPy); NaN for fewer than 3 pairs or equal values.

    Pairs with a missing value are left out.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    there = np.isfinite(a) & np.isfinite(b)
    a, b = stats.rankdata(a[there]), stats.rankdata(b[there])
    if a.size < 3 or not np.ptp(a) or not np.ptp(b):
        return math.nan, math.nan
    result = stats.permutation_test(
        (a,),
        lambda ranks, axis: _correlation(ranks, b),
        permutation_type="pairings",
        vectorized=True,
        n_resamples=N_RESAMPLES,
        rng=np.random.default_rng(seed),
    )
    return float(result.statistic), float(result.pvalue)


def _correlation(ranks: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson correlation of the last axis of `ranks` with `others`."""
    a, b = ranks - ranks.mean(axis=-1, keepdims=True), others - others.mean()
    return (a * b).sum(axis=-1) / np.sqrt((a**2).sum(axis=-1) * (b**2).sum())
