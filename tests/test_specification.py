"""The specification table: every combination that records hold, and what each of them says."""

from __future__ import annotations

import csv
import dataclasses
import io
import math

import pytest

from locaudit.records import TrialRecord, TrialSpec
from locaudit.report import write_report
from locaudit.report.result import read_result
from locaudit.run.audit import run_audit
from locaudit.stats import Design, MethodFacts
from locaudit.stats.scores import judged_metrics, mean_score, score_values
from locaudit.stats.sequential import Null
from locaudit.stats.specification import CHOSEN, Specification, specify
from locaudit.store.run import load_run
from runs import HashJudge, small_config
from tiny import heads

FACTS = {"optimal": MethodFacts("Optimal edit", n_strengths=2)}
N = 8
"""Number of questions."""


def record(arm, strength=None, right=0, *, control=-1, null="", method="optimal", val=None, diverged=False):
    """A trial that answers `right` of the questions right."""
    method = "none" if arm == "base" else method
    spec = TrialSpec(arm, method, None if arm == "base" else heads((0, 0)), strength, 7, "", control, null=null)
    if diverged:
        return TrialRecord(spec, "diverged")
    values = {"mc1": (1.0,) * right + (0.0,) * (N - right)}
    mean = right / N
    return TrialRecord(spec, "ok", metrics={"val": {"mc1": mean if val is None else val}, "test": {"mc1": mean}},
                       drift={"kl": 0.1}, questions={"test": values})  # fmt: skip


def controls(strength, rights, null="anywhere", **more):
    return [record("control", strength, right, control=i, null=null, **more) for i, right in enumerate(rights)]


def table(records, *, level=0.25, facts=FACTS, design=None, score="mc1"):
    return specify(lambda most: records, facts, design or Design(), score=score, level=level)


def test_a_case_by_hand():
    """Strength 1: the claim has 6 of 8, its controls 1, 2 and 6; at strength 2, 5 against 1, 2 and 3.

    Validation chooses strength 2 at the claim, and strength 1 at the controls.
    """
    records = [
        record("base", right=2),
        record("claim", 1.0, 6, val=0.1), record("claim", 2.0, 5, val=0.9),
        *controls(1.0, [1, 2, 6], val=0.9), *controls(2.0, [1, 2, 3], val=0.1),
    ]  # fmt: skip
    found = table(records).rows
    assert [(row.strength, row.n_at_least, row.n_controls, row.p_value, row.better) for row in found] == [
        (CHOSEN, 1, 3, 2 / 4, False), (1.0, 1, 3, 2 / 4, False), (2.0, 0, 3, 1 / 4, True),
    ]  # fmt: skip
    assert [row.effect for row in found] == [3 / 8, 4 / 8, 3 / 8]
    assert [row.lead for row in found] == pytest.approx([5 / 8 - 3 / 8, 6 / 8 - 3 / 8, 5 / 8 - 2 / 8])
    assert {(row.method, row.score, row.null, row.seed, row.judgement, row.answers, row.samples) for row in found} == {
        ("optimal", "mc1", "anywhere", 7, "", "", None)
    }
    assert table(records, level=0.2).rows[2].better is None, "3 controls allow no p below 1/4"
    lower = {"optimal": MethodFacts("Optimal edit", "lower", n_strengths=2)}
    assert [row.n_at_least for row in table(records, facts=lower).rows] == [2, 3, 3]


def test_a_strength_that_some_place_lacks_has_no_row():
    both = [record("base"), record("claim", 1.0, 6), record("claim", 2.0, 5), *controls(1.0, [1, 2, 3])]
    widened = [*both, *controls(2.0, [1, 1], null="anywhere")[:1], *controls(1.0, [1] * 3, "layers"),
               *controls(2.0, [1] * 3, "layers")]  # fmt: skip
    found = [(row.strength, row.null) for row in table(widened).rows]
    assert found == [
        (CHOSEN, "anywhere"), (CHOSEN, "layers"), (1.0, "anywhere"), (1.0, "layers"), (2.0, "layers"),
    ]  # fmt: skip
    single = [record("base"), record("claim", 1.0, 6), *controls(1.0, [1, 2, 3])]
    assert [row.strength for row in table(single).rows] == [CHOSEN]


def test_what_diverged_counts_against_the_claim():
    records = [record("base"), record("claim", 1.0, 6), *controls(1.0, [1, 2]),
               record("control", 1.0, control=2, null="anywhere", diverged=True)]  # fmt: skip
    (row,) = table(records).rows
    assert (row.n_at_least, row.n_controls, row.better) == (1, 3, False)
    assert row.lead == pytest.approx(6 / 8 - 1.5 / 8)
    (row,) = table([record("base"), record("claim", 1.0, diverged=True), *controls(1.0, [1, 2, 3])]).rows
    assert math.isnan(row.claim) and (row.p_value, row.better) == (1.0, None)
    assert table([record("claim", 1.0, 6)]).rows == ()
    assert table([record("base"), *controls(1.0, [1])]).rows == ()


def test_an_early_end_has_the_sequential_p_and_a_missing_control_leaves_the_answer_open():
    records = [record("base"), record("claim", 1.0, 6), *controls(1.0, [7, *[1] * 8])]
    planned = {"anywhere": Null(19)}
    for design, better in ((Design("fixed", planned), None), (Design("curtailed", planned), False)):
        (row,) = table(records, level=0.05, design=design).rows
        assert (row.better, row.p_value) == (better, 2 / 10)


def test_what_does_not_vary_is_named():
    records = [record("base"), record("claim", 1.0, 6), *controls(1.0, [1, 2, 3])]
    one = table(records)
    absent = "one score, one strength, one null, one training seed, no judge"
    assert one.sentence == f"The claim is better than its controls in 1 of 1 combinations. Not varied: {absent}."
    other = [dataclasses.replace(r, spec=dataclasses.replace(r.spec, seed=8)) for r in records]
    both = one + table(other)
    assert both.not_varied == f"Not varied: {absent.replace('one training seed, ', '')}."
    assert both.counts == {"mc1": {("optimal", "anywhere"): (2, 2)}}
    assert Specification(()).sentence == "No combination allows an answer at this level."


def test_more_missing_judgements_than_allowed_leave_the_answer_open():
    def judged(trial, n_missing):
        said = [None] * n_missing + [1.0] * (N - n_missing)
        return dataclasses.replace(
            trial, questions={"test": judged_metrics({"truth": said})}, answers={"test": ("",) * N}
        )

    trials = [record("base"), record("claim", 1.0), *controls(1.0, [1, 2, 3])]
    rows = table([judged(trial, i == 1) for i, trial in enumerate(trials)], score="truth").rows
    assert [(row.score, row.judgement, row.answers, row.better) for row in rows] == [
        ("truth_probability", "probability", "greedy", None), ("truth", "yes or no", "greedy", None),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An audit with two strengths, two nulls, and two sampled answers that a judge of truth rates."""
    home = tmp_path_factory.mktemp("home")
    own = {
        "evaluation": {"samples": 2},
        "controls": 3,
        "claim": "0.1,1.2",
        "nulls": ["anywhere", "layers"],
        "level": 0.3,
    }
    config = small_config(home, **own, iti={"alphas": [2.0, 4.0]})
    run_audit(config, home / "run", judges={"truth": HashJudge("truth")}, progress=False)
    return home / "run"


def test_the_table_of_a_run_is_that_of_its_verdict_and_of_other_choices(folder):
    run = load_run(folder)
    found = run.specification.rows
    for name, method in run.verdict.methods.items():
        for null in method.nulls.values():
            (row,) = [
                row for row in found
                if (row.method, row.score, row.strength, row.null) == (name, run.score, CHOSEN, null.name)
            ]  # fmt: skip
            assert (row.base, row.claim, row.effect) == pytest.approx((method.base, method.claim, method.effect))
            assert (row.lead, row.p_value) == pytest.approx((null.lead, null.p_value))
            assert (row.n_at_least, row.n_controls) == (null.n_at_least, len(null.controls))
            assert row.better == (None if null.n_used < null.n_planned else null.p_value <= run.config.level)
    for row in found:
        if row.strength != CHOSEN and row.answers == "sampled":
            assert row.samples == 1  # only the chosen trials have both
    assert {row.samples for row in found if row.score == run.score and row.strength == CHOSEN} == {2}
    one = run.base.questions["test"]
    assert {row.base for row in found if row.score == "mc2"} == {float(mean_score(score_values(one, "mc2")))}
    assert {row.strength for row in found if row.method == "iti"} == {CHOSEN, 2.0, 4.0}
    assert {row.answers for row in found} == {"", "greedy", "sampled"}
    assert run.specification.not_varied == "Not varied: one training seed, one judge per aspect."


def test_a_report_has_the_table(folder):
    page = write_report(folder).read_text(encoding="utf-8")
    rows = load_run(folder).specification.rows
    with io.StringIO((folder / "specification.csv").read_text()) as text:
        lines = list(csv.DictReader(text))
    assert len(lines) == len(rows)
    assert [float(line["lead"]) for line in lines] == [row.lead for row in rows]
    assert {line["better"] for line in lines} <= {"true", "false", ""}
    assert "Not varied: one training seed, one judge per aspect." in page
    assert len(read_result(folder).specification()) == len(rows)
