"""Rules against the same random places: what audits share runs once, and each is as if it were run alone."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest

from locaudit import cli
from locaudit.claims import read_claim
from locaudit.config import to_yaml
from locaudit.errors import ConfigError, DataError, RunFolderError
from locaudit.run import worker
from locaudit.run.audit import run_audit
from locaudit.run.find import find_places
from locaudit.run.heuristics import run_heuristics
from locaudit.stats import holm
from locaudit.store.run import load_run
from runs import HashJudge, small_config

RULES = ("probe", "mean-difference", "gradient")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture
def ran(monkeypatch):
    """The trials that are run, in order."""
    specs, real = [], worker.run_trials

    def counted(shared, group, on_step=None):
        specs.extend(group)
        return real(shared, group, on_step)

    monkeypatch.setattr(worker, "run_trials", counted)
    return specs


def judged(home, **changes):
    """Settings in which grids widen, and the chosen trials get more samples; and judges."""
    evaluation = {"drift_documents": 2, "drift_tokens": 8, "max_new_tokens": 4, "bank_size": 1, "samples": 2}
    optimal = {"strengths": [0.1, 0.2], "epochs": 1, "bank_size": 1}
    config = small_config(home, methods=["optimal"], optimal=optimal, evaluation=evaluation, widen=1, controls=3)
    return replace(config, **changes), {"judges": {"truth": HashJudge("truth"), "info": HashJudge("info")}}


def stored(folder):
    """Place and trial -> its scores, answers and edit's bytes."""
    run = load_run(folder)
    return {
        (r.spec.place, r.spec.trial_id): (
            r.questions, r.answers, r.samples, r.drift, r.edit and (folder / "edits" / r.edit).read_bytes()
        )
        for r in run.records
    }  # fmt: skip


def test_audits_share_their_random_places_and_are_as_if_run_alone(home, tmp_path, ran):
    config, judges = judged(home)
    folders = run_heuristics(config, tmp_path / "rules", RULES, 2, progress=False, **judges)
    runs = {folder.name: load_run(folder) for folder in folders}
    assert tuple(runs) == RULES
    claims = {by: read_claim(tmp_path / "rules" / f"{by}.csv", top_k=2).location for by in RULES}
    assert {by: run.manifest.claim for by, run in runs.items()} == claims and len(set(claims.values())) > 1
    ids = [spec.trial_id for spec in ran if spec.measured is None]
    assert len(ids) == len(set(ids)), "an edit was found twice"
    places = {by: {r.spec.location for r in run.records if r.spec.arm == "control"} for by, run in runs.items()}
    assert places["probe"] - {claims["gradient"]} <= places["gradient"]
    assert any(r.spec.hyperparameter not in (None, 0.1, 0.2) for r in runs["gradient"].records)
    n = len(ran)
    run_heuristics(config, tmp_path / "rules", RULES, 2, progress=False, **judges)
    assert len(ran) == n, "a finished comparison has nothing left to run"
    run_audit(replace(config, claim=str(claims["gradient"])), tmp_path / "alone", progress=False, **judges)
    alone, shared = stored(tmp_path / "alone"), stored(tmp_path / "rules" / "gradient")
    assert alone.keys() == shared.keys() and alone == shared


def test_begun_audits_keep_their_claims(home, tmp_path):
    config, judges = judged(home)
    run_heuristics(config, tmp_path, RULES[:2], 2, progress=False, **judges)
    assert not (tmp_path / "gradient").exists()
    (tmp_path / "probe.csv").unlink()
    run_heuristics(config, tmp_path, ("gradient", *RULES[:2]), 2, progress=False, **judges)
    assert (tmp_path / "gradient.csv").exists() and not (tmp_path / "probe.csv").exists()
    with pytest.raises(RunFolderError, match="claim"):
        run_heuristics(config, tmp_path, RULES[:2], 3, progress=False, **judges)
    before = (tmp_path / "gradient.csv").read_text()
    for changes, said in (
        ({"kind": "mlp"}, "kind: head there, mlp here"),
        ({"positions": "last"}, "positions: all there, last here"),
        ({"patch_with": "pair"}, "patch_with: mean there, pair here"),
    ):
        with pytest.raises(RunFolderError, match=f"{said}.*choose another `out`"):
            run_heuristics(config, tmp_path, RULES, 2, progress=False, **judges, **changes)
    (tmp_path / "heuristics.json").unlink()  # a folder begun before this file was written
    with pytest.raises(RunFolderError, match="kind: head there, mlp here"):
        run_heuristics(config, tmp_path, RULES[:2], 2, "mlp", progress=False, **judges)
    assert (tmp_path / "gradient.csv").read_text() == before


def test_rules_replace_outputs_where_it_is_said(home, tmp_path):
    config, judges = judged(home)
    run_heuristics(config, tmp_path, RULES, 2, positions="last", progress=False, **judges)
    for by, where in (("gradient", {"positions": "last"}), ("probe", {})):
        find_places(config, by, progress=False, **where).save(tmp_path / "alone.csv")
        assert (tmp_path / f"{by}.csv").read_text() == (tmp_path / "alone.csv").read_text()
    with pytest.raises(ConfigError, match="the rule probe and mean-difference with"):
        run_heuristics(config, tmp_path / "none", RULES[:2], 2, positions="last", progress=False, **judges)
    with pytest.raises(DataError, match="without a paired prompt"):
        run_heuristics(config, tmp_path / "none", RULES, 2, patch_with="pair", progress=False, **judges)
    assert not (tmp_path / "none").exists()


def test_rules_are_compared_from_the_command_line(home, tmp_path, capsys):
    (tmp_path / "small.yaml").write_text(to_yaml(small_config(home, methods=["iti"], controls=3)))
    out = tmp_path / "rules"
    flags = ["--rules", "probe", "gradient", "--k", "1", "--kind", "head", "--out", str(out)]
    assert cli.main(["heuristics", str(tmp_path / "small.yaml"), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["probe", "gradient"] and "of 3 as good, lead" in lines[0]
    with (out / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["probe", "gradient"] and rows[0]["controls anywhere"] == "3"
    assert 0 <= int(rows[0]["as good anywhere"]) <= 3
    assert [float(row["p_holm"]) for row in rows] == pytest.approx(holm([float(row["p"]) for row in rows]))
    assert (out / "compare.html").exists() and (out / "probe" / "report.html").exists()


@pytest.mark.parametrize(
    ("rules", "k", "changes", "message"),
    [
        (("probe",), 2, {}, "two or more rules"),
        (("probe", "probe"), 2, {}, "each once"),
        (("probe", "gradient"), 0, {}, "k of at least 1"),
        (("probe", "gradients"), 2, {}, "did you mean 'gradient'"),
        (("probe", "gradient"), 2, {"claim": "0.1"}, "leave claim"),
    ],
)
def test_what_cannot_be_compared(home, tmp_path, rules, k, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_heuristics(replace(small_config(home), **changes), tmp_path / "rules", rules, k, progress=False)
    assert not (tmp_path / "rules").exists()
