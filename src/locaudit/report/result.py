"""`AuditResult`: an audit in Python, with its verdict, its trials as tables, and its report on request."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from locaudit.records import TrialRecord
from locaudit.report import write_report
from locaudit.report.design import read_verdict
from locaudit.report.frames import answers_frame, scores_frame, specification_frame, trials_frame
from locaudit.report.plots import Plots
from locaudit.report.tables import Tables, reading_words, tabulate
from locaudit.stats.verdict import Verdict
from locaudit.store.run import Run, load_run

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class AuditResult:
    """The result of an audit: verdict, trials and tables of them. Made by `audit` and `read_result`.

        result = locaudit.read_result("runs/mine")
        result.verdict.methods["optimal"].nulls["anywhere"].p_value
        result.trials().query("arm == 'control'")

    The run may be unfinished. In a notebook, a result is shown as a table.
    """

    run: Run
    """Settings, manifest, trials, questions and judgements."""

    @cached_property
    def verdict(self) -> Verdict:
        """The verdict, with the score, level and margin that the result was read with."""
        return read_verdict(self.run)

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
        """Path of the run's own page, which `audit` and `locaudit report` write. The page may not exist yet."""
        return self.folder / "report.html"

    def trials(self) -> DataFrame:
        """One row per trial: identity, test scores with intervals, drift, seconds. Needs the extra ``report``."""
        return trials_frame(self.tables)

    def specification(self) -> DataFrame:
        """One row per combination of score, strength, null, ... that the trials allow. Needs the extra ``report``."""
        return specification_frame(self.tables)

    def scores(self) -> DataFrame:
        """One row per trial, split, question and metric. Needs the extra ``report``."""
        return scores_frame(self.run)

    def answers(self) -> DataFrame:
        """One row per generated answer, with its judgements. Needs the extra ``report``."""
        return answers_frame(self.run)

    @property
    def plot(self) -> Plots:
        """Figures of the run: ``result.plot.null()``. Need the extra ``notebook``."""
        return Plots(self.tables)

    def write_report(self, out: str | Path | None = None) -> Path:
        """Write report.html, verdict.json, trials.csv and specification.csv; returns the page's path.

        They are written to the folder `out` or, if None, to the run folder. If the result was read with another score,
        level or margin than the run's, the default is ``reports/SCORE...`` in the run folder. Raises `RunFolderError`
        for an `out` that holds another run or study, and `LocauditError` without the extra ``report``.
        """
        return write_report(self.folder, self.tables, out=out)

    def __repr__(self) -> str:
        reading = f"\n  read with {reading_words(self.run.reading)}" if self.run.reading else ""
        return f"AuditResult({str(self.folder)!r}){reading}\n{self.verdict!r}"

    def _repr_html_(self) -> str:
        return self.run._repr_html_()

    @cached_property
    def tables(self) -> Tables:
        """Everything that a report shows, as rows of plain values."""
        return tabulate(self.run)


def read_result(
    folder: str | Path,
    score: str | None = None,
    level: float | None = None,
    margin: float | None = None,
    labels: str | Path | None = None,
) -> AuditResult:
    """Read the result of an audit from its run folder. Writes nothing and loads no model.

        result = locaudit.read_result("runs/mine", score="mc1", level=0.01)

    `score`, `level` and `margin` replace those of the run; None keeps them. The trials stay the same. `labels` is a
    file of trusted labels of the run's answers: ``result.run.corrected`` then has the scores corrected by them.

    Raises `RunFolderError` for a folder that is not a run or has no scores of the unedited model yet. Raises
    `ConfigError` for a score that the run does not have, or a level or margin out of range, and `DataError`
    for labels that cannot be used.
    """
    result = AuditResult(load_run(folder).read_with(score, level, margin, labels))
    _ = result.verdict  # computed now, so that a run without scores is refused here
    return result
