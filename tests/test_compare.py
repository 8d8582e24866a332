"""Audits side by side: what differs, how many tests there are, and what is refused."""

import csv
import math
from dataclasses import replace

import pytest

from locaudit import cli
from locaudit.config import AuditConfig
from locaudit.errors import RunFolderError
from locaudit.report import write_report
from locaudit.report.compare import compare_runs, write_comparison
from locaudit.stats import holm
from pages import data_of, rows_of, words
from test_report import FULL, MANIFEST, SILENT, make_run, trial, trials


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three runs: one claim that stands out, one that does not, and one of another model with another setting."""
    home = tmp_path_factory.mktemp("runs")
    weak = [
        r if r.spec.arm != "claim" else trial("claim", r.spec.method, r.spec.hyperparameter, gain=0.05) for r in FULL
    ]
    other, config = replace(MANIFEST, model="<b>other</b>"), AuditConfig(controls=19, seed=7, evaluation=SILENT)
    return [
        make_run(home / "strong", FULL),
        make_run(home / "weak", weak),
        make_run(home / "deep" / "other", FULL, manifest=other, config=config),
    ]


def test_each_p_is_the_largest_of_an_audit_and_corrected_for_all(folders, tmp_path):
    page, found = write_comparison(folders, tmp_path / "out", margin=0.2)
    assert list(found.runs) == ["strong", "weak", "deep/other"]
    for name, v in found.verdicts.items():
        null = v.nulls["anywhere"]
        assert found.p_values[name][0] == max(v.effect_p, null.p_value) and v.method == "optimal"
    own = [p for p, _ in found.p_values.values()]
    assert [p for _, p in found.p_values.values()] == holm(own)
    assert own[0] == own[2] == 0.05 < own[1] and found.p_values["strong"][1] == pytest.approx(0.15)
    assert "3 claims are tested here against 3 nulls" in found.multiplicity
    assert "up to 0.15 would be called SPECIFIC" in found.multiplicity
    assert found.differences == {"seed": ("0", "0", "7")}
    text = page.read_text()
    rows = rows_of(data_of(text), "compare")
    assert [row["outcome"] for row in rows] == [v.outcome for v in found.verdicts.values()]
    for row, (name, v) in zip(rows, found.verdicts.items(), strict=True):
        assert (row["run"], row["gain"], row["lead anywhere"]) == (name, v.effect, v.nulls["anywhere"].lead)
        assert (row["p"], row["p_holm"]) == found.p_values[name]
    with (tmp_path / "out" / "compare.csv").open(newline="") as file:
        assert [float(row["p_holm"]) for row in csv.DictReader(file)] == holm(own)
    shown = words(text)
    assert "<b>other" not in shown and "&lt;b&gt;other" in shown and "3 claims are tested" in shown
    assert text.count('<svg class="strip"') == 3 and "href=" not in shown.split("<main>")[1]


def test_audits_with_a_report_are_linked(folders, tmp_path):
    write_report(folders[0])
    page, _ = write_comparison(folders[:2], tmp_path / "here")
    (folders[0] / "report.html").unlink()
    links = [part.split('"')[0] for part in page.read_text().split("<main>")[1].split('<a href="')[1:]]
    assert [(page.parent / link).resolve() for link in links] == [folders[0] / "report.html"]


def test_runs_are_compared_from_the_command_line(folders, tmp_path, capsys):
    out = tmp_path / "side"
    assert cli.main(["compare", *map(str, folders), "--out", str(out), "--score", "mc1"]) == 0
    said = capsys.readouterr().out
    assert "strong" in said and "deep/other" in said and "Holm" in said and str(out / "compare.html") in said
    assert {row["score"] for row in rows_of(data_of((out / "compare.html").read_text()), "compare")} == {"MC1"}


def test_what_cannot_be_compared(folders, tmp_path, capsys):
    with pytest.raises(RunFolderError, match="two or more run folders"):
        compare_runs(folders[:1])
    with pytest.raises(RunFolderError, match="each of them once"):
        compare_runs([folders[0], folders[0]])
    with pytest.raises(RunFolderError, match="not a run folder"):
        compare_runs([folders[0], tmp_path])
    empty = make_run(tmp_path / "empty", FULL[:1])
    with pytest.raises(RunFolderError, match="without a score at the claim"):
        compare_runs([folders[0], empty])
    strict = make_run(tmp_path / "strict", FULL, config=AuditConfig(controls=19, level=0.1, evaluation=SILENT))
    with pytest.raises(RunFolderError, match="levels 0.05, 0.1; .*choose it with .level"):
        compare_runs([folders[0], strict])
    assert len(compare_runs([folders[0], strict], level=0.1).runs) == 2
    with pytest.raises(RunFolderError, match="own report is not overwritten"):
        write_comparison(folders, folders[0])
    assert cli.main(["compare"]) == 2 and "no run" in capsys.readouterr().err


def test_claims_that_diverged_have_the_largest_p(folders, tmp_path):
    records = [FULL[0], trial("claim", "optimal", 1.0, status="diverged"), *trials("optimal")[2:]]
    methods = {"optimal": MANIFEST.methods["optimal"]}
    lost = make_run(tmp_path / "lost", records, manifest=replace(MANIFEST, methods=methods))
    page, found = write_comparison([folders[0], lost], tmp_path / "out")
    assert [pair for name, pair in found.p_values.items() if name.endswith("lost")] == [(1.0, 1.0)]
    rows = rows_of(data_of(page.read_text()), "compare")  # which has no NaN
    assert rows[1]["gain"] is None and math.isfinite(rows[0]["gain"])
