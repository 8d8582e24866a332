"""A finished (or unfinished) audit in Python: its verdict, its trials as tables, and its report when asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from locaudit.records import TrialRecord
from locaudit.report import write_report
from locaudit.report.frames import answers_frame, scores_frame, trials_frame
from locaudit.report.tables import Tables, reading_words, tabulate
from locaudit.stats.verdict import Verdict
from locaudit.store.run import Run, load_run

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class AuditResult:
    """What a run folder says: the verdict, the trials behind it, and tables of them. Made by `audit`, `read_result`."""

    run: Run
    """Settings, manifest, trials, questions and judgements."""

    @property
    def verdict(self) -> Verdict:
        """The verdict by the score, level and margin of this reading."""
        return self.run.verdict

    @property
    def records(self) -> tuple[TrialRecord, ...]:
        """The trials, with the judged scores of their answers."""
        return tuple(self.run.records)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run.folder

    @property
    def report(self) -> Path:
        """The run's own page, which `audit` and `locaudit report` write."""
        return self.folder / "report.html"

    def trials(self) -> DataFrame:
        """One row per trial: identity, test scores with intervals, drift, seconds. Needs the extra ``report``."""
        return trials_frame(self.tables)

    def scores(self) -> DataFrame:
        """One row per trial, split, question and metric. Needs the extra ``report``."""
        return scores_frame(self.run)

    def answers(self) -> DataFrame:
        """One row per answer, with its judgements. Needs the extra ``report``."""
        return answers_frame(self.run)

    def write_report(self, out: str | Path | None = None) -> Path:
        """Write report.html, verdict.json, trials.csv and figures/; returns the page.

        `out` None: the run folder, or ``reports/SCORE...`` in it for a score, level or margin that is not the run's.
        Raises `RunFolderError` for an `out` that is a run folder itself.
        """
        return write_report(self.folder, self.tables, out=out)

    def __repr__(self) -> str:
        reading = f"\n  read with {reading_words(self.run.reading)}" if self.run.reading else ""
        return f"AuditResult({str(self.folder)!r}){reading}\n{self.verdict!r}"

    def _repr_html_(self) -> str:
        return self.run._repr_html_()

    @cached_property
    def tables(self) -> Tables:
        """All that a report shows."""
        return tabulate(self.run)


def read_result(
    folder: str | Path, score: str | None = None, level: float | None = None, margin: float | None = None
) -> AuditResult:
    """Read a run folder, by another score, level or margin if given; writes nothing and loads no model.

    Raises `RunFolderError` for a folder that is no run or has no scores yet, `ConfigError` for a score that the run
    does not have.
    """
    result = AuditResult(load_run(folder).read_with(score, level, margin))
    _ = result.verdict  # computed now, so that a run without scores is refused here
    return result
