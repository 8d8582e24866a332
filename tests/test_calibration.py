"""Error rates of the verdict under nulls that are true."""

import numpy as np
import pytest
from scipy import stats

from locaudit.stats.sequential import LEAST, look
from locaudit.studies.calibration.coverage import INTERVALS, NO_GAIN, WORLDS
from locaudit.studies.calibration.rates import Rate, chance_specific, pool_rates, simulate
from test_stats import BASE, BASE_TRIAL, NOISE, SCORE, trial


@pytest.mark.parametrize("world", ["spread", "crossed", "same", "heavy"])
def test_a_claim_like_any_other_place_is_rarely_called_specific(world):
    found = simulate(world, n_audits=400, n_questions=40)
    assert found.false.interval[0] <= 0.05
    for t, rate in found.p_below.items():
        assert rate.interval[0] <= t, (t, rate)
    assert found.parametric["t for one new place"].interval[0] <= 0.06 or world == "heavy"
    assert found.parametric["t-test"].interval[0] > 0.1  # takes the claim's score as exact: rejects far too often


def test_ending_early_changes_no_verdict_and_saves_controls():
    every, early = (simulate("spread", rule=rule, n_audits=300, n_questions=40) for rule in ("fixed", "curtailed"))
    assert early.false == every.false
    assert every.mean_controls == 19
    # Without ties, the test is open after n >= 9 controls if none of them does as well: with probability 1 / (n + 1).
    assert LEAST <= early.mean_controls <= LEAST + sum(1 / (n + 1) for n in range(LEAST, 19)) + 0.3


def test_disjoint_controls_break_the_level_where_one_head_makes_a_set():
    assert simulate("disjoint", n_audits=600, n_questions=60).false.interval[0] > 0.05


def test_a_rate_has_its_exact_interval():
    assert Rate(0, 60).interval == pytest.approx((0.0, 1 - 0.025 ** (1 / 60)))
    assert Rate(3, 60).share == 0.05


def pool(gains):
    return [BASE_TRIAL, *(trial("control", "optimal", BASE + NOISE + gain, control=i) for i, gain in enumerate(gains))]


def test_every_place_of_a_pool_is_the_claim_in_turn():
    gains = np.linspace(0.25, 0.5, 41)
    found = pool_rates(pool(gains), "optimal", SCORE)
    assert found.n_places == found.n_effective == 41
    assert found.n_tied == 0
    # Without ties, a place is specific if it beats all of 19 others: once in 20, whatever the scores are.
    assert found.false_rate == pytest.approx(1 / 20)
    assert sorted(found.p_values) == pytest.approx([k / 41 for k in range(1, 42)])
    assert found.drawn.n_trials == 41


def test_ties_and_edits_without_effect_lower_the_rate():
    tied = pool_rates(pool([0.3] * 41), "optimal", SCORE)
    assert tied.false_rate == 0
    assert tied.n_tied == 41
    idle = pool_rates(pool(np.linspace(-0.5, -0.25, 41)), "optimal", SCORE)
    assert idle.false_rate == idle.n_effective == 0


def test_chance_of_a_draw_of_controls_that_the_claim_beats():
    assert chance_specific(0, 47, 19) == 1.0
    assert chance_specific(1, 47, 19) == pytest.approx(28 / 47)
    assert chance_specific(5, 47, 19) == pytest.approx(stats.hypergeom.pmf(0, 47, 5, 19))
    assert chance_specific(1, 47, 100) == 1.0  # all 47 tried: p = 2 / 48
    rng = np.random.default_rng(0)
    hits = np.arange(47) < 3
    drawn = [look(list(rng.permutation(hits)[:39]), rule="fixed", n_planned=39, level=0.05) for _ in range(2000)]
    rate = np.mean([x.state == "specific" for x in drawn])
    assert rate == pytest.approx(chance_specific(3, 47, 39), abs=0.03)


def test_the_truths_of_the_coverage_study_are_true():
    rng = np.random.default_rng(0)
    assert all(truth.value == pytest.approx(0, abs=1e-12) for truth in NO_GAIN)
    for truth in (*NO_GAIN, *(x for part in INTERVALS.values() for x in part)):
        first, *others = truth.draw(rng, 40_000)
        found = first.mean(axis=1).prod() - (np.mean([x.mean(axis=1).prod() for x in others]) if others else 0)
        assert found == pytest.approx(truth.value, abs=0.012), truth.name
    for world in WORLDS:
        places = world.places(rng, 40_000)
        assert (places.mean(), places.std()) == pytest.approx((0, world.tau), abs=0.003)
        assert world.share(0.03) == pytest.approx((places >= 0.03).mean(), abs=0.01)
