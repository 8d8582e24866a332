"""Equal optimisation: training length, widening grids, doses of KL, and the flags that say a better edit exists."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace

import pytest
from bench.measurements import print_edits
from hypothesis import given
from hypothesis import strategies as st

from locaudit.config import merge_config
from locaudit.location import Location
from locaudit.measure.tree import Forest
from locaudit.methods.horizon import horizon
from locaudit.methods.iti import TOLERANCE, match_doses
from locaudit.methods.training import progress
from locaudit.records import TrialRecord, TrialSpec
from locaudit.run import horizons
from locaudit.run.audit import run_audit
from locaudit.run.pilot import describe_estimate, run_pilot
from locaudit.run.plan import fit_context
from locaudit.stats.optimisation import find_destroyed, find_flags
from locaudit.stats.phrases import MethodFacts
from locaudit.stats.selection import next_strength, select
from locaudit.store.run import load_run
from runs import HashJudge, small_config, stopped_at


@pytest.mark.parametrize(
    ("objectives", "epochs"),
    [
        ([], None),
        ([20.0], None),
        ([20.0, 19.0], None),  # gained 5 %
        ([20.0, 19.61], 2),  # gained 1.95 %
        ([20.0, 21.0], 2),  # got worse
        ([20.0, 10.0, 9.9], 4),
        ([20.0, 10.0, 5.0], None),
        ([20.0, 10.0, 5.0, 4.95], 8),
        ([20.0, 10.0, 5.0, 2.5], 16),  # not at the plateau
        ([20.0, None], 2),  # longer training diverged
        ([None, 10.0, 9.9], 4),
        ([None, None, None, None], 16),
        ([-1.0, -1.5, -1.51], 4),  # a loss may be negative
        ([0.0, 0.0], 2),
    ],
)
def test_the_training_length_is_the_first_whose_doubling_gains_little(objectives, epochs):
    assert horizon(objectives) == epochs


def test_windows_of_training_have_every_question_equally_often():
    assert progress([4.0, 2.0], 1) == {"objective": 3.0}
    assert progress([4.0, 2.0, 1.0, 1.0], 2) == {"objective": 1.0, "change": -2 / 4}
    assert progress([9.0] * 12 + [4.0, 2.0, 1.0, 1.0], 8) == {"objective": 2.0, "change": -7 / 9}


@pytest.mark.parametrize(
    ("tried", "best", "further"),
    [
        ([0.1, 0.2, 0.4], 0.2, None),
        ([0.1, 0.2, 0.4], 0.1, 0.05),
        ([0.4, 0.1, 0.2], 0.4, 0.8),
        ([5.0, 10.0, 15.0, 20.0], 20.0, 26.6667),
        ([0.1, 0.2, 0.4, 0.05], 0.05, 0.025),
        ([0.1, 0.2, 0.4, 0.05, 0.025], 0.025, None),  # widened twice
        ([0.1, 0.2], 0.1, None),  # the grid is not done
        ([-5.0, -1.0, 1.0], -5.0, -25.0),
        ([-1.0, 1.0, 2.0], -1.0, None),  # no geometric step across 0
    ],
)
def test_grids_widen_at_their_edge(tried, best, further):
    assert next_strength(tried, best, 4 if 20.0 in tried else 3, 2) == further


def test_a_fixed_grid_and_a_single_strength_do_not_widen():
    assert next_strength([0.1, 0.2], 0.1, 2, 0) is None
    assert next_strength([0.1], 0.1, 1, 2) is None


@given(
    st.lists(st.tuples(st.floats(0.02, 2), st.floats(1e-4, 10), st.floats(0.5, 2.5)), min_size=1, max_size=4),
    st.floats(0.1, 10),
)
def test_doses_are_met_wherever_kl_grows(cases, start):
    """KL = scale alpha^2 (1 + alpha)^power grows at most as fast as alpha^4.5."""

    def kl(numbers, alphas):
        return [cases[k][1] * alpha**2 * (1 + alpha) ** cases[k][2] for k, alpha in zip(numbers, alphas, strict=True)]

    doses = [dose for dose, _, _ in cases]
    found = match_doses(kl, doses, [start] * len(doses))
    assert None not in found
    for value, dose in zip(kl(range(len(doses)), found), doses, strict=True):
        assert abs(value / dose - 1) <= TOLERANCE + 1e-9


def test_a_dose_out_of_reach_is_not_met():
    assert match_doses(lambda numbers, _: [0.0 for _ in numbers], [0.1], [1.0]) == [None]
    assert match_doses(lambda numbers, alphas: [min(a, 0.05) for a in alphas], [0.1], [1.0]) == [None]


# Flags


def trial(method, arm, strength, val, objective=None):
    where = Location.whole() if arm == "whole" else Location(((0, 0),))
    training = {} if objective is None else {"objective": (objective,)}
    scores = {"mc2": (val,)}
    return TrialRecord(
        TrialSpec(arm, method, where, strength, 0, "c"), "ok", metrics={"val": {"mc2": val}, "test": {"mc2": val}},
        questions={"val": scores, "test": scores}, drift={"kl": 0.1}, training=training,
    )  # fmt: skip


FACTS = {
    "iti": MethodFacts("ITI", symbol="α", n_strengths=3),
    "optimal": MethodFacts("Optimal edit", trained=True, symbol="τ", n_strengths=3),
}
ITI = [trial("iti", arm, alpha, 0.4 + (alpha == 10) / 10) for arm in ("claim", "whole") for alpha in (5, 10, 15)]


def optimal(claim, whole, *, losses=(2.0, 1.0)):
    return [
        trial("optimal", arm, tau, val + (tau == 0.2) / 10, loss)
        for arm, val, loss in (("claim", claim, losses[0]), ("whole", whole, losses[1]))
        for tau in (0.1, 0.2, 0.4)
    ]


def flags(records, **training):
    found = find_flags(records, FACTS | {"optimal": replace(FACTS["optimal"], training=training)}, "mc2")
    return {(flag.name, flag.places) for flag in found["optimal"]}, found


def test_an_arm_below_iti_on_validation_is_not_optimised():
    assert flags([*ITI, *optimal(0.4, 0.4)])[0] == set()  # equal
    names, found = flags([*ITI, *optimal(0.3, 0.45)])
    assert names == {("not optimised", ("claim",))}
    assert "(the claim)" in found["optimal"][0].text and "0.400 and ITI 0.500" in found["optimal"][0].text
    assert not found["iti"]


def test_without_validation_of_both_test_questions_are_read():
    """A method with one strength is not scored on validation questions, and must not escape the comparison by that."""
    single = [
        replace(x, metrics={"test": x.metrics["test"]}) for x in optimal(0.3, 0.45) if x.spec.hyperparameter == 0.2
    ]
    names, found = flags([*ITI, *single])
    assert ("not optimised", ("claim",)) in names and ("not optimised", ("whole",)) not in names
    (text,) = (flag.text for flag in found["optimal"] if flag.name == "not optimised")
    assert "on test questions the Optimal edit has 0.400 and ITI 0.500" in text


def test_a_difference_within_the_margin_does_not_count():
    """A third of what ITI gains: .2 of .3 at the claim counts, .05 of .3 does not."""
    base = replace(trial("none", "base", None, 0.2), spec=TrialSpec("base", "none", None, None, 0, "c"))
    for claim, is_flagged in ((0.2, True), (0.35, False)):
        found = find_flags([base, *ITI, *optimal(claim, 0.45)], FACTS, "mc2", margin=1 / 3)
        assert ("not optimised" in {flag.name for flag in found["optimal"]}) == is_flagged
        assert "not optimised" in {
            flag.name for flag in find_flags([*ITI, *optimal(claim, 0.45)], FACTS, "mc2")["optimal"]
        }


def test_a_whole_model_worse_than_a_part_of_it_is_flagged():
    assert flags([*ITI, *optimal(0.4, 0.4, losses=(1.0, 1.01))])[0] == set()  # within 2 %
    assert flags([*ITI, *optimal(0.4, 0.4, losses=(1.0, 1.5))])[0] == {("superset", ("claim",))}


def test_an_edit_whose_loss_rose_at_the_end_is_flagged():
    for change, is_flagged in ((-0.3, False), (0.09, False), (0.11, True)):
        records = [replace(x, training=dict(x.training) | {"change": (change,)}) for x in optimal(0.4, 0.4)]
        names, found = flags([*ITI, *records])
        assert (("unsettled", ("claim", "whole")) in names) == is_flagged
    assert "rose at the end of training (the claim, the whole model)" in found["optimal"][0].text


def test_the_best_at_an_edge_and_training_that_is_too_short_are_flagged():
    records = [r for r in optimal(0.4, 0.4) if r.spec.arm == "whole" or r.spec.hyperparameter != 0.1]
    names, found = flags(records, plateau=False, epochs=16)
    assert names == {("edge", ("claim",)), ("short", ("claim",))}
    assert "16 epochs still gained" in found["optimal"][1].text


def test_a_single_strength_is_said_only_of_methods_that_have_one():
    one = [trial(name, "claim", tau, 0.4) for name, tau in (("optimal", 0.2), ("ablate", None))]
    facts = {"optimal": replace(FACTS["optimal"], n_strengths=1), "ablate": MethodFacts("Ablation", "lower")}
    found = find_flags(one, facts, "mc2")
    assert [flag.name for flag in found["optimal"]] == ["single"] and not found["ablate"]
    assert found["optimal"][0].text.startswith("A single τ was tried (0.2)")


def test_an_edit_that_destroys_the_model_is_flagged():
    def says(record, *answers, kl=0.1):
        return replace(record, answers={"test": answers}, drift={"kl": kl})

    questions = ("Is it far from here to the sea?", "What do people eat in winter?")
    loop = "and and and and and and and and"
    base = replace(trial("none", "claim", None, 0.4), spec=TrialSpec("base", "none", None, None, 0, "c"))
    good, bad = ("It is about two miles.", "They eat soup."), (loop, loop)
    tried = [says(trial("iti", "claim", 5, 0.4), *bad), says(trial("iti", "whole", 5, 0.4), *good, kl=5.5)]
    (flag,) = find_destroyed([says(base, *good), *tried], questions, "mc2")["iti"]
    assert flag.name == "destroyed" and flag.places == ("claim", "whole")
    assert "(the claim (100% of its answers are degenerate), the whole model (KL 5.5 nats per token))" in flag.text
    (flag,) = find_destroyed([says(base, *bad), *tried], questions, "mc2")["iti"]
    assert flag.places == ("whole",)  # the unedited model answers no better
    assert find_destroyed([says(base, *good), says(tried[0], loop, "They eat soup.")], questions, "mc2")["iti"] == ()
    placebos = [replace(tried[1], spec=replace(tried[1].spec, arm="placebo", control=i)) for i in range(2)]
    for n, named in ((1, "(placebo 0)"), (2, "(2 placebos)")):
        (flag,) = find_destroyed([says(base, *good), *placebos[:n]], questions, "mc2")["iti"]
        assert flag.places == ("placebo 0", "placebo 1")[:n] and named in flag.text


# A run


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """ITI by dose, optimal edits of a length that is found, and grids that widen once."""
    base = small_config(tmp_path_factory.mktemp("inputs"))
    changes = {
        "widen": 1,
        "methods": {
            "iti": {"doses": [0.002, 0.004]},
            "optimal": {"strengths": [0.2, 0.4], "epochs": "auto", "max_questions": 4},
        },
    }
    return merge_config(base, changes)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    run_audit(config, out, progress=False)
    return load_run(out)


def test_doses_are_hit_at_every_place(run):
    trials = [record for record in run.trials if record.spec.method == "iti"]
    assert {record.spec.arm for record in trials} == {"claim", "control", "whole"}
    for record in trials:
        assert record.drift["kl"] == pytest.approx(record.spec.hyperparameter, rel=TOLERANCE + 1e-3)
        assert record.training["alpha"][0] > 0
    alphas = {r.spec.arm: r.training["alpha"][0] for r in trials if r.spec.hyperparameter == 0.002}
    assert alphas["whole"] < alphas["claim"]


def test_edits_are_listed_with_dose_objective_and_flags(run, capsys):
    print_edits(run)
    rows = [[x.strip() for x in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines()[2:]]
    found = {(method, float(strength), place): cells for method, strength, place, *cells in rows}
    assert {place for _, _, place in found} == {"claim", "whole", "control anywhere"}
    for record in run.trials:
        spec = record.spec
        if spec.arm in ("claim", "whole"):
            alpha, objective, kl, _, chosen, flags = found[spec.method, spec.hyperparameter, spec.arm]
            assert kl == f"{record.drift['kl']:.3f}"
            assert alpha == (f"{record.training['alpha'][0]:.3f}" if spec.method == "iti" else "-")
            assert objective == (f"{record.training['objective'][0]:.3f}" if spec.method == "optimal" else "-")
            verdict = run.verdict.methods[spec.method]
            is_chosen = verdict.chosen[spec.arm] == spec.hyperparameter
            assert chosen == f"{int(is_chosen)} of 1"
            names = [flag.name for flag in verdict.flags if spec.arm in flag.places] if is_chosen else []
            assert flags == ", ".join(f"{name} 1" for name in names)


def test_grids_widen_by_one_rule_at_every_place(run):
    assert run.is_finished
    for method, grid in (("iti", [0.002, 0.004]), ("optimal", [0.2, 0.4])):
        for place in {(r.spec.arm, r.spec.control) for r in run.trials if r.spec.method == method}:
            tried = [
                r.spec.hyperparameter
                for r in run.trials
                if r.spec.method == method and (r.spec.arm, r.spec.control) == place
            ]
            # Of two strengths the best one is at an edge, so each place has a third.
            assert len(tried) == 3 and set(grid) < set(tried) and set(tried) - set(grid) < {0.001, 0.008, 0.1, 0.8}
    assert len(run.trials) == run.manifest.planned == 1 + 2 * 4 * 3


def test_a_place_of_two_nulls_gets_further_strengths_once_for_both(tmp_path):
    """Of 24 controls, several stand for both nulls; each of their places has all trials, the samples included."""
    own = {"methods": ["iti"], "iti": {"alphas": [2.0, 4.0]}, "evaluation": {"samples": 3, "bank_size": 2}}
    config = small_config(tmp_path, controls=12, claim="0.1,1.2", **own)
    config = merge_config(config, {"nulls": ["anywhere", "layers"], "widen": 2})
    run_audit(config, tmp_path / "run", judges={a: HashJudge(a) for a in ("truth", "info")}, progress=False)
    run = load_run(tmp_path / "run")
    assert run.is_finished and len(run.trials) == run.manifest.planned
    n_places = Counter(r.spec.trial_id for r in run.trials)
    further = [r.spec for r in run.trials if r.spec.hyperparameter not in (None, 2.0, 4.0)]
    assert any(n_places[spec.trial_id] == 2 for spec in further)
    assert {len(r.samples["test"]) for places in select(run.records, run.score).values() for r in places.values()} == {
        3
    }


def test_the_training_length_is_found_once_and_used_by_all(run):
    training = run.manifest.methods["optimal"].training
    lengths = training["objectives"]
    assert set(lengths) == {"claim", "whole"}
    assert training["epochs"] == max(map(horizon, lengths.values()))
    steps = {len(r.training["loss"]) for r in run.trials if r.spec.method == "optimal"}
    assert steps == {training["n_steps"]} == {2 * training["epochs"]}
    for record in run.trials:
        if record.spec.method == "optimal":
            assert math.isfinite(record.training["objective"][0]) and "change" in record.training


def test_a_stopped_search_and_a_stopped_run_end_the_same(run, config, tmp_path, monkeypatch):
    real, seen = horizons._objective, []

    def stop_at_the_third(*args):
        seen.append(args[1].arm)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(horizons, "_objective", stop_at_the_third)
        run_audit(config, tmp_path / "run", progress=False)
    with monkeypatch.context() as patch, stopped_at(6):
        patch.setattr(horizons, "_objective", lambda *args: (seen.append("again"), real(*args))[1])
        run_audit(config, tmp_path / "run", progress=False)
    n_tried = sum(map(len, run.manifest.methods["optimal"].training["objectives"].values()))
    assert len(seen) == n_tried + 1  # nothing was tried twice but the one that was stopped
    with monkeypatch.context() as patch:
        patch.setattr(horizons, "_objective", None)
        run_audit(config, tmp_path / "run", progress=False)
    again = load_run(tmp_path / "run")
    assert {r.spec.trial_id: r for r in again.trials} == {r.spec.trial_id: r for r in run.trials}
    assert again.manifest.methods == run.manifest.methods


def test_the_search_says_how_long_it_takes_at_most(config, tmp_path, capsys):
    run_pilot(config, tmp_path / "run")
    said = " ".join(capsys.readouterr().err.split())
    assert "finding the training length of optimal: at most 60 epochs of training" in said
    assert re.search(r"optimal, claim: objective \S+ after 2 epochs; at most 58 epochs more, about \d+ (s|min)", said)
    assert re.search(r"optimal, whole: objective \S+ after \d+ epochs(?!;)", said)
    estimate = describe_estimate(run_pilot(config, tmp_path / "run", progress=False))
    assert re.search(r"the training length of optimal is found \(\d+ epochs of training, not repeated\)", estimate)


def test_runs_of_other_lengths_share_no_fit(run):
    method, epochs = run.config.methods["optimal"], run.manifest.methods["optimal"].training["epochs"]
    context = next(r.spec.context for r in run.trials if r.spec.method == "optimal")
    forest = Forest((), ())
    known = "m", forest, (), []
    hashes = {n: fit_context(*known, "optimal", replace(method, epochs=n), "d") for n in (epochs, 1, "auto")}
    assert len(set(hashes.values())) == 3 and context not in hashes.values()
    by_dose = [fit_context(*known, "iti", run.config.methods["iti"], drift) for drift in ("a", "b")]
    assert by_dose[0] != by_dose[1]
