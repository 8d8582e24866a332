"""The four questions about a claim: yes and no only where the numbers exclude the other."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from locaudit.location import Location
from locaudit.records import Place
from locaudit.stats import Design, MethodFacts, compare_edits
from locaudit.stats.grades import conclusion, grade
from locaudit.stats.measured import Measured
from locaudit.stats.selection import CLAIM as CLAIM_PLACE
from locaudit.stats.sequential import Null

N = 200
RNG = np.random.default_rng(0)
BASE = RNG.random(N) / 2
CLAIM = Location(((0, 0),))
FACTS = MethodFacts("Optimal edit", trained=True)


def measured(base, claim, controls, *, whole=None, rest=None, places=None, facts=FACTS, **design):
    arms = {"base": base, "claim": claim, "whole": whole, "rest": rest}
    places = places or {i: Location(((1, i),)) for i in controls}
    return Measured(
        method="optimal",
        facts=facts,
        arms={Place(arm): x for arm, x in arms.items() if x is not None}
        | {Place("control", i, "anywhere"): x for i, x in controls.items()},
        locations={CLAIM_PLACE: CLAIM} | {Place("control", i, "anywhere"): x for i, x in places.items()},
        level=0.05,
        design=Design(**design),
    )


def scores(gain, noise=0.05):
    return None if gain is None else (BASE + gain + np.random.default_rng(7).normal(0, noise, N))[None]


def measure(claim=0.3, controls=(0.0,) * 39, whole=0.3, rest=0.3, places=None, population=None, noise=0.05):
    own, base = scores(claim, noise), BASE[None]
    others = {
        i: np.full((1, N), math.nan)
        if gain is None
        else (BASE + gain + np.random.default_rng(i).normal(0, noise, N))[None]
        for i, gain in enumerate(controls)
    }
    found = measured(
        base, own, others, whole=scores(whole, noise), rest=scores(rest, noise), places=places,
        nulls={"anywhere": Null(len(controls), population)},
        seconds={"optimal": 60.0},
    )  # fmt: skip
    return {g.question: g for g in grade(found)}


def answers(found):
    return [found[name].answer for name in ("sufficiency", "specificity", "necessity", "uniqueness")]


def test_controls_that_do_as_well_are_equivalent():
    assert "equivalent to within 0.05" in measure(claim=0.3, controls=(0.3,) * 39)["specificity"].evidence
    assert "equivalent" not in measure(claim=0.3, controls=(0.0,) * 39)["specificity"].evidence


def test_a_place_that_is_the_only_one():
    found = measure(controls=(0.0,) * 39, rest=0.0, population=39)
    assert answers(found) == ["yes", "yes", "yes", "yes"]
    assert conclusion(list(found.values())) == (
        "An edit there is enough; the place does better than random ones; without it, an edit of the rest falls short; "
        "no other place of its size matches it."
    )
    # Drawn from more places than were tried, it may still not be the only one.
    assert measure(controls=(0.0,) * 39, rest=0.0)["uniqueness"].answer == "undecided"


def test_a_gain_below_the_margin_is_matched_by_edits_that_do_nothing_so_nothing_is_said():
    found = measure(claim=0.04, controls=(0.0,) * 39, whole=0.04, rest=0.0, noise=0.01)
    assert answers(found) == ["yes", "yes", "undecided", "undecided"]
    assert "it is not shown that the claim's gain is above the margin" in found["uniqueness"].evidence


def test_a_lead_below_the_margin_is_no_answer_about_the_share():
    found = measure(claim=0.04, controls=(0.0,) * 18, noise=0.01)["specificity"]
    assert found.answer == "undecided"  # 0 of 18 do as well: too few controls, not "random places do as well"


@pytest.mark.parametrize(("n", "decided"), [(20, False), (55, False), (60, True), (100, True)])
def test_answers_that_hardly_change_decide_only_where_their_number_excludes_the_margin(n, decided):
    """Scores of 0 and 1 that are the same everywhere: resamples cannot differ, whatever the truth is."""
    same = np.zeros((1, n))
    found = compare_edits(same, same, margin=0.05)
    assert found.few != decided
    assert found.equivalent == decided
    # A true deficit of the margin is rarely called none.
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(200):
        worse = (rng.random(n) < 0.05).astype(float)
        wrong += compare_edits(1 - worse[None], np.ones((1, n)), margin=0.05).outcome == "not worse"
    assert wrong / 200 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)


def test_a_place_like_any_other():
    found = measure(controls=(0.3,) * 39)
    assert answers(found) == ["yes", "no", "no", "no"]
    assert "is equivalent to the edit of the whole model" in found["sufficiency"].evidence
    assert found["specificity"].interval[0] > 0.05


def test_an_edit_that_does_nothing():
    found = measure(claim=0.0, controls=(0.0,) * 39)
    assert found["sufficiency"].answer == "no"
    assert found["uniqueness"].answer == "not tried"
    assert "whole model" in measure(claim=0.0, whole=0.0)["necessity"].evidence


def test_too_little_to_tell():
    found = measure(claim=0.3, controls=(-0.5,) * 10, whole=0.3, rest=0.2, noise=2.0)
    assert answers(found)[:2] == ["undecided"] * 2
    one = measure(controls=(0.3,) + (0.0,) * 18)
    assert one["specificity"].answer == "undecided"
    assert (
        "controls with stopping: anytime would settle whether it is above 0.05 (another " in one["specificity"].evidence
    )
    assert "undecided" not in conclusion(list(one.values()))


def test_what_was_not_run_is_not_tried():
    found = measure(whole=None, rest=None)
    assert found["necessity"].answer == "not tried"
    assert math.isnan(found["necessity"].estimate)
    assert measure(claim=0.3)["sufficiency"].power.startswith("a gain of 0.0")


def test_places_that_share_units_count_once():
    places = {0: CLAIM, 1: Location(((0, 0), (3, 3))), 2: Location(((5, 5), (6, 6))), 3: Location(((6, 6), (7, 7)))}
    found = measure(controls=(0.3,) * 4, places=places)["uniqueness"]
    assert found.evidence.startswith("1 of 1 places")  # 0 and 1 overlap the claim, 3 overlaps 2


def test_diverged_controls_reach_the_claim_but_match_nothing():
    found = measure(controls=(None,) * 5 + (0.0,) * 34)
    assert found["specificity"].estimate == 5 / 39
    assert found["uniqueness"].answer == "undecided"


@given(st.floats(-0.5, 0.5), st.integers(0, 5))
def test_grades_do_not_depend_on_a_shift_of_all_scores(shift, seed):
    rng = np.random.default_rng(seed)
    base, own, whole = rng.random(40), rng.random(40) + 0.2, rng.random(40) + 0.2
    others = rng.random((19, 40)) + 0.1

    def graded(by):
        controls = {i: x[None] + by for i, x in enumerate(others)}
        return [g.answer for g in grade(measured(base[None] + by, own[None] + by, controls, whole=whole[None] + by))]

    assert graded(0.0) == graded(shift)


def test_a_claim_without_a_score_has_no_grades():
    assert not grade(measured(BASE[None], np.full((1, N), math.nan), {}, nulls={"anywhere": Null(19)}))


@pytest.mark.parametrize("n", [0, 1])
def test_few_controls_are_no_error(n):
    found = measure(controls=(0.0,) * n)
    assert found["specificity"].answer in ("undecided", "no")
