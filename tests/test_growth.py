"""A run that grows after it had results: only what is missing runs, and it ends as if all had been there at first."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import runpy
import shutil
import signal
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest

from locaudit import cli
from locaudit.config import merge_config, to_yaml
from locaudit.errors import ConfigError, DataError, RunFolderError
from locaudit.registry import METHODS
from locaudit.report import write_report
from locaudit.run import prepare, worker
from locaudit.run.audit import run_audit
from locaudit.run.pilot import run_pilot
from locaudit.run.repeats import run_repeats
from locaudit.stats.growth import Extension, describe_extensions
from locaudit.store.folder import read_run
from locaudit.store.manifest import extended
from locaudit.store.run import load_run
from runs import HashJudge, save_behaviour, save_model, small_config, stopped_at
from test_runner import dump

JUDGES = {"truth": HashJudge("truth"), "info": HashJudge("info")}
MARGIN = 2e-5
"""Reward margins, in nats, are differences of sums of up to 100 nats, whose last digit in float32 is 8e-6."""
SMALL = {
    "claim": "0.1,1.2",
    "score": "reward_margin",
    "iti": {"alphas": [2.0, 4.0]},
    "split": {"fractions": [0.4, 0.3, 0.3], "max_val": 3, "max_test": 4},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model")
    save_behaviour(folder / "questions.jsonl", n=30)
    return folder


@pytest.fixture(scope="module")
def small(home, tmp_path_factory) -> Path:
    """A finished audit with the settings `SMALL`."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_audit(small_config(home, **SMALL), folder, progress=False)
    return folder


@pytest.fixture
def copied(small, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(small, tmp_path / "run")


def grown(config, **changes):
    return merge_config(config, changes)


def more_questions(config):
    return grown(config, split={"max_val": 5, "max_test": None})


class Counted:
    """What runs: edits found, questions scored and answered."""

    def __init__(self, monkeypatch):
        self.found, self.scored, self.answered = Counter(), Counter(), Counter()
        for name in ("iti", "optimal"):
            monkeypatch.setitem(METHODS._things, name, self.counting(METHODS[name]))
        score, answer = worker.answer_log_probs, worker.answer_prompts

        def scores(model, forest, bank, **options):
            self.scored.update({len(forest.trees): bank.n_edits})
            return score(model, forest, bank, **options)

        def answers(model, forest, edits, **options):
            self.answered.update({len(forest.trees): len(edits or [0])})
            return answer(model, forest, edits, **options)

        monkeypatch.setattr(worker, "answer_log_probs", scores)
        monkeypatch.setattr(worker, "answer_prompts", answers)

    def counting(self, method):
        def fit(shared, jobs, settings, on_step=None):
            self.found[method.title] += len(jobs)
            return method.fitter(shared, jobs, settings, on_step)

        return dataclasses.replace(method, fit=fit)


def assert_same_result(one: Path, other: Path) -> None:
    """The same trials and verdict, scores equal within 1e-6."""
    ours, theirs = load_run(one), load_run(other)
    assert [r.spec for r in ours.trials] == [r.spec for r in theirs.trials]
    assert ours.questions == theirs.questions
    for mine, its in zip(ours.records, theirs.records, strict=True):
        assert (mine.status, mine.message, mine.edit, mine.answers) == (its.status, its.message, its.edit, its.answers)
        assert mine.questions.keys() == its.questions.keys()
        for split, metrics in mine.questions.items():
            assert metrics.keys() == its.questions[split].keys()
            for name, values in metrics.items():
                close = MARGIN if name == "reward_margin" else 1e-6
                assert values == pytest.approx(its.questions[split][name], abs=close, nan_ok=True)
            same = pytest.approx(its.metrics[split], abs=MARGIN, nan_ok=True)
            assert mine.metrics[split] == same
        assert mine.drift == pytest.approx(its.drift, abs=1e-6)
    assert ours.is_finished and theirs.is_finished
    for name, verdict in ours.verdict.methods.items():
        its = theirs.verdict.methods[name]
        assert (verdict.outcome, verdict.chosen, [*verdict.nulls]) == (its.outcome, its.chosen, [*its.nulls])
        for name, null in verdict.nulls.items():
            other = its.nulls[name]
            assert (null.n_at_least, null.n_planned, null.p_value) == (other.n_at_least, other.n_planned, other.p_value)
            assert null.controls == pytest.approx(other.controls, abs=MARGIN, nan_ok=True)
    assert ours.verdict.headline == theirs.verdict.headline


def assert_as_from_the_start(config, folder: Path, name: str = "run", **options) -> None:
    """The run `name` in the folder, which has grown, against one that began with this configuration."""
    run_audit(config, folder / "whole", progress=False, **options)
    assert_same_result(folder / name, folder / "whole")


@pytest.mark.parametrize("null", ["anywhere", "layers", "kv-groups", "probe-accuracy", "norm"])
def test_more_controls_run_those_that_are_missing(home, tmp_path, monkeypatch, null):
    claim = {"claim": "0.1,1.0,1.2"}
    few = small_config(home, **SMALL | claim, nulls=[null], controls=3, evaluation={"bank_size": 2})
    many = grown(few, controls=5)
    run_audit(few, tmp_path / "run", progress=False)
    before = load_run(tmp_path / "run")
    counted = Counted(monkeypatch)
    run_audit(many, tmp_path / "run", progress=False)
    after = load_run(tmp_path / "run")
    assert counted.found == {"ITI": 2 * 2, "Optimal edit": 2}
    kept = {r.spec.trial_id: r for r in after.trials}
    assert all(kept[r.spec.trial_id] == r for r in before.trials)
    assert after.manifest.extensions == (Extension("controls", 3, 5, 16, before.manifest.planned),)
    assert_as_from_the_start(many, tmp_path)
    assert load_run(tmp_path / "whole").verdict.extended == ""


def test_new_questions_are_scored_with_the_edits_that_are_there(home, tmp_path, monkeypatch):
    config = small_config(home, **SMALL | {"score": "auto"}, evaluation={"bank_size": 4})
    run_audit(config, tmp_path / "run", judges=JUDGES, progress=False)
    before = load_run(tmp_path / "run")
    edits = {path.name: path.read_bytes() for path in (tmp_path / "run" / "edits").iterdir()}
    counted, references = Counted(monkeypatch), []
    real = prepare.answer_log_probs

    def reference(model, forest):
        references.append(len(forest.trees))
        return real(model, forest)

    monkeypatch.setattr(prepare, "answer_log_probs", reference)
    run_audit(more_questions(config), tmp_path / "run", judges=JUDGES, progress=False)
    after = load_run(tmp_path / "run")
    assert [len(after.questions[name]) for name in ("val", "test")] == [5, 9]
    assert not counted.found
    assert references == [2, 5]  # the unedited model, too, reads the new ones alone
    # ITI has two strengths at each of four places, which are compared on validation questions.
    assert counted.scored == {2: 8, 5: 8 + 4}
    assert counted.answered == {2: 1 + 8, 5: 1 + 8 + 4}
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "edits").iterdir()} == edits
    for old, new in zip(before.trials, after.trials, strict=True):
        assert old.drift == new.drift
        for split, metrics in old.questions.items():
            for name, values in metrics.items():
                assert new.questions[split][name][: len(values)] == values  # to the last digit
    assert {e.what for e in after.manifest.extensions} == {"test questions", "validation questions"}
    monkeypatch.undo()
    monkeypatch.setenv("LOCAUDIT_CACHE", "off")
    assert_as_from_the_start(more_questions(config), tmp_path, judges=JUDGES)


def test_all_at_once_with_a_judge_and_answers_that_were_not_there(home, tmp_path, monkeypatch):
    config = small_config(home, **SMALL | {"score": "auto"}, evaluation={"bank_size": 3, "max_new_tokens": 0})
    run_audit(config, tmp_path / "run", progress=False)
    run = load_run(tmp_path / "run")
    assert run.score == "mc2" and not run.said
    counted = Counted(monkeypatch)
    answering = grown(config, evaluation={"max_new_tokens": 6})
    run_audit(answering, tmp_path / "run", judges=JUDGES, progress=False)
    assert not counted.found and not counted.scored
    assert counted.answered == {3: 1 + 8, 4: 1 + 8 + 4}
    run = load_run(tmp_path / "run")
    assert run.score == "info_truth_probability" and run.is_finished and not run.n_unjudged
    assert [(e.what, e.before, e.after) for e in run.manifest.extensions] == [("judges", "none", "truth, info")]
    everything = grown(more_questions(config), evaluation={"max_new_tokens": 6}, controls=4)
    run_audit(config, tmp_path / "grown", progress=False)
    run_audit(everything, tmp_path / "grown", judges=JUDGES, progress=False)
    assert_as_from_the_start(everything, tmp_path, "grown", judges=JUDGES)
    with pytest.raises(RunFolderError, match="evaluation.max_new_tokens: 6 there, 0 here"):
        run_audit(grown(everything, evaluation={"max_new_tokens": 0}), tmp_path / "grown", progress=False)


def test_a_judge_added_to_a_run_with_answers_judges_them(home, tmp_path, monkeypatch):
    config, truth = small_config(home, **SMALL | {"score": "auto"}), HashJudge("truth")
    run_audit(config, tmp_path / "run", progress=False)
    counted = Counted(monkeypatch)
    run_audit(config, tmp_path / "run", judges={"truth": truth}, progress=False)
    assert not (counted.found or counted.scored or counted.answered)
    run = load_run(tmp_path / "run")
    assert len(truth.seen) == len(run.said) and run.score == "truth_probability"
    assert "judges from none to truth" in run.verdict.extended


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_an_extension_that_is_killed_goes_on(home, tmp_path):
    config, rng = small_config(home, **SMALL, controls=3), random.Random(0)
    more = grown(more_questions(config), controls=5)
    run_audit(config, tmp_path / "run", progress=False)
    started = time.monotonic()
    run_audit(more, tmp_path / "whole", progress=False)
    length, kills = time.monotonic() - started, 0
    for _ in range(8):
        child = os.fork()
        if child == 0:
            run_audit(more, tmp_path / "run", progress=False)
            os._exit(0)
        time.sleep(rng.uniform(0.05, 0.2) * length)
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert kills >= 4
    run_audit(more, tmp_path / "run", progress=False)
    assert_same_result(tmp_path / "run", tmp_path / "whole")


def test_an_extension_that_was_interrupted_is_unfinished(home, copied, capsys):
    config = small_config(home, **SMALL)
    n_trials = len(load_run(copied).trials)
    with stopped_at(4):
        run_audit(more_questions(config), copied, progress=False)
    assert cli.main(["report", str(copied)]) == 0
    assert capsys.readouterr().out.startswith(f"UNFINISHED: 3 of {n_trials} trials")
    run_audit(more_questions(config), copied)
    assert f"3 of {n_trials} trials done and {n_trials - 3} partly done" in capsys.readouterr().err
    assert load_run(copied).is_finished


def test_an_edit_that_diverges_on_new_questions_is_recorded_as_from_the_start(home, copied, tmp_path, monkeypatch):
    config, real = small_config(home, **SMALL), worker.answer_log_probs

    def wild(model, forest, bank, **options):
        sums = real(model, forest, bank, **options)
        wide = {site.layer for site in bank.sites} == set(range(model.n_layers)) and bank.n_edits == 1
        return [x / 0 for x in sums] if wide and len(forest.trees) >= 5 else sums

    monkeypatch.setattr(worker, "answer_log_probs", wild)
    run_audit(more_questions(config), copied, progress=False)
    assert {r.status for r in load_run(copied).trials} == {"ok", "diverged"}
    assert_as_from_the_start(more_questions(config), tmp_path)
    monkeypatch.setattr(worker, "run_trials", None)
    run_audit(more_questions(config), copied, progress=False)  # nothing is left to do


def test_a_continued_run_says_which_trials_ran_where(small):
    found = load_run(small).manifest
    planned, one = found.planned, found.machine

    def on(threads, before, n):
        return extended(dataclasses.replace(found, threads=threads), before, n)

    assert on(7, found, 0).machines == () and on(found.threads, found, 3).machines == ()
    second = on(7, found, 3)
    two = second.machine
    assert second.machines == ((0, one), (3, two)) and "7 threads" in two
    assert second.moved == f"Not all trials ran alike: trials 1 to 3 on {one}, later ones on {two}."
    third = on(found.threads, second, 5)
    assert third.machines == ((0, one), (3, two), (5, one)) and "trials 4 to 5 on" in third.moved
    assert on(7, third, 5).machines == second.machines  # nothing had run on the third
    assert on(found.threads, second, 3).machines == ()
    assert on(7, found, planned).machine == one and on(7, found, planned).machines == ()  # nothing is left to run
    assert on(9, second, planned).machines == second.machines


def test_a_lost_edit_is_named(home, copied):
    config = small_config(home, **SMALL)
    (copied / "edits" / "control-anywhere-01-optimal-0.2.safetensors").unlink()
    with pytest.raises(DataError, match=r"control-anywhere-01-optimal-0\.2\.safetensors"):
        run_audit(more_questions(config), copied, progress=False)


def test_an_answer_that_becomes_false_is_another_question(home, tmp_path):
    """The texts and their order stay the same, and so do the ids, which the file gives."""
    path = tmp_path / "asked.jsonl"

    def write(n_true):
        rows = [
            {"id": f"q{i}", "question": f"What is {i}?", "true": [f"Red {i}.", f"Blue {i}."][:n_true],
             "false": [f"Red {i}.", f"Blue {i}.", f"Green {i}."][n_true:]}
            for i in range(20)
        ]  # fmt: skip
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return small_config(home, behaviour=str(path), methods=["optimal"], controls=1)

    run_audit(write(2), tmp_path / "run", progress=False)
    with pytest.raises(RunFolderError, match="questions"):
        run_audit(write(1), tmp_path / "run", progress=False)


def test_what_cannot_grow_is_refused_by_name(home, tmp_path):
    config = small_config(home, **SMALL, controls=3)
    run_audit(config, tmp_path / "run", progress=False)
    settings = (tmp_path / "run" / "config.yaml").read_bytes()
    for changes, words in (
        ({"controls": 2}, "controls: 3 there, 2 here"),
        ({"split": {"max_test": 3}}, "split.max_test: 4 there, 3 here"),
        ({"split": {"max_train": 5}}, "split.max_train: None there, 5 here"),
        ({"split": {"seed": 1}, "level": 0.1, "controls": 9}, r"split.seed: 0 there, 1 here\)"),
        ({"evaluation": {"max_new_tokens": 9}}, "evaluation.max_new_tokens: 6 there, 9 here"),
    ):
        with pytest.raises(RunFolderError, match=rf"{words}.*raise controls, split.max_val, split.max_test or"):
            run_audit(grown(config, **changes), tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == settings


def test_a_start_that_fails_leaves_the_number_as_it_was(home, copied, monkeypatch):
    """A mistyped number can be taken back as long as nothing was planned with it."""
    config = small_config(home, **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "plant", None)
        with pytest.raises(TypeError):
            run_audit(grown(config, controls=200), copied, progress=False)
    run_audit(grown(config, controls=4), copied, progress=False)
    assert [e.after for e in load_run(copied).manifest.extensions] == [4]


def test_a_claim_file_forbids_what_it_fixes(home, tmp_path):
    claim_file = tmp_path / "claim.yaml"
    claim_file.write_text('claim: "0.1,1.2"\ncontrols: 3\n')
    free = small_config(home, **SMALL, controls=3)
    config = dataclasses.replace(free, registered=str(claim_file))
    run_audit(config, tmp_path / "run", progress=False)
    with pytest.raises(ConfigError, match=r"controls = 5, but 3 in claim\.yaml"):
        run_audit(grown(config, controls=5), tmp_path / "run", progress=False)
    with pytest.raises(RunFolderError, match=r"claim\.yaml fixes settings now raised \(controls: 3 there, 5 here\)"):
        run_audit(grown(free, controls=5), tmp_path / "run", progress=False)
    run_audit(more_questions(config), tmp_path / "run", progress=False)  # it leaves these open
    run = load_run(tmp_path / "run")
    assert run.is_finished and run.manifest.n_questions["test"] == 9


def test_everything_says_that_a_run_was_extended(home, tmp_path, capsys):
    config, out = small_config(home, **SMALL, controls=19, methods=["optimal"]), tmp_path / "run"
    run_audit(config, out, progress=False)
    path = tmp_path / "more.yaml"
    path.write_text(to_yaml(grown(config, controls=21)))
    assert cli.main(["audit", str(path), "--out", str(out)]) == 0
    said = capsys.readouterr()
    text = load_run(out).verdict.extended
    assert text.startswith("This run was extended: controls from 19 to 21, when 22 of 22 trials had results. Unless")
    assert "false-positive rate may exceed 0.05" in text and "stopping: anytime" in text
    assert text in said.out and "22 of 24 trials done, going on" in said.err
    assert text in str(load_run(out).verdict)
    assert text in write_report(out).read_text(encoding="utf-8")
    written = json.loads((out / "verdict.json").read_text())
    assert written["extended"] == text
    assert written["extensions"] == [{"what": "controls", "before": 19, "after": 21, "n_trials": 22, "n_planned": 22}]
    run_audit(grown(config, controls=21, stopping="anytime"), out, progress=False)
    assert "stays valid" not in load_run(out).verdict.extended  # the first look was at a fixed number
    early = grown(config, stopping="anytime", controls=4)
    run_audit(early, tmp_path / "early", progress=False)
    run_audit(grown(early, controls=6), tmp_path / "early", progress=False)
    assert "p against the controls stays valid" in load_run(tmp_path / "early").verdict.extended


def test_what_an_extension_means_for_p():
    few, enough = Extension("controls", 9, 19, 1, 2), Extension("controls", 19, 59, 1, 2)
    questions = Extension("test questions", 10, 20, 1, 2)
    assert describe_extensions([], "fixed", 0.05) == ""
    assert "No result" not in describe_extensions([enough], "fixed", 0.05)
    assert "no result could have been significant" in describe_extensions([few], "fixed", 0.05)
    assert "optional stopping" in describe_extensions([few, enough], "curtailed", 0.05)
    assert "stays valid" in describe_extensions([enough], "anytime", 0.05)
    assert "stays valid" not in describe_extensions([enough, questions], "anytime", 0.05)
    assert "anytime" not in describe_extensions([questions], "fixed", 0.05)
    assert "no result could have been significant" in describe_extensions(
        [few, dataclasses.replace(questions, before=4)], "fixed", 0.05
    )
    assert "optional stopping" in describe_extensions([few, dataclasses.replace(questions, before=5)], "fixed", 0.05)


def test_repeats_grow_in_number_controls_and_questions(home, tmp_path, capsys):
    config = small_config(home, **SMALL)
    config, out = grown(config, methods=["optimal"]), tmp_path / "runs"
    run_repeats(config, out, 2, progress=False)
    more = grown(more_questions(config), controls=4)
    with pytest.raises(RunFolderError, match="controls: 2 there, 1 here"):
        run_repeats(grown(config, controls=1), out, 3, progress=False)
    capsys.readouterr()
    run_repeats(more, out, 3)
    assert "2 of 3 repeats done, going on" in capsys.readouterr().err
    run_repeats(more, tmp_path / "whole", 3, progress=False)
    for number in range(3):
        assert_same_result(out / f"repeat-{number}", tmp_path / "whole" / f"repeat-{number}")
    assert cli.main(["report", str(out)]) == 0
    said = capsys.readouterr().out
    assert "REPEATS WERE ADDED: 2, then 3" in said and "controls from 2 to 4" in said
    assert "controls from 2 to 4" in (out / "repeats.html").read_text(encoding="utf-8")


def test_a_dry_run_of_an_extension_times_what_is_added_in_a_copy(home, tmp_path, monkeypatch):
    config = small_config(home, **SMALL, controls=4)
    run_audit(config, tmp_path / "run", progress=False)
    finished = load_run(tmp_path / "run")
    before, status = dump(tmp_path / "run"), (tmp_path / "run" / "status.json").read_bytes()
    (tmp_path / "copy").mkdir()
    monkeypatch.setattr("locaudit.run.pilot.TemporaryDirectory", lambda: nullcontext(tmp_path / "copy"))
    found = run_pilot(more_questions(config), tmp_path / "run", progress=False)
    assert dump(tmp_path / "run") == before and (tmp_path / "run" / "status.json").read_bytes() == status
    after = load_run(tmp_path / "run")
    assert after.config == finished.config and after.manifest == finished.manifest and after.is_finished
    run = load_run(tmp_path / "copy")
    left = run.manifest.planned - found.n_done
    assert 0 < len(run.trials) == found.n_done and left > 0
    n_iti = sum(1 for r in run.trials if r.spec.method == "iti")
    n_optimal = sum(1 for r in run.trials if r.spec.method == "optimal")
    assert found.n_answers == (12 - n_iti) * 7 + (6 - n_optimal) * 5
    assert 0 < found.spent < sum(run.seconds.values())
    run_audit(more_questions(config), tmp_path / "run", progress=False)
    assert_as_from_the_start(more_questions(config), tmp_path)


def test_an_old_folder_keeps_the_names_of_its_edits(home, copied):
    """Edits of 0.1.0 were named after their ids; the record has the name."""
    import sqlite3

    config = small_config(home, **SMALL)
    with sqlite3.connect(copied / "trials.sqlite") as connection:
        for fit, edit in connection.execute("SELECT fit, edit FROM fits WHERE edit != ''").fetchall():
            connection.execute("UPDATE fits SET edit = ? WHERE fit = ?", (f"{fit}.safetensors", fit))
            (copied / "edits" / edit).rename(copied / "edits" / f"{fit}.safetensors")
    connection.close()
    run_audit(grown(more_questions(config), controls=3), copied, progress=False)
    names = {r.spec.edit_file: r.edit for r in load_run(copied).trials if r.edit}
    assert names["control-anywhere-02-iti-2.safetensors"] == "control-anywhere-02-iti-2.safetensors"
    assert len(names["claim-iti-2.safetensors"]) == len("0123456789abcdef.safetensors")
    with read_run(copied) as store:
        assert {path.name for path in store.edits.iterdir()} == set(names.values())


def test_an_off_target_behaviour_is_only_measured(home, tmp_path, monkeypatch):
    other = save_behaviour(home / "other.jsonl", n=16, shift=25)  # shares questions 25 to 29 with the behaviour
    config = small_config(home, **SMALL)
    with_other = grown(config, off_target=(str(other),))
    run_audit(config, tmp_path / "run", judges=JUDGES, progress=False)
    before = load_run(tmp_path / "run")
    counted = Counted(monkeypatch)
    run_audit(with_other, tmp_path / "run", judges=JUDGES, progress=False)
    after = load_run(tmp_path / "run")
    assert not counted.found and not counted.answered
    split = f"off:{other}"
    n = len(after.questions[split])
    assert set(counted.scored) == {n} and n < 5  # 0.3 of 16, without those that are shared
    assert {r.spec.trial_id for r in after.records} == {r.spec.trial_id for r in before.records}
    assert dataclasses.replace(after.verdict, off_target=()) == before.verdict
    run_audit(with_other, tmp_path / "at once", judges=JUDGES, progress=False)
    at_once = load_run(tmp_path / "at once")
    for one, two in zip(after.records, at_once.records, strict=True):
        assert one.questions[split]["mc2"] == pytest.approx(two.questions[split]["mc2"], abs=1e-6)
        assert set(one.answers) == {"val", "test"} or one.spec.method == "optimal"
    chosen = {o.method: o for o in after.verdict.off_target if o.score == "mc2"}
    claim = next(r for r in after.records if r.spec.arm == "claim" and r.spec.method == "optimal")
    assert chosen["optimal"].claim == pytest.approx(claim.metrics[split]["mc2"])
    assert chosen["optimal"].n_at_least == sum(x >= chosen["optimal"].claim for x in chosen["optimal"].controls)
    assert "Other behaviours under the same edits" in write_report(tmp_path / "run").read_text()
    with pytest.raises(RunFolderError, match="off_target"):  # it cannot be taken away again
        run_audit(config, tmp_path / "run", judges=JUDGES, progress=False)
    with pytest.raises(DataError, match="another behaviour"):
        run_audit(grown(config, off_target=(config.behaviour,)), tmp_path / "no", progress=False)


def test_a_run_without_its_texts_is_read_and_continued(home, tmp_path):
    config = small_config(
        home, methods=["iti"], **SMALL | {"score": "info_truth_probability", "iti": {"alphas": [2.0]}}
    )
    run_audit(config, tmp_path / "run", judges=JUDGES, progress=False)
    tool = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "without_texts.py"))
    tool["main"](tmp_path / "run", tmp_path / "copy")
    before, after = load_run(tmp_path / "run"), load_run(tmp_path / "copy")
    assert after.verdict == before.verdict and after.is_finished
    texts = {answer for record in before.records for answers in record.answers.values() for answer in answers}
    texts |= {x for q in before.questions["test"] for x in (q.text, *q.true, *q.false)}
    stored = (tmp_path / "copy" / "trials.sqlite").read_bytes()
    assert not [text for text in texts if len(text) > 3 and text.encode() in stored]
    more = dataclasses.replace(config, controls=4)
    for name in ("run", "copy"):
        run_audit(more, tmp_path / name, judges=JUDGES, progress=False)
    assert load_run(tmp_path / "copy").verdict == load_run(tmp_path / "run").verdict
