"""Write the report of a run folder: verdict, trials and an HTML page. No model is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from locaudit.config import to_yaml
from locaudit.errors import RunFolderError
from locaudit.report.html import render
from locaudit.report.page import hardly_moved, page_data, sections
from locaudit.report.run_charts import UNJUDGED, null_strip
from locaudit.report.style import require
from locaudit.report.tables import Tables, read_tables
from locaudit.store.files import write_atomically

__all__ = ["Tables", "read_tables", "require_report_extra", "write_report"]


def require_report_extra() -> None:
    """Raise `LocauditError` if the extra `report` is not installed. Called before trials, which may take hours."""
    for module in ("matplotlib", "jinja2"):
        require(module)


def report_folder(folder: Path, out: str | Path | None, score: str, reading: Mapping[str, tuple[Any, Any]]) -> Path:
    """The folder that a report is written to; it is created if needed.

    The folder is `out` or, if None, the run's own folder. If the run is read with another score, level or margin
    (`Run.reading`), or with labels, the default is ``reports/SCORE...`` in the run's folder. Raises `RunFolderError` if
    another run, study or set of repeats has its own report there, or if the folder cannot be written to.
    """
    named = [name if name == "labels" else f"{name}-{x:g}" for name, (_, x) in reading.items() if name != "score"]
    default = folder / "reports" / "-".join([score, *named]) if reading else folder
    target = default if out is None else Path(out)
    is_own = not reading and target.resolve() == folder.resolve()
    check_free(target, is_own=is_own, remedy=f"choose another --out, or leave out --out to write to {default}")
    target.mkdir(parents=True, exist_ok=True)
    return target


def check_free(target: Path, *, is_own: bool = False, remedy: str = "choose another --out") -> None:
    """Raise `RunFolderError` if a report must not or cannot be written to a folder.

    It must not if a run, a study or repeats have their own report there, unless it `is_own`.
    """
    if not is_own and any((target / file).is_file() for file in ("config.yaml", "paper.yaml", "repeats.json")):
        raise RunFolderError(
            got=f"{target} as the folder of a report, which holds another run, study or repeats",
            expected="another folder, so that their own report is not overwritten",
            remedy=remedy,
        )
    there = next(path for path in (target, *target.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RunFolderError(
            got=f"{target} as the folder of a report, which cannot be written to",
            expected="a folder with write permission; the run itself is only read",
            remedy="choose another --out",
        )


def write_report(folder: str | Path, tables: Tables | None = None, *, out: str | Path | None = None) -> Path:
    """Write verdict.json, trials.csv, specification.csv and report.html of a run; returns the page's path.

    They are written to `out` or, if None, to the run folder. `tables` has the run's content, if it was read before. If
    it was read with another score, level or margin than the run's, or with labels (`Run.read_with`), the default is
    ``reports/SCORE...`` in the run folder. The page of an unfinished run begins with what is missing.

    Raises `RunFolderError` for a folder that is not a run or has no scores of the unedited model, and for an `out` that
    has another report. Without the extra `report`, raises `LocauditError` after writing verdict.json and the CSV files.
    """
    tables = tables or read_tables(folder)
    labels = {} if tables.corrected is None else {"labels": (None, tables.corrected.file)}
    folder = report_folder(Path(folder), out, tables.verdict.score, {**tables.reading, **labels})
    write_atomically(folder / "verdict.json", tables.verdict_json().encode())
    write_atomically(folder / "trials.csv", tables.trials_csv().encode())
    if tables.specification.rows:
        write_atomically(folder / "specification.csv", tables.specification_csv().encode())
    data = page_data(tables)
    page = render(
        "report/template.html",
        data,
        t=tables,
        verdict=tables.verdict,
        config=tables.config,
        run=tables.manifest,
        sections=sections(data),
        figure=require("markupsafe").Markup(null_strip(tables.verdict, tables.manifest)),
        moved=hardly_moved(tables),
        kind=tables.manifest.kind_plural.removesuffix("s"),
        unjudged=UNJUDGED,
        yaml=to_yaml(tables.config),
    )
    path = folder / "report.html"
    write_atomically(path, page.encode())
    return path
