"""Sequential tests: stop drawing controls as soon as the answer is clear, with a valid p.

Controls are tried in an order that is fixed in advance. Let theta be the share of random places that do at least as
well as the claim, and let g be the number of controls that do so among the first n. With N planned controls, the claim
is specific if (1 + g) / (1 + N) <= level, that is, if fewer than h = floor(level (1 + N)) of all N do at least as well.

- ``fixed``: use all N controls.
- ``curtailed`` (after Besag and Clifford 1991): stop when g >= h, because more controls cannot change "not specific".
  Also stop when too few controls are left for g to become h. The state is always that of all N controls.
- ``anytime``: stop when a confidence sequence for theta (`share_interval`) excludes the level. The sequence holds for
  all n at once, so that one may look after every control and add more controls. The sequence may miss theta with
  probability `RISK` times the level. This is subtracted from the level, so that the false-positive rate is at most the
  level.

No test stops before `LEAST` controls, because effects and their spread are estimated from the controls, too.

**The sequential p of ``curtailed`` is valid**: P(p <= t) <= t if the claim is exchangeable with its controls. Let m be
`LEAST`, and g_n the number among the first n. The claim and n controls are then in random order, so that
P(g_n < k) = k / (n + 1) (or less with ties, which count against the claim).

- Stopped at n = m with g >= h: p = (1 + g) / (1 + m), the Monte-Carlo p of these m. It is at most this in the audits
  with g_m <= g, whose probability is (1 + g) / (1 + m).
- Stopped at n > m with g = h: p = h / n (Besag and Clifford). It is at most this in audits that had not stopped with
  "not specific" at n - 1, that is, with g_{n-1} < h. Their probability is h / n.
- Never less than (1 + h) / (1 + N) in these two cases, so that p is above the level like that of all N controls.
- "Specific": p = (1 + g + left) / (1 + N), where `left` controls were not tried. This is the largest value that the p
  of all N controls can still take, so that it is valid as that is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import optimize, special, stats

from locaudit.records import Place
from locaudit.stats.scores import MAX_MISSING, SIGNS, TIE, Supports, reaches

Rule = Literal["fixed", "curtailed", "anytime"]
State = Literal["specific", "not specific", "open"]
RISK = 0.1
"""With ``anytime``, the interval may miss theta with probability RISK * level."""
LEAST = 9
"""Number of controls of a null before which no test stops; all of them if fewer are planned."""
MOST_CONTROLS = 10_000
"""Largest number of controls that is planned or suggested."""


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

    ``fixed``: the Monte-Carlo p. ``curtailed``: after an early stop, a sequential p (see the top of this file). It is
    on the same side of the level as the p of all N controls, but can be above or below that p. ``anytime``: the upper
    end of `share_interval` plus its error. This is valid at every n. If the number of places is finite, the claim is
    counted as one of them."""
    final: tuple[int, int]
    """Smallest and largest number of all N planned controls that can do at least as well as the claim.

    Both count the controls that were tried and did; the largest adds all that were not tried. Controls that were tried
    after the test had stopped count here, but neither in `n` nor in `p_value`. The two are equal once all are tried.
    A stopped test has these bounds instead of a confidence interval, because an interval for g of N takes n = N."""

    @property
    def ended_early(self) -> bool:
        """Whether the test stopped and planned controls were left out."""
        return self.state != "open" and self.final[0] < self.final[1]


def curtailment(n_planned: int, level: float) -> int:
    """The number h = floor(level (1 + N)). If at least h controls do as well as the claim, it is not specific.

    It is 0 if N is too small for any result to be specific.
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

    Controls are counted in their planned order, so that the result is that of `look`, which also explains `population`.
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
    seen: Look = field(init=False)
    """The test after the controls that were counted so far. Missing judgements are not considered here."""
    _claim: float | None = field(default=None, init=False)
    _waiting: dict[int, float] = field(default_factory=dict, init=False)
    """Control number -> score, for the controls that have arrived."""
    _is_sure: bool = field(default=True, init=False)
    """Whether judgements are complete enough for the test to stop."""

    def __post_init__(self):
        self.seen = Look("open", 0, 0, 1.0, (0, self.n_planned))

    def add(self, place: Place, mean: float, missing: float = 0.0, lost: bool = False) -> None:
        """Add the score of a place once all its trials are scored: ``add(place, *score_place(trials, score))``.

        A control of this null is counted after all of them with a smaller number. For places other than these and the
        claim, only the share of missing judgements matters.
        """
        arm, number, null = place
        self._is_sure &= missing <= MAX_MISSING
        if arm == "claim":
            self._claim = mean
            self._is_sure &= not lost  # a claim without any judgement cannot be compared
        elif arm == "control" and null == self.null:
            self._waiting[number] = mean
        while self._claim is not None and self.seen.n in self._waiting and self.wants_more:
            sign = SIGNS[self.supports]
            waiting = sign * self._waiting[self.seen.n]
            self.count(bool(reaches(waiting, sign * self._claim, self.tolerance)))

    @property
    def wants_more(self) -> bool:
        """Whether the stopping rule needs another control and not all planned controls are counted."""
        return self.seen.state == "open" and self.seen.n < self.n_planned

    @property
    def state(self) -> State:
        """``open`` while the claim's score, controls or too many judgements are missing."""
        return self.seen.state if self._is_sure else "open"

    def count(self, hit: bool) -> None:
        """Count the next control; `hit` says whether it does at least as well as the claim.

        After the test has stopped, this only narrows `Look.final`.
        """
        low, high = self.seen.final
        final = (low + hit, high - (not hit))
        if not self.wants_more:
            self.seen = replace(self.seen, final=final)
            return
        n, g, h = self.seen.n + 1, self.seen.n_at_least + hit, curtailment(self.n_planned, self.level)
        left, p_value = self.n_planned - n, (1 + g) / (1 + n)
        may_stop = n >= min(LEAST, self.n_planned)
        state: State = "open"
        if self.rule == "anytime":
            # A false positive needs p = high + risk <= level. Then either the interval misses theta at some n, which
            # has a probability of at most risk, or theta <= level - risk. If the claim is exchangeable with random
            # places, the latter has a probability of at most level - risk. Together, this is at most the level.
            risk, population = RISK * self.level, self.population
            low, high = share_interval(g, n, error=risk, population=population)
            p_value = min(1.0, high + risk)
            # If there are finitely many places, there are population + 1 with the claim itself, and up to
            # high * population + 1 of them do at least as well. Once all are tried, theta is known without error.
            if population is not None:
                p_value = min(1.0, (high * population + 1) / (population + 1) + (risk if n < population else 0.0))
            if may_stop:
                state = "specific" if p_value <= self.level else "not specific" if low + risk > self.level else "open"
        elif h and not left:  # all N controls are counted, so `p_value` is the plain Monte-Carlo p
            state = "specific" if p_value <= self.level else "not specific"
        elif self.rule == "curtailed" and h and may_stop and g >= h:
            state = "not specific"
            p_value = max(p_value if n == LEAST else h / n, (1 + h) / (1 + self.n_planned))
        elif self.rule == "curtailed" and h and may_stop and g + left < h:
            state, p_value = "specific", (1 + g + left) / (1 + self.n_planned)
        self.seen = Look(state, n, g, p_value, final)


def look(reached: Sequence[bool], *, rule: Rule, n_planned: int, level: float, population: int | None = None) -> Look:
    """Test a claim by going through its controls in order until the stopping rule ends the test.

    `reached` says for each control whether it does at least as well as the claim. Controls are drawn without
    replacement from `population` places (None: practically infinitely many). With fewer than `n_planned` controls and
    without an early stop, the state is ``open``, and p is computed from these controls.
    """
    monitor = Monitor(rule, n_planned, level, population)
    for hit in reached[:n_planned]:
        monitor.count(bool(hit))
    return monitor.seen


@lru_cache(maxsize=100_000)
def share_interval(
    n_at_least: int, n: int, *, error: float = 0.05, population: int | None = None
) -> tuple[float, float]:
    """Confidence sequence for theta, the share of random places that do at least as well as the claim.

        { t : (n + 1) P(g of n | theta = t) > error }

    where g = `n_at_least` of `n` controls do as well. With probability at least 1 - `error`, the intervals for all n
    contain theta at once. P is binomial, or hypergeometric if controls are drawn without replacement from `population`
    places (Waudby-Smith and Ramdas 2020). Returns (low, high), which are shares in [0, 1].

    Why this holds: if theta is drawn uniformly, every g of n has probability 1 / (n + 1). If theta = t is true, the
    ratio of this probability to the probability under t, 1 / ((n + 1) P(g of n | t)), is a martingale with mean 1. By
    Ville's inequality, the probability that it ever exceeds 1 / error is at most `error` (Robbins 1970).
    """
    if n == 0:
        return 0.0, 1.0
    if population is not None and population <= MOST_CONTROLS:
        # All possible numbers of places that do as well: at least g were seen, and at least n - g do not.
        hits = np.arange(n_at_least, population - n + n_at_least + 1)
        kept = hits[(n + 1) * stats.hypergeom.pmf(n_at_least, population, hits, n) > error]
        return float(kept[0] / population), float(kept[-1] / population)

    # log of (n + 1) C(n, g) / error, computed here because scipy's binom.logpmf is slow for single numbers
    constant = math.lgamma(n + 1) - math.lgamma(n_at_least + 1) - math.lgamma(n - n_at_least + 1)
    constant += math.log(n + 1) - math.log(error)

    def excess(share: float) -> float:  # log of (n + 1) P(g of n | share) / error: positive inside the interval
        return constant + float(special.xlogy(n_at_least, share) + special.xlog1py(n - n_at_least, -share))

    # It rises up to share = g / n and falls after it, so that each end of the interval is one root.
    peak, edge = n_at_least / n, 1e-12
    low = optimize.brentq(excess, edge, peak) if n_at_least and excess(edge) < 0 else 0.0
    high = optimize.brentq(excess, peak, 1 - edge) if n_at_least < n and excess(1 - edge) < 0 else 1.0
    return float(low), float(high)  # type: ignore[arg-type]
