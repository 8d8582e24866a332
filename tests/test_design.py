"""Variance components and power of planned audits, against simulated audits and numbers that are known by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from bench.design import Truth, simulate
from scipy import stats

from locaudit.stats import crossed_interval, estimate
from locaudit.stats.design import (
    Components,
    Noise,
    Size,
    find_components,
    gain_power,
    lead_power,
    questions_for,
    sameness_power,
    smallest_gain,
    smallest_lead,
    smallest_margin,
)

PARTS = Components(Noise(0.15), Noise(0.12), Noise(0.12), 0.04**2)
SIZE = Size(100, controls=19)


def test_components_of_a_table_with_seeds_and_samples():
    control = Noise(0.09, 0.16, 0.0009, 0.04)
    truth = Truth(replace(PARTS, gain=Noise(0.05, 0.05), claim=control, control=control, places=0.01))
    found = truth.draw(np.random.default_rng(0), Size(1000, 4, 60, 6), lead=0.1, gain=0.2)
    parts = find_components(*found)
    assert parts is not None
    for name in ("questions", "samples", "rest"):
        for one in (parts.claim, parts.control):
            assert getattr(one, name) == pytest.approx(getattr(control, name), rel=0.15)
    assert parts.control.seeds == pytest.approx(control.seeds, rel=0.25)
    assert parts.places == pytest.approx(0.01, rel=0.5)
    low, high = parts.plausible()
    assert low.places < parts.places < high.places
    assert stats.chi2.cdf(parts.scores * 59 / (high.places + parts.scores - parts.places), 59) == pytest.approx(0.1)


def test_one_component_one_seed_and_one_answer_in_its_plain_shape():
    claim, controls, base = Truth(PARTS).draw(np.random.default_rng(1), Size(400, 1, 19), lead=0.1, gain=0.2)
    plain = find_components(claim[0, 0], controls[:, 0, 0], base[0, 0])
    assert plain == find_components(claim, controls, base)
    assert plain is not None and math.isnan(plain.control.samples)
    size = Size(400, controls=19)
    # the two intervals count two pseudo-questions more
    assert plain.lead_se(size) == pytest.approx(crossed_interval(claim[0, 0], controls[:, 0, 0]).se, rel=0.02)
    assert math.sqrt(plain.gain.variance(size)) == pytest.approx(estimate(claim[0, 0], base[0, 0]).se, rel=0.02)
    half, ample = (replace(size, questions=n) for n in (200, 10**9))
    assert plain.gain.variance(half) == pytest.approx(2 * plain.gain.variance(size))
    assert plain.lead_se(ample) == pytest.approx(math.sqrt(plain.places / 19), rel=1e-3)
    assert replace(plain, population=19).lead_se(ample) == pytest.approx(0, abs=1e-4)


def test_a_score_of_several_components_and_missing_values():
    rng = np.random.default_rng(2)
    values = (rng.random((22, 2, 500)) < 0.6).astype(float)
    parts = find_components(values[0], values[2:], values[1])
    assert parts is not None
    # Independent answers: the product of two means of .6 has the variance 2 * .6^2 * .24 per question.
    assert parts.control.questions == pytest.approx(2 * 0.36 * 0.24, rel=0.05)
    assert parts.gain.questions == pytest.approx(4 * 0.36 * 0.24, rel=0.15)
    diverged = values.copy()
    diverged[-1] = np.nan
    assert find_components(values[0], diverged[2:], values[1]) == find_components(values[0], values[2:-1], values[1])


def test_data_that_cannot_say():
    values = np.random.default_rng(3).random((5, 1, 30))
    assert find_components(values[0], values[2:], values[1]) is not None
    assert find_components(values[0], values[3:], values[1]) is None  # two controls
    assert find_components(values[0], np.repeat(values[2:3], 3, axis=0), values[1]) is None  # all alike
    assert find_components(np.full((1, 30), np.nan), values[2:], values[1]) is None


def test_power_without_noise_of_questions_by_hand():
    quiet = Components(Noise(0.0), Noise(0.0), Noise(0.0), 0.1**2)
    for n, h in ((19, 1), (39, 2)):
        by_hand = stats.binom.cdf(h - 1, n, stats.norm.sf(0.2 / 0.1))
        assert lead_power(quiet, Size(100, controls=n), 0.2) == pytest.approx(by_hand)
    assert lead_power(quiet, Size(100, controls=18), 9.0) == 0  # p is at least 1 / 19
    assert smallest_lead(quiet, Size(100, controls=18)) == math.inf
    assert lead_power(replace(quiet, population=8), SIZE, 9.0) == 0
    assert gain_power(quiet, SIZE, 0.001) == 1 and gain_power(quiet, Size(4), 1.0) == 0
    exact = lead_power(quiet, SIZE, 0.2)
    assert lead_power([quiet, quiet], SIZE, 0.2) == pytest.approx(exact**2)  # nothing in common


def test_a_claim_like_its_controls_is_found_at_the_level():
    for n in (19, 39):
        # The claim is one more place: its true lead is drawn like theirs.
        own = replace(PARTS, claim=Noise(PARTS.claim.questions + PARTS.places * 100))
        assert lead_power(own, Size(100, controls=n), 0.0) == pytest.approx(0.05, abs=1e-3)


def test_smallest_effects_have_the_power():
    for size in (SIZE, Size(30, controls=39)):
        assert gain_power(PARTS, size, smallest_gain(PARTS, size)) == pytest.approx(0.8)
        assert lead_power(PARTS, size, smallest_lead(PARTS, size)) == pytest.approx(0.8)
        assert sameness_power(PARTS, size, smallest_margin(PARTS, size)) == pytest.approx(0.8)
    assert smallest_lead([PARTS, PARTS], SIZE) > smallest_lead(PARTS, SIZE)


def test_questions_for_a_lead_are_the_fewest():
    def power(size):
        return lead_power(PARTS, size, 0.12)

    n = questions_for(power, SIZE)
    assert n is not None and power(replace(SIZE, questions=n)) >= 0.8 > power(replace(SIZE, questions=n - 1))
    assert questions_for(lambda size: lead_power(PARTS, size, 0.05), SIZE) is None  # places differ by .04


def test_more_samples_and_seeds_help_as_far_as_they_are_known():
    noise = Noise(0.02, 0.1, 0.0004, 0.03)
    parts = Components(noise, noise, noise, 0.03**2)
    assert noise.variance(Size(50, 4, 19, 2)) == pytest.approx(0.02 / 50 + 0.0004 / 2 + 0.03 / 100 + 0.1 / 400)
    assert smallest_lead(parts, Size(50, 4)) < smallest_lead(parts, Size(50, 1))
    assert smallest_lead(parts, Size(50, 4, 19, 3)) < smallest_lead(parts, Size(50, 4))
    assert PARTS.gain.variance(Size(50, 4)) == PARTS.gain.variance(Size(50, 1))
    # Two seeds without noise of their own: both pass at level / 2, or neither.
    assert gain_power(PARTS, Size(10**6, seeds=2), 1e-3, level=0.1) == pytest.approx(
        gain_power(PARTS, Size(10**6), 1e-3, level=0.05), abs=0.01
    )


@pytest.mark.parametrize(("questions", "controls"), [(30, 19), (100, 19), (100, 39)])
def test_predicted_power_is_that_of_simulated_audits(questions, controls):
    size = Size(questions, 2, controls)
    noise = Noise(0.05, 0.1)
    for place in simulate(
        [Truth(Components(noise, noise, noise, 0.03**2), samples=2)], [size], n_audits=400, n_gains=150
    ):
        for name, predicted, rate in place.powers:
            slack = 0.02 + 2.5 * math.sqrt(predicted * (1 - predicted) / rate.n_trials)
            assert rate.share == pytest.approx(predicted, abs=slack), name
