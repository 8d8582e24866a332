"""The report of a run folder: verdict, trials, figures and one HTML page, from records and statistics alone."""

from __future__ import annotations

from pathlib import Path

from locaudit.config import to_yaml
from locaudit.report.answers import N_OPEN
from locaudit.report.drawings import UNJUDGED, draw_all
from locaudit.report.html import render
from locaudit.report.style import require
from locaudit.report.tables import Tables, read_tables
from locaudit.stats.grades import conclusion
from locaudit.store.files import write_atomically

__all__ = ["Tables", "read_tables", "require_report_extra", "write_report"]


def require_report_extra() -> None:
    """Raise `LocauditError` now, not after hours of trials, when the extra `report` is not installed."""
    for module in ("matplotlib", "jinja2"):
        require(module)


def write_report(folder: str | Path, tables: Tables | None = None) -> Path:
    """Write verdict.json, trials.csv, figures/ and report.html of a run folder; returns the page's path.

    Works on an unfinished run: the page then says first what is missing. `tables` spares reading the folder again.
    Raises `RunFolderError` for a folder that is no run or has no scores of the unedited model, `LocauditError` without
    the extra `report` (verdict.json and trials.csv are there even then).
    """
    folder, tables = Path(folder), tables or read_tables(folder)
    write_atomically(folder / "verdict.json", tables.verdict_json().encode())
    write_atomically(folder / "trials.csv", tables.trials_csv().encode())
    page = render(
        "report/template.html",
        t=tables,
        verdict=tables.verdict,
        config=tables.config,
        run=tables.manifest,
        drawings=draw_all(tables, folder / "figures"),
        kind=tables.manifest.kind_plural.removesuffix("s"),
        unjudged=UNJUDGED,
        conclusion=conclusion,
        n_open=N_OPEN,
        yaml=to_yaml(tables.config),
    )
    path = folder / "report.html"
    write_atomically(path, page.encode())
    return path
