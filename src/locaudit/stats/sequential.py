"""Sequential tests: stop drawing controls as soon as the answer is clear, without optional stopping.

Controls are tried in an order fixed in advance. Let theta be the share of random places that do at least as well as the
claim, and let g of the first n controls do so. With N controls planned, the claim is specific if
(1 + g) / (1 + N) <= level, that is, if fewer than h = floor(level (1 + N)) of all N do at least as well.

- ``fixed``: use all N controls.
- ``curtailed`` (Besag and Clifford 1991, with this h): stop when g = h, since more controls cannot change "not
  specific"; or when too few controls are left for g to become h. The verdict is always that of all N controls.
- ``anytime``: stop when a confidence sequence for theta (`share_interval`) excludes the level. It holds for all n at
  once, so one may look after every control and add more controls. A part `RISK` of the level is spent on the
  chance that the sequence misses theta; the false-positive rate is at most the level.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import optimize, special, stats

from locaudit.records import Place
from locaudit.stats.scores import MAX_MISSING, SIGNS, TIE, Supports, reaches

Rule = Literal["fixed", "curtailed", "anytime"]
State = Literal["specific", "not specific", "open"]
RISK = 0.1
"""Part of the level that ``anytime`` spends on its interval missing theta: the interval's error is RISK * level."""
MOST_CONTROLS = 10_000
"""Largest number of controls that is planned for or suggested."""


@dataclass(frozen=True)
class Look:
    """The state of the test after some controls."""

    state: State
    """``open``: more controls are needed."""
    n: int
    """Number of controls used: up to and including the one at which the test stopped."""
    n_at_least: int
    """How many of them do at least as well as the claim."""
    p_value: float
    """Valid p-value under the stopping rule.

    ``fixed``: the Monte-Carlo p. ``curtailed``: after an early stop a sequential p, which lies on the same side of the
    level as the p of all N controls but does not bound it. ``anytime``: the upper end of `share_interval` plus its
    error, valid at every n; if places are finitely many, the claim is counted among them."""


def curtailment(n_planned: int, level: float) -> int:
    """Number of controls from which on a claim is not specific if they do as well: h = floor(level (1 + N)).

    0 if N is too small for any result to be specific.
    """
    return math.floor(level * (1 + n_planned) + 1e-9)


@dataclass(frozen=True)
class Null:
    """The controls that are planned for one null distribution."""

    n_planned: int
    population: int | None = None
    """Number of places that they are drawn from; None if it is practically infinite."""

    def can_test(self, level: float) -> bool:
        """Whether there are enough places for p to reach the level, at least 1 / level - 1, if all are tried."""
        return self.population is None or curtailment(self.population, level) > 0


@dataclass
class Monitor:
    """Follows one method's test against one null while scores arrive in any order.

    Call `add` until `state` is no longer ``open``.

    Controls are counted in their planned order, so the result is that of `look`. `population` and `level` as there.
    """

    rule: Rule
    n_planned: int
    level: float
    population: int | None = None
    supports: Supports = "higher"
    tolerance: float = TIE
    """Scores that differ by less are ties."""
    null: str = ""
    """Name of the null; controls of other nulls only count for missing judgements."""
    seen: Look = field(default=Look("open", 0, 0, 1.0), init=False)
    """The test after the controls counted so far, regardless of missing judgements."""
    _claim: float | None = field(default=None, init=False)
    _waiting: dict[int, float] = field(default_factory=dict, init=False)
    """Control number -> score, of the controls that arrived."""
    _is_sure: bool = field(default=True, init=False)
    """Whether judgements are complete enough for the test to stop."""

    def add(self, place: Place, mean: float, missing: float = 0.0, lost: bool = False) -> None:
        """Add the score of a place once all its trials are scored: ``add(place, *score_place(trials, score))``.

        A control of this null is counted after all of them with a smaller number. For places other than these and the
        claim, only the share of missing judgements matters.
        """
        arm, number, null = place
        self._is_sure &= missing <= MAX_MISSING
        if arm == "claim":
            self._claim = mean
            self._is_sure &= not lost  # without any judgement, the claim cannot be compared
        elif arm == "control" and null == self.null:
            self._waiting[number] = mean
        while self._claim is not None and self.seen.n in self._waiting and self.wants_more:
            sign = SIGNS[self.supports]
            waiting = sign * self._waiting[self.seen.n]
            self.count(bool(reaches(waiting, sign * self._claim, self.tolerance)))

    @property
    def wants_more(self) -> bool:
        """Whether the stopping rule asks for another control and not all planned ones are counted."""
        return self.seen.state == "open" and self.seen.n < self.n_planned

    @property
    def state(self) -> State:
        """``open`` while controls or the claim's score are missing, or while too many judgements are."""
        return self.seen.state if self._is_sure else "open"

    def count(self, hit: bool) -> None:
        """Count the next control; `hit` says whether it does at least as well as the claim."""
        n, g, h = self.seen.n + 1, self.seen.n_at_least + hit, curtailment(self.n_planned, self.level)
        left, p_value = self.n_planned - n, (1 + g) / (1 + n)
        state: State = "open"
        if self.rule == "anytime":
            # False positives at p = high + risk <= level: either the interval misses theta at some n (probability at
            # most risk), or theta <= level - risk. For a claim exchangeable with random places the latter has at most
            # that probability, so that both together have at most the level.
            risk, population = RISK * self.level, self.population
            low, high = share_interval(g, n, error=risk, population=population)
            p_value = min(1.0, high + risk)
            # Finitely many places: with the claim itself there are population + 1, and high * population + 1 of them do
            # at least as well. Once all are tried, theta is known and no error is left to add.
            if population is not None:
                p_value = min(1.0, (high * population + 1) / (population + 1) + (risk if n < population else 0.0))
            state = "specific" if p_value <= self.level else "not specific" if low + risk > self.level else "open"
        elif h and not left:  # all N controls are counted: `p_value` is the plain Monte-Carlo p
            state = "specific" if p_value <= self.level else "not specific"
        # "Not specific" is certain. Besag and Clifford's p is h / n; the other term keeps it above the level.
        elif self.rule == "curtailed" and h and g == h:
            state, p_value = "not specific", max(h / n, (1 + g) / (1 + self.n_planned))
        # "Specific" is certain even if every control left does as well: p is that of this worst case.
        elif self.rule == "curtailed" and h and g + left < h:
            state, p_value = "specific", (1 + g + left) / (1 + self.n_planned)
        self.seen = Look(state, n, g, p_value)


def look(reached: Sequence[bool], *, rule: Rule, n_planned: int, level: float, population: int | None = None) -> Look:
    """Test a claim by going through its controls in order until the stopping rule ends the test.

    `reached` says for each control whether it does at least as well as the claim. `population` is the number of places
    that controls are drawn from without replacement; None if it is practically infinite. With fewer than `n_planned`
    controls and no early stop the state is ``open``, and p is computed from the controls seen.
    """
    monitor = Monitor(rule, n_planned, level, population)
    for hit in reached:
        if monitor.wants_more:
            monitor.count(bool(hit))
    return monitor.seen


@lru_cache(maxsize=100_000)
def share_interval(
    n_at_least: int, n: int, *, error: float = 0.05, population: int | None = None
) -> tuple[float, float]:
    """Confidence sequence for theta, the share of random places that do at least as well as the claim.

        { t : (n + 1) P(g of n | theta = t) > error }

    where g = `n_at_least` of `n` controls do as well. The intervals for all n contain theta together with probability
    at least 1 - `error`. P is binomial, or hypergeometric if controls are drawn without replacement from `population`
    places (Waudby-Smith and Ramdas 2020). Returns (low, high), shares in [0, 1].

    Why it holds: under the mixture of all theta with uniform weight, every g of n has probability 1 / (n + 1). The
    likelihood ratio of the mixture to theta = t, 1 / ((n + 1) P(g of n | t)), is a martingale with mean 1 if t is true.
    By Ville's inequality it ever exceeds 1 / error with probability at most `error` (Robbins 1970).
    """
    if n == 0:
        return 0.0, 1.0
    if population is not None and population <= MOST_CONTROLS:
        # Every possible number of places in the population that do as well: g were seen, n - g are not among them.
        hits = np.arange(n_at_least, population - n + n_at_least + 1)
        kept = hits[(n + 1) * stats.hypergeom.pmf(n_at_least, population, hits, n) > error]
        return float(kept[0] / population), float(kept[-1] / population)

    # log of (n + 1) C(n, g) / error, computed here because scipy's binom.logpmf is slow for single numbers
    constant = math.lgamma(n + 1) - math.lgamma(n_at_least + 1) - math.lgamma(n - n_at_least + 1)
    constant += math.log(n + 1) - math.log(error)

    def excess(share: float) -> float:  # log of (n + 1) P(g of n | share) / error: positive inside the interval
        return constant + float(special.xlogy(n_at_least, share) + special.xlog1py(n - n_at_least, -share))

    # It rises up to share = g / n and falls after it, so each end of the interval is one root.
    peak, edge = n_at_least / n, 1e-12
    low = optimize.brentq(excess, edge, peak) if n_at_least and excess(edge) < 0 else 0.0
    high = optimize.brentq(excess, peak, 1 - edge) if n_at_least < n and excess(1 - edge) < 0 else 1.0
    return float(low), float(high)  # type: ignore[arg-type]


def controls_to_decide(n_at_least: int, n: int, level: float, population: int | None = None) -> int | None:
    """Estimate how many controls in all ``anytime`` needs to tell on which side of the level theta lies.

    Assumes that the share seen so far, (g + 1/2) / (n + 1), stays. None if more than `MOST_CONTROLS` or more than
    `population` controls are needed.
    """
    share = (n_at_least + 0.5) / (n + 1)
    most = min(MOST_CONTROLS, population or MOST_CONTROLS)

    def decides(total: int) -> bool:
        low, high = share_interval(round(share * total), total, error=RISK * level, population=population)
        return low > level or high < level

    if n > most or not decides(most):
        return None
    return n + bisect_left(range(n, most), True, key=decides)


def specificity_power(n_planned: int, level: float, share: float, rule: Rule = "fixed") -> float:
    """Power: probability that `n_planned` controls call a claim specific if a `share` of random places matches it."""
    if rule != "anytime":
        return float(stats.binom.cdf(curtailment(n_planned, level) - 1, n_planned, share))
    chance, found = np.ones(1), 0.0  # chance[g]: the test is still open and g controls did as well
    for n in range(1, min(n_planned, MOST_CONTROLS) + 1):
        chance = np.convolve(chance, [1 - share, share])
        for g in np.flatnonzero(chance).tolist():
            low, high = share_interval(g, n, error=RISK * level)
            is_specific = high + RISK * level <= level  # the stopping rule of `Monitor.count`
            found += chance[g] if is_specific else 0.0
            if is_specific or low + RISK * level > level or chance[g] <= 1e-9:
                chance[g] = 0.0
    return float(found)
