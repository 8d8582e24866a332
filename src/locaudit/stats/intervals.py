"""Confidence intervals of scores, differences and leads without resampling: the delta method, made fit for few changes.

A score is a product of means over questions, theta = prod_c m_c. Its pseudo-values, one per question, are

    psi_i = theta + sum_c (prod_{k != c} m_k) (x_ci - m_c)

Their mean is theta, and their variance over n is that of theta to first order (the infinitesimal jackknife; Efron 1982,
chapter 6). A difference of scores has the difference of the pseudo-values. For a plain mean, psi_i = x_i. Everything
here is about the mean of such values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from locaudit.records import TrialRecord
from locaudit.stats.scores import TIE, Values, find_score, has_score, score_values

EXTRA = 2.0
"""Number of pseudo-questions that enlarge the variance of an `Estimate`, as in Bonett and Price (2012)."""
N_DRAWS = 4_000
"""Number of draws for the interval of `true_share`."""


def pseudo_values(values: ArrayLike) -> Values:
    """Pseudo-values of a score: `values` (components, ..., questions) -> (..., questions); see the module.

    A missing value (NaN) adds nothing, and the others of its component count for more. All are NaN if a component has
    no value.
    """
    x = np.asarray(values, dtype=float)
    there = ~np.isnan(x)
    known = there.sum(axis=-1, keepdims=True)  # (components, ..., 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(there, x, 0.0).sum(axis=-1, keepdims=True) / known
        centred = np.where(there, x - means, 0.0) * (x.shape[-1] / known)
    out = np.prod(means, axis=0) + np.zeros(x.shape[1:])
    for c in range(len(x)):
        out = out + np.prod(np.delete(means, c, axis=0), axis=0) * centred[c]
    return out


def complete(values: Values) -> Values:
    """The questions that no arm lacks, of values (..., questions)."""
    return values[..., ~np.isnan(values).any(axis=tuple(range(values.ndim - 1)))]


@dataclass(frozen=True)
class Estimate:
    """A score or a difference of scores over n questions, with confidence intervals and one-sided p-values.

    With the central moments m2, m3, m4 of the pseudo-values and the normal quantile z, the interval is

        mean + (2 z^2 + 1) / 12 * m3 / (m2 n)  +-  z sqrt((m2 + 2 m4 / (m2 n)) / n)

    Both corrections vanish as 1 / n. The first is half of Hall's correction for skewness (1992; half, because the
    skewness of few changed questions is itself uncertain). The second is the variance with two more questions at the
    distance sqrt(m4 / m2) from the mean. For answers of 0 and 1 that is about 1, as in the interval of Bonett and Price
    (2012), and for normal values the interval is about that of Student's t.

    If all pseudo-values are equal, at most a share 1 - (alpha / 2)^(1/n) of all questions behaves otherwise, and these
    may be anywhere within the limits. This is exact (Clopper and Pearson 1934).

    The questions are a random sample of those that the interval speaks about; edits and places are held fixed.
    Its coverage is measured by ``locaudit calibrate coverage``; see docs/calibration.md.
    """

    value: float
    """The score, or the difference of scores."""
    variance: float
    """Squared standard error, with the second correction; 0 if all pseudo-values are equal."""
    skew: float
    """m3 / (m2 n), in the score's units."""
    n: int
    """Number of questions."""
    limits: tuple[float, float]
    """Smallest and largest possible value. Intervals are cut off there."""

    @property
    def se(self) -> float:
        """Standard error."""
        return math.sqrt(self.variance)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Two-sided interval. (NaN, NaN) without a value, or if an unbounded score is the same at all questions."""
        tail = (1 - confidence) / 2
        if not self.variance:
            share = 1 - tail ** (1 / self.n)
            low, high = (self.value + share * (limit - self.value) for limit in self.limits)
            return (low, high) if math.isfinite(high - low) else (math.nan, math.nan)
        z = -float(special.ndtri(tail))
        centre = self.value + (2 * z * z + 1) / 12 * self.skew
        low, high = (min(max(centre + x * self.se, self.limits[0]), self.limits[1]) for x in (-z, z))
        return low, high

    def p_above(self, bound: float = 0.0) -> float:
        """One-sided p of the null hypothesis that the true value is at most `bound`: the interval, inverted.

        p is the alpha at which the lower end of the interval at confidence 1 - 2 alpha is the bound.
        """
        gap = self.value - bound
        if math.isnan(gap):
            return 1.0
        if not self.variance:
            return 1.0 if gap <= 0 else max(0.0, 1 - gap / (self.value - self.limits[0])) ** self.n
        # The lower end is the bound at a root of (skew / 6) z^2 - se z + (gap + skew / 12) = 0: take the one near 0.
        distance = gap + self.skew / 12
        root = self.variance - 2 / 3 * self.skew * distance
        z = 2 * distance / (self.se + math.sqrt(root)) if root >= 0 else 3 * self.se / self.skew
        return float(special.ndtr(-z))

    def p_below(self, bound: float = 0.0) -> float:
        """One-sided p of the null hypothesis that the true value is at least `bound`."""
        low, high = self.limits
        return Estimate(-self.value, self.variance, -self.skew, self.n, (-high, -low)).p_above(-bound)


def estimate(
    after: ArrayLike,
    before: ArrayLike | Sequence[ArrayLike] | None = None,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    tolerance: float = TIE,
) -> Estimate:
    """The score of `after`, or its difference to the score of `before`, or to the mean score of a list `before`.

    Shapes as in `arms_of`; differences are paired by question, and over the questions that no arm lacks. `bounds` are
    those of one score (`Score.bounds`). Pseudo-values within `tolerance` of each other are equal.
    """
    if before is None:
        return mean_estimate(pseudo_values(arms_of(after)[0]), bounds, tolerance)
    first, *others = pseudo_values(complete(np.stack([*arms_of(after), *arms_of(before)], axis=1)))
    return mean_estimate(first - np.mean(others, axis=0), (bounds[0] - bounds[1], bounds[1] - bounds[0]), tolerance)


def arms_of(values: ArrayLike | Sequence[ArrayLike]) -> list[Values]:
    """The values of one edit, or of each edit in a list, as arrays (components, questions).

    The values of an edit have the shape (questions,) if its score is a plain mean, and (components, questions) if it is
    a product of means. An array is one edit; a list or tuple of arrays is several edits.
    """
    several = isinstance(values, list | tuple) and np.ndim(values[0]) > 0
    return [np.atleast_2d(np.asarray(x, dtype=float)) for x in (values if several else [values])]  # type: ignore[list-item]


def score_intervals(
    records: Sequence[TrialRecord], scores: Sequence[str], *, confidence: float = 0.95, split: str = "test"
) -> dict[str, dict[str, tuple[float, float]]]:
    """Trial id -> score -> its interval over the questions of a split. Trials that lack a score are left out."""
    tested = {record.spec.trial_id: record.questions.get(split, {}) for record in records}
    return {
        trial: {
            score: estimate(score_values(questions, score), bounds=find_score(score).bounds).interval(confidence)
            for score in scores
        }
        for trial, questions in tested.items()
        if scores and all(has_score(questions, score) for score in scores)
    }


def mean_estimate(psi: Values, limits: tuple[float, float], tolerance: float = TIE) -> Estimate:
    """The mean of pseudo-values `psi` (questions,), whose smallest and largest possible values are `limits`."""
    n, value = psi.size, float(psi.mean()) if psi.size else math.nan
    centred = psi - value
    if not n or not np.ptp(psi) > tolerance:  # NaN: no value
        return Estimate(value, math.nan if math.isnan(value) else 0.0, 0.0, n, limits)
    m2, m3, m4 = (float((centred**power).mean()) for power in (2, 3, 4))
    return Estimate(value, (m2 + EXTRA * m4 / (m2 * n)) / n, m3 / (m2 * n), n, limits)


@dataclass(frozen=True)
class Crossed:
    """The lead of a claim over random places, with questions and places random at once (`crossed_interval`)."""

    lead: float
    """Claim minus the mean control."""
    interval: tuple[float, float]
    se: float
    """Standard error: the root of the sum of squares of those below."""
    se_questions: float
    """Standard error from questions, with these places."""
    se_places: float
    """Standard error from the draw of controls; NaN for fewer than two."""
    se_seeds: float
    """Standard error from training seeds; 0 if there is only one, which is then held fixed."""
    df: float
    """Degrees of freedom of the t-interval (Satterthwaite 1946)."""


def crossed_interval(
    claim: ArrayLike, controls: ArrayLike, *, confidence: float = 0.95, population: int | None = None
) -> Crossed:
    """Interval of the claim's lead over the mean of *all* possible controls, for *all* questions of this kind.

    `estimate(claim, controls)` holds the controls fixed: it speaks about the lead over these very places. Here controls
    are a random sample of places, and questions a random sample of questions. The claim is one fixed place in both.

        variance = V(questions) + sigma^2(places) / N + sigma^2(seeds) / S,    interval = lead +- t(df) * its root

    V(questions) is that of `estimate`. sigma^2(places) is the variance of the controls' true scores: that of their
    scores minus the part that questions make, which V(questions) has already (two-way analysis of variance of the
    pseudo-values, Searle et al. 1992). It is 0 where the questions' part is larger, and shrinks by 1 - N / population
    if there are so few places. Degrees of freedom: Satterthwaite (1946), from the raw variances; V(questions) counts as
    known, because its correction for small n already gives about a t-interval. Resampling both (the pigeonhole
    bootstrap, Owen 2007) would count noise of single answers up to three times.

    Args:
        claim: (components, questions), or (seeds, components, questions) if the edits were trained with several seeds.
            Seeds are then random too: the interval speaks about all seeds.
        controls: (places, components, questions), or (places, seeds, components, questions). A place without a score
            (NaN) is left out.
        confidence: Of the interval.
        population: Number of places that the controls were drawn from; None if there are very many.

    """
    own, others = _tables(claim, controls)
    if not len(others):
        return Crossed(math.nan, (math.nan, math.nan), *[math.nan] * 5)
    leads = own - others.mean(axis=0)  # (seeds, questions)
    questions = mean_estimate(leads.mean(axis=0), (-math.inf, math.inf))
    n_places, n_seeds = len(others), len(leads)
    places, raw_places, _ = _between(others.mean(axis=1))
    seeds, raw_seeds, _ = _between(leads) if n_seeds > 1 else (0.0, 0.0, 0.0)
    share = 0.0 if population is None else min(1.0, n_places / population)
    v_places, raw_places = (x * (1 - share) / n_places for x in (places, raw_places))
    variance = questions.variance + v_places + seeds / n_seeds
    if not variance:  # all questions and places alike: nothing to estimate a spread from
        return Crossed(questions.value, (math.nan, math.nan), 0.0, 0.0, 0.0, 0.0, math.inf)
    spent = raw_places**2 / max(n_places - 1, 1) + (raw_seeds / n_seeds) ** 2 / max(n_seeds - 1, 1)
    df = variance**2 / spent if spent > 0 else math.inf
    z = float(special.ndtri((1 + confidence) / 2))
    centre = questions.value + (2 * z * z + 1) / 12 * questions.skew
    half = math.sqrt(variance) * (z if math.isinf(df) else float(special.stdtrit(df, (1 + confidence) / 2)))
    return Crossed(
        questions.value, (centre - half, centre + half), math.sqrt(variance), questions.se, math.sqrt(v_places),
        math.sqrt(seeds / n_seeds), df,
    )  # fmt: skip


@dataclass(frozen=True)
class Share:
    """The share of places whose true score is at least the claim's (`true_share`)."""

    value: float
    """Median of the draws."""
    interval: tuple[float, float]
    """About (0, 1) if the data cannot tell: few questions or controls, or places that hardly differ."""
    sd: float
    """Standard deviation of the places' true scores; 0 if questions explain all of the controls' spread."""
    p_common: float = 1.0
    """p of the null hypothesis that the share is at most `most`: the share of draws whose lower end is."""


def true_share(
    claim: ArrayLike,
    controls: ArrayLike,
    *,
    confidence: float = 0.95,
    most: float = 0.05,
    slack: float = 0.0,
    population: int | None = None,
    seed: int = 0,
    tolerance: float = TIE,
) -> Share:
    """Share of random places that are truly at least as good as the claim: the noise of questions is taken out.

    The share of controls that *score* at least as high is blurred by the questions. If all places are truly alike and
    the claim is truly better than all, some still score higher. Each draw therefore replaces the scores by true scores
    that fit them, and counts again:

    - The variance of the controls' scores, and the questions' part in it, are drawn from their inverted chi-squared
      distributions. The rest is tau^2, the variance of true scores; it may be 0.
    - A control's true score is its score, shrunk towards the mean by b = tau^2 / (tau^2 + questions' part), plus normal
      noise of variance tau^2 (1 - b).
    - The claim's true lead is normal around the lead, with the variance that questions give it.
    - From the k of N true scores that reach the claim's come the two ends of the Clopper-Pearson interval, as draws of
      Beta(k, N - k + 1) and Beta(k + 1, N - k).

    Places that score below the claim and far below the others (by more than 3 times the distance between the quartiles
    below the first, Tukey's outer fence: their edit destroyed the model) do not reach the claim. They are left out of
    the variances, which they would make so large that the noise of the others would stay.

    The interval goes from a low quantile of the lower ends to a high quantile of the upper ends. Without noise from
    questions it is the Clopper-Pearson interval of the count, whatever the distribution of places; the normal
    distribution serves to remove the noise only. The drawing is that of generalised confidence intervals (Weerahandi
    1993). Coverage, normal places or not: docs/calibration.md.

    If all places of the `population` were tried, k / N is the share. With `slack`, a place counts if its true score is
    at least the claim's minus the slack. Shapes as in `crossed_interval`; several seeds are averaged. Scores within
    `tolerance` are ties. NaN for fewer than two controls or without a score.
    """
    own, others = (x.mean(axis=-2) for x in _tables(claim, controls))  # (questions,), (places, questions)
    n_places, n = others.shape
    if n_places < 2 or n < 2 or np.isnan(own).any():
        return Share(math.nan, (math.nan, math.nan), math.nan)
    first, third = np.quantile(others.mean(axis=1), (0.25, 0.75))
    least = min(first - 3 * (third - first), own.mean() - slack) - tolerance
    near = others[others.mean(axis=1) >= least]
    true, raw, noise = _between(near)
    rng = np.random.default_rng(seed)

    def inverted(variance: float, df: int) -> Values:
        return variance * df / rng.chisquare(df, (N_DRAWS, 1))

    part = inverted(noise, (len(near) - 1) * (n - 1))
    tau2 = np.maximum(inverted(raw, len(near) - 1) - part, 0.0)
    shrink = tau2 / np.maximum(tau2 + part, np.finfo(float).tiny)
    scores = near.mean(axis=1) - near.mean()
    # (draws, places) and (draws, 1): true scores, from the controls' mean
    drawn = shrink * scores + np.sqrt(tau2 * (1 - shrink)) * rng.standard_normal((N_DRAWS, len(near)))
    leads = own - near.mean(axis=0)
    lead = leads.mean() + np.sqrt(inverted(float(leads.var(ddof=1)) / n, n - 1)) * rng.standard_normal((N_DRAWS, 1))
    k = (drawn >= lead - slack - tolerance).sum(axis=1)
    ends = (
        (k / n_places, k / n_places)
        if n_places == population
        else (
            np.where(k > 0, rng.beta(np.maximum(k, 1), n_places - k + 1), 0.0),
            np.where(k < n_places, rng.beta(k + 1, np.maximum(n_places - k, 1)), 1.0),
        )
    )
    quantiles = ((1 - confidence) / 2, (1 + confidence) / 2)
    low, high = (float(np.quantile(end, p)) for end, p in zip(ends, quantiles, strict=True))
    p_common = float((1 + np.sum(ends[0] <= most)) / (1 + N_DRAWS))
    return Share(float(np.median(k)) / n_places, (low, high), math.sqrt(true), p_common)


def _tables(claim: ArrayLike, controls: ArrayLike) -> tuple[Values, Values]:
    """Pseudo-values: of the claim (seeds, questions), and of the controls with a score (places, seeds, questions).

    Only the questions are used that none of them lacks.
    """
    own, others = np.asarray(claim, dtype=float), np.asarray(controls, dtype=float)
    if own.ndim == 2:  # one seed
        own, others = own[None], others[:, None]
    others = others[~np.any(np.isnan(others).all(axis=-1), axis=(1, 2))]
    if np.isnan(own).all(axis=-1).any():  # no score at the claim
        return np.full((len(own), own.shape[-1]), np.nan), pseudo_values(np.moveaxis(others, -2, 0))
    # the components, last but one axis, to the front
    own, *others = pseudo_values(np.moveaxis(complete(np.stack([own, *others])), -2, 0))
    return own, np.reshape(others, (len(others), *own.shape))


def _between(table: Values) -> tuple[float, float, float]:
    """Variance between the rows of `table` (rows, questions): of their true means, of their means, and the noise's.

    The three are max(0, raw - noise), raw and noise, where noise is the mean square of the interaction over the number
    of questions: what questions alone add to the differences between rows. NaN for fewer than two rows or questions.
    """
    rows, n = table.shape
    if rows < 2 or n < 2:
        return math.nan, math.nan, math.nan
    means = table.mean(axis=1)
    apart = table - means[:, None] - table.mean(axis=0) + means.mean()
    raw, noise = float(means.var(ddof=1)), float((apart**2).sum() / ((rows - 1) * (n - 1)) / n)
    return max(0.0, raw - noise), raw, noise
