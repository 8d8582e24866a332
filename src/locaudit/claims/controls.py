"""Random controls for a claim: sets with as many units in each stratum as the claim, drawn uniformly."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from math import comb, prod

from locaudit.errors import LocationError
from locaudit.location import Location, Unit, order_of

Strata = Mapping[Unit, int]
"""The stratum (group) of every unit of the model, as a number."""


def sample_controls(claim: Location, strata: Strata, n: int, *, seed: int, disjoint: bool = False) -> list[Location]:
    """Draw `n` different random locations of the claim's kind and size. If fewer are possible, return all of them.

    A control has as many units in each stratum as the claim. It is drawn uniformly from all such sets except the claim
    itself. Therefore a claim that was drawn in the same way is exchangeable with its controls. The first k controls are
    the same for every n. `disjoint` excludes sets that share units with the claim. Raises `LocationError` if no control
    is possible.

    Disjoint controls test another null hypothesis: that the claim is no better than places *elsewhere*. A random claim
    that happens to contain the model's best unit then beats all of its controls. If the claim has k of the model's n
    units, this happens with probability k / n, so that the false-positive rate can be about k / n if that is above the
    level. For a claim of one unit, `disjoint` makes no difference.
    """
    taken = set(claim.units) if disjoint else set()
    wanted = Counter(strata[unit] for unit in claim.units)
    free: dict[int, list[Unit]] = {stratum: [] for stratum in sorted(wanted)}
    for unit in sorted(strata, key=order_of):
        if strata[unit] in wanted and unit not in taken:
            free[strata[unit]].append(unit)
    available = count_controls(claim, strata, disjoint=disjoint)
    if not available:
        raise LocationError(
            got=f"a claim of {len(claim)} {claim.kind} units that leaves no room for a control",
            expected=f"at least one {'disjoint ' if disjoint else 'other '}set of its size",
            remedy="use a smaller claim, looser matching (match: none), or controls that may overlap the claim",
        )
    rng = random.Random(seed)
    found: dict[tuple[Unit, ...], Location] = {}
    while len(found) < min(n, available):
        units = [unit for stratum, k in sorted(wanted.items()) for unit in rng.sample(free[stratum], k)]
        location = Location(tuple(units), claim.kind)
        if location.units != claim.units:
            found.setdefault(location.units, location)
    return list(found.values())


def count_controls(claim: Location, strata: Strata, *, disjoint: bool = False) -> int:
    """Number of possible controls: the size of the set that `sample_controls` draws from."""
    taken = set(claim.units) if disjoint else set()
    room = Counter(stratum for unit, stratum in strata.items() if unit not in taken)
    wanted = Counter(strata[unit] for unit in claim.units)
    return prod(comb(room[stratum], k) for stratum, k in wanted.items()) - (not disjoint)
