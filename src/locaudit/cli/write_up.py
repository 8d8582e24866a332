"""``locaudit table``: a run's verdict for a paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from locaudit.cli.commands import read_flags


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
