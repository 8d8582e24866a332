"""The report of a study: numbers.json, claims, figures, tables and paper.html, from records and statistics alone."""

from __future__ import annotations

import json
from pathlib import Path

from locaudit.records import json_text
from locaudit.report import write_report
from locaudit.report.style import save
from locaudit.store import write_atomically
from locaudit.studies.paper.claims import judge_claims
from locaudit.studies.paper.measures import measure
from locaudit.studies.paper.page import render_paper
from locaudit.studies.paper.panels import panels
from locaudit.studies.paper.study import is_study, read_study
from locaudit.studies.paper.tables import tables

__all__ = ["is_study", "write_paper"]


def write_paper(folder: str | Path) -> Path:
    """Write numbers.json, figures/, tables/ and paper.html of a finished study, and its audits' reports.

    Returns the path of paper.html. Raises `RunFolderError` if trials are missing.
    """
    folder = Path(folder)
    study = read_study(folder)
    measured = measure(study)
    claims = judge_claims(measured)
    text = json_text({**measured, "claims": claims}, indent=1)
    write_atomically(folder / "numbers.json", text.encode())
    numbers = json.loads(text)  # figures and page show what the file says
    for name, rows in tables(numbers, claims).items():
        (folder / "tables").mkdir(exist_ok=True)
        write_atomically(folder / "tables" / name, rows.encode())
    drawn = [(panel, save(panel.draw(), folder / "figures", panel.name, pdf=True)) for panel in panels(numbers)]
    for part in study.audits:
        write_report(folder / part)
    path = folder / "paper.html"
    write_atomically(path, render_paper(numbers, drawn, study.config, list(study.audits)).encode())
    return path
