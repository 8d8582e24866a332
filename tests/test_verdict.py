"""The questions about a claim: yes and no only where a test excludes the opposite; and the outcome that follows."""

import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from locaudit.location import Location
from locaudit.records import Place
from locaudit.stats import Design, MethodFacts, find_outcome
from locaudit.stats.measured import Measured
from locaudit.stats.questions import ask, outcome_of
from locaudit.stats.selection import CLAIM as CLAIM_PLACE
from locaudit.stats.sequential import Null
from locaudit.stats.words import explain

N = 200
BASE = np.random.default_rng(0).random(N) / 2
CLAIM = Location(((0, 0),))
FACTS = MethodFacts("Optimal edit", trained=True)


def measured(base, claim, controls, *, whole=None, rest=None, facts=FACTS, bounds=(0.0, 1.0), more=None, **design):
    arms = {"base": base, "claim": claim, "whole": whole, "rest": rest}
    return Measured(
        method="optimal",
        facts=facts,
        arms={Place(arm): x for arm, x in arms.items() if x is not None}
        | {Place("control", i, "anywhere"): x for i, x in controls.items()}
        | (more or {}),
        locations={CLAIM_PLACE: CLAIM},
        level=0.05,
        bounds=bounds,
        design=Design(**design),
    )


def scores(gain, noise, seed=7):
    return None if gain is None else (BASE + gain + np.random.default_rng(seed).normal(0, noise, N))[None]


def measure(
    claim=0.3, controls=(0.0,) * 39, whole=0.3, rest=0.3, population=None, noise=0.05, n_planned=None, **settings
):
    others = {
        i: np.full((1, N), math.nan) if gain is None else scores(gain, noise, seed=i) for i, gain in enumerate(controls)
    }
    return measured(
        BASE[None], scores(claim, noise), others, whole=scores(whole, noise, 8), rest=scores(rest, noise, 9),
        nulls={"anywhere": Null(n_planned or len(controls), population)}, **settings,
    )  # fmt: skip


def answers(m, flags=()):
    return {question.name: question.answer for question in ask(m, flags)}


def told(m, flags=()):
    """Outcome, and its sentence."""
    questions = ask(m, flags)
    outcome = outcome_of(questions)
    return outcome, explain(m, outcome, questions)


def opened(m, name, flags=()):
    """Why a question is open, and the remedy; empty texts if it is not."""
    (question,) = [question for question in ask(m, flags) if question.name == name]
    assert (question.answer == "open") == bool(question.why) == bool(question.remedy)
    return question.open, question.why, question.remedy


def test_a_place_that_matters():
    m = measure(rest=0.0)
    assert answers(m) == {"moves": "yes", "works": "yes", "anywhere": "yes", "needed": "open"}
    assert opened(m, "needed")[0] == "rests"  # without random places it might be as bad
    assert told(m) == ("SPECIFIC", "the best edit found at the claim works better than random places.")


def test_a_place_like_any_other():
    m = measure(controls=(0.3,) * 39)
    assert answers(m) == {"moves": "yes", "works": "yes", "anywhere": "no", "needed": "no"}
    assert told(m)[0] == "NOT SPECIFIC"


def test_an_edit_that_does_nothing_where_another_works():
    m = measure(claim=0.0)
    assert answers(m) == {"moves": "yes", "works": "no", "anywhere": "-", "needed": "no"}
    outcome, sentence = told(m)
    assert outcome == "NO GAIN SHOWN" and sentence.startswith("edits can move this behaviour, but the best edit found")


def test_no_answer_is_no_if_no_edit_moves_the_behaviour():
    m = measure(claim=0.0, whole=0.0, rest=0.0)
    assert set(answers(m).values()) == {"open", "-"}
    assert told(m)[0] == "CANNOT TELL"
    assert opened(m, "works")[0] == opened(m, "moves")[0] == "nothing"
    assert opened(m, "needed")[0] == "no_whole_needed"
    assert opened(measure(claim=0.0, whole=None, rest=None), "works")[0] == "no_whole"


def test_a_gain_that_is_neither_shown_nor_excluded_is_open():
    name, why, remedy = opened(measure(claim=0.2, whole=0.4, noise=1.0), "works")
    assert name == "wide"
    assert "neither shown nor excluded" in why and "split.max_test" in remedy


def test_an_unedited_model_at_the_best_possible_score_cannot_gain():
    ones = np.ones((1, N))
    m = measured(ones, ones, {i: ones for i in range(19)}, whole=ones)
    assert opened(m, "works")[0] == "at_best"
    assert told(m) == (
        "CANNOT TELL",
        "The unedited model already scores 1.00, and the best possible score is 1.00. Use harder questions, or another "
        "score (--score).",
    )
    lower = MethodFacts("Ablation", "lower")
    zeros = np.zeros((1, N))
    m = measured(zeros, zeros, {i: zeros for i in range(19)}, whole=zeros, facts=lower, bounds=(-1.0, 0.0))
    assert opened(m, "works")[0] == "at_best"


def test_controls_at_the_best_possible_score_cannot_be_beaten():
    ones = np.ones((1, N))
    m = measured(BASE[None], ones, {i: ones for i in range(19)}, whole=ones)
    assert opened(m, "anywhere")[0] == "controls_at_best"
    unbounded = measured(BASE[None], ones, {i: ones for i in range(19)}, whole=ones, bounds=(-math.inf, math.inf))
    assert answers(unbounded)["anywhere"] == "no"
    half = {i: ones if i < 9 else BASE[None] for i in range(19)}
    assert answers(measured(BASE[None], ones, half, whole=ones))["anywhere"] == "no"  # 9 of 19 reach it: not half


@pytest.mark.parametrize(
    ("n_reach", "n", "population", "answer"),
    [
        (0, 19, None, "yes"), (1, 19, None, "open"), (3, 19, None, "open"), (4, 19, None, "no"),
        (1, 39, None, "yes"), (2, 39, None, "open"), (5, 39, None, "open"), (6, 39, None, "no"),
        (0, 18, None, "open"), (3, 18, None, "open"), (18, 18, None, "open"),
        (0, 19, 19, "yes"), (1, 19, 19, "no"), (1, 39, 39, "yes"), (2, 39, 39, "no"),  # all places tried: exact
    ],
)  # fmt: skip
def test_the_count_decides_between_yes_open_and_no(n_reach, n, population, answer):
    """Each of yes and no is a test at the level: 0 of 19 and 1 of 39 for yes, 4 of 19 and 6 of 39 for no."""
    m = measure(controls=(0.6,) * n_reach + (0.0,) * (n - n_reach), population=population)
    assert answers(m)["anywhere"] == answer
    assert told(m)[0] == {"yes": "SPECIFIC", "no": "NOT SPECIFIC", "open": "CANNOT TELL"}[answer]
    if answer == "open":
        assert opened(m, "anywhere")[0] == ("few_controls" if n == 18 else "some")
    seen = {q.name: q.seen for q in ask(m)}["anywhere"]
    assert ("; yet more than 5% of such places come within" in seen) == (answer == "no"), "a no beside a lead above 0"


def test_a_lead_below_the_margin_is_as_good_as_none():
    """2 of 19 controls are as good, which alone leaves it open; but all are about as good."""
    rng = np.random.default_rng(3)
    near = tuple(0.27 + rng.normal(0, 0.01, 17)) + (0.35, 0.35)
    m = measure(controls=near)
    seen = {q.name: q.seen for q in ask(m)}["anywhere"]
    assert answers(m)["anywhere"] == "no" and "; a lead below .098 counts as none" in seen
    far = (0.0,) * 17 + (0.35, 0.35)
    assert answers(measure(controls=far))["anywhere"] == "open"
    # Better than all 19, by a lead that is shown to be small: better, and the sentence says by how little.
    outcome, sentence = told(measure(controls=(0.25,) * 19, noise=0.01))
    assert outcome == "SPECIFIC"
    assert sentence.endswith("; its lead over the mean of random places is below 33% of its own gain.")


def test_the_margin_is_a_share_of_a_proven_gain():
    m = measure(claim=0.2, whole=0.4)
    assert m.margin(Place("whole")) == pytest.approx((m.means[Place("whole")] - m.means[Place("base")]) / 3)
    m = measure(claim=0.2, whole=None, margin=0.5)
    assert m.margin(CLAIM_PLACE) == pytest.approx((m.means[CLAIM_PLACE] - m.means[Place("base")]) / 2)
    assert math.isnan(m.margin(Place("whole"))) and math.isnan(measure(claim=0.0, whole=0.0).margin(CLAIM_PLACE))


def test_a_lead_is_compared_with_the_gain_at_the_claim_whatever_the_whole_model_gains():
    """The whole model gains ten times as much, as an edit that destroys it may; random places gain a third."""
    bounds = (-math.inf, math.inf)
    assert (
        answers(measure(claim=0.3, controls=(0.1,) * 17 + (0.35,) * 2, whole=3.0, bounds=bounds))["anywhere"] == "open"
    )
    assert answers(measure(claim=0.3, controls=(0.25,) * 17 + (0.35,) * 2, bounds=bounds))["anywhere"] == "no"


def test_unfinished_controls_leave_their_null_open():
    m = measure(controls=(0.3,) * 10, n_planned=19)
    assert opened(m, "anywhere")[0] == "unfinished"
    assert told(m)[1].startswith("Only 10 of 19 planned controls are scored.")


def test_a_no_takes_a_hundred_questions():
    few = slice(0, 40)
    m = measure(controls=(0.3,) * 39, claim=0.3)
    small = replace(m, arms={place: x[:, few] for place, x in m.arms.items()})
    assert answers(small)["works"] == "yes"
    assert opened(small, "anywhere")[0] == opened(small, "needed")[0] == "few_for_no"
    assert (
        opened(replace(small, arms={**small.arms, CLAIM_PLACE: small.arms[Place("base")]}), "works")[0] == "few_for_no"
    )


def test_noise_of_questions_alone_makes_no_place_as_good():
    """The claim is better than every place by half of its gain, but few noisy questions blur that."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(60):
        arms = {Place("base"): 0.0, CLAIM_PLACE: 0.2, Place("whole"): 0.2}
        arms |= {Place("control", i, "anywhere"): 0.1 for i in range(19)}
        noisy = {place: (gain + rng.normal(0, 0.5, 60))[None] for place, gain in arms.items()}
        base, claim, whole, *controls = noisy.values()
        m = measured(base, claim, dict(enumerate(controls)), whole=whole, bounds=(-math.inf, math.inf))
        wrong += answers(m)["anywhere"] == "no"
    assert wrong <= 60 * 0.05 + 3 * math.sqrt(60 * 0.05 * 0.95)


@pytest.mark.parametrize(("flag", "reason"), [("not optimised", "not_optimised"), ("unsettled", "unsettled")])
def test_an_edit_that_is_not_the_best_found_says_no_to_nothing(flag, reason):
    flags = [flag]
    assert opened(measure(claim=0.0), "works", flags)[0] == reason
    assert opened(measure(controls=(0.3,) * 39), "anywhere", flags)[0] == reason
    assert answers(measure(), flags)["anywhere"] == "yes"


def test_diverged_controls_count_against_the_claim():
    m = measure(controls=(None,) * 6 + (0.0,) * 33)
    assert answers(m)["anywhere"] == "open"  # neither better than they are, nor shown to be no better
    assert (m.nulls["anywhere"].look.n_at_least, m.nulls["anywhere"].p_value) == (6, 7 / 40)


def test_without_a_score_at_the_claim_all_is_open():
    m = measured(BASE[None], np.full((1, N), math.nan), {}, whole=scores(0.3, 0.05), nulls={"anywhere": Null(19)})
    assert {question.open for question in ask(m)} == {"diverged"}


def test_a_method_that_lowers_scores_is_not_asked_what_is_needed():
    facts = MethodFacts("Ablation", "lower")
    m = measured(-BASE[None], -BASE[None] + 0.3, {0: -BASE[None]}, rest=-BASE[None], facts=facts, bounds=(-1.0, 0.0))
    assert list(answers(m)) == ["works", "anywhere"]


@pytest.mark.parametrize("n", [0, 1])
def test_few_controls_are_no_error(n):
    assert told(measure(controls=(0.0,) * n))[0] == "CANNOT TELL"


@pytest.mark.parametrize("null", ["anywhere", "layers", "norm", "directions"])
def test_the_outcome_follows_from_the_answers(null):
    only = partial(find_outcome, "yes")
    assert only({null: "yes"}) == "SPECIFIC"
    assert only({null: "no"}) == "NOT SPECIFIC"
    assert only({null: "open"}) == only({}) == "CANNOT TELL"
    for works, outcome in (("no", "NO GAIN SHOWN"), ("open", "CANNOT TELL")):
        assert {find_outcome(works, {null: x}) for x in ("yes", "no", "open", "-")} == {outcome}


def test_the_outcome_over_two_nulls():
    found = {pair: find_outcome("yes", dict(zip(("anywhere", "layers"), pair, strict=True))) for pair in
             itertools.product(["yes", "no", "open"], repeat=2)}  # fmt: skip
    assert found.pop(("yes", "yes")) == "SPECIFIC"
    assert found.pop(("yes", "no")) == "SPECIFIC TO ITS LAYERS"
    assert {outcome for (anywhere, _), outcome in found.items() if anywhere == "no"} == {"NOT SPECIFIC"}
    assert {outcome for (anywhere, _), outcome in found.items() if anywhere != "no"} == {"CANNOT TELL"}


def test_a_whole_model_that_is_destroyed_is_no_measure():
    weak = measure(claim=0.0, whole=0.3, rest=0.3)
    assert answers(weak)["works"] == "no" and answers(measure(rest=0.3))["needed"] == "no"
    flags = ["destroyed whole"]
    assert opened(weak, "works", flags)[0] == opened(measure(rest=0.3), "needed", flags)[0] == "whole_destroyed"
    assert told(weak, flags)[0] == "CANNOT TELL" and "weaker strengths" in told(weak, flags)[1]


def test_an_edit_that_destroys_the_model_is_no_evidence_for_its_place():
    good = measure()
    bad = replace(good, destroyed={"claim"})
    assert told(good)[0] == "SPECIFIC" and told(bad)[0] == "CANNOT TELL"
    assert opened(bad, "works")[0] == "destroyed" and answers(bad)["anywhere"] == "-"


def test_controls_that_destroy_the_model_say_no_to_nothing():
    m = measure(controls=(0.3,) * 6 + (0.0,) * 33)
    assert answers(m)["anywhere"] == "no"
    m = replace(m, destroyed={f"control anywhere {i}" for i in range(6)})
    assert answers(m)["anywhere"] == "open", "as if they had diverged"
    assert (m.nulls["anywhere"].look.n_at_least, m.nulls["anywhere"].p_value) == (6, 7 / 40)


def test_ties_wider_than_the_margin_say_no_to_nothing():
    """The claim leads all random places by more than the margin, a third of its small gain, but within rounding."""
    m = measure(claim=0.1, controls=(0.06,) * 39, whole=0.1, noise=0.001)
    assert answers(m)["anywhere"] == "yes"
    m = replace(m, tolerance=0.05)
    assert m.nulls["anywhere"].look.n_at_least == 39 and answers(m)["anywhere"] == "open"


def test_gains_and_leads_are_over_the_questions_that_no_arm_lacks():
    """The claim's edit and a control each lack the answers of other questions, which are easy."""
    base = (np.arange(N) % 2).astype(float)
    claim, control = base.copy(), base.copy()
    claim[:10], control[N - 10 :] = math.nan, math.nan
    m = replace(measured(base[None], claim[None], {0: control[None], 1: base[None]}), missing=(0, 10, 10, 0))
    assert m.means[CLAIM_PLACE] == m.means[Place("base")]  # as many right as wrong answers are lost
    claim[:20:2] = base[:20:2]
    m = replace(m, arms={**m.arms, CLAIM_PLACE: claim[None]})
    assert m.means[CLAIM_PLACE] < m.means[Place("base")] and m.gain(CLAIM_PLACE).value == 0
    assert m.nulls["anywhere"].lead.lead == 0


def test_the_headline_says_what_places_in_the_same_layers_reach():
    own = {Place("control", i, "layers"): scores(0.3, 0.05, seed=i) for i in range(39)}
    design = Design(nulls={"anywhere": Null(39), "layers": Null(39)})
    outcome, sentence = told(replace(measure(more=own), design=design))
    assert outcome == "SPECIFIC TO ITS LAYERS"
    assert "works better than random places, but random places in its layers do as well (" in sentence


def test_p_of_needed_is_that_of_both_tests():
    rests = {Place("rest", i, "anywhere"): scores(0.0 if i < 1 else 0.3, 0.05, seed=i) for i in range(19)}
    (question,) = [q for q in ask(measure(rest=0.0, more=rests)) if q.name == "needed"]
    assert question.open == "rests" and question.p == 0.1


def test_places_of_its_own_groups_are_within_its_layers():
    assert find_outcome("yes", {"anywhere": "yes", "layers": "yes", "kv-groups": "no"}) == "SPECIFIC TO ITS LAYERS"
    assert find_outcome("yes", {"anywhere": "yes", "layers": "no", "kv-groups": "no"}) == "SPECIFIC TO ITS LAYERS"
    assert find_outcome("yes", {"anywhere": "yes", "norm": "no", "kv-groups": "no"}) == "NOT SPECIFIC"
    assert find_outcome("yes", {"anywhere": "no", "kv-groups": "yes"}) == "NOT SPECIFIC"
    assert find_outcome("yes", {"kv-groups": "no"}) == "NOT SPECIFIC"


@given(st.floats(-0.4, 0.0), st.integers(0, 5))
def test_answers_do_not_depend_on_a_shift_of_all_scores(shift, seed):
    rng = np.random.default_rng(seed)
    base, own, whole = (rng.random(40) * 0.5 + x for x in (0.4, 0.5, 0.5))
    others = rng.random((19, 40)) * 0.5 + 0.45

    def found(by):
        controls = {i: x[None] + by for i, x in enumerate(others)}
        bounds = (-math.inf, math.inf)
        return answers(measured(base[None] + by, own[None] + by, controls, whole=whole[None] + by, bounds=bounds))

    assert found(0.0) == found(shift)


def test_a_claim_is_needed_only_if_random_places_are_needed_less():
    def rests(gain):
        return {Place("rest", i, "anywhere"): scores(gain, 0.05, seed=100 + i) for i in range(19)}

    assert answers(measure(rest=0.0, more=rests(0.3)))["needed"] == "yes"
    assert opened(measure(rest=0.0, more=rests(0.0)), "needed")[0] == "rests"
    (question,) = [q for q in ask(measure(rest=0.0, more=rests(0.3))) if q.name == "needed"]
    assert question.seen.endswith("p = .05") and "; without random places .5" in question.seen
    assert answers(measure(rest=0.3, more=rests(0.3)))["needed"] == "no"


def test_a_placebo_that_gains_voids_the_audit():
    def placebos(gain):
        return {Place("placebo", i): scores(gain, 0.05, seed=200 + i) for i in range(2)}

    m = measure(more=placebos(0.2))
    assert {question.open for question in ask(m)} == {"placebo"}
    assert told(m)[0] == "CANNOT TELL" and "swapped at random gains, too" in told(m)[1]
    assert answers(measure(more=placebos(0.0)))["anywhere"] == "yes"
    # Of many placebos some gain by chance: p is corrected for their number.
    many = {Place("placebo", i): scores(0.0, 0.5, seed=i) for i in range(100)}
    found = measured(BASE[None], scores(0.3, 0.05), {}, more=many)
    assert found.placebo_p > 0.05 > min(map(found.gain_p, many))
