from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sqlite3
import time
from pathlib import Path

import pytest
import torch

from locaudit import audit
from locaudit.behaviours import load_behaviour
from locaudit.config import load_config
from locaudit.edits import load_edit
from locaudit.errors import LocationError, ModelError, RunFolderError
from locaudit.location import all_units
from locaudit.models import load_model, wrap_model
from locaudit.records import TrialSpec
from locaudit.report import write_report
from locaudit.run.audit import run_audit
from locaudit.run.plan import build_plan, draw_controls
from locaudit.run.status import Pace, describe_seconds
from locaudit.stats import decide_run
from locaudit.store import read_run
from runs import HashJudge, save_behaviour, save_model, small_config


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def finished(home) -> Path:
    """A finished audit with two values in each grid."""
    out = home / "finished"
    config = small_config(home, iti={"alphas": [1.0, 4.0]}, optimal={"strengths": [0.1, 0.4]})
    run_audit(config, out, progress=False)
    return out


def dump(folder: Path) -> dict[str, list]:
    """Everything a run recorded, clocks and machine facts aside."""
    with sqlite3.connect(folder / "trials.sqlite") as connection:
        out = {
            name: connection.execute(f"SELECT * FROM {name} ORDER BY 1, 2, 3, 4").fetchall()
            for name in ("trials", "scores", "answers", "judgements", "questions")
        }
    connection.close()
    for name in ("edits", "cache"):  # a kill may leave a part of a temporary file, which has a name of its own
        files = sorted(path for path in (folder / name).iterdir() if not path.name.endswith(".tmp"))
        out[name] = [(path.name, path.read_bytes()) for path in files]
    return out


def test_plan_has_every_trial_once(finished):
    with read_run(finished) as store:
        records = store.records()
        planned = store.fact("run")["planned"]
    places = {(r.spec.method, r.spec.arm, r.spec.control, r.spec.hyperparameter) for r in records}
    arms = [("claim", -1), ("whole", -1), ("control", 0), ("control", 1)]
    expected = {("iti", *arm, alpha) for arm in arms for alpha in (1.0, 4.0)}
    expected |= {("optimal", *arm, tau) for arm in arms for tau in (0.1, 0.4)}
    expected |= {("none", "base", -1, None)}
    assert places == expected
    assert len(records) == planned == len(expected)


def test_a_run_folder_holds_what_it_promises(finished):
    with read_run(finished) as store:
        records, config = store.records(), store.config
        assert load_config(finished / "config.yaml") == config
        assert set(store.seconds()) == {r.spec.trial_id for r in records}
        for record in records:
            assert record.status == "ok"
            assert set(record.metrics) == {"val", "test"}
            if record.edit:
                assert load_edit(store.edits / record.edit).is_finite
    with sqlite3.connect(finished / "trials.sqlite") as connection:
        n_scores = connection.execute("SELECT count(*) FROM scores").fetchone()[0]
    connection.close()
    assert n_scores == sum(len(v) for r in records for m in r.questions.values() for v in m.values())


def test_resuming_a_finished_run_changes_nothing(finished, home):
    before = dump(finished)
    run_audit(load_config(finished / "config.yaml"), finished, progress=False)
    assert dump(finished) == before


def test_running_twice_gives_the_same_bytes(home, tmp_path):
    config = small_config(home)
    for name in ("a", "b"):
        run_audit(config, tmp_path / name, progress=False)
    assert dump(tmp_path / "a") == dump(tmp_path / "b")


def test_an_error_in_the_middle_keeps_finished_trials(home, tmp_path, monkeypatch):
    import locaudit.run.banks as run

    config, real, calls = small_config(home), run.run_trials, []

    def failing(shared, specs, on_step=None):
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        calls.append(specs)
        return real(shared, specs, on_step)

    monkeypatch.setattr(run, "run_trials", failing)
    with pytest.raises(OSError, match="No space"):
        run_audit(config, tmp_path / "a", progress=False)
    with read_run(tmp_path / "a") as store:
        assert len(store.records()) == 4
    monkeypatch.setattr(run, "run_trials", real)
    run_audit(config, tmp_path / "a", progress=False)
    run_audit(config, tmp_path / "b", progress=False)
    assert dump(tmp_path / "a") == dump(tmp_path / "b")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_kill_at_ten_moments_then_resume(home, tmp_path):
    config, rng = small_config(home, controls=4), random.Random(0)
    started = time.monotonic()
    run_audit(config, tmp_path / "whole", progress=False)
    length = time.monotonic() - started
    kills = 0
    for _ in range(10):
        child = os.fork()
        if child == 0:
            run_audit(config, tmp_path / "killed", progress=False)
            os._exit(0)
        # A tenth of the run on average, so that the kills fall on preparation and on all kinds of trials.
        time.sleep(rng.uniform(0.02, 0.25) * length)
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    run_audit(config, tmp_path / "killed", progress=False)
    assert kills >= 8
    assert dump(tmp_path / "killed") == dump(tmp_path / "whole")


def test_banked_trials_agree_with_single_ones(home, tmp_path):
    for size in (1, 3):
        run_audit(
            small_config(home, optimal={"bank_size": size, "strengths": [0.1, 0.4]}),
            tmp_path / str(size),
            progress=False,
        )
    one, three = (by_place(tmp_path / str(size)) for size in (1, 3))
    assert one.keys() == three.keys()
    for place in one:
        for metric in ("mc2", "reward_margin"):  # the others jump where two answers are nearly tied
            value = one[place].metrics["test"][metric]
            assert three[place].metrics["test"][metric] == pytest.approx(value, abs=0.02), (place, metric)


def by_place(folder: Path):
    with read_run(folder) as store:
        return {(r.spec.method, r.spec.arm, r.spec.control, r.spec.hyperparameter): r for r in store.records()}


def test_more_controls_keep_the_ids_of_the_first(home, llama):
    config = small_config(home)
    claim = load_claim()
    configs = config, dataclasses.replace(config, controls=5)
    few, many = (build_plan(c, llama, claim, "context", draw_controls(c, llama, claim)[0]) for c in configs)
    ids = [{spec.trial_id for group in plan for spec in group} for plan in (few, many)]
    assert ids[0] < ids[1]


def load_claim():
    from locaudit.location import parse_location

    return parse_location("0.1,1.2")


def test_rng_seed_ignores_the_location():
    a = TrialSpec("claim", "optimal", "0.1", 0.2, 0, "c")
    b = dataclasses.replace(a, arm="control", location="1.1", control=3)
    assert a.rng_seed == b.rng_seed
    assert a.trial_id != b.trial_id
    assert a.rng_seed != dataclasses.replace(a, seed=1).rng_seed


def test_other_weights_under_the_same_name_are_refused(home, tmp_path):
    config = small_config(tmp_path)
    run_audit(config, tmp_path / "run", progress=False)
    save_model(tmp_path / "model", seed=5)
    with pytest.raises(RunFolderError, match="other model weights, questions"):
        run_audit(config, tmp_path / "run", progress=False)


def test_other_questions_under_the_same_name_are_refused(tmp_path):
    config = small_config(tmp_path)
    run_audit(config, tmp_path / "run", progress=False)
    save_behaviour(tmp_path / "questions.jsonl", shift=1)
    with pytest.raises(RunFolderError, match="other model weights, questions"):
        run_audit(config, tmp_path / "run", progress=False)


def test_a_claim_outside_the_model_names_its_shape(home, tmp_path):
    with pytest.raises(LocationError, match=r"9\.0.*layers 0-1 and heads 0-3"):
        run_audit(small_config(home, claim="9.0"), tmp_path / "run", progress=False)


def test_a_claim_file_that_changed_is_another_claim(home, tmp_path):
    claim = tmp_path / "claim.csv"
    claim.write_text("layer,head\n0,1\n")
    config = small_config(home, claim=str(claim), methods=["iti"])
    run_audit(config, tmp_path / "run", progress=False)
    run_audit(config, tmp_path / "run", progress=False)
    claim.write_text("layer,head\n1,1\n")
    with pytest.raises(RunFolderError, match=r"claim: 0\.1 there, 1\.1 here"):
        run_audit(config, tmp_path / "run", progress=False)


def test_neuron_claims_run(home, tmp_path):
    run_audit(small_config(home, claim="neurons:0.3,1.17", whole_model=False), tmp_path / "run", progress=False)
    with read_run(tmp_path / "run") as store:
        assert all(r.status == "ok" for r in store.records())
        assert {r.spec.location.split(":")[0] for r in store.records() if r.edit} == {"neurons"}


def test_pairs_primer_in_training_and_other_readers_run(home, tmp_path):
    primer = tmp_path / "primer.txt"
    primer.write_text("Q: Is 1 more than 2?\nA: No.")
    config = small_config(
        home,
        prompt={"primer": str(primer), "primer_in_training": True},
        optimal={"batching": "pair", "reader": "none", "objective": "dpo", "reduction": "mean"},
        probe={"context": "answer"},
        iti={"direction": "probe", "positions": "all"},
        match="layer",
    )
    run_audit(config, tmp_path / "run", progress=False)
    with read_run(tmp_path / "run") as store:
        assert len(store.records()) == 9


def test_audit_from_python(home, tmp_path):
    model = load_model(small_config(home).model, device="cpu")
    behaviour = load_behaviour(small_config(home).behaviour)
    result = audit(
        model,
        behaviour,
        claim=[(0, 1), (1, 2)],
        controls=2,
        out=tmp_path / "run",
        progress=False,
        prompt={"primer": "none"},
        iti={"alphas": (2.0,)},
        optimal={"strengths": [0.2]},
        evaluation={"drift_documents": 2, "drift_tokens": 8, "max_new_tokens": 6},
        judges={"truth": HashJudge("truth"), "info": HashJudge("info")},
    )
    assert result.report.is_file()
    assert result.verdict.claim == "0.1,1.2"
    assert result.verdict.score == "info_truth"
    assert {v.outcome for v in result.verdict.methods.values()} <= {"no effect", "underpowered"}
    assert json.loads((tmp_path / "run" / "verdict.json").read_text())["headline"] == result.verdict.headline


def test_a_model_that_explodes_under_some_edits_is_recorded(home, tmp_path):
    config = small_config(home, optimal={"strengths": [1e-30]})
    run_audit(config, tmp_path / "run", progress=False)
    with read_run(tmp_path / "run") as store:
        records = [r for r in store.records() if r.spec.method == "optimal"]
    assert {r.status for r in records} == {"diverged"}
    assert all(r.message and not r.edit and not r.metrics for r in records)


def test_pace_gives_the_time_of_what_is_left():
    pace = Pace()
    assert pace.remaining({"iti": 5.0}) is None
    pace.add("iti", cost=10, seconds=20)
    assert pace.remaining({"iti": 5.0}) == pytest.approx(10)
    assert pace.remaining({"optimal": 5.0}) == pytest.approx(10)
    pace.add("optimal", cost=10, seconds=60)
    assert pace.remaining({"iti": 5.0, "optimal": 5.0}) == pytest.approx(40)
    assert [describe_seconds(s) for s in (40, 420, 12000)] == ["40 s", "7 min", "3 h 20 min"]


def test_wrapping_leaves_no_gradients(llama):
    model = wrap_model(llama.lm, llama.tokenizer)
    assert not any(p.requires_grad for p in model.lm.parameters())
    assert torch.is_grad_enabled()


def test_nothing_stale_is_reused_after_a_refused_start(home, tmp_path):
    """What is cached before any trial ran belongs to its own settings: seed and drift text included."""
    text = tmp_path / "text.txt"
    changes = {"claim": "0.1,1.2", "iti": {"direction": "random", "alphas": [2.0]}, "methods": ["iti"]}
    changes["evaluation"] = {"drift_text": str(text), "drift_documents": 2, "drift_tokens": 8}
    text.write_text("one two three four five six seven eight nine ten. " * 8)
    with pytest.raises(LocationError):
        everything = str(all_units(2, 4))  # leaves no room for controls, which is noticed after probing
        run_audit(small_config(home, **changes | {"claim": everything}), tmp_path / "run", progress=False)
    text.write_text("Entirely different words stand in this second text, are they not? " * 8)
    for name in ("run", "clean"):
        run_audit(small_config(home, seed=7, **changes), tmp_path / name, progress=False)
    assert dump(tmp_path / "run") == dump(tmp_path / "clean")


def test_an_unfinished_run_says_so_in_the_terminal(home, tmp_path, capsys, monkeypatch):
    import locaudit.run.banks as run
    from locaudit import cli

    real, calls = run.run_trials, []

    def interrupted(shared, specs, on_step=None):
        calls.append(specs)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(shared, specs, on_step)

    monkeypatch.setattr(run, "run_trials", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_audit(small_config(home), tmp_path / "run", progress=False)
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith("UNFINISHED: 3 of 9 trials")


def test_a_model_that_is_not_finite_is_refused(tmp_path, llama):
    config = small_config(tmp_path, claim="0.1", methods=["optimal"])
    model = load_model(config.model, device="cpu")
    model.lm.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        run_audit(config, tmp_path / "run", model=model, progress=False)


def test_controls_end_early_once_the_verdict_is_certain(home, tmp_path, monkeypatch):
    """Curtailed: the verdict of all controls, from the first ones alone; `fixed` later runs the others."""
    config = small_config(home, controls=19, claim="0.0", iti={"alphas": [0.5, 1.0]}, stopping="curtailed", level=0.3)
    run_audit(config, tmp_path / "run", progress=False)
    with read_run(tmp_path / "run") as store:
        records, planned = store.records(), store.fact("run")["planned"]
        early = decide_run(store, records)
    assert len(records) == planned
    assert any(v.ended_early for v in early.methods.values())
    for verdict in early.methods.values():
        assert len(verdict.controls) == verdict.n_used or not verdict.ended_early
        assert verdict.n_planned == 7  # of one head, as many as there are
    report = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "they ended early: 7 were planned" in report
    assert "Unfinished" not in report
    first = {record.spec.trial_id for record in records}
    run_audit(dataclasses.replace(config, stopping="fixed"), tmp_path / "run", progress=False)
    with read_run(tmp_path / "run") as store:
        every = store.records()
        late = decide_run(store, every)
    assert first < {record.spec.trial_id for record in every}
    assert [v.outcome for v in late.methods.values()] == [v.outcome for v in early.methods.values()]
    assert all(len(v.controls) == 7 for v in late.methods.values())


def test_the_rest_of_the_model_is_edited_where_it_is_asked_for(home, tmp_path):
    config = small_config(home, rest=True, claim="0.0,1.2", split={"fractions": [0.4, 0.2, 0.4]})
    run_audit(config, tmp_path / "run", progress=False)
    with read_run(tmp_path / "run") as store:
        records = store.records()
        verdict = decide_run(store, records)
    (rest,) = [record for record in records if record.spec.arm == "rest"]
    assert rest.spec.method == "optimal"
    assert rest.spec.location == "0.1,0.2,0.3,1.0,1.1,1.3"
    (necessity,) = [g for g in verdict.methods["optimal"].grades if g.question == "necessity"]
    assert necessity.answer in ("yes", "no", "undecided")
    (not_iti,) = [g for g in verdict.methods["iti"].grades if g.question == "necessity"]
    assert not_iti.answer == "not tried"
    edit = load_edit(tmp_path / "run" / "edits" / rest.edit)
    assert not edit.sites["heads", 0].b[:8].any()  # the claim's head takes no part
    assert edit.sites["heads", 0].b[8:].any()


@pytest.mark.parametrize("match", ["kv-group", "probe-accuracy", "norm"])
def test_matched_controls_of_a_run(home, tmp_path, match):
    run_audit(small_config(home, match=match, methods=["iti"], claim="0.0,1.3"), tmp_path / "run", progress=False)
    with read_run(tmp_path / "run") as store:
        places = [r.spec.location for r in store.records() if r.spec.arm == "control"]
        run = store.fact("run")
    assert 1 <= len(set(places)) == run["n_controls"] <= run["population"]
