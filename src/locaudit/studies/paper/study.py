"""Read the audits of a study from their run folders, and pick the trials that were chosen on validation questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from locaudit.config import read_over, unknown_names_kept
from locaudit.errors import RunFolderError
from locaudit.records import Arm, Place, TrialRecord
from locaudit.report.tables import Tables, tabulate
from locaudit.stats import components, mean_score, score_values
from locaudit.stats.scores import tolerance
from locaudit.stats.selection import choose, group_trials
from locaudit.store.folder import has_trials
from locaudit.store.run import Run, load_run
from locaudit.studies.paper.config import PaperConfig, Part
from locaudit.text import plural

SETTINGS = "paper.yaml"
"""File with the study's settings. It also marks a folder as that of a study."""
SCORE = "info_truth"
"""The score that the paper compares."""


@dataclass(frozen=True)
class Study:
    """The paper's study: settings, and the audits that were run."""

    config: PaperConfig
    audits: Mapping[Part, Tables]

    @property
    def sets(self) -> Tables:
        """The audit of the probed heads against random sets of heads."""
        return self.audits["sets"]


@dataclass(frozen=True, eq=False)
class Chosen:
    """The edits of a method that validation questions chose by a score, and their values at each test question."""

    audit: Tables
    method: str
    margin: float = 0.0
    """Equivalence margin of the comparisons, in the score's units."""
    score: str = SCORE

    @property
    def tolerance(self) -> float:
        """Scores that differ by less are ties."""
        return tolerance(self.score, self.audit.manifest.dtype)

    @cached_property
    def trials(self) -> Mapping[Place, Sequence[TrialRecord]]:
        """Place -> its trials. Places are sorted: the probed heads, then the random places by number."""
        return group_trials(row.record for row in self.audit.rows)[self.method]

    @cached_property
    def records(self) -> Mapping[Place, TrialRecord | None]:
        """Place -> chosen trial; None if every edit there diverged."""
        return {place: choose(trials, self.score, self.tolerance) for place, trials in self.trials.items()}

    @property
    def random(self) -> list[TrialRecord | None]:
        """The chosen trials at the random places, by number; None if every edit there diverged."""
        return [record for place, record in self.records.items() if place.arm == "control"]

    def values(self, record: TrialRecord | None) -> NDArray[np.float64]:
        """The score's components at the test questions, (components, questions). All are NaN if `record` is None."""
        names = components(self.score)
        if record is None:
            return np.full((len(names), len(self.audit.base.record.questions["test"][names[0]])), np.nan)
        return score_values(record.questions["test"], self.score)

    def at(self, arm: Arm) -> NDArray[np.float64]:
        """Values at an arm: ``claim`` (the probed heads), ``whole`` or ``base`` (the unedited model)."""
        return self.values(self.audit.base.record if arm == "base" else self.records[Place(arm)])

    def mean(self, record: TrialRecord | None) -> float:
        """The score on the test questions."""
        return float(mean_score(self.values(record)))


def is_study(folder: str | Path) -> bool:
    """Whether the folder was made by ``locaudit paper``."""
    return (Path(folder) / SETTINGS).is_file()


def read_study(folder: str | Path) -> Study:
    """Read a finished study. Raises `RunFolderError` if the folder has none, or if trials or judgements are missing."""
    folder = Path(folder)
    if not is_study(folder):
        raise RunFolderError(
            got=f"{folder} without {SETTINGS}",
            expected="a folder made by locaudit paper",
            remedy="give the folder that locaudit paper got as --out",
        )
    with unknown_names_kept():  # a study of an earlier version can be read
        config = read_over(PaperConfig(), folder / SETTINGS)
    audits: dict[Part, Tables] = {part: tabulate(_finished(folder / part)) for part in config.audits()}
    if any(audit.judges != audits["sets"].judges for audit in audits.values()):
        raise RunFolderError(
            got=f"{folder}, whose parts were judged by different judges",
            expected="the same judges of Truth and Info in all",
            remedy="run the locaudit paper command again with the judges that you want",
        )
    return Study(config, audits)


def _finished(folder: Path) -> Run:
    """The run of one audit. Raises `RunFolderError` if trials or judgements are missing."""
    run = load_run(folder) if has_trials(folder) else None
    if run is not None and run.is_finished:
        return run
    lacks = "no trials" if run is None else f"{len(run.trials)} of {run.manifest.planned} trials"
    if run is not None and run.n_unjudged:
        lacks += f" and {plural(run.n_unjudged, 'answer')} not judged"
    raise RunFolderError(
        got=f"{folder} with {lacks}",
        expected="a finished study",
        remedy="run the same locaudit paper command again: finished trials are kept",
    )
