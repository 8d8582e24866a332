"""Intervals, exchange tests and contrasts against SciPy, exact enumeration and small simulations with fixed seeds."""

import math

import numpy as np
import pytest
from scipy import stats

from locaudit.stats import (
    contrast_methods,
    crossed_interval,
    estimate,
    mean_score,
    new_place_p,
    paired_gain_p,
    true_share,
)
from locaudit.stats.intervals import pseudo_values
from locaudit.stats.tests import _Gains

NO_LIMITS = (-math.inf, math.inf)


def holds(interval, truth):
    return interval[0] <= truth <= interval[1]


# --- pseudo-values


@pytest.mark.parametrize("n_components", [1, 2, 3])
def test_pseudo_values_have_the_score_as_mean_and_its_derivatives_as_deviations(n_components):
    x = np.random.default_rng(n_components).random((n_components, 5, 12))
    psi = pseudo_values(x)
    assert psi.mean(axis=-1) == pytest.approx(mean_score(x))
    for i in range(12):  # a question that counts for slightly more moves the score by its deviation
        more = np.ones(12)
        more[i] += 1e-6
        moved = np.prod((x * more).sum(axis=-1) / more.sum(), axis=0) - mean_score(x)
        assert moved / (1e-6 / 12) == pytest.approx(psi[:, i] - mean_score(x), abs=1e-5)


def test_missing_values_add_nothing():
    x = np.random.default_rng(0).random((2, 30))
    x[0, :4] = x[1, 3:5] = np.nan
    psi = pseudo_values(x)
    assert psi.mean() == pytest.approx(float(mean_score(x)))
    assert psi[3] == pytest.approx(psi.mean())  # both are missing
    kept = x[:1, 4:]
    full, holed = estimate(kept), estimate(x[:1])
    assert holed.value == pytest.approx(full.value)
    assert holed.se == pytest.approx(full.se, rel=0.03)
    assert math.isnan(estimate(np.full((2, 5), np.nan)).value)
    assert all(map(math.isnan, estimate(np.full((2, 5), np.nan), x[:, :5]).interval()))


# --- one arm, and differences


def test_intervals_of_normal_values_are_nearly_those_of_t():
    x = stats.norm.ppf((np.arange(30) + 0.5) / 30)
    for confidence in (0.9, 0.95):
        found = estimate(x, bounds=NO_LIMITS).interval(confidence)
        t = stats.ttest_1samp(x, 0).confidence_interval(confidence)
        assert found == pytest.approx(tuple(t), rel=0.05)


@pytest.mark.parametrize("n", [20, 60])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_coverage_of_few_changed_answers_by_enumeration(n, confidence):
    """All outcomes (+1, 0, -1) of n questions, weighted by their probability; also one arm: no -1."""
    outcomes = [(i, j) for i in range(n + 1) for j in range(n + 1 - i)]
    intervals = []
    for i, j in outcomes:
        x = np.repeat([1.0, -1.0, 0.0], [i, j, n - i - j])
        intervals.append(estimate(x, np.zeros(n)).interval(confidence))
    low, high = np.asarray(intervals).T
    table = np.asarray([(i, j, n - i - j) for i, j in outcomes])
    for up, down in [(k / n, m * k / n) for k in (1, 2, 3, 5, 9) for m in (0, 0.5, 1)] + [(0.7, 0.0), (0.4, 0.2)]:
        weight = stats.multinomial.pmf(table, n, [up, down, 1 - up - down])
        covered = weight[(low <= up - down + 1e-12) & (high >= up - down - 1e-12)].sum()
        assert covered > confidence - 0.03, (up, down, covered)


def test_if_nothing_changed_the_interval_is_clopper_pearsons():
    x = np.random.default_rng(0).random(25)
    most = stats.binomtest(0, 25).proportion_ci(0.95, "exact").high
    same = estimate(x, x)
    assert same.interval() == pytest.approx((-most, most))
    assert same.p_below(most) == pytest.approx(0.025)
    assert (same.p_above(0.0), same.p_above(0.1)) == (1.0, 1.0)
    assert estimate(np.ones((2, 25))).interval() == pytest.approx((1 - most, 1.0))
    assert all(map(math.isnan, estimate(x, x, bounds=NO_LIMITS).interval()))


@pytest.mark.parametrize("seed", range(6))
def test_p_values_invert_the_interval(seed):
    rng = np.random.default_rng(seed)
    found = estimate(rng.random((2, 40)) ** 3, (rng.random((2, 40)) > 0.4).astype(float))
    for alpha in (0.001, 0.05, 0.3):
        low, high = found.interval(1 - 2 * alpha)
        assert found.p_above(low) == pytest.approx(alpha) or low == -1.0
        assert found.p_below(high) == pytest.approx(alpha) or high == 1.0
    bounds = np.linspace(-3, 3, 301)
    assert (np.diff([found.p_above(x) for x in bounds]) >= 0).all()
    assert (np.diff([found.p_below(x) for x in bounds]) <= 0).all()


@pytest.mark.parametrize("bounds", [(0.0, 1.0), NO_LIMITS])
def test_turning_the_sign_turns_the_interval(bounds):
    rng = np.random.default_rng(3)
    a, b = rng.random((2, 30)) ** 4
    one, other = estimate(a, b, bounds=bounds), estimate(b, a, bounds=bounds)
    assert one.interval() == pytest.approx(tuple(-x for x in other.interval()[::-1]))
    assert one.p_above(0.01) == pytest.approx(other.p_below(-0.01))


def test_a_difference_to_several_is_that_to_their_mean_score():
    rng = np.random.default_rng(1)
    claim, controls = rng.random((2, 30)), list(rng.random((4, 2, 30)))
    found = estimate(claim, controls)
    assert found.value == pytest.approx(float(mean_score(claim)) - np.mean([mean_score(x) for x in controls]))
    assert estimate(claim, [controls[0]] * 3).interval() == pytest.approx(estimate(claim, controls[0]).interval())


# --- the test of a gain


def test_gains_and_their_spread_are_those_of_the_exchanged_scores():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 9))
    exchanged = rng.random((50, 9)) > 0.5
    gains, sds = _Gains(a, b)(exchanged)
    for swap, gain, sd in zip(exchanged, gains, sds, strict=True):
        psi = pseudo_values(np.where(swap, b, a)) - pseudo_values(np.where(swap, a, b))
        assert (gain, sd) == (pytest.approx(psi.mean()), pytest.approx(psi.std()))


def test_a_gain_test_keeps_its_level_where_truth_rises_and_info_falls():
    """The product is .24 in both arms. Raw gains, exchanged, reject in about 7 %."""
    rng = np.random.default_rng(0)
    rejected = 0
    for _ in range(700):
        after, before = (rng.random((2, 60)) < np.asarray(chance)[:, None] for chance in ((0.6, 0.4), (0.3, 0.8)))
        rejected += paired_gain_p(after, before, n_resamples=199) <= 0.05
    assert stats.binomtest(rejected, 700).proportion_ci(0.95).low < 0.05
    assert rejected / 700 < 0.065


# --- places


def table(rng, n_places, n, tau, sd=0.3, n_seeds=1, seed_sd=0.0):
    """Scores of random places (places, seeds, 1, questions); questions are hard or easy for all of them alike."""
    true = rng.normal(0.5, tau, (n_places, 1, 1)) + rng.normal(0, seed_sd, (n_places, n_seeds, 1))
    return (true + rng.normal(0, 0.2, n) + rng.normal(0, sd, (n_places, n_seeds, n)))[:, :, None]


def test_a_lead_over_all_places_needs_their_spread_too():
    rng = np.random.default_rng(0)
    within = both = 0
    for _ in range(300):
        arms = table(rng, 11, 80, 0.1)
        arms[0] += 0.6 - pseudo_values(arms[0, 0]).mean() + rng.normal(0, 0.3 / math.sqrt(80))  # truly .1 better
        within += holds(estimate(arms[0, 0], list(arms[1:, 0])).interval(), 0.1)
        both += holds(crossed_interval(arms[0, 0], arms[1:, 0]).interval, 0.1)
    assert within / 300 < 0.85
    assert both / 300 > 0.92


def test_a_lead_over_one_set_of_places_is_the_crossed_one_without_their_spread():
    rng = np.random.default_rng(1)
    arms = table(rng, 9, 50, 0.0)[:, 0]
    fixed = estimate(arms[0], list(arms[1:]), bounds=NO_LIMITS)
    all_tried = crossed_interval(arms[0], arms[1:], population=8)
    assert all_tried.interval == pytest.approx(fixed.interval())
    assert (all_tried.se_places, all_tried.se_seeds, all_tried.df) == (0.0, 0.0, math.inf)
    with_a_hole = crossed_interval(arms[0], np.concatenate([arms[1:], np.full((1, 1, 50), np.nan)]))
    assert with_a_hole == crossed_interval(arms[0], arms[1:])
    assert math.isnan(crossed_interval(arms[0], arms[1:2]).interval[0])
    assert math.isnan(crossed_interval(arms[0], np.full((3, 1, 50), np.nan)).lead)


def test_variances_of_places_and_seeds_are_found():
    rng = np.random.default_rng(2)
    arms = table(rng, 401, 100, 0.1, n_seeds=3, seed_sd=0.05)
    found = crossed_interval(arms[0], arms[1:])
    assert found.se_places * 20 == pytest.approx(math.sqrt(0.1**2 + 0.05**2 / 3), rel=0.1)
    assert found.se == pytest.approx(math.hypot(found.se_questions, found.se_places, found.se_seeds))
    seeds = [
        crossed_interval(x[0], x[1:]).se_seeds for x in (table(rng, 21, 100, 0.1, 0.3, 3, 0.05) for _ in range(200))
    ]
    # claim and mean control both vary by seed; the square is nearly unbiased
    assert np.mean(np.square(seeds)) == pytest.approx(0.05**2 / 3 * (1 + 1 / 20), rel=0.25)


def test_the_share_of_places_without_noise_is_clopper_pearsons():
    rng = np.random.default_rng(0)
    arms = table(rng, 20, 400, 0.1, sd=1e-6)[:, 0]
    order = np.argsort(arms[1:, 0].mean(axis=-1))
    claim = arms[1 + order[-3]] + 1e-4  # two places are better
    found = true_share(claim, arms[1:])
    assert found.value == pytest.approx(2 / 19)
    assert found.interval == pytest.approx(tuple(stats.binomtest(2, 19).proportion_ci(0.95, "exact")), abs=0.02)
    assert found.sd == pytest.approx(arms[1:].mean(axis=-1).std(ddof=1), rel=0.01)


def test_the_share_of_places_cannot_be_told_from_noise():
    rng = np.random.default_rng(1)
    arms = table(rng, 20, 20, 0.0)[:, 0]
    low, high = true_share(arms[0] - arms[0].mean() + arms[1:].mean(), arms[1:]).interval
    assert low < 0.05 and high > 0.95
    assert true_share(arms[1], np.stack([arms[1]] * 5)).value == 1.0  # ties count against the claim
    assert math.isnan(true_share(arms[0], arms[1:2]).value)


def test_destroyed_places_do_not_hide_the_noise_of_the_others():
    """How often a place of the best 5 % is called a common one does not depend on what the worst places score."""
    rng, wrong = np.random.default_rng(0), np.zeros((200, 2), dtype=bool)
    for i in range(len(wrong)):
        places, own = rng.normal(0, 0.05, (19, 1, 1)), rng.normal(0.05 * stats.norm.ppf(0.95), 1, (1, 100))
        others = places + rng.normal(0, 1, (19, 1, 100))
        worse = others.copy()
        worse[:2] -= 2
        wrong[i] = [true_share(own, x).p_common <= 0.025 for x in (others, worse)]
    assert (wrong.mean(axis=0) <= 0.04).all()


def test_the_share_of_better_places_is_covered():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(150):
        arms = table(rng, 20, 100, 0.05)
        arms[0] += 0.55 - pseudo_values(arms[0, 0]).mean() + rng.normal(0, 0.03)  # truly one sd better
        covered += holds(true_share(arms[0, 0], arms[1:, 0]).interval, stats.norm.sf(1))
    assert covered / 150 > 0.92


# --- tests against places


def test_the_test_of_one_new_place_keeps_its_level():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2000, 9))
    p = [new_place_p(x[0], x[1:].tolist()) for x in scores]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert new_place_p(10.0, scores[0, 1:].tolist()) < 1e-3  # no smallest value


def test_a_contrast_of_two_methods_by_hand():
    controls = [(1.0, 10.0), (2.0, 10.0), (3.0, 40.0)]
    claim = (4.0, 20.0)
    first, second = (stats.zscore([own, *others]) for own, *others in zip(claim, *controls, strict=True))
    contrast = first - second
    found = contrast_methods(claim, controls)
    assert found.value == pytest.approx(contrast[0])
    assert found.p_first == (1 + np.sum(contrast[1:] >= contrast[0])) / 4
    assert found.p_value == (1 + np.sum(np.abs(contrast[1:]) >= abs(contrast[0]))) / 4
    turned = contrast_methods(claim[::-1], [x[::-1] for x in controls])
    assert (turned.value, turned.p_value) == (pytest.approx(-found.value), found.p_value)


def test_a_contrast_counts_ties_and_missing_scores_against_the_claim():
    assert contrast_methods((1.0, 1.0), [(1.0, 1.0)] * 4).p_value == 1.0
    assert contrast_methods((5.0, 1.0), [(1.0, 1.1), (2.0, math.nan), (0.0, 1.2)]).p_first == 2 / 4
    assert contrast_methods((math.nan, 1.0), [(1.0, 1.0), (2.0, 0.0)]).p_value == 1.0


def test_contrasts_of_exchangeable_places_are_valid():
    arms = np.random.default_rng(4).normal(size=(20, 2)) + np.random.default_rng(5).normal(size=(20, 1))
    found = [contrast_methods(arms[i], np.delete(arms, i, axis=0)) for i in range(20)]
    for name in ("p_value", "p_first"):
        assert sorted(getattr(x, name) for x in found) == pytest.approx([(i + 1) / 20 for i in range(20)])
