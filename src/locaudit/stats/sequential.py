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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import optimize, stats

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


def look(reached: Sequence[bool], *, rule: Rule, n_planned: int, level: float, population: int | None = None) -> Look:
    """Go through the controls in their order (`reached`: whether each does at least as well) until the rule ends them.

    `population` is the number of places that controls are drawn from without repeats, if it is known and small.

    With ``fixed``, fewer than `n_planned` controls are an unfinished audit: ``open``, and p is that of those seen.
    """
    reached = reached[:n_planned]
    h = curtailment(n_planned, level)
    g, bound = 0, 1.0
    for n, hit in enumerate(reached, start=1):
        g += bool(hit)
        left = n_planned - n
        if rule == "curtailed" and h and g == h and left:
            return Look("not specific", n, g, max(h / n, (1 + g) / (1 + n_planned)))
        if rule == "curtailed" and h and g + left < h and left:
            return Look("specific", n, g, (1 + g + left) / (1 + n_planned))
        if rule == "anytime":
            low, high = share_interval(g, n, error=RISK * level, population=population)
            bound = high + RISK * level
            if population is not None:  # the claim is one of them: of all ranks among population + 1 places
                bound = (high * population + 1) / (population + 1) + (RISK * level if n < population else 0.0)
            bound = min(1.0, bound)
            if low + RISK * level > level or bound <= level:
                return Look("specific" if bound <= level else "not specific", n, g, bound)
    n = len(reached)
    p_value = bound if rule == "anytime" else (1 + g) / (1 + n)
    if rule == "anytime" or n < n_planned or not h:
        return Look("open", n, g, p_value)
    return Look("specific" if p_value <= level else "not specific", n, g, p_value)


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

    def excess(share: float) -> float:
        return float(math.log(n + 1) + stats.binom.logpmf(n_at_least, n, share) - math.log(error))

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
    low, high = n, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle + 1, high)
    return low


def specificity_power(n_planned: int, level: float, share: float, rule: Rule = "fixed") -> float:
    """Probability that a claim which a `share` of random places reaches is called specific by N controls."""
    if rule != "anytime":
        return float(stats.binom.cdf(curtailment(n_planned, level) - 1, n_planned, share))
    chance, found = {0: 1.0}, 0.0  # of having gone on so far, by the number that reached the claim
    for n in range(1, min(n_planned, MOST_CONTROLS) + 1):
        after: dict[int, float] = {}
        for g, p in chance.items():
            for hit, q in ((0, 1 - share), (1, share)):
                after[g + hit] = after.get(g + hit, 0.0) + p * q
        chance = {}
        for g, p in after.items():
            low, high = share_interval(g, n, error=RISK * level)
            if high + RISK * level <= level:
                found += p
            elif low + RISK * level <= level and p > 1e-9:
                chance[g] = p
    return found
