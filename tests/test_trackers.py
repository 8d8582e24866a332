"""Trackers show a run, and change nothing about it."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from locaudit import cli
from locaudit.config.settings import leaves
from locaudit.config.validation import to_dict
from locaudit.registry import TRACKERS
from locaudit.run.audit import run_audit
from locaudit.run.trackers import tracking
from locaudit.store.folder import read_run
from locaudit.store.run import load_run
from runs import small_config, stopped_at


class Listing:
    """Keeps what it is told; `fails` names the method that raises."""

    fails = ""

    def __init__(self, name, folder, settings):
        Listing.told = [(name, settings)]
        self._fail("init")

    def log(self, n, values):
        Listing.told.append((n, dict(values)))
        self._fail("log")

    def finish(self, values, report):
        Listing.told.append((dict(values), report))
        self._fail("finish")

    def _fail(self, name):
        if self.fails == name:
            raise OSError(f"no server at {name}")


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """A small audit without a tracker: its settings and its folder."""
    home = tmp_path_factory.mktemp("audited")
    config = small_config(home)
    run_audit(config, home / "run", progress=False)
    return config, home / "run"


def unedited(run):
    return next(record.metrics["test"] for record in run.records if record.spec.arm == "base")


def content(folder):
    with read_run(folder) as store:
        edits = {path.name: path.read_bytes() for path in store.edits.iterdir()}
        return store.config.hash, [record.spec.trial_id for record in store.records()], store.records(), edits


def test_a_tracker_sees_each_place_and_the_verdict_and_changes_no_result(audited, tmp_path):
    config, folder = audited
    with TRACKERS.temporary("listing", Listing):
        run_audit(replace(config, tracker="listing"), tmp_path / "run", progress=False)
    assert content(tmp_path / "run") == content(folder)
    (name, settings), *places, (values, report) = Listing.told
    assert name == str(tmp_path / "run")
    assert settings["controls"] == "2" and set(settings) == {name for name, _ in leaves(to_dict(config))}
    assert [n for n, _ in places] == list(range(1, 10))  # unedited; claim, whole model and two controls by two methods
    shown = {name: value for _, values in places for name, value in values.items()}
    run = load_run(folder)
    assert shown["unedited/mc2"] == unedited(run)["mc2"]
    assert {"optimal/claim/kl", "iti/whole/mc1", "iti/control-anywhere/mc2"} <= shown.keys()
    v = run.verdict.methods["optimal"]
    assert (values["outcome"], values["optimal/outcome"]) == (run.verdict.outcome, v.outcome)
    assert (values["optimal/gain"], values["optimal/anywhere/p"]) == (v.effect, v.nulls["anywhere"].p_value)
    assert report == tmp_path / "run" / "report.html" and report.is_file()


@pytest.mark.parametrize("stage", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(audited, tmp_path, monkeypatch, capsys, stage):
    config, folder = audited
    monkeypatch.setattr(Listing, "fails", stage)
    with TRACKERS.temporary("listing", Listing):
        run_audit(replace(config, tracker="listing"), tmp_path / "run")
    assert content(tmp_path / "run") == content(folder)
    assert " ".join(capsys.readouterr().err.split()).count(f"listing failed (no server at {stage})") == 1
    assert len(Listing.told) == {"init": 1, "log": 2, "finish": 11}[stage]


def test_a_tracker_is_told_of_an_interrupted_run_and_of_all_places_when_it_goes_on(audited, tmp_path):
    config = replace(audited[0], tracker="listing")
    with TRACKERS.temporary("listing", Listing):
        with stopped_at(4):
            run_audit(config, tmp_path / "run", progress=False)
        assert Listing.told[-1] == ({}, None) and len(Listing.told) < 11
        run_audit(config, tmp_path / "run", progress=False)
    assert len(Listing.told) == 11 and Listing.told[-1][1] is not None


def test_an_unknown_tracker_and_a_missing_package_are_told_before_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    remedies = {"tensorbord": "did you mean 'tensorboard'?", "tensorboard": "pip install 'locaudit[trackers]'"}
    for name, said in remedies.items():
        assert cli.main(["audit", "--tracker", name, "--out", str(tmp_path / "run")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def follow(audited, name):
    """Show a finished run as its own audit would."""
    config, folder = audited
    said = []
    with tracking(replace(config, tracker=name), folder, said.append) as track:
        for record in load_run(folder).records:
            track(record)
    assert said == []
    return load_run(folder)


def test_tensorboard_reads_the_run(audited):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = follow(audited, "tensorboard")
    found = EventAccumulator(str(run.folder / "tensorboard"))
    found.Reload()
    assert [x.value for x in found.Scalars("unedited/mc2")] == [pytest.approx(unedited(run)["mc2"])]
    steps = [x.step for name in found.Tags()["scalars"] if name.endswith("/kl") for x in found.Scalars(name)]
    assert sorted(steps) == list(range(1, len(run.records) + 1))
    (verdict,) = found.Tensors("verdict/text_summary")
    assert run.verdict.headline.encode() in verdict.tensor_proto.string_val[0]


@pytest.mark.filterwarnings("ignore")  # of MLflow's own dependencies
def test_mlflow_reads_the_run(audited, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = follow(audited, "mlflow")
    (found,) = mlflow.search_runs(output_format="list")
    assert found.info.status == "FINISHED" and found.data.params["controls"] == "2"
    assert found.data.tags["outcome"] == run.verdict.outcome
    assert found.data.metrics["optimal/anywhere/p"] == run.verdict.methods["optimal"].nulls["anywhere"].p_value
    assert [x.path for x in mlflow.MlflowClient().list_artifacts(found.info.run_id)] == ["report.html"]


@pytest.mark.filterwarnings("ignore")  # of wandb's own dependencies
def test_wandb_keeps_the_run_offline(audited, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = follow(audited, "wandb")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert (folder / "files" / "report.html").is_file()
    assert run.verdict.headline.encode() in next(folder.glob("*.wandb")).read_bytes()
