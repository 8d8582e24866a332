"""Ending controls early: the same verdict, intervals that hold at every moment, and p-values that stay valid."""

import itertools
import math
from collections import defaultdict
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from locaudit.location import Location
from locaudit.records import Place, TrialRecord, TrialSpec
from locaudit.stats import (
    Design,
    Monitor,
    decide,
    judged_metrics,
    mean_score,
    score_place,
    score_values,
    sequential,
)
from locaudit.stats.sequential import LEAST, RISK, Null, curtailment, share_interval
from locaudit.stats.tests import max_t_p, monte_carlo_p

LEVEL = 0.05


def look(reached, rule, n_planned=None, level=LEVEL, population=None):
    """All planned controls tried, unless said otherwise."""
    n_planned = len(reached) if n_planned is None else n_planned
    return sequential.look(list(reached), rule=rule, n_planned=n_planned, level=level, population=population)


@given(st.lists(st.booleans(), min_size=1, max_size=120), st.sampled_from([0.01, 0.05, 0.1, 0.3]))
def test_curtailed_controls_give_the_verdict_of_all_of_them(reached, level):
    n = len(reached)
    fixed, early = (look(reached, rule, level=level) for rule in ("fixed", "curtailed"))
    assert early.state == fixed.state
    assert early.n <= n
    assert (
        early.p_value >= fixed.p_value if fixed.state == "specific" else early.p_value > level or not early.n_at_least
    )
    # What comes after the end does not matter to the test. It narrows the bounds of the final count.
    assert early.final == fixed.final == (sum(reached), sum(reached))
    for after in (reached[early.n :], [not x for x in reached[early.n :]]):
        for n_more in range(len(after) + 1):
            seen = look([*reached[: early.n], *after[:n_more]], "curtailed", n, level)
            assert replace(seen, final=early.final) == early
            least = sum(reached[: early.n]) + sum(after[:n_more])
            assert seen.final == (least, least + len(after) - n_more)


@pytest.mark.parametrize("rule", ["curtailed", "anytime"])
def test_no_test_ends_before_nine_controls(rule):
    assert LEAST == 9
    for n in range(1, LEAST):
        assert look([True] * n, rule, 39).state == look([False] * n, rule, 10).state == "open"
    assert look([True] * 9, rule, 39).state == "not specific"
    assert look([False] * 9, "curtailed", 10, 0.2).state == "specific"
    # With fewer planned controls, none of them is left out.
    for n in range(1, LEAST):
        for reached in itertools.product([False, True], repeat=n):
            found = look(reached, "curtailed", level=0.4)
            assert found == look(reached, "fixed", level=0.4)
            assert found.n == n


@given(st.integers(0, 30), st.integers(1, 30))
def test_fixed_controls_give_the_monte_carlo_p(n_hits, n):
    n_hits = min(n_hits, n)
    reached = [True] * n_hits + [False] * (n - n_hits)
    scores = [1.0 if hit else 0.0 for hit in reached]
    assert look(reached, "fixed").p_value == monte_carlo_p(0.5, scores)


def test_no_outcome_is_certain_from_too_few_controls():
    assert curtailment(18, 0.05) == 0
    assert curtailment(19, 0.05) == 1
    assert curtailment(39, 0.05) == 2
    assert look([True] * 18, "curtailed").state == "open"


def chances_under_the_null(rule, n_planned, level):
    """Exact distribution of the last `Look` for a claim that is exchangeable with its controls, without ties.

    The rank of the claim among itself and n controls is uniform. So the next control does at least as well as the claim
    with probability (g + 1) / (n + 2).
    """
    chances, ended = {Monitor(rule, n_planned, level).seen: Fraction(1)}, defaultdict(Fraction)
    while chances:
        later = defaultdict(Fraction)
        for seen, chance in chances.items():
            share = Fraction(seen.n_at_least + 1, seen.n + 2)
            for hit in (True, False):
                monitor = Monitor(rule, n_planned, level)
                monitor.seen = seen
                monitor.count(hit)
                found = later if monitor.wants_more else ended
                found[monitor.seen] += chance * (share if hit else 1 - share)
        chances = later
    return ended


@pytest.mark.parametrize("level", [0.05, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("n_planned", [5, 9, 10, 12, 19, 39])
@pytest.mark.parametrize("rule", ["fixed", "curtailed", "anytime"])
def test_p_is_valid_under_the_null(rule, n_planned, level):
    """By enumeration of all ranks and orders: P(p <= t) <= t for every t."""
    found = chances_under_the_null(rule, n_planned, level)
    assert sum(found.values()) == 1
    for t in {seen.p_value for seen in found}:
        below = sum(chance for seen, chance in found.items() if seen.p_value <= t)
        assert below <= Fraction(t) + Fraction(1, 10**12)
        if rule == "curtailed" and t > (1 + curtailment(n_planned, level)) / (1 + n_planned):
            assert float(below) == pytest.approx(t, abs=1e-12)  # exact, not only valid
    if rule != "anytime":
        specific = sum(chance for seen, chance in found.items() if seen.state == "specific")
        assert specific == Fraction(curtailment(n_planned, level), 1 + n_planned)


@pytest.mark.parametrize("population", [None, 60])
def test_the_interval_holds_at_all_moments_at_once(population):
    """Ever outside the interval: at most 5 % of sequences, looked at after every control."""
    rng, wrong, n_runs = np.random.default_rng(1), 0, 400
    for _ in range(n_runs):
        if population:
            hits = int(rng.integers(0, population + 1))
            share = hits / population
            drawn = rng.permutation(np.arange(population) < hits)
        else:
            share = rng.random()
            drawn = rng.random(60) < share
        g = np.cumsum(drawn)
        for n in (1, 2, 3, 5, 8, 13, 20, 30, 45, 60):
            low, high = share_interval(int(g[n - 1]), n, population=population)
            if not low - 1e-9 <= share <= high + 1e-9:
                wrong += 1
                break
    assert wrong / n_runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / n_runs)


def test_the_interval_is_the_set_of_shares_that_the_mixture_does_not_exclude():
    g, n, error = 3, 19, 0.05
    low, high = share_interval(g, n, error=error)
    for share in (low, high):
        assert (n + 1) * stats.binom.pmf(g, n, share) == pytest.approx(error, rel=1e-6)
    assert share_interval(0, 0) == (0.0, 1.0)
    assert share_interval(0, 19)[0] == 0.0
    assert share_interval(19, 19)[1] == 1.0
    # All places tried: the share is known.
    assert share_interval(7, 40, population=40) == (7 / 40, 7 / 40)
    # Many places: drawing without repeats is drawing with them.
    assert share_interval(g, n, population=10_000) == pytest.approx((low, high), abs=2e-3)


def test_anytime_ends_when_the_interval_excludes_the_level_and_keeps_the_error_rate():
    ended = look([False] * 400, "anytime")
    assert ended.state == "specific"
    assert share_interval(0, ended.n, error=RISK * LEVEL)[1] < (1 - RISK) * LEVEL
    assert share_interval(0, ended.n - 1, error=RISK * LEVEL)[1] >= (1 - RISK) * LEVEL
    assert look([True] * 400, "anytime").n == LEAST
    assert look([False] * 19, "anytime").state == "open"
    rng = np.random.default_rng(2)
    states = []
    for _ in range(400):
        share = rng.random()  # of places that reach a claim exchangeable with them: uniform
        states.append(look(rng.random(400) < share, "anytime").state)
    rate = states.count("specific") / len(states)
    assert rate <= LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / len(states))


@pytest.mark.parametrize("population", [2, 5, 12, 23, 47, 68])
def test_anytime_counts_the_claim_among_few_places(population):
    """All ranks of a claim among population + 1 places, controls in random order: specific in at most 5 %."""
    rng, n_false, n_runs = np.random.default_rng(population), 0, 20
    for rank in range(population + 1):  # places that reach the claim
        for _ in range(n_runs):
            drawn = rng.permutation(np.arange(population) < rank)
            n_false += look(drawn, "anytime", population=population).state == "specific"
    assert n_false / (n_runs * (population + 1)) <= LEVEL


def test_controls_beyond_the_plan_are_not_looked_at():
    assert look([False] * 25, "curtailed", 19) == look([False] * 19, "fixed")


PLANS = st.tuples(
    st.sampled_from(["fixed", "curtailed", "anytime"]), st.integers(1, 60), st.sampled_from([0.05, 0.2]),
    st.sampled_from([None, 60]), st.sampled_from(["higher", "lower"]),
)  # fmt: skip


@given(PLANS, st.lists(st.sampled_from([0.1, 0.5, 0.9, math.nan]), max_size=60), st.randoms())
def test_a_monitor_says_what_a_look_at_all_says(plan, controls, random):
    """After each control, in any order of arrival: what `look` says of those up to the first that is missing."""
    rule, n_planned, level, population, supports = plan
    monitor = Monitor(rule=rule, n_planned=n_planned, level=level, population=population, supports=supports)
    sign = {"higher": 1, "lower": -1}[supports]
    reached = [not sign * x < sign * 0.5 for x in controls]
    arrivals = [Place("claim"), Place("base"), *(Place("control", i) for i in range(len(controls)))]
    random.shuffle(arrivals)
    for n, place in enumerate(arrivals, start=1):
        monitor.add(place, controls[place[1]] if place[0] == "control" else 0.5)
        seen = set(arrivals[:n])
        in_order = list(itertools.takewhile(lambda i, seen=seen: Place("control", i) in seen, range(len(controls))))
        in_order = in_order if Place("claim") in seen else []
        assert monitor.state == look(reached[: len(in_order)], rule, n_planned, level, population).state


def test_a_monitor_does_not_end_what_was_hardly_judged():
    def end(**claim):
        monitor = Monitor(rule="curtailed", n_planned=19, level=0.05)
        monitor.add(Place("claim"), **{"mean": 0.5, **claim})
        for number in range(LEAST):
            monitor.add(Place("control", number), 0.6)
        return monitor

    assert end().state == "not specific"
    assert end(mean=math.nan).state == "not specific", "it diverged everywhere"
    assert end(mean=math.nan, lost=True).state == "open", "no judge judged it"
    assert end(missing=0.06).state == "open"
    late = end()
    late.add(Place("whole"), 0.5, missing=0.06)
    assert late.state == "open"


@pytest.mark.parametrize("lost", [0.0, 0.04, 0.3, 1.0])
def test_a_monitor_of_records_ends_where_their_verdict_does(lost):
    rng = np.random.default_rng(0)

    def tried(arm, control=-1):
        out = []
        for strength in (1.0, 2.0):
            place = Location(((int(arm == "control"), 0),))
            null = "anywhere" if arm == "control" else ""
            spec = TrialSpec(arm, "iti", place, strength, 0, "context", control, null=null)
            said = [None if rng.random() < lost else rng.random() for _ in range(30)]
            questions = {split: judged_metrics({"truth": said}) for split in ("val", "test")}
            metrics = {
                split: {"truth": float(mean_score(score_values(questions[split], "truth")))} for split in questions
            }
            out.append(TrialRecord(spec, "ok", metrics=metrics, drift={"kl": 0.1}, questions=questions))
        return out

    for _ in range(10):
        base = replace(tried("base")[0], spec=TrialSpec("base", "none", None, None, 0, "context"))
        places = [tried("claim"), *(tried("control", k) for k in range(19))]
        monitor, records = Monitor(rule="curtailed", n_planned=39, level=0.05, null="anywhere"), [base]
        monitor.add(Place("base"), *score_place([base], "truth"))
        for trials in places:
            monitor.add(trials[0].spec.place, *score_place(trials, "truth"))
            records += trials
            design = Design(rule="curtailed", nulls={"anywhere": Null(39)})
            v = decide(records, score="truth", design=design).methods["iti"]
            is_sure = v.worst_missing <= 0.05 and not math.isnan(v.claim)
            assert (monitor.state != "open") == (v.first.ended_early and is_sure)


# --- several tests of one claim


def test_max_t_keeps_the_family_wise_error_and_beats_holm_where_tests_agree():
    rng = np.random.default_rng(3)
    smallest = [min(max_t_p(arms[0], arms[1:])) for arms in rng.normal(size=(2000, 20, 4))]
    assert np.mean(np.asarray(smallest) <= 0.05) == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / 2000))
    same = np.repeat(rng.normal(size=(19, 1)), 3, axis=1)
    assert max_t_p(np.full(3, same.max() + 1), same) == [0.05] * 3


def test_max_t_with_one_test_is_the_monte_carlo_p_and_missing_values_count_against_the_claim():
    controls = np.arange(19.0)
    assert max_t_p([17.5], controls[:, None]) == [monte_carlo_p(17.5, controls)]
    assert max_t_p([99.0], np.asarray([*controls, np.nan])[:, None]) == [2 / 21]
    assert max_t_p([np.nan, 99.0], np.stack([controls, controls], axis=1)) == [1.0, 1 / 20]
    assert max_t_p([1.0], np.ones((3, 1))) == [1.0]
