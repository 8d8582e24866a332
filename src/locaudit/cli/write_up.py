"""``locaudit table`` and ``locaudit figures``: a run for a paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from locaudit.cli.commands import read_flags, say


@dataclass(frozen=True)
class _Table:
    folder: tyro.conf.Positional[Path]
    """Folder of a run."""
    format: Literal["latex", "markdown"] = "latex"
    """``latex`` needs the package booktabs."""
    score: str | None = None
    """Score that the verdict compares (None: the score of the run)."""


def table(arguments: Sequence[str]) -> None:
    """Parse ``locaudit table RUN [--format latex|markdown]`` and print the table and the paragraph."""
    words = "Print a run's verdict as a table, and a paragraph that says what was done, for a paper."
    command = read_flags(_Table, "locaudit table", words, arguments)
    from locaudit.report.result import read_result
    from locaudit.report.write_up import write_up

    print(write_up(read_result(command.folder, score=command.score).tables, command.format), end="")


@dataclass(frozen=True)
class _Figures:
    folder: tyro.conf.Positional[Path]
    """Folder of a run, or of repeats."""
    width: Literal["single", "double"] = "single"
    """As wide as one column of a paper (3.3 inches), or as two (6.9 inches)."""
    format: Literal["pdf", "svg", "png"] = "pdf"
    """Fonts are embedded in PDF; letters are outlines in SVG; PNG has 300 dots per inch."""
    out: Path | None = None
    """Folder for the files (None: ``figures`` in the run's folder or, for another score, in that of its report)."""
    score: str | None = None
    """Score that the verdict compares (None: the score of the run)."""


def figures(arguments: Sequence[str]) -> None:
    """Parse ``locaudit figures RUN`` and write the figures."""
    words = "Draw a run's figures for a paper: random places, effect against KL, strengths, probe accuracy and others."
    command = read_flags(_Figures, "locaudit figures", words, arguments)
    from locaudit.report import report_folder
    from locaudit.report.figures import WIDTHS, run_figures, write_figures
    from locaudit.report.repeats import read_repeats, repeats_figures
    from locaudit.report.result import read_result
    from locaudit.store.repeats import is_repeats

    folder, score = command.folder, command.score
    if is_repeats(folder):
        repeats = read_repeats(folder, score=score)
        charts, read_as = repeats_figures(repeats), (repeats.verdict.score, repeats.reading)
    else:
        result = read_result(folder, score=score)
        charts, read_as = run_figures(result.tables), (result.verdict.score, result.run.reading)
    out = command.out or report_folder(folder, None, *read_as) / "figures"
    for path in write_figures(charts, out, command.format, WIDTHS[command.width]):
        say(path)
