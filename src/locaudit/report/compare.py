"""Audits side by side: other models, claims or behaviours, and how many tests of a claim that makes.

An audit calls a claim SPECIFIC if it works and beats the places of each null that can test. The p of this is the
largest of their p-values (an intersection-union test). Over several audits, Holm's method corrects it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from locaudit.config import to_dict
from locaudit.config.settings import leaves
from locaudit.errors import RunFolderError
from locaudit.location import short_location
from locaudit.report import check_free
from locaudit.report.html import render
from locaudit.report.page_tables import make_table
from locaudit.report.run_charts import null_strip
from locaudit.report.style import require, score_title
from locaudit.report.tables import csv_text
from locaudit.stats import holm
from locaudit.stats.phrases import where
from locaudit.stats.verdict import MethodVerdict
from locaudit.store.files import write_atomically
from locaudit.store.run import Run, load_run

_NOT_COMPARED = ("registered", "plugins", "executor", "tracker", "loading", "ray", "claim", "model", "behaviour")
"""Beginnings of settings that are not listed as differences: they change no result, or have a column."""
TITLES = {"edited": "at the claim", "p_gain": "p of the gain", "p": "p (largest)", "p_holm": "p (Holm)"}


@dataclass(frozen=True, eq=False)
class Comparison:
    """Several runs, each with its own verdict by its main method."""

    runs: Mapping[str, Run]
    """Name -> run."""

    @cached_property
    def verdicts(self) -> Mapping[str, MethodVerdict]:
        """Name -> verdict of the main method, of runs that have one."""
        found = {name: run.verdict for name, run in self.runs.items()}
        return {name: v.methods[v.main] for name, v in found.items() if v.main}

    @cached_property
    def p_values(self) -> Mapping[str, tuple[float, float]]:
        """Name -> the largest p behind SPECIFIC, and the same corrected by Holm's method over all runs."""
        own = [max(v.effect_p, *(x.p_value for x in v.deciding.values())) for v in self.verdicts.values()]
        return dict(zip(self.verdicts, zip(own, holm(own), strict=True), strict=True))

    @property
    def level(self) -> float:
        """The level, which is the same in all runs."""
        return next(iter(self.runs.values())).config.level

    @property
    def asked(self) -> Mapping[str, str]:
        """Name -> question in words, of all runs."""
        return {q.name: q.asked for v in self.verdicts.values() for q in v.questions}

    @cached_property
    def differences(self) -> Mapping[str, tuple[str, ...]]:
        """Setting -> its value in each run, for settings that differ and have no column of their own."""
        found = differing([dict(leaves(to_dict(run.config))) for run in self.runs.values()])
        return {name: row for name, row in found.items() if not name.startswith(_NOT_COMPARED)}

    @property
    def multiplicity(self) -> str:
        """How many tests there are, in words."""
        n, nulls = len(self.verdicts), sum(len(v.nulls) for v in self.verdicts.values())
        return (
            f"{n} claims are tested here against {nulls} nulls in all. Each audit errs at level {self.level:g} alone: "
            f"of {n} claims that are places like any other, up to {n * self.level:.2g} would be called SPECIFIC. "
            f"p (Holm) corrects the largest p of each audit for all {n}; outcomes are not corrected."
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row per run (`run_row`), with its largest p and the corrected one."""
        nulls = dict.fromkeys(null for v in self.verdicts.values() for null in v.nulls)
        for name, v in self.verdicts.items():
            p, p_holm = self.p_values[name]
            yield {"run": name, **run_row(self.runs[name], v, nulls), "p": p, "p_holm": p_holm}

    def __repr__(self) -> str:
        return "\n".join(f"{name}: {v.outcome} (p = {self.p_values[name][0]:.3f})" for name, v in self.verdicts.items())


def differing(values: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Name -> its value in each of the mappings, where they differ."""
    found = {name: tuple(str(one.get(name, "-")) for one in values) for one in values for name in one}
    return {name: row for name, row in found.items() if len(set(row)) > 1}


def run_row(run: Run, v: MethodVerdict, nulls: Iterable[str]) -> dict[str, Any]:
    """A method of a run as a row: what was audited, outcome, estimates with intervals, and p against each null."""
    row: dict[str, Any] = {
        "model": run.manifest.model, "behaviour": run.manifest.behaviour,
        "claim": short_location(str(run.manifest.claim)), "score": score_title(run.verdict.score),
        "method": v.title, "outcome": v.outcome, "base": v.base, "edited": v.claim, "gain": v.effect,
        "gain_low": v.effect_interval[0], "gain_high": v.effect_interval[1], "p_gain": v.effect_p,
    }  # fmt: skip
    for null in nulls:
        x = v.nulls.get(null)
        keys = (f"mean control{where(null)}", f"lead {null}", f"lead {null}_low", f"lead {null}_high", f"p {null}",
                f"as good {null}", f"controls {null}")  # fmt: skip
        values = (v.claim - x.lead, x.lead, *x.lead_interval, x.p_value, x.n_at_least, x.n_used) if x else [None] * 7
        row |= zip(keys, values, strict=True)
    return row


def compare_runs(folders: Sequence[str | Path], **settings: Any) -> Comparison:
    """Read runs to be compared. `settings` are those of `Run.read_with`.

    Raises `RunFolderError` for fewer than two runs, a folder given twice, a run whose claim is not scored, or runs with
    different levels.
    """
    if len({Path(folder).resolve() for folder in folders}) < max(2, len(folders)):
        raise RunFolderError(
            got=f"{', '.join(map(str, folders)) or 'no run'}",
            expected="two or more run folders, each of them once",
            remedy="name the folders of the audits to compare",
        )
    names = [Path(folder).resolve() for folder in folders]
    start = os.path.commonpath([name.parent for name in names])
    runs = {os.path.relpath(name, start): load_run(name).read_with(**settings) for name in names}
    unscored = [name for name, run in runs.items() if not run.verdict.main]
    if unscored:
        raise RunFolderError(
            got=f"{', '.join(unscored)} without a score at the claim",
            expected="runs whose claim is scored",
            remedy="continue these audits, or leave them out",
        )
    if len(levels := {run.config.level for run in runs.values()}) > 1:
        raise RunFolderError(
            got=f"runs with the levels {', '.join(f'{x:g}' for x in sorted(levels))}",
            expected="one level",
            remedy="choose it with --level",
        )
    return Comparison(runs)


def write_comparison(folders: Sequence[str | Path], out: str | Path, **settings: Any) -> tuple[Path, Comparison]:
    """Write compare.html and compare.csv into the folder `out`; returns the page and its content.

    Raises the errors of `compare_runs`, and `RunFolderError` if `out` holds a run or cannot be written to.
    """
    found, target = compare_runs(folders, **settings), Path(out)
    check_free(target)
    target.mkdir(parents=True, exist_ok=True)
    rows = list(found.rows())
    write_atomically(target / "compare.csv", csv_text(rows).encode())
    markup = require("markupsafe").Markup
    pages = {name: os.path.relpath(run.folder / "report.html", target) for name, run in found.runs.items()
             if (run.folder / "report.html").is_file()}  # fmt: skip
    page = render(
        "report/compare.html",
        {"tables": {"compare": make_table("Numbers", rows, TITLES, filters=("model", "behaviour", "outcome"))}},
        found=found,
        figures={name: markup(null_strip(run.verdict, run.manifest)) for name, run in found.runs.items()},
        pages=pages,
        sections={"compare": "Compare", "numbers": "Numbers"},
    )
    write_atomically(target / "compare.html", page.encode())
    return target / "compare.html", found
