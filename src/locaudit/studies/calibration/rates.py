"""False-positive rates of the verdict under a true null hypothesis, in simulation or with the edits of a real run.

The null hypothesis is true if the claim is drawn in the same way as its controls. `specific` is then a false positive.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from locaudit.errors import ConfigError
from locaudit.records import TrialRecord
from locaudit.stats.scores import find_score, mean_score, reaches, score_values, tolerance
from locaudit.stats.selection import select
from locaudit.stats.sequential import Rule, curtailment, look
from locaudit.stats.tests import gain_p, monte_carlo_p, new_place_p, t_test_p
from locaudit.store.run import load_run

FAMILY = (1, 2, 3, 4, 6, 8, 12, 16, 24, 48)
"""Number of able heads, out of `N_HEADS`, in each planted model. At an able head, an edit can succeed."""
N_HEADS = 48
"""24 layers of 2 heads."""

World = Literal["spread", "crossed", "same", "heavy", "disjoint"]
WORLDS: Mapping[World, str] = {
    "spread": "places differ (normal, SD 0.05 in the score)",
    "crossed": "places differ in each audit's own questions, too (SD 0.05 of places, 0.15 of pairs)",
    "same": "all places are equally good: only the questions' noise",
    "heavy": "few places are far better (Pareto)",
    "disjoint": "controls share no head with a claim of 12 of 40 heads; a set is as good as its best head",
}
"""Simulated distributions of the quality of places. In all of them, the claim is a place like any other.

In ``disjoint`` this is not enough: controls that avoid the claim are not exchangeable with it."""
PARAMETRIC = {"t-test": t_test_p, "t for one new place": new_place_p}
"""Parametric tests, for comparison: the one that papers use, and the one whose size is right for normal scores."""


@dataclass(frozen=True)
class Rate:
    """A proportion: `n` of `n_trials`."""

    n: int
    n_trials: int
    share: float = field(init=False)
    """n / n_trials."""
    interval: tuple[float, float] = field(init=False)
    """95 % Clopper-Pearson interval."""

    def __post_init__(self):
        found = stats.binomtest(self.n, self.n_trials).proportion_ci(0.95, "exact")
        object.__setattr__(self, "share", self.n / self.n_trials)
        object.__setattr__(self, "interval", (float(found.low), float(found.high)))

    def __str__(self) -> str:
        return f"{self.share:.2%} ({self.interval[0]:.2%} to {self.interval[1]:.2%})"


@dataclass(frozen=True)
class Simulated:
    """Error rates over simulated audits of claims that are places like any other."""

    world: World
    rule: Rule
    n_controls: int
    false: Rate
    """False positives: audits whose outcome is `specific`."""
    p_below: Mapping[float, Rate]
    """t -> audits with p <= t. The verdict is calibrated if their share is at most t."""
    parametric: Mapping[str, Rate]
    """Parametric test (``t-test``, ``t for one new place``) -> audits that it rejects at the level."""
    mean_controls: float
    """Mean number of controls used before the stopping rule ended the test."""

    def __str__(self) -> str:
        below = ", ".join(f"{rate.share:.3f} at {t:g}" for t, rate in self.p_below.items())
        return (
            f"  {self.rule:>22}  specific in {self.false} of {self.false.n_trials:,}; p at most t: {below}; "
            f"{self.mean_controls:.1f} controls used"
        )


def simulate(
    world: World,
    *,
    rule: Rule = "fixed",
    n_audits: int = 10_000,
    n_controls: int = 19,
    n_questions: int = 100,
    level: float = 0.05,
    seed: int = 0,
) -> Simulated:
    """Simulate audits in which the claim is drawn like its controls, so that `specific` is always a false positive.

    With the edit at a place, P(a question is answered right) = clip(0.5 + difficulty of the question + quality of the
    place). In the unedited model, it is 0.3 + difficulty. Difficulties are uniform on +-0.2; `world` gives the
    qualities. In ``crossed``, each audit draws its own questions, and each pair of place and question adds a normal
    number with standard deviation 0.15: an edit suits some questions and not others.
    """
    rng = np.random.default_rng(seed)
    difficulty = rng.uniform(-0.2, 0.2, n_questions)
    is_crossed = world == "crossed"
    false, used, p_values = 0, 0, []
    rejected = dict.fromkeys(PARAMETRIC, 0)
    for _ in range(n_audits):
        quality = _qualities(world, 1 + n_controls, rng)[:, None]
        if is_crossed:
            difficulty = rng.uniform(-0.2, 0.2, n_questions)
            quality = quality + rng.normal(0, 0.15, (1 + n_controls, n_questions))
        # (1 + controls, questions): chance of a right answer, the claim first
        chance = np.clip(0.5 + difficulty + quality, 0, 1)
        answers = (rng.random((1 + n_controls, n_questions)) < chance).astype(float)
        claim, *controls = answers.mean(axis=1).tolist()
        seen = look(reaches(controls, claim).tolist(), rule=rule, n_planned=n_controls, level=level)
        used += seen.n
        p_values.append(seen.p_value)
        for name, test in PARAMETRIC.items():
            rejected[name] += bool(test(claim, controls) <= level)
        if seen.state == "specific":
            base = (rng.random(n_questions) < np.clip(0.3 + difficulty, 0, 1)).astype(float)
            false += int(gain_p(answers[0], base) <= level)
    steps = [0.01, 0.05, 0.1, 0.25, 0.5] if n_controls >= 99 else [0.05, 0.1, 0.25, 0.5]
    return Simulated(
        world,
        rule,
        n_controls,
        Rate(false, n_audits),
        {t: Rate(int(np.sum(np.asarray(p_values) <= t + 1e-12)), n_audits) for t in steps},
        {name: Rate(n, n_audits) for name, n in rejected.items()},
        used / n_audits,
    )


def _qualities(world: World, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Quality of each of `n` places, the claim first: what an edit there adds to the chance of a right answer."""
    if world == "same":
        return np.full(n, 0.1)
    if world == "heavy":
        return 0.1 + 0.02 * np.minimum(rng.pareto(1.0, n), 15.0)
    if world in ("spread", "crossed"):
        return rng.normal(0.1, 0.05, n)
    # "disjoint": a set is as good as its best head; claim and controls share no head
    heads = 0.02 * np.minimum(rng.pareto(1.0, 40), 15.0)
    claim = rng.choice(40, 12, replace=False)
    others = np.setdiff1d(np.arange(40), claim)
    return np.asarray([heads[claim].max(), *(heads[rng.choice(others, 12, replace=False)].max() for _ in range(n - 1))])


@dataclass(frozen=True)
class Pooled:
    """False-positive rate with real edits. Each place of a pool is the claim in turn, with other places as controls."""

    method: str
    score: str
    n_places: int
    n_controls: int
    false_rate: float
    """Share of audits with the outcome `specific`, computed exactly over all draws of controls from the pool."""
    drawn: Rate
    """The same with one draw of controls per claim."""
    n_effective: int
    """Number of places whose edit has a significant gain."""
    n_tied: int
    """Number of places that tie with another. Ties count against a claim, so that they lower the rate."""
    p_values: tuple[float, ...]
    """Monte-Carlo p of each place against all others."""
    scores: tuple[float, ...]

    def __str__(self) -> str:
        low, high = self.drawn.interval
        return (
            f"{self.method}, {self.score}: each of {self.n_places} places was the claim in turn, against "
            f"{self.n_controls} of the others: specific in {self.false_rate:.2%} of all draws of controls; "
            f"in one draw per claim, {self.drawn.n} of {self.drawn.n_trials} (95 %: {low:.2%} to {high:.2%}, treating "
            f"places as independent). {self.n_effective} places gain significantly, {self.n_tied} tie with another."
        )


def pool_run(
    folder: Path, *, score: str | None = None, n_controls: int = 19, level: float = 0.05, seed: int = 0
) -> tuple[str, list[Pooled]]:
    """The name of a run's model, and `pool_rates` for each of its methods. `score` is by default the run's score.

    Raises `ConfigError` if the simulated audits or the run have too few controls, or if the run lacks the score.
    """
    run = load_run(folder).read_with(score=score)
    model, methods, null = run.manifest.model, run.manifest.methods, next(iter(run.manifest.nulls))
    records = [r for r in run.records if r.spec.null in ("", null)]  # the controls of one null are drawn alike
    tried = {r.spec.method for r in records if r.spec.arm == "control"}
    n_places = len({r.spec.control for r in records if r.spec.arm == "control"})
    if not 0 < level < 1 or not curtailment(n_controls, level):
        raise ConfigError(
            got=f"--controls {n_controls} at --level {level:g}",
            expected="enough controls for the outcome specific to be possible: 1 / (1 + controls) <= level",
            remedy="raise --controls",
        )
    if n_places <= n_controls:
        raise ConfigError(
            got=f"{folder} with {n_places} controls and --controls {n_controls}",
            expected="more controls in the run than --controls",
            remedy="lower --controls, or use a run with more controls (at least 40 for a useful estimate)",
        )
    shared: dict[str, Any] = {"n_controls": n_controls, "level": level, "seed": seed, "dtype": run.manifest.dtype}
    return model, [pool_rates(records, method, run.score, **shared) for method in methods if method in tried]


def pool_rates(
    records: Iterable[TrialRecord],
    method: str,
    score: str,
    *,
    n_controls: int = 19,
    level: float = 0.05,
    seed: int = 0,
    dtype: str = "float32",
) -> Pooled:
    """Use each control of a run in turn as the claim of an audit, with `n_controls` of the other controls.

    The controls in `records` must be those of one null: all are drawn in the same way, so that the null
    hypothesis is true for each of them.
    """
    records, tie = list(records), tolerance(score, dtype)
    chosen: Mapping[Any, Any] = select(records, score, tie)
    places = [record for place, record in chosen[method].items() if place.arm == "control"]
    before = score_values(next(r for r in records if r.spec.arm == "base").questions["test"], score)
    values = [None if r is None else score_values(r.questions["test"], score) for r in places]
    means = np.asarray([math.nan if x is None else float(mean_score(x)) for x in values])
    bounds = find_score(score).bounds
    works = [x is not None and gain_p(x, before, bounds=bounds, tolerance=tie) <= level for x in values]
    p_values, exact, n_false = [], [], 0
    rng = np.random.default_rng(seed)
    for i, own in enumerate(means.tolist()):
        others = np.delete(means, i)
        n_at_least = int(np.sum(reaches(others, own, tie)))
        p_values.append(monte_carlo_p(own, others.tolist(), tie))
        exact.append(works[i] * chance_specific(n_at_least, len(others), n_controls, level))
        drawn = rng.choice(others, min(n_controls, len(others)), replace=False)
        n_false += bool(works[i]) and monte_carlo_p(own, drawn.tolist(), tie) <= level
    return Pooled(
        method,
        score,
        len(means),
        n_controls,
        float(np.mean(exact)),
        Rate(n_false, len(means)),
        int(sum(works)),
        int(sum(np.sum(np.isclose(means, own, rtol=0, atol=tie)) > 1 for own in means)),
        tuple(p_values),
        tuple(means.tolist()),
    )


def chance_specific(n_at_least: int, n_others: int, n_controls: int, level: float = 0.05) -> float:
    """Probability, over draws of controls, of `specific` if `n_at_least` of `n_others` places match the claim."""
    n = min(n_controls, n_others)
    return float(stats.hypergeom.cdf(curtailment(n, level) - 1, n_others, n_at_least, n))
