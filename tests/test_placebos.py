"""Placebos (the claim's edit from exchanged answers) and the rests of controls: planned, run, grown and shown."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from locaudit import cli
from locaudit.behaviours import load_behaviour, split_questions
from locaudit.behaviours.format import Prompt
from locaudit.config import AuditConfig, merge_config
from locaudit.edits import load_edit
from locaudit.errors import ConfigError, RunFolderError
from locaudit.measure.activations import Activations
from locaudit.measure.tree import plant
from locaudit.methods.training import TrainingData
from locaudit.records import Place, TrialRecord, TrialSpec
from locaudit.registry import METHODS
from locaudit.report import write_report
from locaudit.report.tables import place_name, read_tables
from locaudit.run import prepare
from locaudit.run.audit import describe, run_audit
from locaudit.run.pilot import describe_estimate, run_pilot
from locaudit.run.placebos import draw_exchanges, draw_placebos
from locaudit.run.subject import read_settings
from locaudit.stats.growth import Extension, describe_extensions
from locaudit.stats.optimisation import find_flags
from locaudit.stats.phrases import MethodFacts
from locaudit.store.run import load_run
from locaudit.store.trusted import frame_of
from locaudit.studies.calibration.planted import plant_model, planted_settings
from pages import data_of, rows_of
from runs import HashJudge, save_behaviour, save_model, small_config, stopped_at
from test_growth import Counted, assert_as_from_the_start
from test_runner import dump
from tiny import heads, tokenizer

BOTH = {
    "claim": "0.1,1.2",
    "controls": 4,
    "rest": True,
    "rest_controls": 3,
    "placebos": 2,
    "iti": {"alphas": [2.0, 4.0]},
    "optimal": {"strengths": [0.2, 0.4], "epochs": 1},
}
RESTS = [Place("rest", number, "anywhere") for number in range(3)]
PLACEBOS = [Place("placebo", 0), Place("placebo", 1)]
JUDGES = {"truth": HashJudge("truth"), "info": HashJudge("info")}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model")
    save_behaviour(folder / "questions.jsonl", n=24)
    return folder


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_audit(small_config(home, **BOTH), folder, judges=JUDGES, progress=False)
    return folder


def places_of(run, method: str) -> dict[Place, list[TrialRecord]]:
    found: dict[Place, list[TrialRecord]] = {}
    for record in run.trials:
        if record.spec.method == method:
            found.setdefault(record.spec.place, []).append(record)
    return found


def edit_of(folder: Path, record: TrialRecord):
    return load_edit(folder / "edits" / record.edit)


def test_the_names_of_places():
    names = {
        Place("claim"): ("claim", "Claim"),
        Place("rest"): ("rest", "All but the claim"),
        Place("control", 3, "layers"): ("control layers 3", "Control 3 in its layers"),
        Place("rest", 3, "layers"): ("rest layers 3", "All but control 3 in its layers"),
        Place("placebo", 0): ("placebo 0", "Placebo 0"),
    }
    assert {place: (place.label, place_name(place)) for place in names} == names
    files = {
        TrialSpec("claim", "iti", None, 2.0, 0, ""): "claim-iti-2",
        TrialSpec("control", "iti", None, 2.0, 0, "", 3, null="layers"): "control-layers-03-iti-2",
        TrialSpec("rest", "iti", None, 2.0, 0, "", 3, null="layers"): "rest-layers-03-iti-2",
        TrialSpec("placebo", "iti", None, 2.0, 0, "", 3): "placebo-03-iti-2",
    }
    assert {spec: f"{name}.safetensors" for spec, name in files.items()} == {spec: spec.edit_file for spec in files}
    _, control, rest, placebo = files
    assert [describe([control]), describe([rest]), describe([placebo])] == [
        "ITI at control 3 in its layers, strength 2",
        "ITI at all but control 3 in its layers, strength 2",
        "ITI at placebo 3, strength 2",
    ]
    assert "placebo 3, iti, strength 2" in repr(TrialRecord(placebo, "ok"))


def test_one_of_each_two_questions_is_exchanged(home):
    questions = split_questions(load_behaviour(str(home / "questions.jsonl"))).train
    assert len(questions) == 14
    drawn = [draw_exchanges(questions, seed, number) for seed in range(20) for number in range(20)]
    assert all(a != b for chosen in drawn for a, b in zip(chosen[::2], chosen[1::2], strict=True))
    assert len(set(drawn)) > 100  # of 2^7 that there are
    for each in zip(*drawn, strict=True):
        assert 0.4 < sum(each) / len(drawn) < 0.6
    assert draw_exchanges(questions[:1], 0, 0) == (True,)
    assert draw_exchanges(questions[:7], 3, 1)[:6] == draw_exchanges(questions, 3, 1)[:6]
    forest = plant(tokenizer(), Prompt(), [(q.text, q.answers) for q in questions])
    first, second = draw_placebos(2, questions, forest, 0)
    assert draw_placebos(1, questions, forest, 0)[0].chosen == first.chosen != second.chosen
    for q, turned, is_chosen in zip(questions, first.questions, first.chosen, strict=True):
        assert (turned.true, turned.false) == ((q.false, q.true) if is_chosen else (q.true, q.false))
    # The trees are those of the exchanged questions.
    assert first.forest == plant(tokenizer(), Prompt(), [(q.text, q.answers) for q in first.questions])


@pytest.mark.parametrize("name", ["misconceptions", "sentiment"])
def test_placebos_of_bundled_questions(name):
    questions = split_questions(load_behaviour(name)).train
    assert any(q.best is not None for q in questions) == (name == "misconceptions")
    forest = plant(tokenizer(), Prompt(), [(q.text, q.answers) for q in questions])
    (placebo,) = draw_placebos(1, questions, forest, 0)
    for q, turned, is_chosen in zip(questions, placebo.questions, placebo.chosen, strict=True):
        assert turned == (dataclasses.replace(q, true=q.false, false=q.true, best=None) if is_chosen else q)
    assert placebo.forest == plant(tokenizer(), Prompt(), [(q.text, q.answers) for q in placebo.questions])


def test_exchanged_data_are_those_of_exchanged_questions(home):
    questions = split_questions(load_behaviour(str(home / "questions.jsonl"))).train
    forest = plant(tokenizer(), Prompt(), [(q.text, q.answers) for q in questions])
    reference = tuple(torch.rand(len(tree.branches)) for tree in forest.trees)
    data = TrainingData(forest, tuple(len(q.true) for q in questions), reference)
    (placebo,) = draw_placebos(1, questions, forest, 0)
    found = data.exchange(placebo.chosen)
    assert found.forest == placebo.forest and found.n_true == tuple(len(q.true) for q in placebo.questions)
    for old, new, one, two in zip(forest.trees, found.forest.trees, reference, found.reference, strict=True):
        before = dict(zip(old.branches, one.tolist(), strict=True))
        assert before == dict(zip(new.branches, two.tolist(), strict=True))
    read = Activations(torch.rand(3, 1, 1, 2), torch.tensor([True, False, True]), torch.tensor([0, 0, 1]))
    assert read.exchange([True, False]).is_true.tolist() == [False, True, True]


def test_what_is_planned_and_run(home, finished):
    run = load_run(finished)
    assert run.is_finished and (run.manifest.rest_controls, run.manifest.placebos) == (3, 2)
    controls = [Place("control", number, "anywhere") for number in range(4)]
    iti, optimal = places_of(run, "iti"), places_of(run, "optimal")
    assert set(iti) == {Place("claim"), Place("whole"), *controls, *PLACEBOS}  # ITI does not edit the rest
    assert set(optimal) == {*iti, Place("rest"), *RESTS}
    assert {len(trials) for trials in (*iti.values(), *optimal.values())} == {2}
    for number, place in enumerate(RESTS):
        assert {r.spec.location for r in optimal[place]} == {optimal[controls[number]][0].spec.location.rest()}
        assert {r.spec.context for r in optimal[place]} == {r.spec.context for r in optimal[Place("claim")]}
    for places in (iti, optimal):
        fits = [{r.spec.trial_id for r in places[place]} for place in (Place("claim"), *PLACEBOS)]
        assert len(set.union(*fits)) == 6  # no placebo shares a fit with the claim or another one
        for place in PLACEBOS:
            assert {r.spec.location for r in places[place]} == {run.manifest.claim}
    verdict = run.verdict.methods["optimal"]
    assert len(verdict.nulls["anywhere"].controls) == 4  # no rest counts as a control
    assert run.as_repeat().controls["anywhere"] == tuple(optimal[place][0].spec.location for place in controls)


def test_placebos_and_rests_do_not_change_anything_else(home, finished, tmp_path):
    config = small_config(home, **BOTH | {"rest_controls": 0, "placebos": 0})
    run_audit(config, tmp_path / "run", judges=JUDGES, progress=False)
    plain, run = load_run(tmp_path / "run"), load_run(finished)
    kept = [r for r in run.trials if r.spec.place not in (*RESTS, *PLACEBOS)]
    assert list(plain.trials) == kept
    assert {name: v.outcome for name, v in plain.verdict.methods.items()} == {
        name: v.outcome for name, v in run.verdict.methods.items()
    }


def test_a_placebo_is_found_from_exchanged_questions(home, finished):
    """The same edits as those of an audit whose training questions are exchanged in its file."""
    run = load_run(finished)
    config = small_config(home, **BOTH)
    split = read_settings(config).split
    forest = plant(tokenizer(), Prompt(), [(q.text, q.answers) for q in split.train])
    for number, placebo in enumerate(draw_placebos(2, split.train, forest, config.seed)):
        given = load_behaviour(config.behaviour)
        turned = {q.id: q for q in placebo.questions}
        behaviour = dataclasses.replace(given, questions=tuple(turned.get(q.id, q) for q in given.questions))
        plain = small_config(home, **BOTH | {"rest_controls": 0, "placebos": 0, "controls": 1, "rest": False})
        out = finished.parent / f"exchanged-{number}"
        run_audit(plain, out, behaviour=behaviour, judges=JUDGES, progress=False)
        for method in ("iti", "optimal"):
            ours, theirs = places_of(run, method)[Place("placebo", number)], places_of(load_run(out), method)
            for one, two in zip(
                sorted(ours, key=lambda r: r.spec.hyperparameter),
                sorted(theirs[Place("claim")], key=lambda r: r.spec.hyperparameter),
                strict=True,
            ):
                assert one.spec.trial_id == two.spec.trial_id
                first, second = edit_of(finished, one), edit_of(out, two)
                for site, edit in first.sites.items():
                    assert torch.allclose(edit.b, second.sites[site].b, atol=1e-5)
                    assert torch.allclose(edit.a, second.sites[site].a, atol=1e-5)
                claim = next(r for r in places_of(run, method)[Place("claim")]
                             if r.spec.hyperparameter == one.spec.hyperparameter)  # fmt: skip
                own = edit_of(finished, claim)
                assert not all(torch.allclose(own.sites[site].b, x.b, atol=1e-3) for site, x in first.sites.items())


def test_methods_whose_edits_do_not_depend_on_the_labels_have_no_placebo(home, tmp_path):
    config = small_config(home, placebos=2, methods={"iti": {"alphas": [2.0], "direction": "random"}, "ablate": {}})
    run_audit(config, tmp_path / "run", progress=False)
    run = load_run(tmp_path / "run")
    assert run.manifest.placebos == 0 and not any(r.spec.arm == "placebo" for r in run.trials)
    settings = merge_config(config, {"methods": {"iti": {"direction": "probe"}}}).methods["iti"]
    assert METHODS["iti"].has_placebo(settings)


@pytest.mark.parametrize("context", ["answer", "next_question"])
def test_iti_reads_activations_once_for_all_placebos(home, tmp_path, monkeypatch, context):
    reads, real = [], prepare.collect_activations

    def noted(*args, **options):
        reads.append(options["context"])
        return real(*args, **options)

    monkeypatch.setattr(prepare, "collect_activations", noted)
    changes = {"probe": {"context": context}, "methods": {"iti": {"alphas": [2.0], "direction": "probe"}}}
    run_audit(small_config(home, placebos=3, **changes), tmp_path / "run", progress=False)
    assert sorted(reads) == sorted({context, "next_question"})
    files = {path.name for path in (tmp_path / "run" / "cache").iterdir()}
    assert {"iti.safetensors", *(f"iti-placebo-{number}.safetensors" for number in range(3))} <= files


@pytest.mark.parametrize("call", [3, 7])
def test_a_resumed_run_ends_as_an_uninterrupted_one(home, finished, tmp_path, call):
    config = small_config(home, **BOTH)
    with stopped_at(call):
        run_audit(config, tmp_path / "run", judges=JUDGES, progress=False)
    assert not load_run(tmp_path / "run").is_finished
    run_audit(config, tmp_path / "run", judges=JUDGES, progress=False)
    assert dump(tmp_path / "run") == dump(finished)


def test_they_can_be_added_to_a_finished_run(home, tmp_path, monkeypatch):
    config = small_config(home, **BOTH | {"rest_controls": 0, "placebos": 0})
    run_audit(config, tmp_path / "run", progress=False)
    before = load_run(tmp_path / "run")
    some = merge_config(config, {"rest_controls": 1, "placebos": 1})
    counted = Counted(monkeypatch)
    run_audit(some, tmp_path / "run", progress=False)
    assert counted.found == {"ITI": 2, "Optimal edit": 2 + 2}
    more = merge_config(config, {"rest_controls": 3, "placebos": 2})
    run_audit(more, tmp_path / "run", progress=False)
    assert counted.found == {"ITI": 2 + 2, "Optimal edit": 2 + 2 + 2 + 4}
    monkeypatch.undo()
    after = load_run(tmp_path / "run")
    kept = {r.spec.trial_id: r for r in after.trials}
    assert all(kept[r.spec.trial_id] == r for r in before.trials)
    assert [(e.what, e.before, e.after) for e in after.manifest.extensions] == [
        ("rests of controls", 0, 1),
        ("placebos", 0, 1),
        ("rests of controls", 1, 3),
        ("placebos", 1, 2),
    ]
    assert_as_from_the_start(more, tmp_path)
    with pytest.raises(RunFolderError, match="placebos: 2 there, 1 here"):
        run_audit(merge_config(more, {"placebos": 1}), tmp_path / "run", progress=False)
    with pytest.raises(RunFolderError, match="rest_controls: 3 there, 0 here"):
        run_audit(merge_config(more, {"rest_controls": 0}), tmp_path / "run", progress=False)


def test_what_adding_them_means_for_p():
    rests, placebos, controls = (
        Extension(what, 0, 19, 9, 9) for what in ("rests of controls", "placebos", "test questions")
    )
    assert "stays valid" in describe_extensions([rests, placebos], "fixed", 0.05)
    assert "more nulls" not in describe_extensions([placebos], "fixed", 0.05)
    # One placebo may void the audit; a second one halves its weight. Nineteen rests may have been short of one control.
    for earlier in (dataclasses.replace(placebos, before=1), dataclasses.replace(rests, before=19)):
        assert "optional stopping" in describe_extensions([earlier], "fixed", 0.05)
    assert "optional stopping" in describe_extensions(
        [placebos, dataclasses.replace(controls, before=20)], "fixed", 0.05
    )


@pytest.mark.parametrize("stopping", ["curtailed", "anytime"])
def test_early_stopping_does_not_count_them(home, tmp_path, stopping):
    config = small_config(home, **BOTH | {"stopping": stopping, "level": 0.5, "controls": 12})
    plain = merge_config(config, {"rest_controls": 0, "placebos": 0})
    for name, settings in (("run", config), ("plain", plain)):
        run_audit(settings, tmp_path / name, progress=False)
    run, without = load_run(tmp_path / "run"), load_run(tmp_path / "plain")
    assert run.is_finished
    n_controls = Counter()
    for method, places in (("iti", PLACEBOS), ("optimal", [*PLACEBOS, *RESTS])):
        found = set(places_of(run, method))
        assert found - set(places_of(without, method)) == set(places)  # all are run, however early the controls end
        n_controls[method] = sum(place.arm == "control" for place in found)
        assert len(run.verdict.methods[method].nulls["anywhere"].controls) == n_controls[method]
    assert stopping == "anytime" or min(n_controls.values()) < 12


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"rest_controls": 2, "rest": False}, "rest_controls = 2 with rest = False"),
        ({"rest_controls": 2, "rest": True, "whole_model": False}, "whole_model = False"),
        ({"rest_controls": 3, "rest": True, "controls": 2}, "rest_controls = 3 with controls = 2"),
    ],
)
def test_rests_of_controls_need_the_rest_and_the_controls(home, changes, got):
    with pytest.raises(ConfigError, match=got):
        read_settings(small_config(home, **changes))


def test_rests_are_of_the_first_null_as_far_as_it_has_places(home, tmp_path):
    changes = {"claim": "0.1", "nulls": ["layers", "anywhere"], "controls": 5, "rest_controls": 5, "rest": True}
    run_audit(small_config(home, **changes, methods=["optimal"]), tmp_path / "run", progress=False)
    run = load_run(tmp_path / "run")
    n_places = run.manifest.nulls["layers"].n_planned
    assert n_places == run.manifest.rest_controls == 3  # a layer has 4 heads
    rests = sorted(place for place in places_of(run, "optimal") if place.is_rest_of_control)
    assert rests == [Place("rest", number, "layers") for number in range(3)]
    assert heads((0, 0)).rest() in {r.spec.location for r in run.trials}
    with pytest.raises(RunFolderError, match="name layers first in nulls"):
        run_audit(small_config(home, **changes | {"nulls": ["anywhere", "layers"]}, methods=["optimal"]),
                  tmp_path / "run", progress=False)  # fmt: skip


def test_a_dry_run_counts_them_and_times_rests_as_whole_models(home, tmp_path, capsys):
    config = small_config(home, **BOTH)
    found = run_pilot(config, tmp_path / "run", judges=JUDGES, progress=False)
    run_audit(config, tmp_path / "whole", judges=JUDGES, progress=False)
    whole, tried = load_run(tmp_path / "whole"), load_run(tmp_path / "run")
    assert found.n_trials == Counter((r.spec.arm, r.spec.method) for r in whole.trials)
    assert "8 rest optimal" in describe_estimate(found) and "4 placebo iti" in describe_estimate(found)
    # The time of a rest is that of the whole model and the rest.
    seconds, done = tried.seconds, {r.spec.trial_id for r in tried.trials}
    pace: dict[tuple[str, bool], list[float]] = {}
    for r in tried.trials:
        pace.setdefault((r.spec.method, r.spec.arm in ("whole", "rest")), []).append(seconds[r.spec.trial_id])
    left = [r.spec for r in whole.trials if r.spec.trial_id not in done]
    expected = sum(sum(x) / len(x) for spec in left for x in [pace[spec.method, spec.arm in ("whole", "rest")]])
    assert found.seconds == pytest.approx(expected)


def test_the_report_shows_them_beside_the_controls(finished, tmp_path):
    tables, page = read_tables(finished), write_report(finished).read_text(encoding="utf-8")
    assert list(tables.arms("optimal")) == [Place("claim"), Place("whole"), Place("rest"), *PLACEBOS]
    assert list(tables.rests("optimal")) == RESTS and not tables.rests("iti")
    assert list(tables.controls("optimal")) == ["anywhere"] and len(tables.controls("optimal")["anywhere"]) == 4
    edits = [(row["method"], row["edit"]) for row in rows_of(data_of(page), "trials") if row["chosen"]]
    assert [edit for method, edit in edits if "All but control" in edit] == [f"All but control {i}" for i in range(3)]
    assert ("optimal", "All but control 2") in edits and ("optimal", "Placebo 1") in edits
    speakers = tables.said
    assert not any("lacebo" in who or "ll but" in who for who in speakers)
    assert any("control 0" in who for who in speakers)
    arms = Counter(line["arm"] for line in tables.lines if line["method"] == "optimal")
    assert arms == {"claim": 2, "whole": 2, "rest": 8, "placebo": 4, "control": 8}
    assert {(line["null"], line["control"]) for line in tables.lines if line["arm"] == "rest"} == {
        ("", -1), *(("anywhere", number) for number in range(3))
    }  # fmt: skip
    assert {place.arm for _, place in frame_of(load_run(finished)).records} == {"base", "claim", "whole", "control"}


@pytest.mark.parametrize(("name", "file"), [("rest-anywhere-2", "rest-anywhere-02"), ("placebo-1", "placebo-01")])
def test_their_edits_can_be_exported(finished, tmp_path, capsys, name, file):
    out = tmp_path / "out"
    command = ["export", str(finished), "--trial", f"{name}/optimal", "--to", "vectors", "--out", str(out)]
    command += ["--strength", "0.2"]
    assert cli.main(command) == 0
    written = load_edit(out / "edit.safetensors")
    saved = load_edit(finished / "edits" / f"{file}-optimal-0.2.safetensors")
    assert all(torch.equal(edit.b, saved.sites[site].b) for site, edit in written.sites.items())


def test_flags_name_rests_and_leave_placebos_out():
    def trial(arm, strength, objective, number=-1, null=""):
        spec = TrialSpec(arm, "optimal", heads((0, 0)), strength, 0, "", number, null=null)
        metrics = {split: {"mc2": 1 - strength} for split in ("val", "test")}
        return TrialRecord(spec, "ok", metrics=metrics, training={"objective": (objective,)})

    arms = [("claim", 2.0), ("whole", 1.0), ("rest", 2.0)]
    records = [trial(arm, x, objective) for arm, objective in arms for x in (0.1, 0.2)]
    records += [trial("rest", x, 0.5, n, "anywhere") for n in range(2) for x in (0.1, 0.2)]
    records += [trial("placebo", x, 0.5, 0) for x in (0.1, 0.2)]
    edge, superset = find_flags(records, {"optimal": MethodFacts("Optimal", trained=True)}, "mc2")["optimal"]
    assert edge.places == ("claim", "rest", "rest anywhere 0", "rest anywhere 1", "whole")
    assert "the claim, the rest, the whole model, the rests of 2 controls" in edge.text
    assert superset.places == ("rest anywhere 0", "rest anywhere 1")


def test_where_the_claim_gains_its_placebos_do_not(tmp_path):
    """In the planted model, an edit at the claim turns the answers. From exchanged answers it finds nothing to turn."""
    planted = plant_model("misconception", 2, n_items=60, n_layers=6)
    settings = {"claim": str(planted.places), "controls": 1, "nulls": ["anywhere"], "whole_model": False}
    own = {"model": planted.model.name, "behaviour": planted.behaviour.name, "score": "reward_margin", "placebos": 2}
    config = merge_config(AuditConfig(), {**planted_settings(), **settings, **own})
    run_audit(config, tmp_path / "run", model=planted.model, behaviour=planted.behaviour, progress=False)
    found = {r.spec.place: r.metrics["test"] for r in load_run(tmp_path / "run").trials}
    claim = found[Place("claim")]
    assert claim["reward_margin"] > 4 and claim["preference_accuracy"] == 1
    for place in PLACEBOS:
        assert abs(found[place]["reward_margin"]) < 0.5
        assert found[place]["preference_accuracy"] < 0.5
