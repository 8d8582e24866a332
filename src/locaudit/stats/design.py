"""Standard errors and power of planned audits, from the values of a pilot or a finished audit.

In terms of pseudo-values (`locaudit.stats.intervals`), place p with training seed s, sample k and question q has

    psi = mu_p + (question) + (p x q) + (p x s) + (p x s x q) + (p x s x k x q)

Terms that all places have in common cancel in every comparison. With n questions, K samples of each answer and S seeds,
the others give a place's score the variance

    v = V_questions / n + V_seeds / S + V_rest / (n S) + V_samples / (n K S)

(`Noise`). Controls also differ truly: mu_p has the variance tau^2 between random places. All parts are moment estimates
of the analysis of variance (Searle, Casella and McCulloch 1992). What is fixed in the data, such as a single seed,
stays fixed in what is predicted. Variances are taken to be the same at other effects than the one seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from locaudit.stats.intervals import EXTRA, pseudo_values
from locaudit.stats.sequential import curtailment

Values = NDArray[np.float64]
LEAST_CONTROLS = 3
"""Fewer controls say nothing about how much places differ."""
MOST_QUESTIONS = 1_000_000
"""More questions than this are as good as infinitely many."""
_Z = special.ndtri((np.arange(500) + 0.5) / 500)
"""Standard normal values of equal weight, for expectations. Their functions may be steps, so no Gauss-Hermite nodes."""
_TINY = 1e-100
"""Stands for a standard deviation of 0 where one is divided by."""


@dataclass(frozen=True)
class Size:
    """The size of an audit."""

    questions: int
    """Test questions."""
    samples: int = 1
    """Sampled answers to each question; 1 also for scores that need no generated answers."""
    controls: int = 19
    """Controls of each null."""
    seeds: int = 1
    """Training seeds over which each place's score is averaged (``--repeats``)."""


@dataclass(frozen=True)
class Noise:
    """Variance components of a score or a difference of scores: per question, sample and seed."""

    questions: float
    """Between questions; with `samples` unknown, that within questions is in it."""
    samples: float = math.nan
    """Between samples of the answer to one question; NaN if the data have only one."""
    seeds: float = 0.0
    """Between training seeds; 0 if the data have only one, which is then held fixed."""
    rest: float = 0.0
    """Interaction of seeds and questions."""

    def variance(self, size: Size) -> float:
        """Squared standard error with this many questions, samples and seeds."""
        n, k, s = size.questions, size.samples, size.seeds
        within = 0.0 if math.isnan(self.samples) else self.samples
        return self.questions / n + self.seeds / s + self.rest / (n * s) + within / (n * k * s)

    def minus(self, other: Noise, n: int) -> Noise:
        """What is left without the n-th part of `other`; nothing is below 0."""
        parts = {name: max(0.0, x - getattr(other, name) / n) for name, x in vars(self).items()}
        return Noise(**{**parts, "samples": parts["samples"] if self.samples == self.samples else math.nan})


@dataclass(frozen=True)
class Components:
    """What `find_components` learns from an audit about one method and null."""

    gain: Noise
    """Of the claim's gain over the unedited model."""
    claim: Noise
    """Of the claim's score against the mean of all places."""
    control: Noise
    """Of one control's score against the mean of all places, apart from its true difference to it."""
    places: float
    """tau^2, the variance of the places' true scores; 0 if noise explains how much the controls differ."""
    scores: float = math.nan
    """Variance of the controls' scores, noise included, from which `places` is estimated."""
    n_places: int = 0
    """Number of controls behind it."""
    population: int | None = None
    """Number of places that controls are drawn from; None if there are very many."""

    def controls(self, size: Size) -> int:
        """Number of controls: as many as planned, or all places."""
        return size.controls if self.population is None else min(size.controls, self.population)

    def plausible(self, confidence: float = 0.8) -> tuple[Components, Components]:
        """The same with a tau^2 that is as small, and as large, as few controls leave plausible.

        The variance of N scores has a chi-squared distribution with N - 1 degrees of freedom if they are normal; the
        part of noise is taken as known. From three controls, tau may be off by a factor of 2 or more.
        """
        noise, df = max(0.0, self.scores - self.places), self.n_places - 1
        tails = special.chdtri(df, np.asarray([1 - confidence, 1 + confidence]) / 2)
        low, high = (replace(self, places=max(0.0, self.scores * df / x - noise)) for x in tails.tolist())
        return low, high

    def lead_se(self, size: Size) -> float:
        """Standard error of the claim's lead over all places, as in `crossed_interval`."""
        n = self.controls(size)
        left = 1.0 if self.population is None else 1 - n / self.population
        return math.sqrt(self.claim.variance(size) + self.control.variance(size) / n + self.places * left / n)


def find_components(
    claim: ArrayLike, controls: ArrayLike, base: ArrayLike, population: int | None = None
) -> Components | None:
    """Variance components from the values of an audit, or of a pilot.

    Args:
        claim: (components, questions), or (seeds, samples, components, questions).
        controls: The same for each control: (places, components, questions) or (places, seeds, samples, components,
            questions). Controls without a score (NaN) are left out.
        base: The unedited model, shaped like the claim; one seed stands for all.
        population: Number of places that the controls were drawn from; None if there are very many.

    Returns:
        None if the data cannot say: fewer than `LEAST_CONTROLS` controls or 2 questions, a claim without a score, or
        controls that do not vary at all.

    """
    own, unedited, others = _table(claim, 2)[None], _table(base, 2)[None], _table(controls, 3)
    own, unedited, others = (_pseudo_values(x) for x in (own, unedited, others))  # (places, seeds, samples, questions)
    others = others[~np.isnan(others).any(axis=(1, 2, 3))]
    n_places, n_seeds, n_samples, n = others.shape
    if n_places < LEAST_CONTROLS or n < 2 or np.isnan(own).any() or np.isnan(unedited).any():
        return None
    mean = others.mean(axis=0, keepdims=True)
    centred = (others - mean) * math.sqrt(n_places / (n_places - 1))  # the mean takes a part of the variance away
    control = _split(centred)
    lead, scores = _split(own - mean), others.mean(axis=(1, 2, 3))
    raw = float(scores.var(ddof=1))
    if not raw > 0:
        return None
    places = max(0.0, raw - control.variance(Size(n, n_samples, n_places, n_seeds)))
    return Components(_split(own - unedited), lead.minus(control, n_places), control, places, raw, n_places, population)


def _table(values: ArrayLike, n_plain: int) -> Values:
    """Values with axes for seeds and samples, which an array with `n_plain` axes lacks."""
    x = np.asarray(values, dtype=float)
    return x[..., None, None, :, :] if x.ndim == n_plain else x


def _pseudo_values(table: Values) -> Values:
    """(places, seeds, samples, components, questions) -> (places, seeds, samples, questions).

    The score is a product of means over questions and samples, so both are one axis of its pseudo-values.
    """
    x = np.moveaxis(table, -2, 0)  # components first
    return pseudo_values(x.reshape(*x.shape[:-2], -1)).reshape(x.shape[1:])


def _split(table: Values) -> Noise:
    """The components of differences (rows, seeds, samples, questions); each row is one, and they are averaged."""
    _, n_seeds, n_samples, n = table.shape
    samples = float(table.var(axis=2, ddof=1).mean()) if n_samples > 1 else math.nan
    within = samples / n_samples if n_samples > 1 else 0.0
    means = table.mean(axis=2)  # (rows, seeds, questions)
    by_question = float(means.mean(axis=1).var(axis=-1, ddof=1).mean())  # variance over questions of the mean of seeds
    if n_seeds == 1:
        return Noise(max(0.0, by_question - within), samples)
    by_seed = float(means.mean(axis=2).var(axis=-1, ddof=1).mean())
    apart = means - means.mean(axis=1, keepdims=True)
    apart = apart - apart.mean(axis=2, keepdims=True)
    mixed = float((apart**2).sum(axis=(1, 2)).mean() / ((n_seeds - 1) * (n - 1)))
    return Noise(
        max(0.0, by_question - mixed / n_seeds), samples, max(0.0, by_seed - mixed / n), max(0.0, mixed - within)
    )


def gain_power(parts: Components, size: Size, gain: float, level: float = 0.05) -> float:
    """Probability that a true gain of this size is significant. 0 if so few questions cannot be significant.

    With one seed it is the power of a one-sided paired t-test over questions; the verdict's exchange test
    (`paired_gain_p`) has about the same. With several, twice the median of their p must be at most the level: more than
    half of the seeds pass at level / 2. Seeds are independent given the noise of the questions that they share.
    """
    n, s = size.questions, size.seeds
    level = level if s == 1 else level / 2
    if 2.0**-n > level:
        return 0.0
    one = replace(size, seeds=1)
    se = math.sqrt(replace(parts.gain, seeds=0.0).variance(one))  # of the test, which holds its seed fixed
    shared, alone = parts.gain.questions / n, parts.gain.variance(one) - parts.gain.questions / n
    if s == 1 and not parts.gain.seeds:
        return _t_power(n - 1, _ratio(gain, se), level)
    threshold = float(special.stdtrit(n - 1, 1 - level)) * se
    above = gain + math.sqrt(shared) * _Z - threshold
    passed = special.ndtr(above / max(math.sqrt(alone), _TINY))
    return float(special.bdtrc(s // 2, s, passed).mean())


def lead_power(parts: Components | Sequence[Components], size: Size, lead: float, level: float = 0.05) -> float:
    """Probability that the Monte-Carlo test finds a claim whose true score is `lead` above the mean of places.

        P(fewer than h of N controls reach the claim),   h = floor(level (1 + N))

    Given the claim's own noise, claim = lead + sqrt(v_claim) z, the controls are independent, and each reaches it with
    probability Phi(-claim / sqrt(tau^2 + v_control)). The binomial probability is averaged over z. Places are taken to
    be normal. With several `parts`, one for each null, it is the probability of passing all of them with this lead over
    each.
    """
    several = [parts] if isinstance(parts, Components) else list(parts)
    passed = np.ones_like(_Z)
    for one in several:
        n, h = one.controls(size), curtailment(one.controls(size), level)
        if not h:
            return 0.0
        own, spread = one.claim.variance(size), one.places + one.control.variance(size)
        reach = special.ndtr(-(lead + math.sqrt(own) * _Z) / max(math.sqrt(spread), _TINY))
        passed = passed * special.bdtr(h - 1, n, reach)
    return float(passed.mean())


def sameness_power(
    parts: Components | Sequence[Components], size: Size, margin: float, level: float = 0.05, lead: float = 0.0
) -> float:
    """Probability that the interval of the lead (`crossed_interval`, confidence 1 - 2 level) ends below the margin.

    That is, that an audit shows the claim to be no better than random places by the margin, where its true lead is
    `lead`. With several `parts`, the smallest of the nulls' probabilities.
    """
    several = [parts] if isinstance(parts, Components) else list(parts)
    return min(_sameness_power(one, size, margin - lead, level) for one in several)


def _sameness_power(parts: Components, size: Size, gap: float, level: float) -> float:
    n, s, se = parts.controls(size), size.seeds, parts.lead_se(size)
    left = 1.0 if parts.population is None else 1 - n / parts.population
    # as in `crossed_interval`: degrees of freedom by Satterthwaite, and more variance for few questions
    spent = ((parts.places + parts.control.variance(size)) * left / n) ** 2 / max(n - 1, 1)
    if s > 1:
        own, other = (replace(x, questions=0.0).variance(size) for x in (parts.claim, parts.control))
        spent += (own + other / n) ** 2 / (s - 1)
    own, other = (replace(x, seeds=0.0).variance(size) for x in (parts.claim, parts.control))
    wide = math.sqrt(se**2 + 3 * EXTRA / size.questions * (own + other / n))  # 3: the kurtosis of normal values
    return _t_power(wide**4 / spent if spent else math.inf, _ratio(gap, se), level, _ratio(wide, se))


def _ratio(x: float, se: float) -> float:
    return x / se if se else math.copysign(math.inf, x)


def _t_power(df: float, away: float, level: float, wide: float = 1.0) -> float:
    """Power of a one-sided t-test whose estimate is `away` standard errors above the null hypothesis.

    `wide` is the standard error that the test uses, by the true one.
    """
    if math.isinf(away):
        return float(away > 0)
    if df > 1e6:
        return float(special.ndtr(away + wide * special.ndtri(level)))
    return float(stats.nct.sf(wide * special.stdtrit(df, 1 - level), df, away))


def smallest_gain(parts: Components, size: Size, power: float = 0.8, level: float = 0.05) -> float:
    """The smallest true gain that is found with this power; infinite if none is."""
    return _smallest(lambda gain: gain_power(parts, size, gain, level), power)


def smallest_lead(
    parts: Components | Sequence[Components], size: Size, power: float = 0.8, level: float = 0.05
) -> float:
    """The smallest true lead that is found with this power; infinite if none is, as with too few controls."""
    return _smallest(lambda lead: lead_power(parts, size, lead, level), power)


def smallest_margin(
    parts: Components | Sequence[Components], size: Size, power: float = 0.8, level: float = 0.05
) -> float:
    """The smallest margin within which a claim that is like random places is shown to be so with this power."""
    return _smallest(lambda margin: sameness_power(parts, size, margin, level), power)


def _smallest(power_of: Callable[[float], float], power: float) -> float:
    """Where a power that rises with the effect reaches `power`."""
    high = 1e-9
    if power_of(high) >= power:  # without noise, any effect is found
        return high
    while power_of(high) < power:
        high *= 4
        if high > 1e9:
            return math.inf
    return float(optimize.brentq(lambda x: power_of(x) - power, high / 4, high))  # type: ignore[arg-type]


def questions_for(power_of: Callable[[Size], float], size: Size, power: float = 0.8) -> int | None:
    """The smallest number of questions, at least 2, with which `power_of(size)` is `power`; None if none is enough.

    Everything else is as in `size`. Places differ, so that for a small lead no number of questions is enough.
    """

    def enough(n: int) -> bool:
        return power_of(replace(size, questions=n)) >= power

    if not enough(MOST_QUESTIONS):
        return None
    low, high = 1, 2
    while not enough(high):
        low, high = high, min(2 * high, MOST_QUESTIONS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Cost:
    """Seconds that a place takes in an audit: fixed + n (question + (K - 1) sample) with n questions and K samples."""

    fixed: float = 0.0
    """Finding its edits, and all that does not depend on the test questions."""
    question: float = 0.0
    """Scoring all its edits on a test question, with the first answers to it."""
    sample: float = 0.0
    """A further sampled answer to a question."""

    def seconds(self, size: Size) -> float:
        """Seconds with this many questions and samples, for one seed."""
        return self.fixed + size.questions * (self.question + (size.samples - 1) * self.sample)

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(x + y for x, y in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, factor: float) -> Cost:
        return Cost(*(x * factor for x in vars(self).values()))
