"""Write the report of the paper's study: numbers.json, figures, tables, claims and paper.html. Runs no model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from locaudit.config import to_yaml
from locaudit.records import json_text
from locaudit.report import write_report
from locaudit.report.html import render
from locaudit.report.page_tables import make_table
from locaudit.report.style import require
from locaudit.store.files import write_atomically
from locaudit.studies.paper.claims import judge_claims
from locaudit.studies.paper.config import describe_part
from locaudit.studies.paper.figures import draw_study, page_charts, specification_grid
from locaudit.studies.paper.measures import measure
from locaudit.studies.paper.specification import specify, summarise
from locaudit.studies.paper.study import Study, is_study, read_study
from locaudit.studies.paper.tables import tables

__all__ = ["is_study", "write_paper"]


SECTIONS = {
    "claims": "Claims", "setup": "Setup", "random": "Random sets", "single": "Single heads", "special": "Probed heads",
}  # fmt: skip


def _row(claim: Mapping[str, Any]) -> dict[str, Any]:
    keys = "name", "says", "estimand", "measured", "p_holm", "outcome", "open", "size", "flags", "rule"
    return {key: claim.get(key) for key in keys}


def numbers_text(study: Study, rows: list[dict[str, Any]]) -> str:
    """What numbers.json says; `rows` are those of `specify`."""
    return json_text({**measure(study), "claims": judge_claims(study), "specification": summarise(rows)}, indent=1)


def write_paper(folder: str | Path) -> Path:
    """Write numbers.json, figures/, tables/ and paper.html of a finished study, and the report of each of its audits.

    Returns the path of paper.html. Raises `RunFolderError` if trials or judgements are missing.
    """
    folder = Path(folder)
    study = read_study(folder)
    rows = specify(study)
    text = numbers_text(study, rows)
    write_atomically(folder / "numbers.json", text.encode())
    numbers = json.loads(text)  # figures and page show exactly what the file says
    (folder / "tables").mkdir(exist_ok=True)
    for name, text in tables(numbers, rows).items():
        write_atomically(folder / "tables" / name, text.encode())
    for part, audit in study.audits.items():
        write_report(folder / part, audit)
    draw_study(numbers, rows, folder / "figures")
    strips, charts = page_charts(numbers)
    columns, choices = specification_grid(numbers["claims"], rows)
    page = render(
        "studies/paper/paper.html",
        {
            "charts": charts,
            "tables": {"claims": make_table("Claims", [_row(claim) for claim in numbers["claims"]])},
        },
        n=numbers,
        strips={name: require("markupsafe").Markup(svg) for name, svg in strips.items()},
        columns=columns,
        choices=choices,
        sections=SECTIONS,
        parts={part: describe_part(part) for part in study.audits},
        yaml=to_yaml(study.config),
    )
    path = folder / "paper.html"
    write_atomically(path, page.encode())
    return path
