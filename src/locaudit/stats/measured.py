"""Everything that the verdict of one method reads: scores by place, and comparisons between places."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
from scipy import special, stats

from locaudit.location import Location
from locaudit.records import DIRECTIONS, Place, TrialRecord
from locaudit.stats.intervals import (
    Crossed,
    Estimate,
    Share,
    complete,
    crossed_interval,
    mean_estimate,
    pseudo_values,
    true_share,
)
from locaudit.stats.phrases import MethodFacts
from locaudit.stats.scores import (
    SIGNS,
    TIE,
    Values,
    find_score,
    mean_score,
    reaches,
    score_values,
    tolerance,
)
from locaudit.stats.selection import BASE, CLAIM, WHOLE, choose, score_place
from locaudit.stats.sequential import Look, Null, Rule, look, share_interval
from locaudit.stats.tests import gain_p

_UNKNOWN = (math.nan, math.nan)
MARGIN = 1 / 3
"""Default margin, as a share of a proven gain."""


@dataclass(frozen=True)
class Design:
    """How controls were planned and which differences count; `locaudit.store.run.Run.design` makes it."""

    rule: Rule = "fixed"
    nulls: Mapping[str, Null] = field(default_factory=dict)
    """Name -> controls planned for each null. Empty: as many as have records, from infinitely many places."""
    margin: float = MARGIN
    """Differences below this share of a proven gain (`Measured.margin`) count as none."""
    dtype: str = "float32"
    """The model's; it decides which scores are ties (`locaudit.stats.scores.tolerance`)."""
    noun: str = "places"
    """What the units of a place are called, such as ``heads``."""


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
    lead: Crossed
    """The claim's lead over the mean of all such places, with questions and places random.

    Without an interval if the test ended early."""
    share: Share
    """Share of such places that are truly at least as good as the claim."""
    p_common: float
    """p of the test that over a share `level` of such places does as well."""
    p_small_lead: float
    """p of the test that the lead is below the margin, a share of the claim's gain; 1 without a proven gain."""
    p_no: float
    """p of the test that random places do as well (`Measured.nulls`)."""


@dataclass(frozen=True, eq=False)
class Measured:
    """One method's values at the same test questions, by place, and the comparisons between places, computed once.

    Higher scores always support the claim here: if lower ones do, `measure` has flipped the sign of all scores.
    """

    method: str
    facts: MethodFacts
    arms: Mapping[Place, Values]
    """Values of the unedited model, the claim and every other place tried, (components, questions) each; NaN where
    missing, or if every edit there diverged."""
    locations: Mapping[Place, Location]
    """Locations of the claim, the controls and other edits."""
    level: float
    design: Design
    bounds: tuple[float, float] = (0.0, 1.0)
    """Smallest and largest possible score."""
    tolerance: float = TIE
    """Scores that differ by less are ties."""
    chosen: Mapping[str, float | None] = field(default_factory=dict)
    """Place -> hyperparameter chosen on validation."""
    missing: tuple[int, ...] = ()
    """Number of test questions without the score, for each arm that has any."""
    worst_missing: float = 0.0
    """Largest share of missing judgements among an arm's test questions or any trial's validation questions."""
    destroyed: Collection[str] = ()
    """Labels of places whose edit destroys the model, so that its gain says nothing about the place
    (`locaudit.stats.optimisation`). None where lower scores support the claim: the fall itself is asked for."""

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

    @cached_property
    def _psi(self) -> Mapping[Place, Values]:
        """Pseudo-values of the score at each place (`locaudit.stats.intervals`), (questions,)."""
        return dict(zip(self.arms, pseudo_values(np.stack(list(self.arms.values()), axis=1)), strict=True))

    def contrast(self, weights: Mapping[Place, float]) -> Estimate:
        """A weighted sum of scores, such as ``{CLAIM: 1, BASE: -1}``, over the questions that no arm of it lacks."""
        low, high = self.bounds
        signed = [(w * low, w * high) for w in weights.values() if w]
        limits = sum(min(ends) for ends in signed), sum(max(ends) for ends in signed)
        if any(self.missing):
            psi = pseudo_values(complete(np.stack([self.arms[place] for place, w in weights.items() if w], axis=1)))
        else:
            psi = [self._psi[place] for place, w in weights.items() if w]
        return mean_estimate(np.tensordot([w for w in weights.values() if w], psi, 1), limits, self.tolerance)

    def gain(self, place: Place) -> Estimate:
        """Score of the edit at a place minus that of the unedited model."""
        return self.contrast({place: 1.0, BASE: -1.0})

    def gain_p(self, place: Place) -> float:
        """One-sided p of the gain at a place (`locaudit.stats.tests.gain_p`). 1 if it has no score."""
        if math.isnan(self.means[place]):
            return 1.0
        return self._gain_ps.setdefault(
            place, gain_p(self.arms[place], self.arms[BASE], bounds=self.bounds, tolerance=self.tolerance)
        )

    @cached_property
    def _gain_ps(self) -> dict[Place, float]:
        return {}

    def is_proven(self, place: Place) -> bool:
        """Whether the edit at a place was tried and its gain is significant."""
        return place in self.arms and self.gain_p(place) <= self.level

    @cached_property
    def placebo_p(self) -> float:
        """The smallest p of the placebo edits that gain the margin or more, times the number of all (Bonferroni)."""
        tried = [place for place in self.arms if place.arm == "placebo"]
        unit = self.margin(CLAIM if self.is_proven(CLAIM) else WHOLE)
        large = [place for place in tried if not self.gain(place).value < unit]
        return min([1.0, *(len(tried) * self.gain_p(place) for place in large)])

    def margin(self, of: Place) -> float:
        """The margin in the score's units: a share of the gain at a place, NaN if that is not proven."""
        return self.design.margin * self.gain(of).value if self.is_proven(of) else math.nan

    def over_margin(self, weights: Mapping[Place, float], of: Place) -> Estimate:
        """The weighted sum of scores minus the margin, which is uncertain itself: a share of the gain at `of`."""
        total = dict(weights)
        for place, sign in ((of, -1.0), (BASE, 1.0)):
            total[place] = total.get(place, 0.0) + sign * self.design.margin
        return self.contrast(total)

    def is_at_best(self, place: Place) -> bool:
        """Whether a place is within one standard error of the best possible score."""
        best = self.bounds[1]
        return math.isfinite(best) and self.means[place] >= best - max(self.contrast({place: 1.0}).se, self.tolerance)

    @cached_property
    def plans(self) -> Mapping[str, Null]:
        """The planned nulls of this method, in order: random directions, or those of random places."""
        tried = [place.null for place in sorted(self.arms) if place.arm == "control"]
        planned = self.design.nulls or {name: Null(tried.count(name)) for name in tried}
        is_directions = self.facts.null == DIRECTIONS
        own = {name: null for name, null in planned.items() if (name == DIRECTIONS) == is_directions}
        return own or {DIRECTIONS if is_directions else "anywhere": Null(0)}

    @cached_property
    def nulls(self) -> Mapping[str, Against]:
        """The test of the claim against the controls of each null, and the test that these do as well.

        The latter has the Bonferroni p of two tests. The first rejects that at most a share `level` of such places does
        as well as the claim: scores as high (`_common_p`), and, with the noise of questions taken out, truly comes
        within the margin, a share of the claim's own gain (`true_share`). The second rejects that the claim leads the
        mean of all such places by the margin or more (t-test, in which questions, places and the margin are random).
        Neither counts controls that diverged or destroy the model, nor ties that are wider than the margin.
        """
        found = {}
        for name, plan in self.plans.items():
            places = [place for place in sorted(self.arms) if (place.arm, place.null) == ("control", name)]
            means = tuple(self.means[place] for place in places)
            reached = reaches(means, self.means[CLAIM], self.tolerance).tolist()
            design = {"rule": self.design.rule, "level": self.level}
            seen = look(reached, n_planned=plan.n_planned, population=plan.population, **design)
            p_value = 1.0 if self.unscored else seen.p_value
            scored = [place for place in places if not math.isnan(self.means[place])]
            sound = [place for place in scored if place.label not in self.destroyed]
            lead = crossed_interval(self.arms[CLAIM], self._stacked(scored), population=plan.population)
            shared = partial(true_share, population=plan.population, most=self.level, tolerance=self.tolerance)
            share, slack = shared(self.arms[CLAIM], self._stacked(scored)), self.margin(CLAIM)
            tie = min(slack, self.tolerance) if slack > 0 else self.tolerance
            kept = set(sound)
            counted = [self.means[place] for place in places[: seen.n] if place in kept]
            hits = int(reaches(counted, self.means[CLAIM], tie).sum())
            near = shared(self.arms[CLAIM], self._stacked(sound), slack=slack, tolerance=tie) if slack > 0 else share
            common = max(near.p_common, self._common_p(hits, seen, plan))
            if seen.ended_early:  # intervals and the t-test assume a number of controls that does not depend on scores
                lead, share = replace(lead, interval=_UNKNOWN), Share(math.nan, _UNKNOWN, math.nan)
            small = 1.0 if seen.ended_early else self._small_lead_p(sound, lead, len(places) - len(sound))
            p_no = min(1.0, 2 * min(common, small))
            found[name] = Against(plan, places, means, seen, p_value, lead, share, common, small, p_no)
        return found

    def _stacked(self, places: Sequence[Place]) -> Values:
        """The values at places, (places, components, questions)."""
        return np.asarray([self.arms[place] for place in places]).reshape(len(places), *self.arms[CLAIM].shape)

    def _common_p(self, g: int, seen: Look, plan: Null) -> float:
        """P of the null hypothesis that at most a share `level` of places scores as high as the claim, as `g` do.

        Binomial, or hypergeometric. If controls may have ended early, it is the confidence sequence of `share_interval`
        at an error of half the level, because there are two tests.
        """
        n, most = seen.n, plan.population
        if self.design.rule == "anytime" or (self.design.rule == "curtailed" and n < plan.n_planned):
            low, _ = share_interval(g, n, error=self.level / 2, population=most)
            return self.level / 2 if low > self.level else 1.0
        if most is not None:
            return float(stats.hypergeom.sf(g - 1, most, math.floor(self.level * most), n))
        return float(stats.binom.sf(g - 1, n, self.level))

    def _small_lead_p(self, sound: Sequence[Place], lead: Crossed, lost: int) -> float:
        """P of the null hypothesis that the claim leads the mean of all such places by the margin or more."""
        if not self.is_proven(CLAIM) or len(sound) < 2 or lost > self.level * (lost + len(sound)):
            return 1.0
        over = self.over_margin({CLAIM: 1.0, **dict.fromkeys(sound, -1.0 / len(sound))}, of=CLAIM)
        variance = over.variance + lead.se_places**2
        if not variance:
            return over.p_below()
        z = float(special.ndtri(self.level / 2))  # skewness is corrected where the test decides, as in intervals
        centre = over.value + (2 * z * z + 1) / 12 * over.skew
        return float(special.stdtr(lead.df, centre / math.sqrt(variance)))

    @property
    def deciding(self) -> Mapping[str, Against]:
        """The nulls with enough places for p to reach the level; all if none has."""
        able = {name: null for name, null in self.nulls.items() if null.plan.can_test(self.level)}
        return able or self.nulls


def measure(
    method: str, facts: MethodFacts, trials: Mapping[Place, Sequence[TrialRecord]], score: str, level: float,
    design: Design, destroyed: Collection[str] = (),
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
    bounds = find_score(score).bounds
    missing = tuple(int(np.isnan(x).any(axis=0).sum()) for x in known.values())
    return Measured(
        method=method,
        facts=facts,
        arms={place: np.concatenate([known.get(place, np.full_like(known[BASE], np.nan)), turn]) for place in trials},
        locations={place: where for place, tried in trials.items() if (where := tried[0].spec.location) is not None},
        level=level,
        design=design,
        bounds=bounds if facts.supports == "higher" else (-bounds[1], -bounds[0]),
        tolerance=tie,
        chosen={
            place.label: None if record is None else record.spec.hyperparameter
            for place, record in chosen.items()
            if place != BASE
        },
        missing=missing,
        worst_missing=max(score_place(tried, score, tie).missing for tried in trials.values()),
        destroyed=destroyed if facts.supports == "higher" else (),
    )
