"""Several null distributions: places anywhere, and places in the claim's own layers."""

import csv
import dataclasses
import json
import sqlite3
from collections import Counter

import pytest
from bench.measurements import print_scores

from locaudit import cli
from locaudit.claims import draw_nulls
from locaudit.claims.kinds import Shape
from locaudit.config import AuditConfig, merge_config, parse_config, read_registration
from locaudit.errors import ConfigError, LocationError, RunFolderError
from locaudit.location import Location
from locaudit.report import write_report
from locaudit.run import worker
from locaudit.run.audit import run_audit
from locaudit.run.pilot import run_pilot
from locaudit.run.subject import read_settings
from locaudit.stats import Repeat, combine_repeats, decide
from locaudit.stats.growth import Extension, describe_extensions
from locaudit.stats.measured import Design
from locaudit.stats.off_target import measure_off_target
from locaudit.stats.sequential import Null
from locaudit.store.folder import read_run
from locaudit.store.run import load_run
from runs import save_behaviour, save_model, small_config, stopped_at
from test_stats import BASE_TRIAL, LOW, METHODS, SCORE, audit

TWO = {"nulls": ["anywhere", "layers"]}
HIGH = [0.3] * 19
"""Gains of 19 controls that do better than the claim."""
SHAPE = Shape(4, 6, 3, 8, 16, 48)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model")
    save_behaviour(folder / "questions.jsonl")
    return folder


def judge(anywhere, layers, claim=0.25, **design):
    records = [BASE_TRIAL, *audit("optimal", claim, anywhere, layers=layers)]
    found = decide(records, score=SCORE, design=Design(**design), methods=METHODS)
    return found, found.methods["optimal"]


@pytest.mark.parametrize(
    ("anywhere", "layers", "claim", "outcome"),
    [
        (LOW, LOW, 0.25, "SPECIFIC"),
        (LOW, HIGH, 0.25, "SPECIFIC TO ITS LAYERS"),
        (HIGH, LOW, 0.25, "NOT SPECIFIC"),
        (HIGH, HIGH, 0.25, "NOT SPECIFIC"),
        (HIGH, LOW[:9], 0.25, "NOT SPECIFIC"),  # whatever the second test will say
        (LOW, LOW[:9], 0.25, "CANNOT TELL"),
        (LOW[:9], HIGH, 0.25, "CANNOT TELL"),
        (LOW, LOW, -0.1, "CANNOT TELL"),
    ],
)
def test_a_claim_must_stand_out_from_every_null(anywhere, layers, claim, outcome):
    found, v = judge(anywhere, layers, claim)
    assert v.outcome == outcome
    assert {name: null.p_value for name, null in v.nulls.items()} == {
        name: (1 + sum(x >= claim for x in gains)) / (1 + len(gains))
        for name, gains in (("anywhere", anywhere), ("layers", layers))
    }
    answers = {name: null.answer for name, null in v.nulls.items()}
    assert answers == {name: v.question(name).answer for name in v.nulls}
    assert (set(answers.values()) == {"yes"}) == (outcome == "SPECIFIC")  # an intersection-union test
    assert v.question("layers").seen.startswith(f"{v.nulls['layers'].n_at_least} of {len(layers)} as good, p = ")
    if outcome == "SPECIFIC":
        assert "better than random places and random places in its layers." in found.headline
    if outcome == "SPECIFIC TO ITS LAYERS":
        assert "better than random places, but random places in its layers do as well (" in found.headline
    written = json.loads(found.to_json())["methods"]["optimal"]["nulls"]
    assert list(written) == ["anywhere", "layers"] and written["layers"]["n_planned"] == len(layers)


def test_off_target_scores_name_their_null_where_there_are_several():
    def named(**more):
        records = [
            dataclasses.replace(record, questions={**record.questions, "off:other": {"mc2": (0.5, 0.25)}})
            for record in [BASE_TRIAL, *audit("optimal", 0.25, LOW, **more)]
        ]
        verdict = decide(records, score=SCORE, design=Design(), methods=METHODS)
        return [(found.null, found.among) for found in measure_off_target(verdict, records, "float32")]

    assert named(layers=LOW) == [("anywhere", "anywhere"), ("layers", "in its layers")]
    assert named() == [("anywhere", "")]


def test_one_null_alone_gives_the_outcome():
    records = [BASE_TRIAL, *audit("optimal", 0.25, [], layers=HIGH)]
    v = decide(records, score=SCORE, methods=METHODS).methods["optimal"]
    assert (v.outcome, list(v.nulls)) == ("NOT SPECIFIC", ["layers"])
    assert "works, and random places in its layers do as well (" in v.reason
    both = decide([BASE_TRIAL, *audit("optimal", 0.25, LOW, norm=HIGH)], score=SCORE, methods=METHODS)
    assert both.methods["optimal"].outcome == "NOT SPECIFIC"


@pytest.mark.parametrize("gains", [LOW[:8], HIGH[:8]])
def test_a_null_with_too_few_places_does_not_enter_the_outcome(gains):
    nulls = {"anywhere": Null(19), "layers": Null(8, 8)}
    found, v = judge(LOW, gains, nulls=nulls)
    assert v.outcome == "SPECIFIC" and not v.nulls["layers"].can_test
    assert v.nulls["layers"].p_value == (1 + sum(x >= 0.25 for x in gains)) / 9  # exact, over all its places
    few = "there are only 8 places in its layers, so the smallest possible p is 0.111"
    assert v.question("layers").why == few and f"Open: {few}." in str(found)
    assert "in its layers" not in found.headline
    _, v = judge(LOW, gains, nulls=nulls | {"anywhere": Null(8, 8)})
    assert v.outcome == "CANNOT TELL"  # none is left that can tell
    assert (
        v.reason
        == "There are only 8 places, so the smallest possible p is 0.111. Choose a null with more places (nulls)."
    )
    _, v = judge(LOW, HIGH, nulls={"anywhere": Null(19), "layers": Null(19, 19)})
    assert v.outcome == "SPECIFIC TO ITS LAYERS"  # 19 places are enough


def test_repeats_combine_each_null():
    places = {"anywhere": (Location(((1, 1),)),), "layers": (Location(((0, 1),)),)}
    several = [Repeat(judge(LOW, gains)[0], Location(((0, 0),)), places) for gains in (LOW, HIGH, HIGH)]
    found = combine_repeats(several).methods["optimal"]
    assert found.outcomes == ("SPECIFIC", "SPECIFIC TO ITS LAYERS", "SPECIFIC TO ITS LAYERS")
    assert (found.outcome, found.nulls["layers"].n_at_least) == ("SPECIFIC", 0)  # the mean over repeats is below
    assert "0 of 19 controls in its layers do at least as well on average" in found.sentence(SCORE)
    several = [Repeat(judge(LOW, HIGH)[0], Location(((0, 0),)), places)] * 2
    assert combine_repeats(several).methods["optimal"].outcome == "SPECIFIC TO ITS LAYERS"


def test_nulls_are_drawn_with_one_seed_and_those_without_a_place_are_named():
    claim = Location(((0, 1), (2, 3), (2, 4)))
    few, _ = draw_nulls(claim, SHAPE, ["anywhere", "layers"], 5, seed=3)
    many, notes = draw_nulls(claim, SHAPE, ["layers", "anywhere", "kv-groups"], 40, seed=3)
    assert not notes
    for null, controls in few.items():
        assert many[null].locations[:5] == controls.locations
    for null, layers in (("layers", {0: 1, 2: 2}), ("kv-groups", {0: 1, 2: 2})):
        assert all(Counter(layer for layer, _ in c.units) == layers for c in many[null].locations)
    assert few["layers"].population == 6 * 15 - 1
    layer = Location(((1,),), "mlp")
    found, notes = draw_nulls(layer, SHAPE, ["anywhere", "layers"], 19)
    assert list(found) == ["anywhere"] and found["anywhere"].population == 3
    assert notes == (
        "There are no controls of the null layers: a claim of 1 mlp units that leaves no room for a control.",
    )
    with pytest.raises(LocationError, match="1 mlp units that leaves no room"):
        draw_nulls(layer, SHAPE, ["layers"], 19)


def test_few_places_are_known_before_the_model_is_loaded(home):
    notes = read_settings(small_config(home, **TWO, claim="0.1")).notes
    assert [note.partition(" so p")[0] for note in notes] == [
        "The null anywhere: there are only 7 other places,",
        "The null layers: there are only 3 other places in its layers,",
    ]
    (note,) = read_settings(small_config(home, **TWO, claim="mlp:1", level=0.5)).notes
    assert note.startswith("There are no controls of the null layers")
    with pytest.raises(LocationError, match="leaves no room"):
        read_settings(small_config(home, nulls=["layers"], claim="mlp:1"))


def test_a_place_of_both_nulls_is_fitted_once(home, tmp_path, monkeypatch, capsys):
    """A head of a model of 8: all others are its controls anywhere, and 3 of them those in its layers."""
    fitted = []
    real = worker.run_trials
    monkeypatch.setattr(worker, "run_trials", lambda shared, specs, *a: fitted.extend(specs) or real(shared, specs, *a))
    config = small_config(home, **TWO, claim="0.1", controls=19, level=0.3, score="reward_margin", whole_model=False)
    with stopped_at(4):
        run_audit(config, tmp_path / "run", progress=False)
    assert run_pilot(config, tmp_path / "run", progress=False).seconds > 0
    run_audit(config, tmp_path / "run", progress=False)
    run = load_run(tmp_path / "run")
    ids = [spec.trial_id for spec in fitted]
    assert len(set(ids)) == len(ids) == 1 + 2 * (1 + 7)
    assert run.is_finished and len(run.trials) == run.manifest.planned == 1 + 2 * (1 + 7 + 3)
    assert run.manifest.nulls == {"anywhere": Null(7, 7), "layers": Null(3, 3)}
    by_place = {(r.spec.method, r.spec.place): r for r in run.trials}
    for (method, place), record in by_place.items():
        if place.null == "layers":
            (same,) = [r for (m, p), r in by_place.items() if (m, p.null) == (method, "anywhere")
                       and r.spec.location == record.spec.location]  # fmt: skip
            assert dataclasses.replace(record, spec=same.spec) == same
    before = run.verdict
    assert all([*v.nulls] == ["anywhere", "layers"] for v in before.methods.values())
    print_scores(run)
    (row,) = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| optimal | reward_margin")]
    *_, anywhere, _, layers, _, explained, _ = (x.strip() for x in row.split("|"))
    assert float(anywhere) > 0
    assert float(explained) == pytest.approx(1 - float(layers) / float(anywhere), abs=0.02)
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "Mean of 3 controls in its layers" in page and "Control 2 in its layers" in page
    with (tmp_path / "run" / "trials.csv").open(newline="") as file:
        assert Counter(row["null"] for row in csv.DictReader(file)) == {"": 3, "anywhere": 14, "layers": 6}
    assert run.verdict.methods["optimal"].nulls["layers"].can_test  # 3 places at level 0.3
    assert not run.read_with(level=0.2).verdict.methods["optimal"].nulls["layers"].can_test
    run_audit(config, tmp_path / "run", progress=False)
    assert len(ids) == len(fitted) and repr(load_run(tmp_path / "run").verdict) == repr(before)


@pytest.mark.parametrize("stopping", ["fixed", "curtailed"])
def test_a_run_grows_in_nulls_and_in_the_controls_of_each(home, tmp_path, stopping):
    settings = {"claim": "0.1,1.0", "methods": ["iti"], "level": 0.4, "stopping": stopping}
    first = small_config(home, nulls=["anywhere"], controls=2, **settings)
    run_audit(first, tmp_path / "run", progress=False)
    more = small_config(home, **TWO, controls=12, **settings)
    run_audit(more, tmp_path / "run", progress=False)
    run_audit(more, tmp_path / "whole", progress=False)
    grown, whole = load_run(tmp_path / "run"), load_run(tmp_path / "whole")
    if stopping == "fixed":
        assert [r.spec for r in grown.trials] == [r.spec for r in whole.trials]
        assert Counter(r.spec.null for r in grown.trials) == {"": 3, "anywhere": 12, "layers": 12}
    else:
        assert len(grown.trials) < 27
    for name, v in grown.verdict.methods.items():
        assert v.outcome == whole.verdict.methods[name].outcome
        assert [n.p_value for n in v.nulls.values()] == [n.p_value for n in whole.verdict.methods[name].nulls.values()]
    assert {e.what for e in grown.manifest.extensions} == {"controls", "nulls"}
    assert "stay valid" in describe_extensions(
        [Extension("nulls", "anywhere", "anywhere, layers", 3, 5)], "fixed", 0.05
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [("none", "anywhere"), ("layer", "layers"), ("kv-group", "kv-groups"), ("norm", "norm"), ("any", "anywhere")],
)
def test_the_former_setting_is_refused_with_the_present_one(tmp_path, capsys, old, new):
    with pytest.raises(ConfigError, match=rf"setting match in .*expected nulls: \[{new}\], which replaces it"):
        parse_config(f"match: {old}")
    with pytest.raises(ConfigError, match=rf"nulls: \[{new}\]"):
        AuditConfig(match=old)
    (tmp_path / "claim.yaml").write_text(f'claim: "0.1"\nmatch: {old}\n')
    with pytest.raises(ConfigError, match=rf"setting match in .*claim.yaml; expected nulls: \[{new}\]"):
        read_registration(tmp_path / "claim.yaml")
    assert cli.main(["audit", "--match", old]) == 2
    assert f"got --match {old}; expected --nulls {new}, which replaces it" in capsys.readouterr().err
    assert merge_config(AuditConfig(), {"nulls": [new]}).nulls == (new,)


def test_a_run_of_an_earlier_version_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with sqlite3.connect(tmp_path / "trials.sqlite") as connection:
        connection.execute("CREATE TABLE fits (fit TEXT)")
        connection.execute("CREATE TABLE places (arm TEXT, control INTEGER, fit TEXT, registration TEXT)")
    connection.close()
    with pytest.raises(RunFolderError, match="made by an earlier development version"), read_run(tmp_path):
        pass
