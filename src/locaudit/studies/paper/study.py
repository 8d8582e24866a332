"""The audits of a study as read from their run folders."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locaudit.config import AuditConfig, read_over
from locaudit.errors import RunFolderError
from locaudit.records import Method, TrialRecord
from locaudit.stats import components, count_unjudged, judged_records, score_values, select
from locaudit.stats.selection import Place
from locaudit.store import read_run
from locaudit.studies.paper.config import PaperConfig, Part

SETTINGS = "paper.yaml"
"""File in the study's folder that holds its settings, and marks the folder as a study's."""
SCORE = "info_truth"
"""What the paper compares."""

RELEASES: Mapping[tuple[int, int, int], str] = {
    (817, 2585, 3295): "TruthfulQA, first release (the hub's, and the one that fits the paper's number of pairs)",
    (817, 2835, 3367): "TruthfulQA, revision of October 2021 (the paper's number of pairs does not fit it)",
}
"""(questions, true answers, false answers) as loaded -> which data that is."""


def data_release(questions: int, true: int, false: int) -> str:
    """Which data has so many questions, true and false answers."""
    return RELEASES.get((questions, true, false), "not TruthfulQA as released, the paper's data")


@dataclass(frozen=True)
class Audit:
    """One run folder of a study."""

    config: AuditConfig
    records: tuple[TrialRecord, ...]
    run: Mapping[str, Any]
    """The fact ``run``."""
    probes: Mapping[str, Any]
    judges: Mapping[str, Mapping[str, str]]
    seconds: float
    """Of its trials, in all."""
    n_unjudged: int
    """Answers that a judge has not been asked about, as in a run that was killed; failed judgements are none."""

    @property
    def base(self) -> TrialRecord:
        """The unedited model's record."""
        return next(r for r in self.records if r.spec.arm == "base")

    @property
    def is_finished(self) -> bool:
        """Whether every planned trial has a record and every answer was judged."""
        return len(self.records) >= self.run.get("planned", math.inf) and not self.n_unjudged

    def places(self, method: Method) -> dict[Place, list[TrialRecord]]:
        """Trials of each place, by hyperparameter; the claim, the whole model, then the controls by number."""
        out: dict[Place, list[TrialRecord]] = {}
        for record in sorted(self.records, key=_order):
            if record.spec.method == method:
                out.setdefault((record.spec.arm, record.spec.control), []).append(record)
        return out

    def chosen(self, method: Method, score: str = SCORE) -> Mapping[Place, TrialRecord | None]:
        """The trial that validation chose at each place; None where every edit diverged."""
        return select(self.records, score).get(method, {})

    def values(self, record: TrialRecord | None, score: str = SCORE) -> NDArray[np.float64]:
        """The score's components on the test questions, (components, questions); NaN for no record."""
        if record is None:
            return np.full((len(components(score)), len(self.base.questions["test"]["mc2"])), np.nan)
        return score_values(record.questions["test"], score)


@dataclass(frozen=True)
class Study:
    """The paper's study: settings and audits. Those that were not run are absent."""

    config: PaperConfig
    audits: Mapping[Part, Audit]

    @property
    def sets(self) -> Audit:
        """Probed heads against random sets of heads."""
        return self.audits["sets"]


def is_study(folder: str | Path) -> bool:
    """Whether the folder is one of ``locaudit paper``."""
    return (Path(folder) / SETTINGS).is_file()


def read_study(folder: str | Path) -> Study:
    """Read a study's folder. Raises `RunFolderError` if it holds none, or one with trials or judgements missing."""
    folder = Path(folder)
    if not (folder / SETTINGS).is_file():
        raise RunFolderError(
            got=f"{folder} without {SETTINGS}", expected="a folder of locaudit paper", remedy="name its --out"
        )
    config = read_over(PaperConfig(), folder / SETTINGS)
    audits: dict[Part, Audit] = {}
    for part in config.audits():
        path = folder / part
        audit = _read_audit(path) if (path / "trials.sqlite").is_file() else None
        if audit is None or not audit.is_finished:
            lacks = "no trials" if audit is None else f"{len(audit.records)} of {audit.run.get('planned', '?')} trials"
            if audit is not None and audit.n_unjudged:
                lacks += f" and {audit.n_unjudged} answers that were not judged"
            raise RunFolderError(
                got=f"{path} with {lacks}",
                expected="a finished study",
                remedy="run the same locaudit paper command again: finished trials are kept",
            )
        audits[part] = audit
    if any(audit.judges != audits["sets"].judges for audit in audits.values()):
        raise RunFolderError(
            got=f"{folder}, whose parts were judged by different judges",
            expected="the same judges of Truth and Info in all",
            remedy="run the locaudit paper command with the judges that you want again",
        )
    return Study(config, audits)


def _read_audit(folder: Path) -> Audit:
    with read_run(folder) as store:
        judges, records = store.fact("judges") or {}, judged_records(store)
        return Audit(
            store.config,
            tuple(records),
            store.fact("run") or {},
            store.fact("probes") or {},
            judges,
            math.fsum(store.seconds().values()),
            count_unjudged(store, records),
        )


def _order(record: TrialRecord) -> tuple[int, int, float]:
    spec = record.spec
    return _ARMS.index(spec.arm), spec.control, spec.hyperparameter or 0.0


_ARMS = ("base", "claim", "whole", "rest", "control")
