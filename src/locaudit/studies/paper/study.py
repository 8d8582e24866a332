"""The audits of a study as read from their run folders, and the trials that validation chose in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locaudit.config import read_over, unknown_names_kept
from locaudit.errors import RunFolderError
from locaudit.records import TrialRecord
from locaudit.report.tables import Tables, tabulate
from locaudit.stats import components, differ_too_little, mean_score, score_values, select
from locaudit.store.folder import has_trials
from locaudit.store.run import Run, load_run
from locaudit.studies.paper.config import PaperConfig, Part

SETTINGS = "paper.yaml"
"""File in the study's folder that holds its settings, and marks the folder as a study's."""
SCORE = "info_truth"
"""What the paper compares."""


@dataclass(frozen=True)
class Study:
    """The paper's study: settings and audits. Those that were not run are absent."""

    config: PaperConfig
    audits: Mapping[Part, Tables]

    @property
    def sets(self) -> Tables:
        """Probed heads against random sets of heads."""
        return self.audits["sets"]


@dataclass(frozen=True, eq=False)
class Chosen:
    """The edits of a method that validation chose by a score, and their test scores question by question."""

    audit: Tables
    method: str
    score: str = SCORE

    @cached_property
    def records(self) -> Mapping[Any, TrialRecord | None]:
        """By place (arm, number); None where every edit diverged."""
        found: Mapping[Any, Any] = select([row.record for row in self.audit.rows], self.score)
        return found.get(self.method, {})

    @property
    def random(self) -> list[TrialRecord | None]:
        """At the random places, by number."""
        return [record for (arm, _), record in sorted(self.records.items()) if arm == "control"]

    def values(self, record: TrialRecord | None) -> NDArray[np.float64]:
        """The score's components, (components, questions); NaN for no record."""
        names = components(self.score)
        if record is None:
            return np.full((len(names), len(self.audit.base.record.questions["test"][names[0]])), np.nan)
        return score_values(record.questions["test"], self.score)

    def at(self, arm: str) -> NDArray[np.float64]:
        """Values at the claim (the localized heads) or of the whole model; of the unedited model for ``base``."""
        return self.values(self.audit.base.record if arm == "base" else self.records[arm, -1])

    def mean(self, record: TrialRecord | None) -> float:
        """The score on the test questions."""
        return float(mean_score(self.values(record)))

    def few(self, margin: float) -> bool:
        """Whether too few questions tell the localized heads from the random places."""
        return differ_too_little(self.at("claim"), [self.values(record) for record in self.random], margin)


def is_study(folder: str | Path) -> bool:
    """Whether the folder is one of ``locaudit paper``."""
    return (Path(folder) / SETTINGS).is_file()


def read_study(folder: str | Path) -> Study:
    """Read a study's folder. Raises `RunFolderError` if it holds none, or one with trials or judgements missing."""
    folder = Path(folder)
    if not is_study(folder):
        raise RunFolderError(
            got=f"{folder} without {SETTINGS}", expected="a folder of locaudit paper", remedy="name its --out"
        )
    with unknown_names_kept():  # a study of an earlier version can be read
        config = read_over(PaperConfig(), folder / SETTINGS)
    audits: dict[Part, Tables] = {part: tabulate(_finished(folder / part)) for part in config.audits()}
    if any(audit.judges != audits["sets"].judges for audit in audits.values()):
        raise RunFolderError(
            got=f"{folder}, whose parts were judged by different judges",
            expected="the same judges of Truth and Info in all",
            remedy="run the locaudit paper command with the judges that you want again",
        )
    return Study(config, audits)


def _finished(folder: Path) -> Run:
    """A part's run; `RunFolderError` if it lacks trials or judgements."""
    run = load_run(folder) if has_trials(folder) else None
    if run is not None and run.is_finished:
        return run
    lacks = "no trials" if run is None else f"{len(run.trials)} of {run.manifest.planned} trials"
    if run is not None and run.n_unjudged:
        lacks += f" and {run.n_unjudged} answers that were not judged"
    raise RunFolderError(
        got=f"{folder} with {lacks}",
        expected="a finished study",
        remedy="run the same locaudit paper command again: finished trials are kept",
    )
