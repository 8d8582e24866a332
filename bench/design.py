"""Compare the power that `locaudit design` predicts with simulated audits.

python -m bench.design

Scores of random places and questions are drawn from known variance components. Each simulated audit is tested as a real
one is: the claim against its controls (`monte_carlo_p`), its gain (`paired_gain_p`), and whether the interval of its
lead ends below a margin (`crossed_interval`). A second table shows what is predicted from pilots of few controls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bench.command import Positive, header, line, run
from locaudit.stats.design import (
    Components,
    Noise,
    Size,
    find_components,
    gain_power,
    lead_power,
    sameness_power,
    smallest_gain,
    smallest_lead,
    smallest_margin,
)
from locaudit.stats.intervals import crossed_interval
from locaudit.stats.tests import monte_carlo_p, paired_gain_p
from locaudit.studies.calibration.coverage import Shape, World
from locaudit.studies.calibration.rates import Rate

Values = NDArray[np.float64]
Arrays = tuple[Values, Values, Values]
"""Claim, controls and unedited model, in the shapes of `find_components`."""


@dataclass(frozen=True)
class Truth:
    """Known components, from which audits are drawn."""

    parts: Components
    shape: Shape = "normal"
    """Distribution of the places' true scores."""
    name: str = ""
    samples: int = 1
    """Sampled answers to each question in its audits."""
    seeds: int = 1
    """Training seeds of its audits."""

    def draw(self, rng: np.random.Generator, size: Size, lead: float, gain: float) -> Arrays:
        """The values of one audit whose claim leads by `lead` and gains `gain`."""
        n, axes = size.controls, (size.seeds, size.samples, 1, size.questions)
        shared = rng.normal(0.5, 0.2, axes[-1])  # easy and hard questions
        places = World("", self.parts.places**0.5, 0.0, self.shape).places(rng, n)
        claim = lead + shared + _noise(rng, self.parts.claim, 1, axes)[0]
        controls = places[:, None, None, None, None] + shared + _noise(rng, self.parts.control, n, axes)
        return claim, controls, claim - gain - _noise(rng, self.parts.gain, 1, axes)[0]


def _noise(rng: np.random.Generator, noise: Noise, n: int, axes: tuple[int, ...]) -> Values:
    seeds, samples, _, questions = axes
    within = 0.0 if np.isnan(noise.samples) else noise.samples
    parts = (
        ((1, 1, 1, questions), noise.questions),
        ((seeds, 1, 1, 1), noise.seeds),
        ((seeds, 1, 1, questions), noise.rest),
        ((seeds, samples, 1, questions), within),
    )
    found = np.zeros((n, *axes))
    for shape, variance in parts:
        found = found + variance**0.5 * rng.standard_normal((n, *shape)) if variance else found
    return found


_SAMPLED, _SEEDED = Noise(0.03, 0.1), Noise(0.03, 0.1, 0.02**2, 0.02)
TRUTHS = (
    Truth(Components(Noise(0.2), Noise(0.145), Noise(0.145), 0.037**2), name="as Info*Truth of answers"),
    Truth(Components(Noise(0.05), Noise(0.034), Noise(0.034), 0.022**2), name="as Info*Truth of probabilities"),
    Truth(Components(Noise(0.06), Noise(0.04), Noise(0.04), 0.1**2), name="places differ much"),
    Truth(Components(Noise(0.2), Noise(0.145), Noise(0.145), 0.0), name="places are equally good"),
    Truth(Components(Noise(0.2), Noise(0.3), Noise(0.1), 0.03**2), name="the claim is noisier"),
    Truth(Components(_SAMPLED, _SAMPLED, _SAMPLED, 0.03**2), name="4 sampled answers", samples=4),
    Truth(Components(_SEEDED, _SEEDED, _SEEDED, 0.03**2), name="4 sampled answers, 3 seeds", samples=4, seeds=3),
    Truth(Components(Noise(0.06), Noise(0.04), Noise(0.04), 0.1**2), "uniform", "places uniform"),
    Truth(Components(Noise(0.06), Noise(0.04), Noise(0.04), 0.1**2), "exponential", "places exponential"),
)
"""The first two have the standard deviations seen in runs with sets of 16 heads (`locaudit.studies.calibration`)."""
SIZES = (Size(30), Size(100), Size(400), Size(100, controls=39))


@dataclass(frozen=True)
class Compared:
    """Predicted power beside the rate in simulated audits."""

    truth: Truth
    size: Size
    powers: tuple[tuple[str, float, Rate], ...]
    """(what is found, predicted power, how often it was found)."""


def simulate(
    truths: Sequence[Truth], sizes: Sequence[Size], *, n_audits: int = 1000, n_gains: int = 1000, seed: int = 0
) -> Iterator[Compared]:
    """Simulate audits of each truth and size, with effects that should be found with power .5 and .8."""
    rng = np.random.default_rng(seed)
    for truth in truths:
        for size in sizes:
            size = replace(size, samples=truth.samples, seeds=truth.seeds)
            found = []
            for power in (0.5, 0.8):
                lead, gain = smallest_lead(truth.parts, size, power), smallest_gain(truth.parts, size, power)
                margin, hits = smallest_margin(truth.parts, size, power), np.zeros(3, dtype=int)
                for i in range(n_audits):
                    hits += _audit(rng, truth, size, lead, gain, margin, tests_gain=i < n_gains)
                predicted = (
                    ("lead", lead_power(truth.parts, size, lead), Rate(int(hits[0]), n_audits)),
                    ("gain", gain_power(truth.parts, size, gain), Rate(int(hits[1]), min(n_gains, n_audits))),
                    ("same", sameness_power(truth.parts, size, margin), Rate(int(hits[2]), n_audits)),
                )
                found += predicted
            yield Compared(truth, size, tuple(found))


def _audit(
    rng: np.random.Generator, truth: Truth, size: Size, lead: float, gain: float, margin: float, *, tests_gain: bool
) -> Values:
    """Whether one audit finds the lead, the gain and, of a claim without a lead, the sameness."""
    claim, controls, base = truth.draw(rng, size, lead, gain)
    own, others, before = (x.mean(axis=-3) for x in (claim, controls, base))  # over samples
    scores, seed, p_gain = others.mean(axis=(1, 2, 3)).tolist(), int(rng.integers(8)), []
    for after, unedited in zip(own, before, strict=True) if tests_gain else ():  # each training seed
        p_gain.append(paired_gain_p(after, unedited, n_resamples=799, seed=seed))
    return np.asarray([
        monte_carlo_p(float(own.mean()), scores) <= 0.05,
        tests_gain and np.median(p_gain) * min(size.seeds, 2) <= 0.05,  # as repeats are combined
        crossed_interval(own - lead, others, confidence=0.9).interval[1] < margin,
    ])  # fmt: skip


def pilots(truth: Truth, n_controls: int, *, n_pilots: int = 300, seed: int = 0) -> tuple[Values, Values]:
    """Predictions from simulated pilots of 100 questions for an audit of 19 controls.

    Returns the predicted power for a lead whose power is .8, and the smallest lead by the true one, each by pilot.
    """
    rng, size = np.random.default_rng(seed), Size(100)
    lead = smallest_lead(truth.parts, size)
    powers, leads = [], []
    while len(powers) < n_pilots:
        parts = find_components(*truth.draw(rng, Size(100, controls=n_controls), lead, 0.1))
        assert parts is not None
        powers.append(lead_power(parts, size, lead))
        leads.append(smallest_lead(parts, size) / lead)
    return np.asarray(powers), np.asarray(leads)


@dataclass(frozen=True)
class Settings:
    """How much to simulate."""

    audits: Positive = 1000
    """Simulated audits for each truth, size and power."""
    pilots: Positive = 300
    """Simulated pilots for each truth and number of controls."""


def main(given: Settings) -> None:
    """Print both tables."""
    print(
        header("scores", "questions x controls", *(f"{x} {p}" for p in (".5", ".8") for x in ("lead", "gain", "same")))
    )
    worst: dict[str, float] = {}
    for one in simulate(TRUTHS, SIZES, n_audits=given.audits, n_gains=given.audits):
        cells = [f"{rate.share:.3f}" for _, _, rate in one.powers]
        print(line([one.truth.name, f"{one.size.questions} x {one.size.controls}", *cells]), flush=True)
        for name, predicted, rate in one.powers:
            key = f"{name}, {one.truth.shape}"
            worst[key] = max(worst.get(key, 0.0), abs(rate.share - predicted))
    print("\nlargest distance from the prediction: " + "; ".join(f"{name} {x:.3f}" for name, x in worst.items()) + "\n")
    print(header("scores", "controls", "mean", "10 %", "50 %", "90 %", "lead 10 %", "50 %", "90 %"))
    for truth in TRUTHS[:4]:
        for n in (3, 9, 19):
            powers, leads = pilots(truth, n, n_pilots=given.pilots)
            cells = [powers.mean(), *np.quantile(powers, (0.1, 0.5, 0.9)), *np.quantile(leads, (0.1, 0.5, 0.9))]
            print(line([truth.name, n, *(f"{x:.2f}" for x in cells)]), flush=True)


if __name__ == "__main__":
    run(main, Settings, __doc__)
