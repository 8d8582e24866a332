"""Everything that the verdict and the grades of one method read: scores by place, and comparisons between places."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from locaudit.location import Location
from locaudit.records import DIRECTIONS, Place, TrialRecord
from locaudit.stats.equivalence import Match, compare_edits
from locaudit.stats.phrases import MethodFacts
from locaudit.stats.resample import mean_of_scores, resampled_scores
from locaudit.stats.scores import MAX_MISSING, SIGNS, TIE, mean_score, reaches, score_values, tolerance
from locaudit.stats.selection import BASE, CLAIM, choose, score_place
from locaudit.stats.sequential import Look, Null, Rule, look
from locaudit.stats.tests import paired_gain_p

Values = NDArray[np.float64]
"""The components of a score at the test questions: (components, questions); NaN where missing."""
MOST_PLACES = 100
"""Limit on the places that the uniqueness grade compares with the claim one by one."""


@dataclass(frozen=True)
class Design:
    """How controls were planned and which differences count; `locaudit.store.run.Run.design` makes it."""

    rule: Rule = "fixed"
    nulls: Mapping[str, Null] = field(default_factory=dict)
    """Name -> controls planned for each null. Empty: as many as have records, from infinitely many places."""
    margin: float = 0.05
    """Equivalence margin in the score's units: smaller differences count as no difference."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Method -> wall-clock seconds per control, to estimate what more controls would cost."""
    graded: bool = True
    """Whether the verdict has grades."""
    dtype: str = "float32"
    """The model's; it decides which scores are ties (`locaudit.stats.scores.tolerance`)."""


@dataclass(frozen=True, eq=False)
class Against:
    """The test of the claim against the controls of one null."""

    plan: Null
    places: Sequence[Place]
    """The controls that have records, by number."""
    means: tuple[float, ...]
    """Score at each."""
    look: Look
    """The test under the stopping rule."""
    p_value: float
    """Monte-Carlo or sequential p; 1 if the claim has no score."""
    lead: Match | None
    """The claim compared with the mean over the controls that have a score; None if there are no scores."""


@dataclass(frozen=True, eq=False)
class Measured:
    """One method's values at the same test questions, by place, and the comparisons between places, computed once.

    Higher scores always support the claim here: if lower ones do, `measure` has flipped the sign of all scores.
    """

    method: str
    facts: MethodFacts
    arms: Mapping[Place, Values]
    """Values of the unedited model, the claim and every other place tried; NaN if every edit there diverged."""
    locations: Mapping[Place, Location]
    """Locations of the claim, the controls and other edits."""
    level: float
    design: Design
    tolerance: float = TIE
    """Scores that differ by less are ties."""
    chosen: Mapping[str, float | None] = field(default_factory=dict)
    """Place -> hyperparameter chosen on validation."""
    missing: tuple[int, ...] = ()
    """Number of test questions without the score, for each arm that has any."""
    worst_missing: float = 0.0
    """Largest share of missing judgements among an arm's test questions or any trial's validation questions."""

    @property
    def n_questions(self) -> int:
        """Number of test questions."""
        return self.arms[BASE].shape[1]

    @cached_property
    def means(self) -> Mapping[Place, float]:
        """Score at each place."""
        return {place: float(mean_score(x)) for place, x in self.arms.items()}

    @property
    def unscored(self) -> bool:
        """Whether the claim has no score."""
        return math.isnan(self.means[CLAIM])

    @property
    def nothing_to_say(self) -> bool:
        """Whether no conclusion is possible: no score at the claim, few questions, or many missing judgements."""
        return self.unscored or 2.0**-self.n_questions > self.level or self.worst_missing > MAX_MISSING

    @cached_property
    def effect_p(self) -> float:
        """One-sided p of the claim's gain over the unedited model."""
        return 1.0 if self.unscored else paired_gain_p(self.arms[CLAIM], self.arms[BASE], tolerance=self.tolerance)

    @cached_property
    def plans(self) -> Mapping[str, Null]:
        """The planned nulls of this method, in order: random directions, or those of random places."""
        tried = [place.null for place in sorted(self.arms) if place.arm == "control"]
        planned = self.design.nulls or {name: Null(tried.count(name)) for name in tried}
        is_directions = self.facts.null == DIRECTIONS
        own = {name: null for name, null in planned.items() if (name == DIRECTIONS) == is_directions}
        return own or {DIRECTIONS if is_directions else "anywhere": Null(0)}

    @cached_property
    def controls(self) -> list[Place]:
        """All controls: those of the first null by number, then those of the next."""
        controls = [place for place in sorted(self.arms) if place.arm == "control"]
        return [place for name in self.plans for place in controls if place.null == name]

    @cached_property
    def nulls(self) -> Mapping[str, Against]:
        """The test of the claim against the controls of each null."""
        found = {}
        for name, plan in self.plans.items():
            places = [place for place in self.controls if place.null == name]
            means = tuple(self.means[place] for place in places)
            reached = reaches(means, self.means[CLAIM], self.tolerance).tolist()
            design = {"rule": self.design.rule, "level": self.level}
            seen = look(reached, n_planned=plan.n_planned, population=plan.population, **design)
            p_value = 1.0 if self.unscored else seen.p_value
            found[name] = Against(plan, places, means, seen, p_value, self._lead(places))
        return found

    def _lead(self, places: Sequence[Place]) -> Match | None:
        scored = [self.arms[place] for place in places if not math.isnan(self.means[place])]
        if self.unscored or not scored:
            return None
        return self._compare(CLAIM, scored, mean_of_scores(scored))

    @property
    def deciding(self) -> Mapping[str, Against]:
        """The nulls with enough places for p to reach the level; all if none has."""
        able = {name: null for name, null in self.nulls.items() if null.plan.can_test(self.level)}
        return able or self.nulls

    @cached_property
    def drawn(self) -> Mapping[Place, NDArray[np.float64]]:
        """For each place, its score on every bootstrap resample, of shape (resamples,).

        Of the controls, only those in `apart` are included.
        """
        places = [place for place in self.arms if place.arm != "control"]
        places += self.apart if self.design.graded else []
        values = np.stack([self.arms[place] for place in places], axis=1)
        return dict(zip(places, resampled_scores(values), strict=True))

    @cached_property
    def gain(self) -> Match:
        """The claim compared with the unedited model."""
        return self.compare(CLAIM, BASE)

    def compare(self, place: Place, reference: Place) -> Match:
        """One place compared with another; both must be among those `drawn`."""
        return self._compare(place, self.arms[reference], self.drawn[reference])

    def _compare(self, place: Place, reference: Values | Sequence[Values], drawn: NDArray[np.float64]) -> Match:
        differences, design = self.drawn[place] - drawn, self.design
        margin, tie = design.margin, self.tolerance
        return compare_edits(self.arms[place], reference, margin=margin, drawn=differences, tolerance=tie)

    @cached_property
    def apart(self) -> list[Place]:
        """Controls disjoint from the claim and from each other, at most `MOST_PLACES`.

        Taken greedily in the order of the controls, so the choice does not depend on scores.
        """
        taken, found = set(self.locations[CLAIM].units), []
        for place in self.controls:
            units = set(self.locations[place].units)
            if not taken & units:
                taken |= units
                found.append(place)
        return found[:MOST_PLACES]


def measure(
    method: str, facts: MethodFacts, trials: Mapping[Place, Sequence[TrialRecord]], score: str, level: float,
    design: Design,
) -> Measured:  # fmt: skip
    """Collect the scores of the trial chosen at each place. `trials` has all trials, the unedited model's included."""
    tie = tolerance(score, design.dtype)
    chosen = {place: choose(tried, score, tie) for place, tried in trials.items()}
    known = {
        place: score_values(record.questions["test"], score) for place, record in chosen.items() if record is not None
    }
    # A score is a product over components, so one more component, -1 at every question, flips its sign.
    # (1, questions) if lower scores support the claim, else (0, questions)
    turn = np.full((1, known[BASE].shape[1]), SIGNS["lower"])[: facts.supports == "lower"]
    missing = tuple(int(np.isnan(x).any(axis=0).sum()) for x in known.values())
    return Measured(
        method=method,
        facts=facts,
        arms={place: np.concatenate([known.get(place, np.full_like(known[BASE], np.nan)), turn]) for place in trials},
        locations={place: where for place, tried in trials.items() if (where := tried[0].spec.location) is not None},
        level=level,
        design=design,
        tolerance=tie,
        chosen={
            place.label: None if record is None else record.spec.hyperparameter
            for place, record in chosen.items()
            if place != BASE
        },
        missing=missing,
        worst_missing=max(score_place(tried, score, tie).missing for tried in trials.values()),
    )
