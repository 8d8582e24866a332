"""Means of trusted labels, from a judge's ratings of all answers and labels of some (prediction-powered inference).

Let f[a, i] be the judge's P(yes) for arm a's answer to question i, y[a, i] its label, 0 or 1, and w[a, i] the inverse
of the probability that it is labelled, or 0 if it is not. For weights c[a] of the arms, such as +1 for the claim and -1
for the unedited model, the quantity estimated is theta = sum_a c[a] E y[a, i]. Questions are independent draws, and

    g(x) = m + beta (x - m_f)
    psi[a, i] = g(f[a, i]) + w[a, i] (y[a, i] - g(f[a, i]))
    estimate = mean_i d[i],   variance = var_i(d[i]) / n,   d[i] = sum_a c[a] psi[a, i]

E psi[a, i] = E y[a, i] whatever g is, so the judge may be wrong in any way: it only makes the interval wider. m and m_f
are the weighted means of labelled y and f, over the arms with c > 0 and over those with c < 0. beta is the value that
makes var_i(d[i]) smallest (power tuning). All arms of a question are in one d[i], so dependence between them is taken
into account, however the labels are spread over arms.

Sources: Angelopoulos et al. 2023 (prediction-powered inference); Angelopoulos, Duchi, Zrnic 2023 (power tuning); Zrnic
and Candes 2024 (weights). For one arm labelled at random, the estimate is that of ``ppi_py.ppi_mean_pointestimate``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

LEAST = 20
"""Labelled questions that an estimate needs; with fewer, the standard error itself is too uncertain."""


@dataclass(frozen=True)
class RectifiedMean:
    """A mean of trusted labels, or a difference of means, estimated with a judge."""

    value: float
    se: float
    """Standard error."""
    n: int
    """Number of labelled questions behind it: of an arm of which fewest are labelled."""
    interval: tuple[float, float]
    """95 % interval: value -+ t se sqrt(n / (n - 2)), t with n - 2 degrees of freedom, since g has 2 fitted numbers."""


def rectify(f: ArrayLike, y: ArrayLike, w: ArrayLike, c: ArrayLike) -> NDArray[np.float64]:
    """The values psi, whose means over questions estimate the means of the labels; beta is tuned for the weights `c`.

    `f`, `y` and `w` are (arms, questions), `c` is (arms,), psi is (arms, questions). A missing judgement (NaN in `f`)
    is replaced by the mean judgement; labels with w = 0 are not read.
    """
    f, y, w, c = (np.asarray(x, dtype=float) for x in (f, y, w, c))
    y, f, m, m_f = np.where(w > 0, y, 0.0), f.copy(), np.zeros((len(c), 1)), np.zeros((len(c), 1))
    for side in (c > 0, c < 0):
        share = np.abs(c[side])[:, None] * w[side]
        known = ~np.isnan(f[side])
        mean = _ratio((share * np.nan_to_num(f[side])).sum(), (share * known).sum())
        f[side] = np.where(known, f[side], mean)
        m[side], m_f[side] = _ratio((share * y[side]).sum(), share.sum()), mean
    # psi = m + fixed + beta * tuned
    fixed, tuned = w * (y - m), (1 - w) * (f - m_f)
    a, b = c @ fixed, c @ tuned
    beta = -_ratio(((a - a.mean()) * (b - b.mean())).sum(), ((b - b.mean()) ** 2).sum())
    return m + fixed + beta * tuned


def rectified_mean(
    parts: Sequence[NDArray[np.float64]], w: ArrayLike, c: ArrayLike, confidence: float = 0.95
) -> RectifiedMean:
    """Estimate sum_a c[a] prod_k E y_k[a, i] from psi_k, one (arms, questions) per aspect k (`rectify`).

    With one aspect this is a mean or a difference of means. The variance of a product of means is that of its linear
    part (delta method). The product of two estimated means is biased by their covariance, which is subtracted. `w` are
    the weights of the labels: (arms, questions).
    """
    psi, c, n = np.stack(parts), np.asarray(c, dtype=float), parts[0].shape[1]
    means = psi.mean(axis=2)  # (aspects, arms)
    apart = psi - means[..., None]

    def others(*left_out: int) -> NDArray[np.float64]:
        """Product of the means of all other aspects: (arms,)."""
        return np.prod(np.delete(means, left_out, axis=0), axis=0)

    value = np.prod(means, axis=0)
    for k, other in combinations(range(len(psi)), 2):
        value = value - others(k, other) * (apart[k] * apart[other]).sum(axis=1) / (n * (n - 1))
    linear = sum(others(k)[:, None] * apart[k] for k in range(len(psi)))  # (arms, questions)
    se = float((c @ linear).std() / math.sqrt(n))
    labelled = count(w, c)
    free = max(labelled - 2, 1)
    half = float(stats.t.ppf((1 + confidence) / 2, free)) * se * math.sqrt(labelled / free)
    centre = float(c @ value)
    return RectifiedMean(centre, se, labelled, (centre - half, centre + half))


def count(w: ArrayLike, c: ArrayLike) -> int:
    """Number of questions with a label: the smaller one of the arms with positive and those with negative weights."""
    w, c = np.asarray(w), np.asarray(c)
    sides = [w[side] for side in (c > 0, c < 0) if side.any()]
    return min(int((side > 0).any(axis=0).sum()) for side in sides)


def _ratio(top: float, bottom: float) -> float:
    return float(top / bottom) if bottom > 0 else 0.0
