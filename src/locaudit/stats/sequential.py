"""When controls may end early, and what is known at every moment about the share of places that do as well.

Controls come in an order fixed before anything is seen. Let g of the first n reach the claim. With N planned, the claim
is specific if (1 + g) / (1 + N) <= level, that is if fewer than h = floor(level (1 + N)) of all N reach it.

- ``curtailed`` (Besag and Clifford 1991, with their h set to this one): end when g = h, since the verdict of all N can
  only be "not specific" then, or when too few are left to bring g to h. The verdict is always that of all N.
- ``anytime``: end when `share_interval` excludes the level. It holds at all n at once, so that it may be looked at
  after each control, and controls may be added. Its error `RISK` is taken from the level, so that the false-positive
  rate is at most the level.
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

from locaudit.stats.scores import MAX_MISSING, SIGNS, Supports, reaches
from locaudit.stats.selection import Place

Rule = Literal["fixed", "curtailed", "anytime"]
State = Literal["specific", "not specific", "open"]
RISK = 0.1
"""Part of the level that ``anytime`` spends on its interval being wrong."""
MOST_CONTROLS = 10_000
"""More controls than this are not asked for."""


@dataclass(frozen=True)
class Look:
    """What the controls seen so far say."""

    state: State
    """``open``: more controls are needed."""
    n: int
    """Controls used: those up to the one that ended it."""
    n_at_least: int
    """Of those, how many reach the claim."""
    p_value: float
    """``fixed``: the Monte-Carlo p; ``curtailed``: after an early end a sequential p (valid, and on the same side of
    the level as that of all N, not a bound of it); ``anytime``: the upper end of
    `share_interval` (with the claim counted among finitely many places) plus its error, valid whenever one looks."""


def curtailment(n_planned: int, level: float) -> int:
    """h: the number of controls reaching the claim from which it cannot be specific; 0 if no outcome can be."""
    return math.floor(level * (1 + n_planned) + 1e-9)


@dataclass
class Monitor:
    """Tells after each control whether a method's answer is clear, as `look` does, in any order of arrival.

    Feed it with `add`; it is done once `state` is no longer ``open``.
    """

    rule: Rule
    n_planned: int
    level: float
    population: int | None = None
    supports: Supports = "higher"
    seen: Look = field(default=Look("open", 0, 0, 1.0), init=False)
    """What the controls in order say, whatever is missing."""
    _claim: float | None = field(default=None, init=False)
    _waiting: dict[int, float] = field(default_factory=dict, init=False)
    _is_sure: bool = field(default=True, init=False)

    def add(self, place: Place, mean: float, missing: float = 0.0, lost: bool = False) -> None:
        """Add the score of a place of which every trial is scored (``add(place, *score_place(trials, score))``).

        ``("claim", -1)`` is the claim, ``("control", n)`` a control, which waits for those with a smaller number. Of
        the unedited and the whole model only the share of missing judgements counts.
        """
        arm, number = place
        self._is_sure &= missing <= MAX_MISSING
        if arm == "claim":
            self._claim = mean
            self._is_sure &= not lost  # a claim that no judge judged is reached by nothing and everything
        elif arm == "control":
            self._waiting[number] = mean
        while self._claim is not None and self.seen.n in self._waiting and self.wants_more:
            sign = SIGNS[self.supports]
            self.count(bool(reaches(sign * self._waiting[self.seen.n], sign * self._claim)))

    @property
    def wants_more(self) -> bool:
        """Whether the rule has not ended the controls, and not all are counted."""
        return self.seen.state == "open" and self.seen.n < self.n_planned

    @property
    def state(self) -> State:
        """``open`` while more controls are needed, the claim is not scored, or too many judgements are missing."""
        return self.seen.state if self._is_sure else "open"

    def count(self, hit: bool) -> None:
        """Count one more control, which reaches the claim or does not."""
        n, g, h = self.seen.n + 1, self.seen.n_at_least + hit, curtailment(self.n_planned, self.level)
        left, p_value = self.n_planned - n, (1 + g) / (1 + n)
        state: State = "open"
        if self.rule == "anytime":
            risk, population = RISK * self.level, self.population
            low, high = share_interval(g, n, error=risk, population=population)
            p_value = min(1.0, high + risk)
            if population is not None:  # the claim is one of them: of all ranks among population + 1 places
                p_value = min(1.0, (high * population + 1) / (population + 1) + (risk if n < population else 0.0))
            state = "specific" if p_value <= self.level else "not specific" if low + risk > self.level else "open"
        elif h and not left:
            state = "specific" if p_value <= self.level else "not specific"
        elif self.rule == "curtailed" and h and g == h:
            state, p_value = "not specific", max(h / n, (1 + g) / (1 + self.n_planned))
        elif self.rule == "curtailed" and h and g + left < h:
            state, p_value = "specific", (1 + g + left) / (1 + self.n_planned)
        self.seen = Look(state, n, g, p_value)


def look(reached: Sequence[bool], *, rule: Rule, n_planned: int, level: float, population: int | None = None) -> Look:
    """Go through the controls in their order (`reached`: whether each does at least as well) until the rule ends them.

    `population` is the number of places that controls are drawn from without repeats, if it is known and small.

    With ``fixed``, fewer than `n_planned` controls are an unfinished audit: ``open``, and p is that of those seen.
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
    """Share of the places controls are drawn from that do at least as well as the claim: where g of n did.

    It holds for all n at once with probability 1 - `error`: it is the set of shares t with
    (n + 1) P(g of n | t) > error, by Ville's inequality for the mixture of all shares with equal weight (Robbins 1970).
    P is binomial, or hypergeometric where `population` places are drawn without repeats (Waudby-Smith and Ramdas 2020).
    """
    if n == 0:
        return 0.0, 1.0
    if population is not None and population <= MOST_CONTROLS:
        hits = np.arange(n_at_least, population - n + n_at_least + 1)
        kept = hits[(n + 1) * stats.hypergeom.pmf(n_at_least, population, hits, n) > error]
        return float(kept[0] / population), float(kept[-1] / population)

    # log C(n, g), once: scipy's binom.logpmf is slow for single numbers
    constant = math.lgamma(n + 1) - math.lgamma(n_at_least + 1) - math.lgamma(n - n_at_least + 1)
    constant += math.log(n + 1) - math.log(error)

    def excess(share: float) -> float:
        return constant + float(special.xlogy(n_at_least, share) + special.xlog1py(n - n_at_least, -share))

    peak, edge = n_at_least / n, 1e-12
    low = optimize.brentq(excess, edge, peak) if n_at_least and excess(edge) < 0 else 0.0
    high = optimize.brentq(excess, peak, 1 - edge) if n_at_least < n and excess(1 - edge) < 0 else 1.0
    return float(low), float(high)  # type: ignore[arg-type]


def controls_to_decide(n_at_least: int, n: int, level: float, population: int | None = None) -> int | None:
    """How many controls in all would settle on which side of the level the share lies, if it is what was seen.

    The share is taken as (g + 1/2) / (n + 1). None if that takes more than `MOST_CONTROLS`, or than there are.
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
    """Probability that a claim which a `share` of random places reaches is called specific by N controls."""
    if rule != "anytime":
        return float(stats.binom.cdf(curtailment(n_planned, level) - 1, n_planned, share))
    chance, found = np.ones(1), 0.0  # of having gone on so far, by the number that reached the claim
    for n in range(1, min(n_planned, MOST_CONTROLS) + 1):
        chance = np.convolve(chance, [1 - share, share])
        for g in np.flatnonzero(chance).tolist():
            low, high = share_interval(g, n, error=RISK * level)
            is_specific = high + RISK * level <= level
            found += chance[g] if is_specific else 0.0
            if is_specific or low + RISK * level > level or chance[g] <= 1e-9:
                chance[g] = 0.0
    return float(found)
