"""Statistics against hand counts, SciPy and what must hold whatever the numbers are."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from locaudit.errors import RunFolderError
from locaudit.records import TrialRecord, TrialSpec
from locaudit.stats import (
    decide,
    max_t_p,
    mean_score,
    monte_carlo_p,
    paired_gain_p,
    paired_interval,
    score_interval,
    select,
)

N = 32
SCORE = "mc2"
BASE = np.random.default_rng(0).integers(16, 33, N) / 64
"""Multiples of 1/64, so that sums, means and shifts are exact."""
NOISE = np.random.default_rng(1).integers(-2, 3, N) / 64


PLACES = {"base": "", "claim": "0.0", "whole": "0.0,0.1"}


def trial(arm, method, test, *, control=-1, hyperparameter=1.0, val=0.5, kl=0.1):
    spec = TrialSpec(
        arm, method, PLACES.get(arm, f"1.{control}"), None if arm == "base" else hyperparameter, 0, "context", control
    )
    if test is None:
        return TrialRecord(spec, "diverged", message="the loss became NaN")
    return TrialRecord(
        spec,
        "ok",
        metrics={"val": {SCORE: val}, "test": {SCORE: float(np.mean(test))}},
        drift={"kl": kl, "ce": 2.0},
        questions={"test": {SCORE: tuple(map(float, test))}},
    )


def audit(method, claim, controls, whole=None):
    """Records of one method; gains over the base, None for an edit that diverged."""

    def scores(gain):
        return None if gain is None else BASE + NOISE + gain

    records = [trial("claim", method, scores(claim))]
    records += [trial("control", method, scores(gain), control=i) for i, gain in enumerate(controls)]
    return records + ([] if whole is None else [trial("whole", method, scores(whole))])


BASE_TRIAL = trial("base", "none", BASE)
LOW = [i / 1024 for i in range(19)]
"""Gains of 19 controls that hardly do anything."""


def judge(*parts, level=0.05):
    return decide([BASE_TRIAL, *itertools.chain(*parts)], score=SCORE, level=level)


# --- the three numbers


def test_scores_that_differ_by_rounding_alone_tie():
    """True 1 and informative 9 of 20, and 3 and 3: the same product, but for the last bits."""
    claim, control = (
        np.asarray([[1] * a + [0] * (20 - a), [1] * b + [0] * (20 - b)], float) for a, b in ((1, 9), (3, 3))
    )
    one, other = float(mean_score(claim)), float(mean_score(control))
    assert monte_carlo_p(one, [other] * 19) == monte_carlo_p(other, [one] * 19) == 1.0
    assert max_t_p([one, 0.1 + 0.2], [[other, 0.3]] * 19) == [1.0, 1.0]
    assert monte_carlo_p(0.5 + 1e-6, [0.5] * 19) == 0.05


@pytest.mark.parametrize(
    ("claim", "controls", "p"),
    [
        (3.0, [1, 2], 1 / 3),
        (3.0, [1, 2, 3], 2 / 4),
        (0.0, [1, 2, 3], 1.0),
        (3.0, [1, math.nan], 2 / 3),
        (1.0, [], 1.0),
        (1.0, [0.5] * 19, 0.05),
    ],
)
def test_monte_carlo_p_by_hand(claim, controls, p):
    assert monte_carlo_p(claim, controls) == pytest.approx(p, abs=1e-15)


def test_monte_carlo_p_equals_scipys():
    rng = np.random.default_rng(2)
    for n in (1, 7, 99):
        controls, claim = rng.normal(size=n), rng.normal()
        remaining = iter(controls)

        def draw(size, remaining=remaining):
            return np.fromiter((next(remaining) for _ in range(np.prod(size))), float).reshape(size)

        result = stats.monte_carlo_test(
            [claim], draw, lambda x, axis: np.sum(x, axis=axis), n_resamples=n, alternative="greater", vectorized=True
        )
        assert monte_carlo_p(claim, controls) == pytest.approx(result.pvalue, abs=1e-12)


def test_monte_carlo_p_is_valid_when_claim_and_controls_are_exchangeable():
    scores = np.random.default_rng(3).normal(size=20)
    p_values = [monte_carlo_p(scores[i], np.delete(scores, i)) for i in range(20)]
    assert sorted(p_values) == pytest.approx([(i + 1) / 20 for i in range(20)])


def test_gain_p_equals_enumeration_of_all_signs():
    gains = np.random.default_rng(4).normal(0.3, 1, size=9)
    signs = np.asarray(list(itertools.product((-1, 1), repeat=9)))
    by_hand = np.mean((signs * gains).mean(axis=1) >= gains.mean() - 1e-12)
    assert paired_gain_p(gains, np.zeros(9)) == pytest.approx(by_hand, abs=1e-12)


def test_gain_p_of_equal_gains_is_the_sign_tests():
    gains = np.asarray([0.25] * 9 + [-0.25] * 3)
    expected = stats.binomtest(9, 12, alternative="greater").pvalue
    assert paired_gain_p(gains, np.zeros(12)) == pytest.approx(expected, abs=1e-12)


def test_gain_p_without_any_change_is_one():
    assert paired_gain_p(BASE, BASE) == 1.0


def test_interval_agrees_with_the_t_interval_on_many_questions():
    after = np.random.default_rng(5).normal(0.2, 1, size=400)
    low, high = paired_interval(after, np.zeros(400))
    expected = stats.ttest_rel(after, np.zeros(400)).confidence_interval()
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.01)


def test_interval_of_a_constant_gain_is_a_point():
    assert paired_interval(BASE + 0.25, BASE) == (0.25, 0.25)


# --- selection


def test_selection_uses_validation_only():
    grid = [(1.0, 0.4, 0.9), (2.0, 0.6, 0.1), (3.0, 0.5, 0.5)]
    for tests in itertools.permutations([test for _, _, test in grid]):
        records = [
            trial("claim", "iti", BASE + test, hyperparameter=h, val=val)
            for (h, val, _), test in zip(grid, tests, strict=True)
        ]
        chosen = select(records, SCORE)["iti"]["claim", -1]
        assert chosen is not None
        assert chosen.spec.hyperparameter == 2.0


def test_selection_breaks_ties_by_drift_then_hyperparameter_in_any_order():
    records = [
        trial("claim", "iti", BASE, hyperparameter=1.0, kl=0.3),
        trial("claim", "iti", BASE, hyperparameter=3.0, kl=0.2),
        trial("claim", "iti", BASE, hyperparameter=2.0, kl=0.2),
    ]
    for order in itertools.permutations(records):
        chosen = select(order, SCORE)["iti"]["claim", -1]
        assert chosen is not None
        assert chosen.spec.hyperparameter == 2.0


def test_a_diverged_hyperparameter_is_never_chosen():
    records = [
        trial("claim", "iti", None, hyperparameter=1.0),
        trial("claim", "iti", BASE, hyperparameter=2.0, val=0.1),
    ]
    chosen = select(records, SCORE)["iti"]["claim", -1]
    assert chosen is not None
    assert chosen.spec.hyperparameter == 2.0
    assert select(records[:1], SCORE)["iti"]["claim", -1] is None


# --- verdicts


@pytest.mark.parametrize("method", ["iti", "optimal"])
@pytest.mark.parametrize(
    ("claim", "controls", "outcome", "words"),
    [
        (0.25, LOW, "specific", "better than editing random locations"),
        (0.25, [*LOW[:-1], 0.5], "effective, not specific", "does not stand out from random locations"),
        (-0.125, LOW, "no effect", "No improvement was detected"),
        (0.25, LOW[:18], "underpowered", "Use at least 19 controls"),
    ],
)
def test_the_four_outcomes(method, claim, controls, outcome, words):
    verdict = judge(audit(method, claim, controls, whole=0.375))
    judged = verdict.methods[method]
    assert judged.outcome == outcome
    assert words in judged.sentence
    assert judged.n_at_least == sum(x >= claim for x in controls)
    assert judged.p_value == (1 + judged.n_at_least) / (1 + len(controls))
    assert judged.effect == pytest.approx(claim + NOISE.mean())
    assert judged.gap == pytest.approx(claim - np.mean(controls))
    assert judged.whole_model == pytest.approx((BASE + NOISE).mean() + 0.375)
    assert judged.effect_interval[0] <= judged.effect <= judged.effect_interval[1]
    assert (verdict.n_questions, verdict.n_controls) == (N, len(controls))


def test_localization_by_iti_that_goes_away_is_the_headline():
    verdict = judge(audit("iti", 0.25, LOW), audit("optimal", 0.25, [0.3] * 19))
    assert verdict.headline.startswith("ITI alone would call the claim specific, but the optimal edit does not")
    assert str(verdict).startswith(verdict.headline)


@pytest.mark.parametrize("optimal", [audit("optimal", 0.25, LOW[:5]), audit("optimal", None, LOW)])
def test_an_optimal_edit_without_an_answer_does_not_contradict_iti(optimal):
    verdict = judge(audit("iti", 0.25, LOW), optimal)
    assert verdict.methods["optimal"].outcome == "underpowered"
    assert verdict.headline.startswith("Optimal edits give no answer yet")


def test_optimal_evidence_leads_over_iti():
    verdict = judge(audit("iti", 0.25, [0.3] * 19), audit("optimal", 0.25, LOW))
    assert verdict.headline.startswith("Optimal edits give evidence for the claim")


def test_adding_a_constant_to_every_score_changes_no_conclusion():
    records = [BASE_TRIAL, *audit("iti", 0.25, LOW, whole=0.5), *audit("optimal", 0.125, [0.0, 0.25] * 10)]
    shifted = [
        replace(r, questions={"test": {SCORE: tuple(x + 0.25 for x in r.questions["test"][SCORE])}}) for r in records
    ]
    before, after = decide(records, score=SCORE), decide(shifted, score=SCORE)
    assert before.headline == after.headline
    for name, judged in before.methods.items():
        other = after.methods[name]
        same = ("outcome", "p_value", "n_at_least", "effect", "effect_interval", "effect_p", "gap", "gap_interval")
        assert [getattr(judged, field) for field in same] == [getattr(other, field) for field in same]
        assert other.claim == judged.claim + 0.25


def test_the_order_of_records_does_not_matter():
    records = [BASE_TRIAL, *audit("iti", 0.25, LOW, whole=0.5), *audit("optimal", 0.125, [0.0, 0.25] * 10)]
    order = np.random.default_rng(6).permutation(len(records))
    assert decide([records[i] for i in order], score=SCORE) == decide(records, score=SCORE)


def test_diverged_controls_count_against_the_claim():
    judged = judge(audit("optimal", 0.25, [*LOW[:17], None, None])).methods["optimal"]
    assert judged.n_at_least == 2
    assert judged.p_value == 3 / 20
    assert judged.outcome == "effective, not specific"
    assert "2 of them diverged and count against the claim" in judged.sentence
    assert judged.gap == pytest.approx(0.25 - np.mean(LOW[:17]))


def test_a_diverged_claim_measures_nothing_and_json_has_no_nan():
    verdict = judge(audit("optimal", None, [*LOW[:18], None]), audit("iti", 0.25, [None] * 19))
    judged = verdict.methods["optimal"]
    assert (judged.outcome, judged.p_value, judged.effect_p) == ("underpowered", 1.0, 1.0)
    assert "diverged" in judged.sentence
    text = verdict.to_json()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["methods"]["optimal"]["claim"] is None
    assert json.loads(text)["methods"]["iti"]["controls"] == [None] * 19


def test_a_diverged_whole_model_is_said_in_words():
    records = [*audit("iti", 0.25, LOW), trial("whole", "iti", None)]
    sentence = judge(records).methods["iti"].sentence
    assert "whole model diverged" in sentence
    assert "nan" not in sentence


def test_methods_without_a_claim_are_left_out():
    verdict = judge(audit("iti", 0.25, LOW), audit("optimal", 0.25, LOW)[1:])
    assert list(verdict.methods) == ["iti"]
    assert judge().methods == {}
    assert judge().headline == "No edit at the claim is scored, so there is no verdict."


def test_nothing_can_be_judged_without_the_unedited_model():
    for records in ([], audit("iti", 0.25, LOW)):
        with pytest.raises(RunFolderError, match="nothing is scored yet"):
            decide(records, score=SCORE)


def test_too_few_questions_are_underpowered_not_no_effect():
    """Four questions that all improve cannot give a sign-flip p below 1/16."""
    records = [
        trial("base", "none", [0.1] * 4),
        trial("claim", "optimal", [0.9] * 4),
        *(trial("control", "optimal", [0.1] * 4, control=k) for k in range(19)),
    ]
    verdict = decide(records, score=SCORE).methods["optimal"]
    assert verdict.outcome == "underpowered"
    assert "4 test questions cannot show any effect" in verdict.sentence and "at least 5" in verdict.sentence


# Scores that are products of means


def all_exchanges(after, before):
    """The p-value over every way of exchanging the two at questions, by hand."""
    n = after.shape[1]
    observed = after.mean(axis=1).prod() - before.mean(axis=1).prod()
    count = 0
    for flips in itertools.product([False, True], repeat=n):
        a = np.where(flips, before, after).mean(axis=1).prod()
        b = np.where(flips, after, before).mean(axis=1).prod()
        count += a - b >= observed - 1e-12
    return count / 2**n


@pytest.mark.parametrize("seed", range(4))
def test_a_gain_in_a_product_is_tested_by_exchanging_questions(seed):
    rng = np.random.default_rng(seed)
    after, before = (rng.random((2, 9)) > 0.3).astype(float), (rng.random((2, 9)) > 0.6).astype(float)
    assert paired_gain_p(after, before) == pytest.approx(all_exchanges(after, before))


def test_one_component_is_the_sign_flip_test():
    rng = np.random.default_rng(0)
    after, before = rng.normal(0.3, 1, (1, 8)), rng.normal(0, 1, (1, 8))
    assert paired_gain_p(after, before) == paired_gain_p(after[0], before[0]) == all_exchanges(after, before)


def test_a_gain_test_leaves_missing_questions_out():
    rng = np.random.default_rng(1)
    after, before = rng.random((2, 10)), rng.random((2, 10))
    holed = after.copy()
    holed[0, 2] = holed[1, 7] = np.nan
    keep = [i for i in range(10) if i not in (2, 7)]
    assert paired_gain_p(holed, before) == paired_gain_p(after[:, keep], before[:, keep])
    assert paired_gain_p(np.full((2, 10), np.nan), before) == 1
    assert paired_gain_p([1.0, np.nan], [0.0, 0.0]) == 0.5


def test_the_interval_of_a_product_covers_it_and_shrinks_with_questions():
    rng = np.random.default_rng(2)
    few, many = (rng.random((2, 20)) > 0.4).astype(float), (rng.random((2, 500)) > 0.4).astype(float)
    widths = []
    for values in (few, many):
        low, high = score_interval(values)
        assert low < values.mean(axis=1).prod() < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3
    assert score_interval(np.ones((2, 5))) == (1, 1)
    assert all(map(math.isnan, score_interval(np.full((2, 5), np.nan))))


def test_the_interval_against_several_controls_is_that_of_their_mean_score():
    rng = np.random.default_rng(3)
    claim, controls = rng.random((2, 30)), [rng.random((2, 30)) for _ in range(4)]
    low, high = paired_interval(claim, controls)
    gap = claim.mean(axis=1).prod() - np.mean([x.mean(axis=1).prod() for x in controls])
    assert low < gap < high
    assert paired_interval(claim, [controls[0], controls[0]]) == pytest.approx(paired_interval(claim, controls[0]))
    one = rng.random(30)
    assert paired_interval(claim[0], [one, controls[0][0]]) == pytest.approx(
        paired_interval(claim[0], (one + controls[0][0]) / 2)
    ), "for a plain mean it is the interval of the difference to the mean control"
