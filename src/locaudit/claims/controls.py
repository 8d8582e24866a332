"""Random controls of a claim: as many units in each stratum as the claim has, every such set with the same chance."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from math import comb, prod

from locaudit.errors import LocationError
from locaudit.location import Location, Unit, order_of

Strata = Mapping[Unit, int]
"""Stratum of every unit of the model."""


def sample_controls(claim: Location, strata: Strata, n: int, *, seed: int, disjoint: bool = False) -> list[Location]:
    """`n` different random locations of the claim's size and kind, or all that there are if those are fewer.

    Each control has as many units in each stratum as the claim. Any such set but the claim itself may come, the same
    chance for each, so that a claim drawn in the same way is exchangeable with its controls: the first k of them are
    the same for every n. `disjoint` keeps the claim's units out of the controls. Raises `LocationError` when no such
    set exists.

    Disjoint controls answer another question (is there as good a place *elsewhere*?), and a random claim that happens
    to hold the model's best unit beats all of them: with a claim of k of the model's n units, the false-positive rate
    can reach about k / n where that exceeds the level. For a claim of one unit, the two are the same.
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
            remedy="take a smaller claim, looser matching (match: none), or controls that may overlap it",
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
    """How many locations could be a control: the space that `sample_controls` draws from."""
    taken = set(claim.units) if disjoint else set()
    room = Counter(stratum for unit, stratum in strata.items() if unit not in taken)
    wanted = Counter(strata[unit] for unit in claim.units)
    return prod(comb(room[stratum], k) for stratum, k in wanted.items()) - (not disjoint)
