"""Sizes of tests and coverage of intervals, by simulation from a grid of known truths.

Size is how often a test rejects a true null hypothesis at 5 %; coverage is how often a 95 % interval holds the truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from locaudit.records import Place
from locaudit.stats import measured
from locaudit.stats.intervals import crossed_interval, estimate, true_share
from locaudit.stats.phrases import MethodFacts
from locaudit.stats.selection import BASE, CLAIM, WHOLE
from locaudit.stats.tests import gain_p, monte_carlo_p, new_place_p, paired_gain_p
from locaudit.studies.calibration.rates import Rate

Values = NDArray[np.float64]
N_QUESTIONS = (20, 50, 100, 200, 800)
N_RESAMPLES = 399
"""Arrangements of a simulated test, and resamples of a bootstrap; with 399, 5 % is reached exactly."""
BINARY = math.inf
LEVEL = 0.05


@dataclass(frozen=True)
class Measured:
    """Rates at one truth and size."""

    part: str
    truth: str
    size: str
    """Number of questions, or of controls and questions."""
    rates: Mapping[str, Rate]
    """What was counted -> how often."""


@dataclass(frozen=True)
class Truth:
    """How each arm answers. Its score is the product of its components' means."""

    name: str
    means: tuple[tuple[float, ...], ...]
    """(arms, components). The first arm is compared with the mean score of the others."""
    shared: float = 0.5
    """Share of the variance that arms have in common at a question. 1: a higher mean only adds right answers."""
    sharp: float = BINARY
    """Answers are 0 or 1 (infinite), or probabilities that are the closer to 0 and 1 the larger this is."""
    jumps: float = 0.0
    """Share of questions at which the first arm answers better by `jump` than that."""
    jump: float = 0.6
    value: float = field(init=False)
    """True score of the first arm, minus the mean of the others' if there are any."""

    def __post_init__(self):
        first, *others = np.prod(self.means, axis=1).tolist()
        object.__setattr__(self, "value", first - (float(np.mean(others)) if others else 0.0) + self.jump * self.jumps)

    def draw(self, rng: np.random.Generator, n: int) -> Values:
        """Answers to n questions, (arms, components, questions).

        With a normal ability z of an arm at a question and component, the answer is Phi(k (z + c)), of mean
        Phi(k c / sqrt(1 + k^2)), where k is `sharp`; for infinite k, [z + c > 0], of mean Phi(c).
        """
        means = np.asarray(self.means)[..., None]
        z = math.sqrt(self.shared) * rng.standard_normal((1, means.shape[1], n))
        z = z + math.sqrt(1 - self.shared) * rng.standard_normal((*means.shape[:2], n))
        if math.isinf(self.sharp):
            return (z + special.ndtri(means) > 0).astype(float)
        answers = special.ndtr(self.sharp * z + special.ndtri(means) * math.hypot(1, self.sharp))
        answers[0] += self.jump * (rng.random(n) < self.jumps)
        return answers


NO_GAIN = (
    Truth("no arm differs: Truth .5, Info .8", ((0.5, 0.8), (0.5, 0.8)), 0.7),
    Truth("Truth .3 to .6, Info .8 to .4", ((0.6, 0.4), (0.3, 0.8))),
    Truth("the same, arms alike (shared .9)", ((0.6, 0.4), (0.3, 0.8)), 0.9),
    Truth("Truth .45 to .9, Info 1 to .5", ((0.9, 0.4995), (0.45, 0.999))),
    Truth("Truth .2 to .8, Info .96 to .24", ((0.8, 0.24), (0.2, 0.96))),
    Truth("Truth .05 to .1, Info .9 to .45", ((0.1, 0.45), (0.05, 0.9)), 0.7),
    Truth("few change: Truth .5 to .55, Info .88 to .8", ((0.55, 0.8), (0.5, 0.88)), 0.97),
    Truth("probabilities: Truth .3 to .6, Info .8 to .4", ((0.6, 0.4), (0.3, 0.8)), 0.5, 3),
    Truth("one component, few change", ((0.4,), (0.4,)), 0.98),
    Truth("one component, most gain .03, 1 in 20 loses .6", ((0.33,), (0.3,)), 0.99, 1, 0.05, -0.6),
)
"""True gain 0."""
GAIN = (
    Truth("gain: Truth .4 to .5, Info .7 to .8", ((0.5, 0.8), (0.4, 0.7))),
    Truth("gain: Truth .3 to .7, Info .9 to .7", ((0.7, 0.7), (0.3, 0.9))),
)
AT_MARGIN = (
    Truth("answers: .3, whole model .6, claim .4", ((0.4,), (0.6,), (0.3,))),
    Truth("the same, arms alike (shared .9)", ((0.4,), (0.6,), (0.3,)), 0.9),
    Truth("probabilities: .3, whole model .6, claim .4", ((0.4,), (0.6,), (0.3,)), sharp=3),
    Truth("product: .24, whole model .56, claim .347", ((13 / 30, 0.8), (0.7, 0.8), (0.3, 0.8))),
)
"""Claim, whole model, unedited: the claim's gain is exactly the margin, a third of the whole model's."""
_RANDOM = tuple((0.4 + x, 0.8) for x in np.linspace(-0.07, 0.07, 19).tolist())
INTERVALS = {
    "mean of one arm": (
        Truth("answers, .05", ((0.05,),)),
        Truth("answers, .2", ((0.2,),)),
        Truth("answers, .5", ((0.5,),)),
        Truth("answers, .95", ((0.95,),)),
        Truth("probabilities, .3", ((0.3,),), sharp=1),
        Truth("probabilities, .1, skewed", ((0.1,),), sharp=3),
    ),
    "difference of two arms": (
        Truth("5 % of answers change, all to right", ((0.35,), (0.3,)), 1),
        Truth("10 % change, all to right", ((0.4,), (0.3,)), 1),
        Truth("20 % change, all to right", ((0.5,), (0.3,)), 1),
        Truth("4 % change, half to right", ((0.3,), (0.3,)), 0.99),
        Truth("27 % change, most to right", ((0.5,), (0.3,)), 0.8),
        Truth("50 % change, most to right", ((0.5,), (0.3,)), 0),
        Truth("probabilities, few change", ((0.35,), (0.3,)), 1, 20),
        Truth("probabilities, both ways", ((0.4,), (0.3,)), 0.95, 3),
        Truth("probabilities, small changes", ((0.32,), (0.3,)), 0.99, 1),
        Truth("the same, and one in ten gains .6", ((0.32,), (0.3,)), 0.99, 1, 0.1),
    ),
    "product of two means": (
        Truth("answers, .5 x .8", ((0.5, 0.8),)),
        Truth("answers, .1 x .9", ((0.1, 0.9),)),
        Truth("probabilities, .5 x .8", ((0.5, 0.8),), sharp=2),
    ),
    "difference of products": (
        *NO_GAIN[1:8],
        *GAIN,
        Truth("5 % more true answers, no other change", ((0.35, 0.8), (0.3, 0.8)), 1),
        Truth("probabilities: Truth .3 to .35, Info .8 to .75", ((0.35, 0.75), (0.3, 0.8)), 0.95, 3),
    ),
    "lead over 19 given controls": (
        Truth("answers, product", ((0.5, 0.8), *_RANDOM)),
        Truth("probabilities, product", ((0.5, 0.8), *_RANDOM), 0.8, 2),
    ),
}
"""Estimand -> truths at which the coverage of `estimate` is measured."""
RARE = tuple(
    Truth(f"most gain .02, {share:.0%} gain .6", ((0.32,), (0.3,)), 0.99, 1, share) for share in (0.05, 0.02, 0.01)
)
"""Differences of two arms of which a few questions have the largest part."""
Shape = Literal["normal", "uniform", "exponential"]


@dataclass(frozen=True)
class World:
    """True scores of random places, and questions that are hard or easy for all of them."""

    name: str
    tau: float
    """Standard deviation of the places' true scores."""
    sd: float
    """Standard deviation of a place's answer to a question, beyond what the question has in common for all."""
    shape: Shape = "normal"
    """Distribution of the true scores."""
    n_seeds: int = 1
    """Number of training seeds of each place."""
    seed_sd: float = 0.0
    """Standard deviation of a place's true score between training seeds."""

    def places(self, rng: np.random.Generator, size: int | tuple[int, ...]) -> Values:
        """True scores of random places minus their mean."""
        drawn = {
            "normal": lambda: rng.standard_normal(size),
            "uniform": lambda: math.sqrt(3) * rng.uniform(-1, 1, size),
            "exponential": lambda: rng.exponential(1, size) - 1,
        }
        return self.tau * drawn[self.shape]()

    def share(self, lead: float) -> float:
        """Share of places whose true score exceeds the mean by at least the lead."""
        if not self.tau:
            return float(lead <= 0)
        x = lead / self.tau
        tails = {
            "normal": special.ndtr(-x),
            "uniform": np.clip((1 - x / math.sqrt(3)) / 2, 0, 1),
            "exponential": math.exp(-max(x + 1, 0.0)),
        }
        return float(tails[self.shape])

    def best(self, share: float) -> float:
        """The lead that this share of places reaches (`share`, inverted)."""
        return self.tau * float(optimize.brentq(lambda x: self.share(x * self.tau) - share, -1.7, 10))  # type: ignore[arg-type]

    def answers(self, rng: np.random.Generator, true: Values, n: int) -> Values:
        """Values of places with these true scores at n questions: (places, seeds, 1, questions)."""
        by_seed = true[:, None] + self.seed_sd * rng.standard_normal((len(true), self.n_seeds))
        questions = rng.normal(0.5, 0.2, n) + self.sd * rng.standard_normal((len(true), 1, n))
        return (by_seed[..., None] + questions)[:, :, None]


WORLDS = (
    World("as Info*Truth of answers (SD of places .037, SE of a lead .039)", 0.037, 0.38),
    World("as Info*Truth of probabilities (.022, .019)", 0.022, 0.185),
    World("places differ much (.1, .02)", 0.1, 0.2),
    World("the same, exponential: few places are far better", 0.1, 0.2, "exponential"),
    World("the same, uniform", 0.1, 0.2, "uniform"),
    World("all places are equally good (0, .039)", 0.0, 0.38),
    World("as the first, 3 training seeds (SD .03)", 0.037, 0.38, "normal", 3, 0.03),
    World("seeds dominate (.037, .01, 3 seeds of SD .03)", 0.037, 0.1, "normal", 3, 0.03),
)
"""The first two have the standard deviations seen in runs with sets of 16 heads; SE is that of 100 questions."""
DESIGNS = ((9, 100), (19, 20), (19, 100), (19, 400), (39, 100))
"""Controls and questions."""


def measure_coverage(n_sets: int = 500, *, seed: int = 0) -> Iterator[Measured]:
    """Measure all parts, with `n_sets` simulated data sets per truth and size; fewer where one takes longer."""
    rng = np.random.default_rng(seed)

    def count(part: str, truth: Truth | World, size: str, draw: Callable[[], Mapping[str, bool]], n: int) -> Measured:
        counts: dict[str, int] = {}
        for _ in range(n):
            for name, hit in draw().items():
                counts[name] = counts.get(name, 0) + bool(hit)
        return Measured(part, truth.name, size, {name: Rate(hits, n) for name, hits in counts.items()})

    gains = {"size of the test of a gain": NO_GAIN, "power of the test of a gain": GAIN}
    for part, truths in (gains | INTERVALS).items():
        for truth in truths:
            for n in N_QUESTIONS:
                yield count(part, truth, f"{n}", partial(_gain if part in gains else _holds, rng, truth, n), n_sets)
    for truth in INTERVALS["difference of two arms"]:
        yield count("other intervals", truth, "20", partial(_others, rng, truth, 20), max(1, n_sets // 4))
    for truth in AT_MARGIN:
        for n in N_QUESTIONS[2:]:
            yield count("errors of a no: works", truth, f"{n}", partial(_no_gain, rng, truth, n), n_sets)
    for world, design in product(WORLDS[:5], DESIGNS[2:]):
        part, size = "errors of a no: better than random places", "{} x {}".format(*design)
        yield count(part, world, size, partial(_no_lead, rng, world, *design), max(1, n_sets // 4))
    places = {"lead over random places": _lead, "size of tests against random places": _new_place}
    for (part, draw), world, design in product(places.items(), WORLDS, DESIGNS):
        yield count(part, world, "{} x {}".format(*design), partial(draw, rng, world, *design), n_sets)
    for z, world, design in product((0, 1, 2), WORLDS[:6], DESIGNS[1:4]):
        part, size = f"share of places, the claim {z} SD above their mean", "{} x {}".format(*design)
        yield count(part, world, size, partial(_share, rng, world, *design, z), max(1, n_sets // 8))
    for truth, n in product(RARE, N_QUESTIONS):
        yield count("difference of two arms, few large changes", truth, f"{n}", partial(_holds, rng, truth, n), n_sets)


def _gain(rng: np.random.Generator, truth: Truth, n: int) -> dict[str, bool]:
    after, before = truth.draw(rng, n)
    # With two components, the raw gain of an arrangement is linear in the signs: a sign-flip test of these values.
    gradient = ((after + before).mean(axis=1) / 2)[::-1] if len(after) == 2 else np.ones(1)
    seed, n_resamples = int(rng.integers(8)), N_RESAMPLES
    exchanged = partial(paired_gain_p, seed=seed, n_resamples=n_resamples)
    return {
        "gain_p": gain_p(after, before, seed=seed, n_resamples=n_resamples) <= LEVEL,
        "paired_gain_p": exchanged(after, before) <= LEVEL,
        "raw gains only": exchanged(gradient @ (after - before), np.zeros(n)) <= LEVEL,
    }


def _no_gain(rng: np.random.Generator, truth: Truth, n: int) -> dict[str, bool]:
    arms = dict(zip((CLAIM, WHOLE, BASE), truth.draw(rng, n), strict=True))
    m = measured.Measured("optimal", MethodFacts("Optimal edit"), arms, {}, LEVEL, measured.Design())
    return {"no": m.over_margin({CLAIM: 1.0, BASE: -1.0}, of=WHOLE).p_below() <= LEVEL}


def _no_lead(rng: np.random.Generator, world: World, n_places: int, n: int) -> dict[str, bool]:
    """How often a null is answered no by each of its tests, where that is just wrong.

    Common: only 5 % of places come within the margin of the claim. Small lead: the claim leads by exactly the margin.
    """

    def tested(lead: float, margin: float) -> measured.Against:
        true = np.concatenate([[lead, lead - margin / measured.MARGIN], world.places(rng, n_places)])
        claim, base, *controls = world.answers(rng, true, n).mean(axis=1)
        arms = {CLAIM: claim, BASE: base} | {Place("control", i, "anywhere"): x for i, x in enumerate(controls)}
        design, unbounded = measured.Design(), (-math.inf, math.inf)
        facts = MethodFacts("Optimal edit")
        return measured.Measured("optimal", facts, arms, {}, LEVEL, design, unbounded).nulls["anywhere"]

    best = world.best(LEVEL)
    return {
        "no, where 5 % come within the margin": tested(2 * best, best).p_no <= LEVEL,
        "small lead, where it is the margin": 2 * tested(best, best).p_small_lead <= LEVEL,
    }


def _holds(rng: np.random.Generator, truth: Truth, n: int) -> dict[str, bool]:
    first, *others = truth.draw(rng, n)
    found = estimate(first, others or None)
    return _placed(found.interval(), truth.value)


def _placed(interval: Sequence[float], truth: float) -> dict[str, bool]:
    """Whether the interval holds the truth, or lies above or below it; NaN holds nothing. Rounding does not count."""
    low, high = interval
    above, below = low > truth + 1e-9, high < truth - 1e-9
    return {"holds it": not (above or below or math.isnan(low)), "lies above": above, "lies below": below}


def _others(rng: np.random.Generator, truth: Truth, n: int) -> dict[str, bool]:
    after, before = truth.draw(rng, n)[:, 0]
    x, found = after - before, {"estimate": estimate(after, before).interval()}
    with np.errstate(all="ignore"):
        found["t"] = tuple(stats.t.interval(0.95, n - 1, x.mean(), stats.sem(x))) if np.ptp(x) else (x[0], x[0])
        for method in ("percentile", "BCa"):
            constant = not np.ptp(x)  # SciPy returns NaN
            found[f"{method} bootstrap"] = (
                (x[0], x[0])
                if constant
                else tuple(
                    stats.bootstrap((x,), np.mean, method=method, n_resamples=N_RESAMPLES, rng=rng).confidence_interval
                )
            )
    return {name: _placed(interval, truth.value)["holds it"] for name, interval in found.items()}


def _lead(rng: np.random.Generator, world: World, n_places: int, n: int) -> dict[str, bool]:
    lead = (world.tau or 0.037) * float(rng.uniform(-1, 2))
    arms = world.answers(rng, np.concatenate([[lead], world.places(rng, n_places)]), n)
    return {
        "questions only": _placed(estimate(arms[0].mean(axis=0), list(arms[1:].mean(axis=1))).interval(), lead)[
            "holds it"
        ],
        "questions and places": _placed(crossed_interval(arms[0], arms[1:]).interval, lead)["holds it"],
    }


def _new_place(rng: np.random.Generator, world: World, n_places: int, n: int) -> dict[str, bool]:
    claim, *controls = world.answers(rng, world.places(rng, 1 + n_places), n).mean(axis=(1, 2, 3)).tolist()
    return {
        "t for one new place": new_place_p(claim, controls) <= LEVEL,
        "Monte-Carlo p": monte_carlo_p(claim, controls) <= LEVEL,
    }


def _share(rng: np.random.Generator, world: World, n_places: int, n: int, z: int) -> dict[str, bool]:
    lead = (world.tau or 0.037) * z
    arms = world.answers(rng, np.concatenate([[lead], world.places(rng, n_places)]), n)
    found, share = true_share(arms[0], arms[1:], seed=int(rng.integers(1 << 31))), world.share(lead)
    scored = stats.binomtest(int((arms[1:].mean(axis=(1, 2, 3)) >= arms[0].mean()).sum()), n_places)
    return {
        "true_share": _placed(found.interval, share)["holds it"],
        "of the scores alone": _placed(tuple(scored.proportion_ci(0.95, "exact")), share)["holds it"],
        "covers .05 to .95": found.interval[0] < 0.05 and found.interval[1] > 0.95,
    }
