"""A claim file fixed before the run: what it holds, what carries its hash, and what is said of changes after it."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from locaudit import audit, cli
from locaudit.behaviours import load_behaviour
from locaudit.config import (
    AuditConfig,
    changed_settings,
    hold,
    merge_config,
    open_settings,
    read_registration,
    to_yaml,
)
from locaudit.errors import ConfigError, LocationError, RunFolderError
from locaudit.models import load_model
from locaudit.records import TrialSpec
from locaudit.report import write_report
from locaudit.run.audit import run_audit
from locaudit.run.pilot import run_pilot
from locaudit.run.subject import read_inputs
from locaudit.store.folder import read_run
from runs import HashJudge, small_config, stopped_at
from tiny import heads

CLAIM = """\
# What we expect, and how we will look.
claim: "1.2, 0.1"
score: mc2
level: 0.05
margin: 0.2
methods: {iti: {alphas: [3]}}
reason: "Less than <0.2> would not matter."
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("inputs")


def write_claim(folder: Path, text: str = CLAIM) -> Path:
    path = folder / "claim.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def claim_file(tmp_path) -> Path:
    return write_claim(tmp_path)


def tiny_audit(home: Path, **changes) -> AuditConfig:
    """4 trials: the unedited model, the claim and 2 controls."""
    return small_config(home, methods=["iti"], whole_model=False, **changes)


def as_registered(home: Path, **changes) -> AuditConfig:
    """The settings of `CLAIM`, given without it."""
    return tiny_audit(home, **{"claim": "0.1,1.2", "score": "mc2", "margin": 0.2, "iti": {"alphas": [3.0]}} | changes)


def registered(home: Path, path: Path) -> AuditConfig:
    """The settings of `CLAIM`, taken from the claim file at `path`."""
    return tiny_audit(home, iti={"alphas": [3.0]}, registered=str(path))


def assert_no_claim_file(home: Path, path: Path, words: str, error: type[Exception] = ConfigError) -> None:
    with pytest.raises(error, match=words):
        read_inputs(tiny_audit(home, registered=str(path)))


@pytest.fixture(scope="module")
def finished(home) -> Path:
    run_audit(registered(home, write_claim(home)), home / "finished", progress=False)
    return home / "finished"


def test_a_claim_file_may_leave_the_length_of_answers_open(home, tmp_path):
    """``null`` fixes nothing, so that what a run makes of it is no change; an earlier primer is named as now."""
    path = write_claim(tmp_path, CLAIM + "evaluation: {max_new_tokens: null, drift_documents: 2}\n")
    assert read_registration(path).values["evaluation"] == {"drift_documents": 2}
    config = merge_config(
        tiny_audit(home, iti={"alphas": [3.0]}, registered=str(path)), {"evaluation": {"max_new_tokens": None}}
    )
    inputs = read_inputs(config)
    assert inputs.config.evaluation.max_new_tokens == 0
    assert read_inputs(inputs.config).config == inputs.config
    assert changed_settings(inputs.registration.values, inputs.config) == []
    write_claim(tmp_path, CLAIM + "prompt: {primer: default}\n")
    with pytest.raises(ConfigError, match=r"prompt.primer = 'default' in .*claim.yaml; expected auto .* or truthful"):
        read_inputs(config)


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The finished run, to do things to."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def specs(folder: Path) -> list[TrialSpec]:
    with read_run(folder) as store:
        return [record.spec for record in store.records()]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# The file


def test_its_settings_hold_over_those_that_were_not_given(home, claim_file):
    inputs = read_inputs(registered(home, claim_file))
    assert inputs.config == as_registered(home, registered=str(claim_file), prompt={"style": "qa"})
    assert inputs.registration is not None
    assert inputs.registration.sha256 == hashlib.sha256(claim_file.read_bytes()).hexdigest()
    assert inputs.registration.text == CLAIM
    assert inputs.registration.file == "claim.yaml"
    assert inputs.registration.values == {
        "claim": "0.1,1.2", "score": "mc2", "level": 0.05, "margin": 0.2, "methods": {"iti": {"alphas": [3.0]}},
    }  # fmt: skip


def test_a_setting_given_otherwise_is_refused_with_both_values(home, claim_file):
    for changes, words in {
        ("level", 0.1): r"level = 0\.1, but 0\.05 in claim\.yaml.*leave out level",
        ("score", "mc1"): "score = mc1, but mc2 in claim.yaml",
        ("claim", "0.1,1.3"): r"claim = 0\.1,1\.3, but 0\.1,1\.2 in",
    }.items():
        given = as_registered(home, registered=str(claim_file), **dict([changes]))
        with pytest.raises(ConfigError, match=words):
            read_inputs(given)
    with pytest.raises(ConfigError, match=r"methods\.iti\.alphas = \[2\.0\], but \[3\.0\]"):
        read_inputs(tiny_audit(home, registered=str(claim_file)))
    same = tiny_audit(home, registered=str(claim_file), claim="1.2,0.1", level=0.05, iti={"alphas": [3.0]})
    assert read_inputs(same).config.claim == "0.1,1.2"  # the same location, written otherwise


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("level: 0.05", "gives no claim"),
        ("claim:", "gives no claim"),
        ("", "gives no claim"),
        ("clam: '0.1'", "unknown setting clam"),
        ("claim: 0.1", r"claim = 0\.1 in .*put it in quotes"),
        ("claim: '0.1'\nlevel: 2.0", "level = 2.0"),
        ("claim: '0.1'\nregistered: other.yaml", "registered = 'other.yaml'"),
        ("claim: '0.1'\nregistered:", "registered = None"),
        ("- claim", "in .*; expected keys among"),
        ("claim: [", "not YAML"),
        ("claim: '0.1'\nreason: 3", r"reason = 3; expected text in .*claim.yaml"),
        ("claim: '0.1'\nreason: [a, b]", r"reason = \['a', 'b'\]; expected text"),
        ("claim: '0.1'\nmatch: layer", r"the unknown setting match in .*claim.yaml; expected nulls: \[layers\]"),
        ("claim: '0.1'\nnulls: layers", r"nulls = 'layers' in .*claim.yaml; .*write nulls: \[layers\]"),
    ],
)
def test_files_that_are_no_claim_file(home, tmp_path, text, words):
    assert_no_claim_file(home, write_claim(tmp_path, text), words)


def test_no_file_and_no_location(home, tmp_path):
    path = tmp_path / "claim.yaml"
    assert_no_claim_file(home, path, "which is not a file")
    path.write_bytes(b"\xff\xfe\x00")
    assert_no_claim_file(home, path, "not UTF-8")
    assert_no_claim_file(home, write_claim(tmp_path, "claim: x.y"), r"x\.y", LocationError)


def test_a_claim_in_a_file_of_its_own_is_not_fixed(home, tmp_path):
    (tmp_path / "heads.csv").write_text("layer,head\n0,1\n1,2\n")
    path = write_claim(tmp_path, f"claim: {tmp_path / 'heads.csv'}")
    assert_no_claim_file(home, path, r'can change after.*write claim: "0\.1,1\.2"')


def test_a_claim_by_rule_leaves_no_room_for_another(home, tmp_path):
    path = write_claim(tmp_path, "probe: {top_k: 2}")
    assert read_inputs(tiny_audit(home, registered=str(path))).config.claim is None
    with pytest.raises(ConfigError, match=r"claim = 0\.1, but None in claim\.yaml"):
        read_inputs(tiny_audit(home, registered=str(path), claim="0.1"))


def test_things_from_python_are_what_the_file_names(home, tmp_path, claim_file):
    config = as_registered(home, registered=str(claim_file))
    behaviour, model = load_behaviour(config.behaviour), load_model(config.model)
    judges = {"truth": HashJudge("truth")}
    read_inputs(config, behaviour, judges, model)  # it names none of them
    for line, thing in {
        "behaviour: misconceptions": {"behaviour": behaviour},
        "model: smollm2-135m": {"model": model},
        "judges: {truth: {kind: none}}": {"judges": judges},
    }.items():
        claim_file.write_text(f"{CLAIM}{line}\n")
        with pytest.raises(ConfigError, match="from Python"):
            read_inputs(replace(config, model="smollm2-135m", behaviour="misconceptions"), **thing)


def test_changes_and_what_is_left_open(claim_file):
    registration = read_registration(claim_file)
    held = hold(registration, AuditConfig())
    assert changed_settings(registration.values, held) == []
    assert changed_settings(registration.values, merge_config(held, {"level": 0.1, "controls": 5})) == [
        "level: 0.05 registered, 0.1 now"
    ]
    assert changed_settings(
        registration.values, merge_config(held, {"methods": {"iti": {"alphas": [3, 4], "positions": "all"}}})
    ) == ["methods.iti.alphas: [3.0] registered, [3.0, 4.0] now"]
    assert open_settings(registration.values) == ["stopping", "judges"]


def test_methods_that_a_claim_file_names_are_those_of_the_run(tmp_path):
    registration = read_registration(write_claim(tmp_path, "claim: '0.1'\nmethods: [iti]"))
    assert registration.values["methods"] == {"iti": {}}  # its settings stay open
    held = hold(registration, AuditConfig(methods={"iti": {"alphas": [1.0]}}))
    assert held.methods == AuditConfig(methods={"iti": {"alphas": [1.0]}}).methods
    assert list(hold(registration, AuditConfig()).methods) == ["iti"]
    with pytest.raises(ConfigError, match=r"methods = \['optimal'\], but \['iti'\] in claim.yaml"):
        hold(registration, AuditConfig(methods={"optimal": {}}))
    now = AuditConfig(claim="0.1")
    assert changed_settings(registration.values, now) == ["methods: ['iti'] registered, ['iti', 'optimal'] now"]
    with pytest.raises(ConfigError, match=r"the unknown setting iti in .*claim.yaml; expected methods.iti"):
        read_registration(write_claim(tmp_path, "claim: '0.1'\niti: {alphas: [3]}"))


# The run


def test_every_record_carries_the_hash(finished, home):
    registration = read_registration(home / "claim.yaml")
    with read_run(finished) as store:
        fact = store.manifest.registration
        records = store.records()
        assert {record.edit for record in records} == {"", *(r.spec.edit_file for r in records if r.spec.location)}
    assert {record.spec.registration for record in records} == {registration.hash}
    assert len(records) == 4
    assert (fact.sha256, fact.hash) == (registration.sha256, registration.hash)
    assert (fact.file, fact.text) == ("claim.yaml", CLAIM)
    assert fact.values["claim"] == "0.1,1.2"


def test_a_claim_file_changes_no_trial(finished, home, tmp_path):
    """It is carried by every record, and has no part in what a trial is."""
    run_audit(as_registered(home), tmp_path / "free", progress=False)
    with read_run(finished) as one, read_run(tmp_path / "free") as other:
        ours, theirs = one.records(), other.records()
    assert {record.spec.registration for record in theirs} == {""}
    carried = ours[0].spec.registration
    assert ours == [replace(record, spec=replace(record.spec, registration=carried)) for record in theirs]
    assert [record.spec.trial_id for record in ours] == [record.spec.trial_id for record in theirs]


def test_ids_are_what_they_were():
    """A change of what is hashed would orphan the edits of every run."""
    spec = TrialSpec("claim", "iti", heads((0, 1), (1, 2)), 2.0, 0, "c")
    assert spec.trial_id == "8791b54da78938ab"
    assert replace(spec, registration="0123456789abcdef").trial_id == spec.trial_id


def test_resumed_without_the_file_it_keeps_the_ids(home, finished, tmp_path):
    config = as_registered(home, registered=str(home / "claim.yaml"))
    with stopped_at(3):
        run_audit(config, tmp_path / "run", progress=False)
    run_audit(as_registered(home), tmp_path / "run", progress=False)
    assert specs(tmp_path / "run") == specs(finished)
    before = contents(tmp_path / "run" / "edits")
    run_audit(config, tmp_path / "run", progress=False)  # and with the file again, there is nothing to do
    assert contents(tmp_path / "run" / "edits") == before
    assert specs(tmp_path / "run") == specs(finished)


def test_a_changed_file_is_refused_and_nothing_is_touched(home, copy, claim_file):
    then = read_registration(claim_file).hash
    for text in (CLAIM.replace("0.05", "0.01"), CLAIM + "# a word more\n", CLAIM.replace("1.2", "1.3")):
        claim_file.write_text(text)
        before = contents(copy)
        now = read_registration(claim_file).hash
        with pytest.raises(RunFolderError, match=f"{now}.*{then}.*another `out`, or restore"):
            run_audit(registered(home, claim_file), copy, progress=False)
        assert contents(copy) == before


def test_a_claim_file_after_the_first_trial_is_refused(home, tmp_path, claim_file):
    run_audit(as_registered(home), tmp_path / "run", progress=False)
    before = contents(tmp_path / "run")
    with pytest.raises(RunFolderError, match="began without a claim file"):
        run_audit(as_registered(home, registered=str(claim_file)), tmp_path / "run", progress=False)
    assert contents(tmp_path / "run") == before


def test_before_the_first_trial_another_claim_file_may_take_its_place(home, tmp_path, claim_file):
    with stopped_at(1):
        run_audit(registered(home, claim_file), tmp_path / "run", progress=False)
    claim_file.write_text(CLAIM.replace("1.2", "1.3"))
    run_audit(registered(home, claim_file), tmp_path / "run", progress=False)
    assert {spec.registration for spec in specs(tmp_path / "run")} == {read_registration(claim_file).hash}
    with read_run(tmp_path / "run") as store:
        assert store.manifest.registration.values["claim"] == "0.1,1.3"


def test_a_start_without_the_file_does_not_shake_it_off(home, tmp_path, claim_file):
    """Even before the first trial: what differs is then said."""
    with stopped_at(1):
        run_audit(registered(home, claim_file), tmp_path / "run", progress=False)
    run_audit(as_registered(home, claim="0.1,1.3"), tmp_path / "run", progress=False)
    assert {spec.registration for spec in specs(tmp_path / "run")} == {read_registration(claim_file).hash}
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "<li>claim: 0.1,1.2 registered, 0.1,1.3 now</li>" in page


def test_a_key_that_stands_twice_is_refused(claim_file):
    claim_file.write_text(CLAIM + "level: 0.5\n")
    with pytest.raises(ConfigError, match="the key level occurs twice"):
        read_registration(claim_file)


def test_a_dry_run_runs_registered_trials(home, copy, claim_file, tmp_path):
    config = registered(home, claim_file)
    assert run_pilot(config, tmp_path / "new", progress=False).n_done == 3  # all but the second control
    assert {spec.registration for spec in specs(tmp_path / "new")} == {read_registration(claim_file).hash}
    assert run_pilot(config, copy, progress=False).n_done == 4
    assert run_pilot(as_registered(home), copy, progress=False).n_done == 4
    claim_file.write_text(f"{CLAIM}# a word more\n")
    with pytest.raises(RunFolderError, match="another `out`, or restore"):
        run_pilot(config, copy, progress=False)


def test_it_fixes_the_present_settings_and_gives_a_reason(home, tmp_path):
    text = (
        "claim: 'neuron:0.1,1.2'\nmargin: 0.3\nreason: >\n  A third of the whole\n  model.\nnulls: [layers]\n"
        "controls: 39\nevaluation: {samples: 2}\n"
    )
    found = read_registration(write_claim(tmp_path, text))
    assert found.reason == "A third of the whole model." and "reason" not in found.values
    held = read_inputs(tiny_audit(home, registered=str(tmp_path / "claim.yaml"), controls=19, nulls=AuditConfig.nulls,
                                  evaluation={"samples": 4, "max_new_tokens": 6})).config  # fmt: skip
    assert (held.margin, held.nulls, held.controls, held.evaluation.samples) == (0.3, ("layers",), 39, 2)
    assert held.claim == "neuron:0.1,1.2"
    with pytest.raises(ConfigError, match=r"evaluation.samples = 0, but 2 in claim.yaml"):
        read_inputs(tiny_audit(home, registered=str(tmp_path / "claim.yaml"), controls=19, nulls=AuditConfig.nulls))


# What is said of it


def test_the_report_says_what_was_registered(copy, capsys):
    page = write_report(copy).read_text(encoding="utf-8")
    with read_run(copy) as store:
        sha256 = store.manifest.registration.sha256
    assert f"before the run: <code>{sha256[:16]}</code>, claim.yaml; nothing was changed after" in page
    assert "(it leaves open: stopping, judges)" in page
    assert "Reason given for the margin: “Less than &lt;0.2&gt; would not matter.”" in page
    assert "# What we expect, and how we will look." in page
    assert "Changed after registration" not in page
    assert json.loads((copy / "verdict.json").read_text())["registration"] == {
        "sha256": sha256, "file": "claim.yaml", "changed": [], "left_open": ["stopping", "judges"],
        "reason": "Less than <0.2> would not matter.",
    }  # fmt: skip
    assert cli.main(["report", str(copy)]) == 0
    assert f"registered before the run: {sha256[:16]}, claim.yaml; nothing was changed after" in capsys.readouterr().out


def test_a_level_changed_after_the_run_is_seen_everywhere(home, copy, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(to_yaml(as_registered(home)))
    assert cli.main(["audit", str(tmp_path / "config.yaml"), "--level", "0.1", "--out", str(copy)]) == 0
    change = "level: 0.05 registered, 0.1 now"
    shown = capsys.readouterr().out
    assert f"claim.yaml): {change}" in shown
    assert shown.index("CHANGED AFTER REGISTRATION") < shown.index("CANNOT TELL")  # before the verdict
    assert json.loads((copy / "verdict.json").read_text())["registration"]["changed"] == [change]
    page = (copy / "report.html").read_text(encoding="utf-8")
    top, _ = page.split("<h1")
    assert "Changed after registration." in top
    assert f"<li>{change}</li>" in top
    assert "nothing was changed after" not in page
    again = ["audit", str(tmp_path / "config.yaml"), "--registered", str(home / "claim.yaml"), "--out", str(copy)]
    assert cli.main([*again, "--level", "0.1"]) == 2
    assert "level = 0.1, but 0.05 in claim.yaml" in capsys.readouterr().err
    assert cli.main(again) == 0  # as it was registered
    assert "nothing was changed after" in capsys.readouterr().out


def test_a_run_without_a_claim_file_says_what_could_be_chosen_after_it(home, tmp_path):
    run_audit(as_registered(home), tmp_path / "run", progress=False)
    page = write_report(tmp_path / "run").read_text()
    assert "no: score, level, margin, stopping and judges could be chosen after the run" in page
    assert "registration" not in json.loads((tmp_path / "run" / "verdict.json").read_text())


def test_from_python(home, tmp_path, claim_file):
    config = tiny_audit(home, iti={"alphas": [3.0]})
    settings = {"config": config, "registered": str(claim_file), "out": tmp_path / "run", "progress": False}
    result = audit(config.model, config.behaviour, **settings)
    assert (result.verdict.claim, result.verdict.score) == ("0.1,1.2", "mc2")
    assert {record.spec.registration for record in result.records} == {read_registration(claim_file).hash}
    with pytest.raises(ConfigError, match="level"):
        audit(config.model, config.behaviour, **settings, level=0.1)


def test_a_group_that_is_fixed_in_part_leaves_the_rest_of_it_open():
    assert open_settings({"judges": {"truth": {"kind": "reference"}}, "level": 0.05}) == [
        "score", "margin", "stopping", "judges.truth.model", "judges.info.kind", "judges.negative.kind",
        "judges.fluency.kind", "judges.match.kind", "judges.refusal.kind",
    ]  # fmt: skip
    assert "judges" in open_settings({"level": 0.05})
