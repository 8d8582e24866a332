"""What was measured of one way of editing, by place: everything that its verdict and its grades read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from locaudit.location import Location
from locaudit.records import TrialRecord
from locaudit.stats.equivalence import Match, compare_edits
from locaudit.stats.phrases import MethodFacts
from locaudit.stats.resample import mean_of_scores, resampled_scores
from locaudit.stats.scores import MAX_MISSING, SIGNS, mean_score, reaches, score_values
from locaudit.stats.selection import BASE, CLAIM, Place, choose, score_place
from locaudit.stats.sequential import Look, Rule, look
from locaudit.stats.tests import paired_gain_p

Values = NDArray[np.float64]
"""A score's components at the test questions: (components, questions), NaN where missing."""
MOST_PLACES = 100
"""Places compared one by one with the claim."""


@dataclass(frozen=True)
class Design:
    """How controls were planned, and what differences count; `locaudit.store.run.Run.design` reads it."""

    rule: Rule = "fixed"
    n_planned: int | None = None
    """Controls planned; None: those there are."""
    population: int | None = None
    """Places that controls were drawn from; None: too many to matter."""
    margin: float = 0.05
    """Largest difference in the score that counts as none."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Method -> wall-clock seconds of a control, to say what more of them would cost."""
    matched: bool = False
    """Whether controls are matched to the claim, so that they are not all places of its size."""
    graded: bool = True
    """Whether to grade."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Values at the same test questions, by place, and what follows from them; each is computed once.

    The larger score supports the claim: where lower ones do, `measure` has changed the sign of all.
    """

    method: str
    facts: MethodFacts
    arms: Mapping[Place, Values]
    """The unedited model, the claim and what else was tried; NaN where every edit diverged."""
    locations: Mapping[Place, Location]
    """Where claim and controls are."""
    level: float
    design: Design
    chosen: Mapping[str, float | None] = field(default_factory=dict)
    """Place -> hyperparameter chosen on validation."""
    missing: tuple[int, ...] = ()
    """Test questions without the score, for each arm that has one."""
    worst_missing: float = 0.0
    """Largest share of an arm's test questions that is missing, or of validation questions of what was tried there."""

    @property
    def n_questions(self) -> int:
        """Test questions."""
        return self.arms[BASE].shape[1]

    @cached_property
    def controls(self) -> Mapping[Place, Values]:
        """The controls, by number."""
        return {place: x for place, x in sorted(self.arms.items()) if place[0] == "control"}

    @property
    def n_planned(self) -> int:
        """Controls planned."""
        return self.design.n_planned or len(self.controls)

    @cached_property
    def means(self) -> Mapping[Place, float]:
        """Score at each place."""
        return {place: float(mean_score(x)) for place, x in self.arms.items()}

    @property
    def control_means(self) -> tuple[float, ...]:
        """Score at each control, by number."""
        return tuple(self.means[place] for place in self.controls)

    @property
    def unscored(self) -> bool:
        """Whether the claim has no score."""
        return math.isnan(self.means[CLAIM])

    @property
    def nothing_to_say(self) -> bool:
        """Whether no comparison can say anything: no score, too few questions, or too many judgements missing."""
        return self.unscored or 2.0**-self.n_questions > self.level or self.worst_missing > MAX_MISSING

    @cached_property
    def effect_p(self) -> float:
        """One-sided p of the claim's gain over the unedited model."""
        return 1.0 if self.unscored else paired_gain_p(self.arms[CLAIM], self.arms[BASE])

    @cached_property
    def look(self) -> Look:
        """What the controls say of the claim."""
        reached = reaches(self.control_means, self.means[CLAIM]).tolist()
        design = self.design
        return look(reached, rule=design.rule, n_planned=self.n_planned, level=self.level, population=design.population)

    @cached_property
    def drawn(self) -> Mapping[Place, NDArray[np.float64]]:
        """Scores on each resample of the questions: at all places but the controls, and at those `apart` for grades."""
        places = [place for place in self.arms if place not in self.controls]
        places += self.apart if self.design.graded else []
        values = np.stack([self.arms[place] for place in places], axis=1)
        return dict(zip(places, resampled_scores(values), strict=True))

    @cached_property
    def gain(self) -> Match:
        """The claim against the unedited model."""
        return self.compare(CLAIM, BASE)

    @cached_property
    def lead(self) -> Match | None:
        """The claim against the mean control that has a score; None without scores."""
        scored = [x for place, x in self.controls.items() if not math.isnan(self.means[place])]
        if self.unscored or not scored:
            return None
        drawn = self.drawn[CLAIM] - mean_of_scores(scored)
        return compare_edits(self.arms[CLAIM], scored, margin=self.design.margin, drawn=drawn)

    def compare(self, place: Place, reference: Place) -> Match:
        """One place against another, both among those `drawn`."""
        drawn = self.drawn[place] - self.drawn[reference]
        return compare_edits(self.arms[place], self.arms[reference], margin=self.design.margin, drawn=drawn)

    @cached_property
    def apart(self) -> list[Place]:
        """Controls that share no unit with the claim or with an earlier one of these: chosen before any score is seen.

        At most `MOST_PLACES`.
        """
        taken, found = set(self.locations[CLAIM].units) if CLAIM in self.locations else set(), []
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
    """Scores of the trial chosen at each place, of which `trials` has all; the unedited model is among them."""
    chosen = {place: choose(tried, score) for place, tried in trials.items()}
    known = {
        place: score_values(record.questions["test"], score) for place, record in chosen.items() if record is not None
    }
    # A score is a product over components: one more, -1 at every question, turns its sign in all that follows.
    turn = np.full((1, known[BASE].shape[1]), SIGNS["lower"])[: facts.supports == "lower"]
    missing = tuple(int(np.isnan(x).any(axis=0).sum()) for x in known.values())
    return Measured(
        method=method,
        facts=facts,
        arms={place: np.concatenate([known.get(place, np.full_like(known[BASE], np.nan)), turn]) for place in trials},
        locations={
            place: location
            for place, tried in trials.items()
            if (place == CLAIM or place[0] == "control") and (location := tried[0].spec.location) is not None
        },
        level=level,
        design=design,
        chosen={
            f"control {number}" if arm == "control" else arm: None if record is None else record.spec.hyperparameter
            for (arm, number), record in chosen.items()
            if arm != "base"
        },
        missing=missing,
        worst_missing=max(score_place(tried, score).missing for tried in trials.values()),
    )
