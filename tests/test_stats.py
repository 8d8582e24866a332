"""Statistics against hand counts, SciPy and what must hold whatever the numbers are."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from locaudit.errors import RunFolderError
from locaudit.location import Location
from locaudit.records import Place, TrialRecord, TrialSpec
from locaudit.registry import SCORES
from locaudit.stats import (
    JUDGED,
    Design,
    MethodFacts,
    Score,
    crossed_interval,
    decide,
    estimate,
    gain_p,
    judged_metrics,
    judged_scores,
    max_t_p,
    mean_score,
    monte_carlo_p,
    paired_gain_p,
    resolve_score,
    score_values,
    select,
)
from locaudit.stats.changes import count_changes
from locaudit.stats.intervals import pseudo_values
from locaudit.stats.repeats import Repeat, combine_repeats
from locaudit.stats.resample import N_RESAMPLES
from locaudit.stats.selection import choose
from locaudit.stats.sequential import Monitor

N = 128
SCORE = "mc2"
BASE = np.random.default_rng(0).integers(16, 33, N) / 64
"""Multiples of 1/64, so that sums, means and shifts are exact."""
NOISE = np.random.default_rng(1).integers(-2, 3, N) / 64


CLAIM = Location(((0, 0),))
PLACES = {"base": None, "claim": CLAIM, "whole": Location.whole(), "rest": CLAIM.rest()}
METHODS = {"iti": MethodFacts("ITI"), "optimal": MethodFacts("Optimal edit", trained=True)}


def trial(arm, method, test, *, control=-1, null="anywhere", hyperparameter=1.0, val=0.5, kl=0.1):
    place = Location(((0 if null == "layers" else 1, control + 1),)) if arm == "control" else PLACES[arm]
    strength, null = None if arm == "base" else hyperparameter, null if arm == "control" else ""
    spec = TrialSpec(arm, method, place, strength, 0, "context", control, null=null)
    if test is None:
        return TrialRecord(spec, "diverged", message="the loss became NaN")
    return TrialRecord(
        spec,
        "ok",
        metrics={"val": {SCORE: val}, "test": {SCORE: float(np.mean(test))}},
        drift={"kl": kl, "ce": 2.0},
        questions={"test": {SCORE: tuple(map(float, test))}},
    )


def audit(method, claim, controls, whole=None, **nulls):
    """Records of one method; gains over the base, None for an edit that diverged. `nulls`: other nulls' controls."""

    def scores(gain):
        return None if gain is None else BASE + NOISE + gain

    records = [trial("claim", method, scores(claim))]
    for null, gains in {"anywhere": controls, **nulls}.items():
        records += [trial("control", method, scores(gain), control=i, null=null) for i, gain in enumerate(gains)]
    return records + ([] if whole is None else [trial("whole", method, scores(whole))])


BASE_TRIAL = trial("base", "none", BASE)
LOW = [i / 1024 for i in range(19)]
"""Gains of 19 controls that hardly do anything."""


def judge(*parts, level=0.05):
    return decide([BASE_TRIAL, *itertools.chain(*parts)], score=SCORE, level=level, methods=METHODS)


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


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 4e-8), ("float16", 1e-5), ("bfloat16", 1e-4)])
@pytest.mark.parametrize("seed", range(3))
def test_edits_that_do_nothing_tie(dtype, noise, seed):
    """Every edit differs from the unedited model by rounding alone, which may always be upwards: p is no lottery."""
    rng = np.random.default_rng(seed)
    arms = [BASE + noise * rng.uniform(0.5, 1.5, N) for _ in range(41)]
    records = [BASE_TRIAL, trial("claim", "iti", arms[0]), trial("whole", "iti", arms[40])]
    records += [trial("control", "iti", x, control=i) for i, x in enumerate(arms[1:20])]
    records += [trial("claim", "optimal", arms[20])]
    records += [trial("control", "optimal", x, control=i) for i, x in enumerate(arms[21:40])]
    found = decide(records, score=SCORE, design=Design(dtype=dtype), methods=METHODS)
    for v in found.methods.values():
        assert (v.outcome, v.effect_p, v.first.p_value, v.first.p_adjusted) == ("CANNOT TELL", 1.0, 1.0, 1.0)
        assert v.first.n_at_least == 19 and math.isnan(v.first.p_new_place)
    monitor = Monitor("fixed", 19, 0.05, tolerance=found.tolerance)
    for place, x in [(Place("claim"), arms[0]), *((Place("control", i), arms[1 + i]) for i in range(19))]:
        monitor.add(place, float(x.mean()))
    assert monitor.seen.n_at_least == 19
    repeats = combine_repeats([Repeat(found, CLAIM, {}), Repeat(found, CLAIM, {})])
    assert all(m.nulls["anywhere"].p_value == 1.0 for m in repeats.methods.values())
    assert all(m.nulls["anywhere"].n_at_least == 19 for m in repeats.methods.values())
    strengths = [trial("claim", "iti", BASE, hyperparameter=h, val=0.5 + noise * h) for h in (1.0, 2.0, 3.0)]
    assert choose(strengths, SCORE, found.tolerance).spec.hyperparameter == 1.0
    assert (
        choose([trial("claim", "iti", BASE, hyperparameter=2.0, val=0.6), *strengths], SCORE, 1e-3).spec.hyperparameter
        == 2.0
    )


def test_a_tolerance_never_lowers_p():
    """It counts more controls, and more arrangements, as reaching the claim: p stays valid."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores, tolerance = rng.normal(size=20).round(1), float(rng.uniform(0, 0.3))
        assert monte_carlo_p(scores[0], scores[1:], tolerance) >= monte_carlo_p(scores[0], scores[1:])
        one, two = rng.normal(0.1, 1, (2, 10))
        assert paired_gain_p(one, two, tolerance=tolerance) >= paired_gain_p(one, two)
        arms = rng.normal(size=(20, 3)).round(1)
        assert min(np.subtract(max_t_p(arms[0], arms[1:], tolerance), max_t_p(arms[0], arms[1:]))) >= 0


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


def test_monte_carlo_p_is_valid_when_claim_and_controls_are_exchangeable():
    scores = np.random.default_rng(3).normal(size=20)
    p_values = [monte_carlo_p(scores[i], np.delete(scores, i)) for i in range(20)]
    assert sorted(p_values) == pytest.approx([(i + 1) / 20 for i in range(20)])


def test_gain_p_without_any_change_is_one():
    assert paired_gain_p(BASE, BASE) == 1.0


def test_the_interval_of_a_constant_gain_is_not_a_point():
    """Other questions may behave otherwise: at most a share 1 - .025^(1/n) of them does (Clopper-Pearson)."""
    low, high = estimate(BASE + 0.25, BASE).interval()
    share = stats.binomtest(0, N).proportion_ci().high
    assert (low, high) == pytest.approx((0.25 - share * 1.25, 0.25 + share * 0.75))


def exchanged_by_scipy(after, before):
    """The test as SciPy does it, question numbers exchanged and looked up: the larger p, raw or studentised."""
    both, n = np.concatenate([after, before], axis=1), after.shape[1]

    def gains(x, y, axis):
        return mean_score(both[:, x]) - mean_score(both[:, y])

    def studentised(x, y, axis):
        spread = (pseudo_values(both[:, x]) - pseudo_values(both[:, y])).std(axis=-1)
        return gains(x, y, axis) / np.maximum(spread, 1e-12)

    def share(statistic, shrink):
        """SciPy's p-value, with the observed statistic made smaller."""
        found = stats.permutation_test(
            (np.arange(n), np.arange(n, 2 * n)),
            statistic,
            permutation_type="samples",
            alternative="greater",
            vectorized=True,
            n_resamples=N_RESAMPLES,
            rng=np.random.default_rng(0),
        )
        reached, sampled = (found.null_distribution >= shrink * found.statistic - 1e-9), 2**n > N_RESAMPLES
        return (reached.sum() + sampled) / (reached.size + sampled)

    return share(gains, 1.0) if len(after) == 1 else max(share(gains, 1.0), share(studentised, math.sqrt(1 - 1 / n)))


@pytest.mark.parametrize("n", [2, 9, 13, 14, 40])
@pytest.mark.parametrize("n_components", [1, 2])
def test_the_exchanges_are_scipys(n, n_components):
    rng = np.random.default_rng(n)
    for _ in range(3 if n < 20 else 1):
        yes = rng.random((2, n_components, n)) > 0.4
        for after, before in (rng.random((2, n_components, n)) + [[[0.05]], [[0.0]]], yes.astype(float)):
            assert paired_gain_p(after, before) == pytest.approx(exchanged_by_scipy(after, before), abs=1e-12)


# --- selection


@pytest.mark.parametrize(
    "grid",
    [
        [{"val": 0.4}, {"val": 0.6}, {"val": 0.5}],  # by validation only: test scores come in any order
        [{"kl": 0.3}, {"kl": 0.2}, {"kl": 0.2}],  # ties: by drift, then by hyperparameter
        [{"test": None, "val": 0.9}, {"val": 0.1}],  # never a diverged one
    ],
)
def test_selection_by_validation_then_drift_then_hyperparameter(grid):
    for tests in itertools.permutations([BASE + 0.9, BASE + 0.1, BASE + 0.5], len(grid)):
        records = [
            trial("claim", "iti", **{"test": test, "hyperparameter": float(h), **given})
            for h, (test, given) in enumerate(zip(tests, grid, strict=True), start=1)
        ]
        for order in itertools.permutations(records):
            chosen = select(order, SCORE)["iti"][Place("claim")]
            assert chosen is not None
            assert chosen.spec.hyperparameter == 2.0


def test_a_place_where_all_trials_diverged_has_no_choice():
    assert select([trial("claim", "iti", None)], SCORE)["iti"][Place("claim")] is None


# --- verdicts


@pytest.mark.parametrize("method", ["iti", "optimal"])
@pytest.mark.parametrize(
    ("claim", "controls", "outcome", "words"),
    [
        (0.25, LOW, "SPECIFIC", "the best edit found at the claim works better than random places."),
        (0.25, [0.25] * 19, "NOT SPECIFIC", "random places do as well (19 of 19)"),
        (0.25, [*LOW[:-1], 0.5], "CANNOT TELL", "1 of 19 controls are as good"),
        (-0.125, LOW, "NO GAIN SHOWN", "shows no gain"),
        (0.25, LOW[:18], "CANNOT TELL", "Set controls to at least 19"),
    ],
)
def test_the_outcomes(method, claim, controls, outcome, words):
    verdict = judge(audit(method, claim, controls, whole=0.375))
    judged = verdict.methods[method]
    assert judged.outcome == outcome
    assert words in judged.reason
    assert judged.first.n_at_least == sum(x >= claim for x in controls)
    assert judged.first.p_value == (1 + judged.first.n_at_least) / (1 + len(controls))
    assert judged.effect == pytest.approx(claim + NOISE.mean())
    assert judged.first.lead == pytest.approx(claim - np.mean(controls))
    assert judged.whole_model == pytest.approx((BASE + NOISE).mean() + 0.375)
    assert judged.effect_interval[0] <= judged.effect <= judged.effect_interval[1]
    assert (verdict.n_questions, verdict.n_controls) == (N, len(controls))


@pytest.mark.parametrize(
    ("iti", "optimal", "headline"),
    [
        ((0.25, LOW), (0.25, [0.3] * 19), "NOT SPECIFIC: "),
        ((0.25, LOW), (0.25, LOW[:5]), "CANNOT TELL: 5 controls cannot show anything"),
        ((0.25, LOW), (None, LOW), "CANNOT TELL: Every edit tried at the claim diverged"),
        ((0.25, [0.3] * 19), (0.25, LOW), "SPECIFIC: "),
    ],
)
def test_trained_edits_lead_the_headline(iti, optimal, headline):
    verdict = judge(audit("iti", *iti), audit("optimal", *optimal))
    assert verdict.headline.startswith(headline)
    assert str(verdict).startswith(verdict.headline)
    assert verdict.outcome == verdict.methods["optimal"].outcome
    assert verdict.methods["iti"].outcome in str(verdict)


def test_adding_a_constant_to_every_score_changes_no_conclusion():
    records = [BASE_TRIAL, *audit("iti", 0.25, LOW, whole=0.5), *audit("optimal", 0.125, [0.0, 0.25] * 10)]
    shifted = [
        replace(r, questions={"test": {SCORE: tuple(x + 0.25 for x in r.questions["test"][SCORE])}}) for r in records
    ]
    before, after = decide(records, score=SCORE), decide(shifted, score=SCORE)
    assert before.headline == after.headline
    for name, judged in before.methods.items():
        other = after.methods[name]
        assert judged.outcome == other.outcome
        assert judged.effect_interval == pytest.approx(other.effect_interval)
        assert (judged.effect, judged.effect_p) == (other.effect, other.effect_p)
        same = ("p_value", "n_at_least", "lead", "lead_interval")
        for field in same:
            assert getattr(judged.first, field) == pytest.approx(getattr(other.first, field))
        assert other.claim == judged.claim + 0.25


def test_the_order_of_records_does_not_matter():
    records = [BASE_TRIAL, *audit("iti", 0.25, LOW, whole=0.5), *audit("optimal", 0.125, [0.0, 0.25] * 10)]
    order = np.random.default_rng(6).permutation(len(records))
    shuffled = decide([records[i] for i in order], score=SCORE, methods=METHODS)
    # By repr: what was not tried is NaN, which since Python 3.13 keeps dataclasses from being equal.
    assert repr(shuffled) == repr(decide(records, score=SCORE, methods=METHODS))
    assert list(shuffled.methods) == list(METHODS)


def test_diverged_controls_count_against_the_claim():
    judged = judge(audit("optimal", 0.25, [*LOW[:17], None, None])).methods["optimal"]
    assert judged.first.n_at_least == 2
    assert judged.first.p_value == 3 / 20
    assert judged.outcome == "CANNOT TELL"
    assert "2 of 19 controls are as good" in judged.reason
    assert judged.first.lead == pytest.approx(0.25 - np.mean(LOW[:17]))


def test_a_diverged_claim_measures_nothing_and_json_has_no_nan():
    verdict = judge(audit("optimal", None, [*LOW[:18], None]), audit("iti", 0.25, [None] * 19))
    judged = verdict.methods["optimal"]
    assert (judged.outcome, judged.first.p_value, judged.effect_p) == ("CANNOT TELL", 1.0, 1.0)
    assert "diverged" in judged.reason
    text = verdict.to_json()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["methods"]["optimal"]["claim"] is None
    assert json.loads(text)["methods"]["iti"]["nulls"]["anywhere"]["controls"] == [None] * 19


def test_a_diverged_whole_model_is_said_in_words():
    records = [*audit("iti", 0.25, LOW), trial("whole", "iti", None)]
    verdict = judge(records)
    assert verdict.methods["iti"].question("moves").seen == "diverged"
    assert "nan" not in str(verdict)


def test_methods_without_a_claim_are_left_out():
    verdict = judge(audit("iti", 0.25, LOW), audit("optimal", 0.25, LOW)[1:])
    assert list(verdict.methods) == ["iti"]
    assert judge().methods == {}
    assert judge().headline == str(judge()) == "CANNOT TELL: no edit at the claim is scored yet."


def test_nothing_can_be_judged_without_the_unedited_model():
    for records in ([], audit("iti", 0.25, LOW)):
        with pytest.raises(RunFolderError, match="the unedited model has no scores yet"):
            decide(records, score=SCORE)


def test_too_few_questions_cannot_tell():
    """Four questions that all improve cannot give a sign-flip p below 1/16."""
    records = [
        trial("base", "none", [0.1] * 4),
        trial("claim", "optimal", [0.9] * 4),
        *(trial("control", "optimal", [0.1] * 4, control=k) for k in range(19)),
    ]
    verdict = decide(records, score=SCORE).methods["optimal"]
    assert verdict.outcome == "CANNOT TELL"
    assert verdict.reason == "4 test questions cannot show any gain at level 0.05. Use at least 5."


# --- any methods, and scores of which lower ones support the claim


def judged_trial(arm, method, gain, rng, control=-1, lost=0):
    truth, info = (np.clip(rng.random(40) * 0.6 + shift, 0, 1).tolist() for shift in (gain, 0.3 + gain / 2))
    for i in rng.integers(0, 40, lost):
        truth[i] = None
    metrics = judged_metrics({"truth": truth, "info": info})
    return replace(trial(arm, method, BASE, control=control), questions={"test": metrics})


@pytest.mark.parametrize("lost", [0, 2])
@pytest.mark.parametrize("score", ["info_truth", "info_truth_probability", "truth"])
def test_a_verdict_is_made_of_pairwise_comparisons(score, lost):
    rng = np.random.default_rng(0)
    gains = {"claim": 0.3, "whole": 0.35, "rest": 0.1}
    records = [judged_trial("base", "none", 0.0, rng, lost=lost)]
    records += [judged_trial(arm, "optimal", gain, rng, lost=lost) for arm, gain in gains.items()]
    records += [judged_trial("control", "optimal", 0.3 * rng.random(), rng, k, lost=lost) for k in range(25)]
    base, claim, whole, rest, *controls = (score_values(r.questions["test"], score) for r in records)
    v = decide(records, score=score, methods=METHODS).methods["optimal"]
    gain, loss = estimate(claim, base), estimate(rest, whole)
    questions = {question.name: question for question in v.questions}
    assert list(questions) == ["moves", "works", "anywhere", "needed"]
    assert (v.effect, v.effect_p) == (pytest.approx(gain.value), paired_gain_p(claim, base))
    assert v.effect_interval == questions["works"].interval == pytest.approx(gain.interval(), abs=1e-12)
    lead = crossed_interval(claim, np.stack(controls))
    assert questions["anywhere"].interval == v.first.lead_interval == pytest.approx(lead.interval)
    assert questions["needed"].interval == pytest.approx(loss.interval(), abs=1e-12)


def test_methods_are_named_by_title_and_the_trained_one_leads():
    facts = {
        "a": MethodFacts("Lasso"),
        "b": MethodFacts("Best edit", trained=True),
        "c": MethodFacts("Given edit", null="directions"),
    }
    parts = [audit("c", 0.25, (), directions=LOW), audit("a", 0.25, LOW), audit("b", 0.25, [0.3] * 19)]
    verdict = decide([BASE_TRIAL, *itertools.chain(*parts)], score=SCORE, methods=facts)
    assert list(verdict.methods) == ["a", "b", "c"]
    assert verdict.headline.startswith("NOT SPECIFIC: the best edit found at the claim works, and random places do")
    assert verdict.methods["c"].question("directions").asked == "better than random directions at the claim?"
    assert verdict.methods["a"].question("anywhere").asked == "better than random places?"
    assert list(verdict.contrasts) == ["a"]  # the controls of c are others
    alone = decide([BASE_TRIAL, *parts[0]], score=SCORE, methods=facts)
    assert alone.headline == "SPECIFIC: the edit works better than random directions at the claim."
    unknown = decide([BASE_TRIAL, *parts[0], *parts[1]], score=SCORE)
    assert list(unknown.methods) == ["c", "a"]
    assert unknown.headline.startswith("SPECIFIC: the best edit found at the claim works better than random places")


@pytest.mark.parametrize("rule", ["fixed", "curtailed"])
@pytest.mark.parametrize(
    ("claim", "controls"), [(0.25, LOW), (0.25, [*LOW[:-1], 0.5]), (-0.125, LOW), (0.25, [None, *LOW])]
)
def test_lower_scores_support_a_claim_as_higher_ones_do(claim, controls, rule):
    """Every score x against 1 - x: the same verdict, with the signs of what it tells turned."""
    records = [BASE_TRIAL, *audit("optimal", claim, controls)]
    turned = [
        replace(r, questions={"test": {SCORE: tuple(1 - x for x in r.questions["test"][SCORE])}} if r.questions else {})
        for r in records
    ]
    higher, lower = (
        decide(several, score=SCORE, design=Design(rule=rule), methods={"optimal": MethodFacts("Edit", supports)})
        for several, supports in ((records, "higher"), (turned, "lower"))
    )
    up, down = higher.methods["optimal"], lower.methods["optimal"]
    assert (up.outcome, up.effect_p) == (down.outcome, pytest.approx(down.effect_p))
    same = ("p_value", "p_no", "n_at_least", "n_used", "p_new_place")
    assert [getattr(up.first, x) for x in same] == pytest.approx([getattr(down.first, x) for x in same])
    assert down.claim == pytest.approx(1 - up.claim)
    assert (down.effect, down.first.lead) == pytest.approx((-up.effect, -up.first.lead))
    assert down.effect_interval == pytest.approx(tuple(-x for x in reversed(up.effect_interval)))
    for question, other in zip(down.questions, up.questions, strict=True):
        assert (question.name, question.answer, question.open) == (other.name, other.answer, other.open)
        assert question.p == pytest.approx(other.p, nan_ok=True)
        assert question.estimate == pytest.approx(-other.estimate)
    assert down.question("works").asked == "does it fall without the claim?"
    if down.outcome == "SPECIFIC":
        assert down.reason == "the edit of the claim lowers it more than random places."


def test_any_aspects_may_be_judged():
    said = {"tone": [0.9, 0.2, None, 0.7], "truth": [0.6, 0.6, 0.1, 0.1]}
    metrics = judged_metrics(said)
    assert set(metrics) == {"tone", "tone_probability", "truth", "truth_probability"}
    each = ("truth", "truth_probability", "judged", "tone", "tone_probability")
    assert judged_scores(metrics) == ("judged_probability", *each)
    assert resolve_score("auto", said) == "judged_probability"
    assert float(mean_score(score_values(metrics, "judged_probability"))) == pytest.approx(0.6 * 0.35)
    assert float(mean_score(score_values(metrics, "judged"))) == pytest.approx(2 / 3 * 1 / 2)
    assert judged_scores(judged_metrics({"tone": [0.5]})) == ("tone_probability", "tone")
    both = judged_metrics({"truth": [0.5], "info": [0.5]})
    assert judged_scores(both) == JUDGED
    with SCORES.temporary("calm", Score("Calm", ("tone_probability",), needs=("tone",))):
        assert "calm" in judged_scores(metrics)
        assert float(mean_score(score_values(metrics, "calm"))) == pytest.approx(0.6)


# Scores that are products of means


def studentised_gain(after, before):
    """Gain, and gain over its standard error by the delta method for a product of two means, up to sqrt(n)."""
    gain = after.mean(axis=1).prod() - before.mean(axis=1).prod()
    if len(after) == 1:
        return gain, gain
    influence = sum(
        sign * (x[0] * x[1].mean() + x[1] * x[0].mean()) for sign, x in ((1, after), (-1, before))
    )  # (questions,), up to a constant
    return gain, gain / max(influence.std(), 1e-12)


def all_exchanges(after, before):
    """The larger p-value over every way of exchanging the two at questions, by hand."""
    n = after.shape[1]
    gain, studentised = studentised_gain(after, before)
    # the observed standard error is that of a sample, with n - 1
    observed = gain, studentised * (math.sqrt(1 - 1 / n) if len(after) > 1 else 1)
    count = np.zeros(2)
    for flips in itertools.product([False, True], repeat=n):
        found = studentised_gain(np.where(flips, before, after), np.where(flips, after, before))
        count += np.greater_equal(found, np.subtract(observed, 1e-9))
    return count.max() / 2**n


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
        low, high = estimate(values).interval()
        assert low < values.mean(axis=1).prod() < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3
    assert estimate(np.ones((2, 5))).interval() == pytest.approx((0.025 ** (1 / 5), 1))
    assert all(map(math.isnan, estimate(np.full((2, 5), np.nan)).interval()))


def test_the_interval_against_several_controls_is_that_of_their_mean_score():
    rng = np.random.default_rng(3)
    claim, controls = rng.random((2, 30)), [rng.random((2, 30)) for _ in range(4)]
    low, high = estimate(claim, controls).interval()
    gap = claim.mean(axis=1).prod() - np.mean([x.mean(axis=1).prod() for x in controls])
    assert low < gap < high
    twice, once = estimate(claim, [controls[0], controls[0]]), estimate(claim, controls[0])
    assert twice.interval() == pytest.approx(once.interval())
    one = rng.random(30)
    assert estimate(claim[0], [one, controls[0][0]]).interval() == pytest.approx(
        estimate(claim[0], (one + controls[0][0]) / 2).interval()
    ), "for a plain mean it is the interval of the difference to the mean control"


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


def test_gain_p_of_equal_gains_is_the_sign_tests():
    gains = np.asarray([0.25] * 9 + [-0.25] * 3)
    expected = stats.binomtest(9, 12, alternative="greater").pvalue
    assert paired_gain_p(gains, np.zeros(12)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_a_gain_in_a_product_is_tested_by_exchanging_questions(seed):
    rng = np.random.default_rng(seed)
    after, before = (rng.random((2, 9)) > 0.3).astype(float), (rng.random((2, 9)) > 0.6).astype(float)
    assert paired_gain_p(after, before) == pytest.approx(all_exchanges(after, before))


def test_a_gain_that_few_questions_undo_is_not_shown():
    """Nineteen of twenty questions gain .03, and one loses as much as all of them gain."""
    unbounded, found = (-math.inf, math.inf), np.zeros((300, 2), dtype=bool)
    rng, before = np.random.default_rng(0), np.zeros(100)
    for i in range(len(found)):
        after = rng.normal(0.6 * 0.05 / 0.95, 0.03, 100)
        after[rng.random(100) < 0.05] = -0.6
        both = {"seed": i % 8, "n_resamples": 399}
        found[i] = gain_p(after, before, bounds=unbounded, **both) <= 0.05, paired_gain_p(after, before, **both) <= 0.05
    assert found[:, 0].mean() <= 0.075 < found[:, 1].mean()  # the exchange test takes the gain to be symmetric
    same = rng.normal(0.1, 1, 100)
    assert gain_p(same, before, bounds=unbounded) == pytest.approx(paired_gain_p(same, before), abs=0.02)
    assert gain_p(before + 0.5, before, bounds=unbounded) == paired_gain_p(before + 0.5, before)  # no interval


def test_questions_made_worse_and_better_by_hand():
    before = np.array([[1.0, 1.0, 0.0, 0.0, np.nan, 0.5], [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]])
    after = np.array([[1.0, 0.0, 1.0, 1.0, 1.0, 0.5 + 4e-9], [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]])
    found = count_changes(after, before, tolerance=1e-9)  # a product over components, at each question
    assert (found.n, found.worse, found.better) == (5, 0.2, 0.2)
    assert found.worse_interval == pytest.approx((0.0362, 0.6245), abs=1e-4)  # Wilson, by hand
    assert count_changes(after, before, tolerance=1e-10).better == 0.4  # beyond rounding
    assert np.isnan(count_changes(after * np.nan, before, 1e-9).worse)
    for n_better in range(8):
        found = count_changes(np.arange(7.0)[None] < n_better, np.zeros((1, 7)), 1e-9)
        expected = stats.binomtest(n_better, 7).proportion_ci(method="wilson")
        assert found.better_interval == pytest.approx(tuple(expected), abs=1e-15)
