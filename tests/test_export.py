"""A run's edit in forms that other programs read."""

from __future__ import annotations

import json
import re

import pytest
import torch

from locaudit import cli
from locaudit.config import merge_config, to_yaml
from locaudit.edits import load_edit
from locaudit.errors import LocationError, RunFolderError
from locaudit.models import load_model
from locaudit.records import Place
from locaudit.run.audit import run_audit
from locaudit.run.example import sample_answers
from locaudit.run.export import export_edit
from locaudit.stats import select
from locaudit.store.run import load_run
from runs import small_config
from tiny import logits, random_ids, tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    home = tmp_path_factory.mktemp("inputs")
    config = small_config(home, optimal={"strengths": [0.1, 0.4]}, controls=1, rest=True)
    run_audit(config, home / "run", progress=False)
    return home / "run"


def edit_of(folder, arm, method, strength=None, control=-1):
    """The saved edit of a trial, the one that validation chose."""
    run = load_run(folder)
    null = "anywhere" if arm == "control" else ""
    record = select(run.records, run.score)[method][Place(arm, control, null)]
    if strength is not None:
        (record,) = [r for r in run.records if (r.spec.arm, r.spec.method) == (arm, method)
                     and (r.spec.control, r.spec.hyperparameter) == (control, strength)]  # fmt: skip
    return load_edit(folder / "edits" / record.edit)


@pytest.mark.parametrize("arm", ["claim", "control", "whole", "rest"])
def test_vectors_are_the_edit_itself(finished, tmp_path, arm, capsys):
    name, control = ("control-anywhere-0", 0) if arm == "control" else (arm, -1)
    out = tmp_path / "out"
    arguments = ["export", str(finished), "--trial", f"{name}/optimal", "--to", "vectors", "--out", str(out)]
    assert cli.main(arguments) == 0
    printed, noted = capsys.readouterr()
    assert printed.strip() == str(out / "edit.safetensors")
    assert re.search(
        rf"wrote the edit {name}/optimal, strength 0.[14], of .* as vectors: edit.safetensors \(0.0", noted
    )
    assert (
        load_edit(out / "edit.safetensors").to_bytes() == edit_of(finished, arm, "optimal", control=control).to_bytes()
    )
    assert cli.main(arguments) == 2  # the folder is not empty: nothing is replaced
    assert "which is not empty; expected a new or empty folder" in capsys.readouterr().err
    for strength in (0.1, 0.4):
        out = tmp_path / str(strength)
        assert cli.main([*arguments[:-1], str(out), "--strength", str(strength)]) == 0
        expected = edit_of(finished, arm, "optimal", strength, control)
        assert load_edit(out / "edit.safetensors").to_bytes() == expected.to_bytes()


def test_a_sampled_answer_is_the_one_that_a_run_with_samples_has(tmp_path):
    config = small_config(tmp_path, methods=["iti"], iti={"alphas": [60.0]}, evaluation={"samples": 1})
    run_audit(config, tmp_path / "run", progress=False)
    saved = tmp_path / "run" / "config.yaml"
    saved.write_text(to_yaml(merge_config(config, {"ray": {"workers": 2}})))  # the sample needs none
    run = load_run(tmp_path / "run")
    question, said = sample_answers(tmp_path / "run", "claim/iti", max_new_tokens=6)
    assert question == run.questions["test"][0].text
    (base,) = (record for record in run.records if record.spec.arm == "base")
    claim = select(run.records, run.score)["iti"][Place("claim")]
    assert said == {"unedited": base.samples["test"][0][0], "claim/iti": claim.samples["test"][0][0]}
    assert said["unedited"] != said["claim/iti"]


def test_weights_say_what_the_edit_says(finished, tmp_path, capsys):
    assert cli.main(["export", str(finished), "--to", "merged", "--out", str(tmp_path / "merged")]) == 0
    first, *_, last = capsys.readouterr().err.splitlines()
    assert "writes the whole model with the edit in its weights, 0 MB" in first
    assert "as merged: model.safetensors (0." in last
    assert cli.main(["export", str(finished), "--to", "peft", "--out", str(tmp_path / "peft")]) == 0
    assert "base" not in capsys.readouterr().err  # the model has a folder
    model = load_model(load_run(finished).config.model, device="cpu")
    ids, before = random_ids(2, 9), logits(model, random_ids(2, 9))
    with edit_of(finished, "claim", "optimal").on(model):
        edited = logits(model, ids)
    assert (edited - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(load_model(tmp_path / "merged", device="cpu"), ids), edited, rtol=1e-5, atol=3e-5)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert load_model(config["base_model_name_or_path"], device="cpu").fingerprint == model.fingerprint


@pytest.mark.parametrize("trial", ["", "claim", "claim/nothing", "control-7/optimal", "control/optimal", "base/none"])
def test_a_trial_that_is_not_there_is_named(finished, tmp_path, trial):
    with pytest.raises(RunFolderError, match="claim/iti, claim/optimal, control-anywhere-0/iti.*ARM/METHOD"):
        export_edit(finished, trial, "vectors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_says_why(finished, tmp_path):
    with pytest.raises(RunFolderError, match=r"strength 0\.2 of claim/optimal; expected one of 0\.1, 0\.4"):
        export_edit(finished, "claim/optimal", "vectors", tmp_path / "out", strength=0.2)
    with pytest.raises(LocationError, match="positions 'answer'"):
        export_edit(finished, "claim/iti", "merged", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (
        cli.main(["export", str(finished), "--trial", "claim/iti", "--to", "peft", "--out", str(tmp_path / "o")]) == 2
    )


def test_another_model_than_the_audited_one_is_refused(finished, tmp_path):
    changed = load_model(load_run(finished).config.model, device="cpu")
    with torch.no_grad():
        changed.lm.lm_head.weight.mul_(1.01)
    for model in (tiny("gpt2"), changed):
        with pytest.raises(RunFolderError, match="other weights than those that were audited"):
            export_edit(finished, "claim/optimal", "peft", tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists()


def test_a_dtype_that_would_lose_the_update_is_refused(finished, tmp_path, capsys):
    out = ["--to", "merged", "--out", str(tmp_path / "out")]
    assert cli.main(["export", str(finished), *out, "--dtype", "bfloat16"]) == 2
    refused = capsys.readouterr().err
    assert "model's bfloat16 would lose" in refused and "writes the whole model" not in refused
    assert not (tmp_path / "out").exists()
    assert cli.main(["export", str(finished), *out, "--dtype", "float32"]) == 0
