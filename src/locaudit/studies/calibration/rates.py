"""Is the verdict calibrated? Error rates under a null that is true, simulated or with the edits of a real run.

An audit is false if it says `specific` of a claim that was drawn as its controls were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from locaudit.records import Method, TrialRecord
from locaudit.stats.scores import TIE, mean_score, reaches, score_values
from locaudit.stats.selection import select
from locaudit.stats.sequential import Rule, curtailment, look
from locaudit.stats.tests import monte_carlo_p, normal_tail_p, paired_gain_p, t_test_p

World = Literal["spread", "same", "heavy", "disjoint"]
WORLDS: Mapping[World, str] = {
    "spread": "places differ (normal, SD 0.05 in the score)",
    "same": "all places are equally good: only the questions' noise",
    "heavy": "few places are far better (Pareto)",
    "disjoint": "controls kept apart from a claim of 12 of 40 heads, a set being as good as its best head",
}
"""Truths under which audits are simulated; in all of them the claim is a place like any other."""


@dataclass(frozen=True)
class Rate:
    """How often something happened."""

    n: int
    n_trials: int

    @property
    def share(self) -> float:
        """The share, n / n_trials."""
        return self.n / self.n_trials

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Clopper-Pearson interval."""
        found = stats.binomtest(self.n, self.n_trials).proportion_ci(0.95, "exact")
        return float(found.low), float(found.high)


@dataclass(frozen=True)
class Simulated:
    """What audits say of claims that are places like any other."""

    world: World
    rule: Rule
    n_controls: int
    false: Rate
    """Audits that say `specific`."""
    p_below: Mapping[float, Rate]
    """t -> audits with a Monte-Carlo p of at most t."""
    parametric: Mapping[str, Rate]
    """Tests that papers use -> audits that they reject in at the level: ``t-test``, ``normal tail``."""
    mean_controls: float
    """Controls used, of `n_controls`."""


def simulate(
    world: World, *, rule: Rule = "fixed", n_audits: int = 10_000, n_controls: int = 19, n_questions: int = 100,
    level: float = 0.05, seed: int = 0,
) -> Simulated:  # fmt: skip
    """Audits of simulated scores: each edit answers each question right or not, better than the unedited model does.

    The claim is drawn as the controls are, so that `specific` is always false.
    """
    rng = np.random.default_rng(seed)
    difficulty = rng.uniform(-0.2, 0.2, n_questions)
    false, used, p_values = 0, 0, []
    rejected = {"t-test": 0, "normal tail": 0}
    parametric: Mapping[str, Callable[[float, Sequence[float]], float]] = {
        "t-test": t_test_p, "normal tail": normal_tail_p,
    }  # fmt: skip
    for _ in range(n_audits):
        quality = _qualities(world, 1 + n_controls, rng)
        chance = np.clip(0.5 + difficulty + quality[:, None], 0, 1)
        answers = (rng.random((1 + n_controls, n_questions)) < chance).astype(float)
        means = answers.mean(axis=1)
        reached = reaches(means[1:], float(means[0])).tolist()
        seen = look(reached, rule=rule, n_planned=n_controls, level=level)
        used += seen.n
        p_values.append(seen.p_value)
        for name, test in parametric.items():
            rejected[name] += bool(test(float(means[0]), means[1:].tolist()) <= level)
        if seen.state == "specific":
            base = (rng.random(n_questions) < np.clip(0.3 + difficulty, 0, 1)).astype(float)
            false += paired_gain_p(answers[0], base) <= level
    steps = [0.01, 0.05, 0.1, 0.25, 0.5] if n_controls >= 99 else [0.05, 0.1, 0.25, 0.5]
    found = np.asarray(p_values)
    return Simulated(
        world, rule, n_controls, Rate(int(false), n_audits),
        {t: Rate(int(np.sum(found <= t + 1e-12)), n_audits) for t in steps},
        {name: Rate(n, n_audits) for name, n in rejected.items()},
        used / n_audits,
    )  # fmt: skip


def _qualities(world: World, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How much better than the unedited model each place makes it, the claim first."""
    if world == "same":
        return np.full(n, 0.1)
    if world == "heavy":
        return 0.1 + 0.02 * np.minimum(rng.pareto(1.0, n), 15.0)
    if world == "spread":
        return rng.normal(0.1, 0.05, n)
    heads = 0.02 * np.minimum(rng.pareto(1.0, 40), 15.0)
    claim = rng.choice(40, 12, replace=False)
    others = np.setdiff1d(np.arange(40), claim)
    return np.asarray([heads[claim].max(), *(heads[rng.choice(others, 12, replace=False)].max() for _ in range(n - 1))])


@dataclass(frozen=True)
class Pooled:
    """Every place of a pool of real edits in turn the claim, others its controls."""

    method: Method
    score: str
    n_places: int
    n_controls: int
    false_rate: float
    """Share of audits that say `specific`, exact over all draws of controls from the pool."""
    drawn: Rate
    """The same with one draw of controls for each claim."""
    n_effective: int
    """Places whose edit has a significant gain."""
    n_tied: int
    """Places that tie with another: ties count against a claim, so that they lower the rate."""
    p_values: tuple[float, ...]
    """Of each place against all others."""
    scores: tuple[float, ...]


def pool_rates(
    records: Iterable[TrialRecord], method: Method, score: str, *, n_controls: int = 19, level: float = 0.05,
    seed: int = 0,
) -> Pooled:  # fmt: skip
    """Take the controls of a run, in turn, as claims of audits with `n_controls` of the other controls.

    The controls of a run are drawn alike, so that each of them is a claim like any other place.
    """
    records = list(records)
    places = {place: r for place, r in select(records, score)[method].items() if place[0] == "control"}
    before = score_values(next(r for r in records if r.spec.arm == "base").questions["test"], score)
    values = [None if r is None else score_values(r.questions["test"], score) for r in places.values()]
    means = np.asarray([math.nan if x is None else float(mean_score(x)) for x in values])
    works = [x is not None and paired_gain_p(x, before) <= level for x in values]
    p_values, exact, n_false = [], [], 0
    rng = np.random.default_rng(seed)
    for i, own in enumerate(means):
        others = np.delete(means, i)
        n_at_least = int(np.sum(reaches(others, float(own))))
        p_values.append(monte_carlo_p(float(own), others.tolist()))
        exact.append(works[i] * chance_specific(n_at_least, len(others), n_controls, level))
        drawn = rng.choice(others, min(n_controls, len(others)), replace=False)
        n_false += bool(works[i]) and monte_carlo_p(float(own), drawn.tolist()) <= level
    return Pooled(
        method,
        score,
        len(means),
        n_controls,
        float(np.mean(exact)),
        Rate(n_false, len(means)),
        int(sum(works)),
        int(sum(np.sum(np.isclose(means, own, rtol=0, atol=TIE)) > 1 for own in means)),
        tuple(p_values),
        tuple(means.tolist()),
    )


def chance_specific(n_at_least: int, n_others: int, n_controls: int, level: float = 0.05) -> float:
    """Probability that a draw of controls calls a claim specific that `n_at_least` of `n_others` places reach."""
    n = min(n_controls, n_others)
    return float(stats.hypergeom.cdf(curtailment(n, level) - 1, n_others, n_at_least, n))
