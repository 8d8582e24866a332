"""What was measured of one way of editing, by place: everything that its verdict and its grades read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from locaudit.location import Location, parse_location
from locaudit.records import Method, TrialRecord
from locaudit.stats.matching import Match, compare_edits
from locaudit.stats.scores import components, mean_score, reaches, score_values
from locaudit.stats.selection import Place
from locaudit.stats.sequential import Look, Rule, look
from locaudit.stats.tests import paired_gain_p, resampled_differences


@dataclass(frozen=True)
class Design:
    """How controls were planned, and what differences count; `run_design` reads it from a run folder."""

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
    """Whether to grade, which resamples questions for every control."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Scores on the same test questions, (components, questions) each, by place, and what follows from them."""

    method: Method
    base: NDArray[np.float64]
    claim: NDArray[np.float64]
    """NaN where every edit diverged, as at the other places."""
    whole: NDArray[np.float64] | None
    rest: NDArray[np.float64] | None
    controls: Mapping[int, NDArray[np.float64]]
    """By number."""
    places: Mapping[int, Location]
    """Where each control is."""
    location: Location | None
    """The claim's."""
    level: float
    design: Design

    @property
    def n_questions(self) -> int:
        """Test questions."""
        return self.base.shape[1]

    @property
    def n_planned(self) -> int:
        """Controls planned."""
        return self.design.n_planned or len(self.controls)

    @cached_property
    def claim_mean(self) -> float:
        """Score of the edit at the claim."""
        return float(mean_score(self.claim))

    @property
    def unscored(self) -> bool:
        """Whether the claim has no score."""
        return math.isnan(self.claim_mean)

    @cached_property
    def control_means(self) -> tuple[float, ...]:
        """Score at each control, by number."""
        return tuple(float(mean_score(x)) for _, x in sorted(self.controls.items()))

    @cached_property
    def effect_p(self) -> float:
        """One-sided p of the claim's gain over the unedited model."""
        return 1.0 if self.unscored else paired_gain_p(self.claim, self.base)

    @cached_property
    def look(self) -> Look:
        """What the controls say of the claim."""
        reached = reaches(self.control_means, self.claim_mean).tolist()
        design = self.design
        return look(reached, rule=design.rule, n_planned=self.n_planned, level=self.level, population=design.population)

    @cached_property
    def gains(self) -> NDArray[np.float64]:
        """Bootstrap distribution of the claim's gain over the unedited model; none without a score."""
        return np.zeros(0) if self.unscored else resampled_differences(self.claim, [self.base], 0)

    @cached_property
    def gain(self) -> Match:
        """The claim against the unedited model."""
        return compare_edits(self.claim, self.base, margin=self.design.margin, drawn=self.gains)

    @cached_property
    def finite_controls(self) -> Sequence[NDArray[np.float64]]:
        """Scores at the controls that did not diverge."""
        return [x for x in self.controls.values() if not math.isnan(float(mean_score(x)))]

    @cached_property
    def leads(self) -> NDArray[np.float64]:
        """Bootstrap distribution of the claim's lead over the mean control; none without scores."""
        if self.unscored or not self.finite_controls:
            return np.zeros(0)
        return resampled_differences(self.claim, self.finite_controls, 0)

    @cached_property
    def lead(self) -> Match | None:
        """The claim against the mean control; None without scores."""
        if self.unscored or not self.finite_controls:
            return None
        return compare_edits(self.claim, self.finite_controls, margin=self.design.margin, drawn=self.leads)


def measure(
    method: Method,
    base: TrialRecord,
    chosen: Mapping[Place, TrialRecord | None],
    records: Iterable[TrialRecord],
    score: str,
    level: float,
    design: Design,
) -> Measured:
    """Scores of the trial chosen at each place (None: all diverged); `records` say where the places are."""
    n = len(base.questions["test"][components(score)[0]])

    def values(record: TrialRecord | None) -> NDArray[np.float64]:
        lost = np.full((len(components(score)), n), np.nan)
        return lost if record is None else score_values(record.questions["test"], score)

    found = {place: values(record) for place, record in sorted(chosen.items())}
    where = _locations(records, method)
    return Measured(
        method=method,
        base=values(base),
        claim=found["claim", -1],
        whole=found.get(("whole", -1)),
        rest=found.get(("rest", -1)),
        controls={number: x for (arm, number), x in found.items() if arm == "control"},
        places={number: location for (arm, number), location in where.items() if arm == "control"},
        location=where.get(("claim", -1)),
        level=level,
        design=design,
    )


def _locations(records: Iterable[TrialRecord], method: Method) -> dict[Place, Location]:
    """Where each place is; the unedited model has no place."""
    found: dict[Place, Location] = {}
    for record in records:
        if record.spec.method == method and record.spec.location:
            found.setdefault((record.spec.arm, record.spec.control), parse_location(record.spec.location))
    return found
