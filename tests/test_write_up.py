"""A run's verdict as a table for a paper."""

from __future__ import annotations

import re

import pytest

from locaudit import cli, read_result
from locaudit.run.audit import run_audit
from runs import small_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("write-up")
    run_audit(small_config(home, nulls=["anywhere", "layers"]), home / "run", progress=False)
    return home / "run"


def test_both_formats_have_the_verdicts_numbers(folder, capsys):
    verdict = read_result(folder).verdict
    texts = {}
    for form in ("latex", "markdown"):
        assert cli.main(["table", str(folder), "--format", form]) == 0
        texts[form] = capsys.readouterr().out
    for method in verdict.methods.values():
        for null in method.nulls.values():
            assert all(f"{null.n_at_least} of {null.n_used}" in text for text in texts.values())
        assert all(method.outcome in text and method.title in text for text in texts.values())
    latex = [line for line in texts["latex"].splitlines() if line.endswith(r"\\")]
    markdown = [line for line in texts["markdown"].splitlines() if line.startswith("|")]
    n_rows = sum(len(method.nulls) for method in verdict.methods.values())
    assert len(latex) == 1 + n_rows and {line.count("&") for line in latex} == {8}
    assert len(markdown) == 2 + n_rows and {line.count("|") for line in markdown} == {10}
    assert r"\toprule" in texts["latex"] and texts["latex"].count("{tabular}") == 2


def test_the_paragraph_says_what_was_done_and_latex_is_escaped(folder, capsys):
    result = read_result(folder)
    cli.main(["table", str(folder)])
    said = capsys.readouterr().out.split("\n\n")[-1]
    for part in (
        str(result.tables.manifest.claim),
        "random sets of 2 heads",
        "in its layers",
        "held-out",
        result.verdict.headline,
    ):
        assert part in said.replace("\\", "")
    assert not re.search(r"(?<!\\)[%&_#$]", said)
    assert cli.main(["table", str(folder), "--score", "mc2", "--format", "markdown"]) == 0
    assert "MC2" in capsys.readouterr().out
    assert cli.main(["table", str(folder.parent)]) == 2
