"""Read the audits of a study from their run folders, and pick the trials that were chosen on validation questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from locaudit.config import AuditConfig, read_over, unknown_names_kept
from locaudit.errors import RunFolderError
from locaudit.records import Arm, Place, TrialRecord
from locaudit.registry import METHODS
from locaudit.report.design import duration
from locaudit.report.tables import Tables, tabulate
from locaudit.stats import Design, components, mean_score, score_values
from locaudit.stats.intervals import pseudo_values
from locaudit.stats.optimisation import Flag, find_destroyed, find_flags
from locaudit.stats.scores import missing_share, tolerance
from locaudit.stats.selection import BASE, choose, group_trials
from locaudit.store.folder import has_trials
from locaudit.store.run import Run, load_run
from locaudit.studies.paper.config import PaperConfig, Part
from locaudit.studies.paper.registration import Registration, read_rules
from locaudit.text import plural

SETTINGS = "paper.yaml"
"""File with the study's settings. It also marks a folder as that of a study."""
Values = NDArray[np.float64]


class LackingError(Exception):
    """A part of the study that a claim needs has not been run; the text says what it takes."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """The edits of a method that validation questions chose by a score, and their values at each test question."""

    audit: Tables
    method: str
    score: str
    strength: float | None = None
    """Take the edit of this strength at every place; None: the one that validation questions choose there."""

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
        kept = {
            place: [x for x in trials if self.strength in (None, x.spec.hyperparameter)]
            for place, trials in self.trials.items()
        }
        return {place: choose(trials, self.score, self.tolerance) for place, trials in kept.items()}

    def places(self, null: str = "anywhere") -> list[Place]:
        """The random places of a null, by number."""
        return [place for place in self.records if (place.arm, place.null) == ("control", null)]

    @property
    def random(self) -> list[TrialRecord | None]:
        """The chosen trials at the random places, by number; None if every edit there diverged."""
        return [self.records[place] for place in self.places()]

    def values(self, record: TrialRecord | None) -> Values:
        """The score's components at the test questions, (components, questions). All are NaN if `record` is None."""
        names = components(self.score)
        if record is None:
            return np.full((len(names), len(self.audit.base.record.questions["test"][names[0]])), np.nan)
        return score_values(record.questions["test"], self.score)

    def psi(self, place: Place) -> Values:
        """Pseudo-values of the score at a place (`locaudit.stats.intervals`), (questions,); NaN without a score."""
        record = self.audit.base.record if place == BASE else self.records[place]
        return pseudo_values(self.values(record))

    def missing(self) -> float:
        """The largest share of missing judgements among the chosen edits and the unedited model."""
        records = [self.audit.base.record, *(x for x in self.records.values() if x is not None)]
        return max(missing_share(self.values(record)) for record in records)

    @cached_property
    def flags(self) -> tuple[Flag, ...]:
        """Signs that better edits exist than these (`locaudit.stats.optimisation`), by the strengths that were run."""
        records, manifest = [row.record for row in self.audit.rows], self.audit.manifest
        found = find_flags(records, manifest.methods, self.score, self.tolerance, Design().margin)
        return *found[self.method], *find_destroyed(records, (), self.score, self.tolerance)[self.method]

    def at(self, arm: Arm) -> TrialRecord | None:
        """The chosen trial at an arm: ``claim`` (the probed heads), ``whole`` or ``base`` (the unedited model)."""
        return self.audit.base.record if arm == "base" else self.records[Place(arm)]

    def mean(self, record: TrialRecord | None) -> float:
        """The score on the test questions."""
        return float(mean_score(self.values(record)))


@dataclass(frozen=True, eq=False)
class Study:
    """The paper's study: settings, rules, and the audits that were run."""

    config: PaperConfig
    audits: Mapping[Part, Tables]
    """The finished parts."""
    lacking: Mapping[Part, str]
    """The other parts -> what they take."""
    rules: Mapping[str, Any]
    """The claims and their rules (claims.yaml), as they were when the study began."""
    registration: Registration
    _chosen: dict[Any, Chosen] = field(default_factory=dict)

    @property
    def sets(self) -> Tables:
        """The audit of the probed heads against random sets of heads."""
        return self.audits["sets"]

    def chosen(self, part: Part, score: str, strength: float | None = None) -> Chosen:
        """The edits of a part. Raises `LackingError` if it was not run."""
        if part not in self.audits:
            raise LackingError(f"not run: {part} ({self.lacking[part]})")
        method = "iti" if part == "iti" else "optimal"
        key = part, score, strength
        return self._chosen.setdefault(key, Chosen(self.audits[part], method, score, strength))

    def heads(self, part: Part) -> list[tuple[tuple[int, ...], float, int]]:
        """(layer and head), probe accuracy and rank by it, from 1, at the claim and the random places of single heads.

        Heads of equal accuracy are ranked by layer, then by head.
        """
        audit = self.audits[part]
        assert audit.manifest.probes is not None
        accuracy = np.asarray(audit.manifest.probes.val_accuracy)
        ranks = rankdata(-accuracy, method="ordinal").reshape(accuracy.shape)
        found = [head_of(trials[0]) for trials in self.chosen(part, self.config.score).trials.values()]
        return [(at, float(accuracy[at]), int(ranks[at])) for at in found]


def head_of(record: TrialRecord) -> tuple[int, ...]:
    """(layer, head) of an edit of a single head."""
    assert record.spec.location is not None
    return tuple(map(int, record.spec.location.units[0]))


def is_study(folder: str | Path) -> bool:
    """Whether the folder was made by ``locaudit paper``."""
    return (Path(folder) / SETTINGS).is_file()


def read_study(folder: str | Path) -> Study:
    """Read a study whose first part, at least, is finished.

    Raises `RunFolderError` if it is not, if answers of a part are not judged, if parts have different judges, or if a
    part was run with other settings than the study's.
    """
    folder = Path(folder)
    if not is_study(folder):
        raise RunFolderError(
            got=f"{folder} without {SETTINGS}",
            expected="a folder made by locaudit paper",
            remedy="give the folder that locaudit paper got as --out",
        )
    with unknown_names_kept():  # a study of an earlier version can be read
        config = read_over(PaperConfig(), folder / SETTINGS)
    planned = config.audits()
    runs = {part: begun(folder / part) for part in planned}
    done = {part: run for part, run in runs.items() if run and _is_finished(run)}
    if "sets" not in done:
        raise _unfinished(folder / "sets", runs["sets"])
    audits = {part: tabulate(run) for part, run in done.items()}
    lacking = {part: need(planned[part], list(done.values()), runs[part]) for part in planned if part not in done}
    for part, run in done.items():
        if other := next((x for x in _SAME if getattr(run.config, x) != getattr(planned[part], x)), None):
            raise RunFolderError(
                got=f"{run.folder}, whose setting {other} differs from {SETTINGS}",
                expected="parts that were run with the settings of the study",
                remedy="restore the folder as locaudit paper left it, or run its command again with another --out",
            )
    if any(audit.manifest.judges != audits["sets"].manifest.judges for audit in audits.values()):
        raise RunFolderError(
            got=f"{folder}, whose parts were judged by different judges",
            expected="the same judges of Truth and Info in all",
            remedy="run the locaudit paper command again with the judges that you want",
        )
    return Study(config, audits, {part: describe_need(*x) for part, x in lacking.items()}, *read_rules(folder))


_SAME = "score", "seed", "training_seed", "methods", "split", "probe"
"""Settings of a part that must be those of the study. Others may grow, or are paths."""


def _is_finished(run: Run) -> bool:
    """Whether a part is finished. Raises `RunFolderError` if all its trials are there, but answers are not judged."""
    if not run.is_finished and run.n_unjudged and len(run.trials) >= run.manifest.planned:
        raise _unfinished(run.folder, run)
    return run.is_finished


def _unfinished(folder: Path, run: Run | None) -> RunFolderError:
    lacks = "no trials" if run is None else f"{len(run.trials)} of {run.manifest.planned} trials"
    if run is not None and run.n_unjudged:
        lacks += f" and {plural(run.n_unjudged, 'answer')} not judged"
    return RunFolderError(
        got=f"{folder} with {lacks}",
        expected="a finished study",
        remedy="run the same locaudit paper command again: finished trials are kept",
    )


def need(audit: AuditConfig, runs: Sequence[Run], done: Run | None = None) -> tuple[int, float]:
    """Trials that a part lacks, and the seconds they take by the mean trial of `runs`; `done` is what it has."""
    name, settings = next(iter(audit.methods.items()))
    n_places = 1 + audit.whole_model + audit.controls * len(audit.nulls)
    n = 1 + n_places * len(METHODS[name].strengths(settings)) - (len(done.trials) if done else 0)
    seconds = {
        trial.spec.trial_id: (trial.spec.method, run.seconds[trial.spec.trial_id])
        for run in runs
        for trial in run.trials
    }
    same = [x for method, x in seconds.values() if method == name]
    return n, n * fmean(same or [x for _, x in seconds.values()] or [0.0])


def describe_need(n: int, seconds: float) -> str:
    """What a part takes, in words."""
    return f"{plural(n, 'trial')}, about {duration(seconds)}"


def begun(folder: Path) -> Run | None:
    """The run of a part; None if it has no trials."""
    return load_run(folder) if has_trials(folder) else None
