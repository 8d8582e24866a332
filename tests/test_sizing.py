"""Designs from real tiny runs: what a pilot runs, what is read from it, and that the audit grows from it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from locaudit import cli
from locaudit.config import load_config, merge_config, to_yaml
from locaudit.errors import ConfigError, RunFolderError
from locaudit.report.design import (
    Target,
    changes,
    count_questions,
    describe_design,
    find_cheapest,
    power_sentence,
    rounded,
    write_design,
)
from locaudit.report.result import read_result
from locaudit.report.sizing import find_sizing, read_sizing
from locaudit.run.audit import run_audit
from locaudit.run.pilot import run_design_pilot
from locaudit.run.repeats import run_repeats
from locaudit.stats.design import Size, find_components, smallest_lead
from locaudit.stats.scores import score_values
from locaudit.store.folder import check_run
from locaudit.store.run import load_run
from runs import HashJudge, small_config
from test_runner import dump

SETTINGS = {"claim": "0.1,1.2", "score": "reward_margin", "split": {"fractions": [0.4, 0.1, 0.5], "max_test": 4}}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def config(home):
    return small_config(home, controls=19, rest=True, nulls=["anywhere", "layers"], **SETTINGS)


@pytest.fixture(scope="module")
def pilot(config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "pilot"
    run_design_pilot(config, out, progress=False)
    return out


def test_a_pilot_runs_less_than_a_fifth(pilot):
    run = load_run(pilot)
    places = {(r.spec.method, r.spec.arm, r.spec.null) for r in run.trials}
    assert places == {
        ("none", "base", ""), ("iti", "claim", ""), ("optimal", "claim", ""), ("optimal", "whole", ""),
        ("optimal", "control", "anywhere"), ("optimal", "control", "layers"),
    }  # fmt: skip
    assert {r.spec.control for r in run.trials if r.spec.arm == "control"} == {0, 1, 2}
    assert len(run.trials) < run.manifest.planned / 5


def test_the_audit_goes_on_from_a_pilot_as_it_would_without(config, pilot, tmp_path):
    before = dump(pilot)
    run, sizing = read_sizing(pilot)
    assert run.config.controls == 19 and sizing.size == Size(4, 1, 19, 1)
    target = Target(lead=0.9 * smallest_lead(sizing.parts, sizing.size))
    best = find_cheapest(run, sizing, target, 8)
    assert best is not None and best.lead >= 0.8 and (best.size.questions > 4 or best.size.controls > 19)
    write_design(run, best.size, tmp_path / "design.yaml")
    grown = load_config(tmp_path / "design.yaml")
    assert check_run(pilot, grown, None)  # it may grow to the design
    run_audit(config, pilot, progress=False)
    run_audit(config, tmp_path / "whole", progress=False)
    after, whole = dump(pilot), dump(tmp_path / "whole")
    # An edit that two nulls share has its file's name from the place that ran first.
    for found in (before, after, whole):
        found["fits"] = [(*fit[:10], fit[11]) for fit in found["fits"]]
        found["edits"] = sorted(content for _, content in found["edits"])
    assert after == whole and set(before["fits"]) <= set(after["fits"])
    done = load_run(pilot)
    assert done.is_finished and not done.manifest.extensions


def test_what_is_read_from_a_finished_run(pilot):
    run, sizing = read_sizing(pilot)
    assert run.is_finished  # by the test above
    chosen = {r.spec.place: score_values(r.questions["test"], run.score) for r in run.records
              if r.spec.method in ("optimal", "none")}  # fmt: skip
    claim, base = (next(x for place, x in chosen.items() if place.arm == arm) for arm in ("claim", "base"))
    controls = [chosen[place] for place in sorted(chosen) if place.null == "anywhere"]
    assert list(sizing.nulls) == ["anywhere"]  # its layers have too few other places
    parts = find_components(claim, controls, base, run.manifest.nulls["anywhere"].population)
    assert parts is not None and sizing.nulls["anywhere"].population == parts.population
    for size in (sizing.size, Size(100, controls=39)):
        assert sizing.nulls["anywhere"].lead_se(size) == pytest.approx(parts.lead_se(size))
        assert sizing.nulls["anywhere"].gain.variance(size) == pytest.approx(parts.gain.variance(size))
    assert not sizing.is_sampled and not sizing.knows_samples
    # A place that two nulls share counts twice, although it was run once.
    taken = sum(sum(run.parts[r.spec.trial_id].values()) for r in run.trials)
    assert sizing.seconds(sizing.size) == sizing.spent == pytest.approx(taken)
    assert 0 < sum(map(sum, (x.values() for x in run.parts.values()))) <= sum(run.seconds.values())
    assert sizing.more(sizing.size) == 0 < sizing.more(replace(sizing.size, questions=8)) < sizing.spent
    iti, directions = find_sizing(run, "iti"), read_sizing(pilot, null="layers")[1]
    assert iti is not None and iti.method == "iti" and list(directions.nulls) == ["layers"]


def test_the_printed_designs(pilot, capsys):
    run, sizing = read_sizing(pilot)
    lead = smallest_lead(sizing.parts, sizing.size)
    assert cli.main(["design", str(pilot), "--lead", f"{lead:.4f}", "--margin", f"{lead:.4f}"]) == 0
    shown = capsys.readouterr().out
    assert "4 test questions of the 8 that the behaviour has" in shown and "  <- planned" in shown
    assert "Cheapest for a lead of" in shown and "same within" in shown
    assert count_questions(run.config) == 8
    assert load_config(pilot / "design.yaml").claim == run.config.claim
    wish = find_cheapest(run, sizing, Target(lead * 0.97), 8)
    assert wish is not None
    said = describe_design(run, sizing, Target(lead * 0.97), None)
    block = yaml.safe_load("\n".join(said.partition(" more.\n")[2].splitlines()))
    assert block == changes(run, wish.size) and merge_config(run.config, block).hash == run.config.hash
    assert cli.main(["design", str(pilot), "--lead", "1e-7"]) == 0
    assert "No design within these limits" in capsys.readouterr().out
    sentence = power_sentence(run, folder=str(pilot))
    assert sentence.startswith(f"80 % of such audits would find a true lead of {rounded(lead)} or more. ")
    assert " A lead of " in sentence and f"(`locaudit design {pilot} --lead " in sentence
    verdict = read_result(pilot).verdict
    assert verdict.power == sentence.replace(str(pilot), "RUN") and str(verdict).endswith(verdict.power)
    assert all(lead >= smallest_lead(parts, sizing.size) for parts in sizing.parts)  # it must pass both nulls


def test_a_dry_run_says_what_the_audit_will_see(config, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(merge_config(config, {"evaluation": {"bank_size": 4}, "nulls": ["anywhere"]})))
    assert cli.main(["audit", str(path), "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    assert "80 % of such audits would find a true lead of " in capsys.readouterr().out


def test_errors_say_what_to_do(pilot, home, tmp_path, capsys):
    with pytest.raises(ConfigError, match="tested"):
        read_sizing(pilot, "tested")
    with pytest.raises(ConfigError, match="norm"):
        read_sizing(pilot, null="norm")
    assert cli.main(["design", str(pilot), "--power", "1"]) == 2 and "between 0 and 1" in capsys.readouterr().err
    few = small_config(home, controls=2, methods=["iti"], **SETTINGS)
    run_audit(few, tmp_path / "few", progress=False)
    assert power_sentence(load_run(tmp_path / "few")) == ""
    with pytest.raises(RunFolderError, match="3 controls"):
        read_sizing(tmp_path / "few")


def test_samples_and_repeats_are_told_apart(home, tmp_path):
    """Sampled answers, in two repeats of a behaviour with a fixed split."""
    behaviour, rows = tmp_path / "fixed.jsonl", (home / "questions.jsonl").read_text().splitlines()
    parts = ["train"] * 8 + ["val"] * 2 + ["test"] * 6
    fixed = [row[:-1] + f', "split": "{part}"}}' for row, part in zip(rows, parts, strict=True)]
    behaviour.write_text("\n".join(fixed), encoding="utf-8")
    config = small_config(home, controls=4, methods=["optimal"], behaviour=str(behaviour), claim="0.1,1.2",
                          evaluation={"samples": 3}, training_seed=0, level=0.3)  # fmt: skip
    judges = {aspect: HashJudge(aspect) for aspect in ("truth", "info")}
    run_repeats(config, tmp_path / "out", 2, judges=judges, progress=False)
    run, sizing = read_sizing(tmp_path / "out")
    assert run.score == "info_truth_probability" and sizing.knows_samples
    assert sizing.size == Size(6, 3, 4, 2)
    assert {part for parts in run.parts.values() for part in parts} == {"edit", "score", "answer", "sample"}
    (parts,) = sizing.parts
    assert all(math.isfinite(x) for x in vars(parts.control).values())
    # The mean over samples is what the verdict compares.
    from locaudit.report.sizing import _values

    values = _values(run, "optimal", run.manifest.methods["optimal"])
    order = np.argsort([question.id for question in run.questions["test"]])
    for record in run.records:
        shown = score_values(record.questions["test"], run.score)[:, order]
        np.testing.assert_allclose(values[record.spec.place].mean(axis=0), shown)
    best = find_cheapest(run, sizing, Target(1.5 * smallest_lead(sizing.parts, sizing.size)), 6)
    assert best is not None and best.size == sizing.size
