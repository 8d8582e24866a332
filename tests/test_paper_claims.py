"""The rules of the paper's study on planted scores: worlds in which every claim is true, false or beyond the data."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import yaml

from locaudit.claims import parse_location
from locaudit.errors import RunFolderError
from locaudit.location import Location
from locaudit.records import NO_METHOD, TrialRecord, TrialSpec
from locaudit.report.tables import Row
from locaudit.studies.paper.claims import View, at_least, compare, evaluate, judge_claims
from locaudit.studies.paper.registration import CLAIMS, committed, read_rules, register
from locaudit.studies.paper.run import run_paper
from locaudit.studies.paper.specification import specify, summarise
from locaudit.studies.paper.study import Study, read_study
from runs import HashJudge, save_behaviour, save_model, study_config

JUDGES = {"truth": HashJudge("truth"), "info": HashJudge("info")}
N_SETS = 39
# Truth and MC2 by arm. ITI at random places does nothing, optimal edits are alike everywhere.
PAPER = {
    "base": (0.30, 0.40), "iti claim": (0.45, 0.60), "iti random": (0.30, 0.45), "iti whole": (0.44, 0.60),
    "optimal claim": (0.80, 0.60), "optimal random": (0.80, 0.55), "optimal whole": (0.81, 0.60),
    "single": (0.80, 0.60), "single probed": (0.40, 0.60),
}  # fmt: skip
# The probed heads are special under optimal edits only, ITI everywhere is as good as or better than at these.
OPPOSITE = {
    "base": (0.30, 0.40), "iti claim": (0.50, 0.50), "iti random": (0.50, 0.55), "iti whole": (0.70, 0.60),
    "optimal claim": (0.45, 0.60), "optimal random": (0.33, 0.62), "optimal whole": (0.58, 0.60),
    "single": (0.33, 0.60), "single probed": (0.47, 0.60),
}  # fmt: skip
NOTHING = {**dict.fromkeys(PAPER, (0.29, 0.39)), "base": (0.30, 0.40)}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A real study, whose scores the tests replace."""
    home = tmp_path_factory.mktemp("study")
    save_model(home / "model")
    save_behaviour(home / "questions.jsonl", n=20)
    changes = {"landscape": False, "random_heads": 2, "random_sets": 2, "iti": {"doses": [0.01]}}
    config = study_config(home, **changes, optimal={"strengths": [0.2]})
    run_paper(config, home / "out", judges=JUDGES, progress=False)
    return read_study(home / "out")


def planted(study: Study, world, *, n=240, seeds=3, lost=0, **config) -> Study:
    """The study with scores as in `world` at `n` questions, 39 random sets and all single heads but the best probed."""
    rng = np.random.default_rng(0)
    hardness = rng.normal(0, 0.1, n)

    def record(arm, method, level, place=None, control=-1, status="ok", null="anywhere"):
        strength, null = None if arm == "base" else 0.2, null if arm == "control" else ""
        spec = TrialSpec(arm, method, place, strength, 0, "", control, null=null)
        if status != "ok":
            return Row(TrialRecord(spec, "diverged"), False)
        truth, mc2 = (np.clip(x + hardness - hardness.mean() + rng.normal(0, 0.03, n), 0, 1) for x in level)
        values = {"truth": truth, "info": 0 * truth + 0.9, "info_truth_both": 0.9 * truth, "mc2": mc2, "mc1": mc2}
        values |= {f"{name}_probability": values[name] for name in ("truth", "info")}
        questions = {"test": {name: tuple(x.tolist()) for name, x in values.items()}}
        return Row(TrialRecord(spec, "ok", questions=questions, drift={"kl": 0.1}), True)

    def around(level):
        return tuple(x + rng.normal(0, 0.004) for x in level)

    def sets(method):
        claim = study.sets.manifest.claim
        rows = [record(arm, method, world[f"{method} {arm}"], claim) for arm in ("claim", "whole")]
        n_sets = N_SETS if method == "optimal" else 30  # ITI edits the first ones only
        states = ["diverged"] * lost + ["ok"] * (n_sets - lost)
        for null in ("anywhere", "layers") if method == "optimal" else ("anywhere",):
            levels = [around(world[f"{method} random"]) for _ in states]
            rows += [
                record("control", method, level, claim, i, state, null)
                for i, (level, state) in enumerate(zip(levels, states, strict=True))
            ]
        return rows

    assert study.sets.manifest.probes is not None
    accuracy = np.asarray(study.sets.manifest.probes.val_accuracy)
    order, width = np.argsort(-accuracy.ravel(), kind="stable"), accuracy.shape[1]
    places: list[Location] = [parse_location(f"{i // width}.{i % width}") for i in order]
    kinds = ["single probed", *["single"] * (len(places) - 2)]  # the two best probed heads are the study's claim
    single = [record("claim", "optimal", world["single probed"], places[0])]
    single += [record("control", "optimal", around(world[kind]), places[i + 1], i) for i, kind in enumerate(kinds)]
    parts = {"sets": sets("optimal"), "iti": sets("iti"), "single": single}
    parts |= {f"sets-{i}": sets("optimal") for i in range(1, seeds)}
    base, old = record("base", NO_METHOD, world["base"]), study.audits
    audits = {part: replace(old[part.partition("-")[0]], rows=(base, *rows)) for part, rows in parts.items()}
    changed = replace(study.config, training_seeds=seeds, score="info_truth_probability", **config)
    return replace(study, config=changed, audits=audits, lacking={}, _chosen={})


def outcomes(study):
    return {claim["name"]: claim["outcome"] for claim in judge_claims(study)}


def test_claims_that_are_true_replicate(study):
    found = outcomes(planted(study, PAPER))
    assert len(found) == 15  # the paper's 14, and the main one for layer-matched sets
    assert set(found.values()) == {"replicated"}, found


def test_claims_that_are_false_do_not_replicate(study):
    found = outcomes(planted(study, OPPOSITE))
    assert set(found.values()) == {"not replicated"}, found


def test_flags_stand_beside_outcomes_and_change_none(study):
    world = planted(study, PAPER)

    def trained(row):
        loss = 0.9 if row.record.spec.arm == "whole" else 0.5
        return replace(row, record=replace(row.record, training={"objective": (loss,)}))

    rows = tuple(map(trained, world.audits["sets"].rows))
    world = replace(world, audits={**world.audits, "sets": replace(world.audits["sets"], rows=rows)}, _chosen={})
    found = {claim["name"]: claim for claim in judge_claims(world)}
    assert {claim["outcome"] for claim in found.values()} == {"replicated"}
    one, whole = "single (the optimal edit at the probed heads)", "superset (the optimal edit of the whole model)"
    assert found["random_is_as_good"]["flags"] == [one]
    assert set(found["localized_is_nearly_optimal"]["flags"]) == {one, whole}
    assert found["random_matches_whole"]["flags"] == [whole]


def test_without_any_effect_nothing_is_decided(study):
    found = judge_claims(planted(study, NOTHING))
    assert {claim["outcome"] for claim in found} == {"open"}
    assert all("no proven gain of" in claim["open"] for claim in found)


def test_a_claim_about_layers_needs_sets_in_layers(study):
    found = planted(study, PAPER)
    own = {part: replace(x, rows=[row for row in x.rows if row.record.spec.null != "layers"])
           for part, x in found.audits.items()}  # fmt: skip
    rows = {claim["name"]: claim for claim in judge_claims(replace(found, audits=own, _chosen={}))}
    assert rows["random_in_layers_is_as_good"]["open"] == "not run: layer_sets"
    assert rows["random_is_as_good"]["outcome"] == "replicated"


def test_few_questions_unequal_doses_and_diverged_sets_leave_claims_open(study):
    few = judge_claims(planted(study, PAPER, n=40))
    assert {claim["open"] for claim in few} == {"40 test questions, fewer than 100"}
    unequal = judge_claims(planted(study, PAPER, iti=replace(study.config.iti, doses=None)))
    open_ones = {claim["name"] for claim in unequal if "set iti.doses" in claim["open"]}
    assert open_ones == {x["name"] for x in study.rules["claims"] if x.get("equal_dose")}
    lost = {claim["name"]: claim["open"] for claim in judge_claims(planted(study, PAPER, lost=8))}
    assert lost["random_is_as_good"] == "21% of the random sets diverged"
    assert not lost["localized_is_nearly_optimal"]


def test_an_open_claim_says_what_would_decide_it(study):
    close = {**PAPER, "optimal whole": (0.80, 0.60), "optimal claim": (0.80, 0.60), "iti claim": (0.632, 0.60)}
    rows = {claim["name"]: claim for claim in judge_claims(planted(study, close, seeds=1))}
    row = rows["optimal_beats_iti"]  # a lead of .168 of truth, where a third of the gain is .167
    assert row["outcome"] == "open" and "test questions" in row["size"]
    needed = int(row["size"].split()[1].replace(",", ""))
    assert needed > 240


def test_the_table_of_choices_repeats_the_rules(study):
    found = planted(study, PAPER)
    rows = specify(found)
    for rule in found.rules["claims"]:
        own = [row for row in rows if row["claim"] == rule["name"]]
        first = evaluate(rule, View.of(found))
        assert own[0]["changed"] == "" and own[0]["p"] == first.p and own[0]["outcome"] == "replicated"
    assert {row["changed"] for row in rows} == {"", None, "margin", "judged score", "MC score", "seed"}  # one strength
    counts = summarise(rows)["random_is_as_good"]
    assert counts["replicated"] and sum(counts.values()) == sum(row["claim"] == "random_is_as_good" for row in rows)


def test_a_contrast_at_its_bound_is_rejected_as_often_as_its_level():
    rng, hits, n_worlds = np.random.default_rng(0), np.zeros(2), 600
    for _ in range(n_worlds):
        places = 0.1 + rng.normal(0, 0.05, (20, 1, 1))
        own, others = 0.3 + rng.normal(0, 0.3, (1, 120)), places + rng.normal(0, 0.3, (20, 1, 120))
        found = compare(own, others, np.full((1, 120), 0.2))
        hits += np.asarray([found.p_above, found.p_below]) <= 0.05
    assert (np.abs(hits / n_worlds - 0.05) < 0.03).all()


def test_partial_conjunction_is_the_published_one():
    assert at_least([0.9, 0.01, 0.02], 1) == pytest.approx(0.03)  # Bonferroni
    assert at_least([0.9, 0.01, 0.02], 2) == pytest.approx(0.04)
    assert at_least([0.9, 0.01, 0.02], 3) == 0.9  # all of them: the largest
    assert at_least([0.01], 2) == 1.0


def test_rules_are_those_of_the_day_the_study_began(study, tmp_path):
    facts = register(tmp_path)
    assert not facts.changed and facts.sha256[:16] in facts.sentence
    assert register(tmp_path) == facts  # a study that has begun keeps its rules
    rules = yaml.safe_load((tmp_path / CLAIMS).read_text())
    assert rules == study.rules and sum(rule["name"] == "random_is_as_good" for rule in rules["claims"]) == 1
    (tmp_path / CLAIMS).write_text((tmp_path / CLAIMS).read_text().replace("margin: 0.33", "margin: 0.44"))
    assert "were changed after the study began" in read_rules(tmp_path)[1].sentence
    (tmp_path / "registration.json").unlink()
    with pytest.raises(RunFolderError, match="a study of an earlier version"):
        read_rules(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("registration.json", "{"), ("registration.json", "{}"), (CLAIMS, "a: ["), (CLAIMS, ""), (CLAIMS, "claims: [{}]")],
)
def test_a_broken_file_of_rules_is_named(tmp_path, name, content):
    register(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(RunFolderError, match=r"whose claims.yaml or registration.json is broken"):
        read_rules(tmp_path)


def test_a_claim_without_a_part_of_its_rule_is_named(tmp_path):
    register(tmp_path)
    (tmp_path / CLAIMS).write_text((tmp_path / CLAIMS).read_text().replace("  is: above", "  iss: above", 1))
    with pytest.raises(RunFolderError, match="iti_beats_random: is"):
        read_rules(tmp_path)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs Git")
def test_only_an_unchanged_committed_file_counts_as_committed(tmp_path):
    file = tmp_path / "claims.yaml"
    file.write_text("a")
    assert committed(file) == ""  # no repository

    def git(*arguments):
        known = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run([*known, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    assert committed(file) == ""
    git("add", ".")
    git("commit", "-m", "rules")
    assert " of 20" in committed(file)
    file.write_text("b")
    assert committed(file) == ""
