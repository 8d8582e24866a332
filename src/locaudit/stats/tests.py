"""The three numbers under a verdict: a Monte-Carlo p, a paired test of an effect, a paired bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

N_RESAMPLES = 9_999
"""Resamples of the sign-flip test and the bootstrap."""


def monte_carlo_p(claim: float, controls: Sequence[float]) -> float:
    """One-sided Monte-Carlo p-value of a claim against random controls.

    p = (1 + #{i : control_i >= claim}) / (1 + N). Valid (P(p <= t) <= t) when claim and controls are exchangeable under
    the null; ties count against the claim. A control that is NaN (its edit diverged) counts as reaching the claim.
    Source: Davison and Hinkley (1997), section 4.2.
    """
    scores = np.asarray(controls, dtype=float)
    return float((1 + np.sum(~(scores < claim))) / (1 + scores.size))


def paired_gain_p(after: ArrayLike, before: ArrayLike, *, seed: int = 0) -> float:
    """One-sided sign-flip p-value that the mean of `after - before` over questions is not above 0.

    Exact when 2^n is at most `N_RESAMPLES`, else Monte Carlo; SciPy's `permutation_test` does the work. Questions are
    taken as exchangeable in sign under the null.
    """
    gains = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    if not gains.any():
        return 1.0
    result = stats.permutation_test(
        (gains,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=N_RESAMPLES,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def paired_interval(
    after: ArrayLike, before: ArrayLike, *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `after - before`, resampling questions (SciPy's `bootstrap`)."""
    gains = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    if np.ptp(gains) == 0:
        return float(gains[0]), float(gains[0])
    result = stats.bootstrap(
        (gains,),
        np.mean,
        method="percentile",
        confidence_level=confidence,
        n_resamples=N_RESAMPLES,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
