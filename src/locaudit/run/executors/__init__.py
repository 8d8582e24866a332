"""Where trials run. An executor hands groups to workers; the driver alone writes, judges and stops early.

Another one is a class with `map`, registered in `locaudit.registry.EXECUTORS`. `Worker`s elsewhere are made from the
run folder, where `locaudit.run.prepare` has left what they need.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from locaudit.records import TrialSpec
from locaudit.registry import EXECUTORS
from locaudit.run.worker import Result, Worker


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of a group, or of a part of it."""

    group: Sequence[TrialSpec]
    results: Sequence[Result]
    is_last: bool
    """Whether nothing more of the group will come."""


class Executor(Protocol):
    """Runs groups of trials."""

    def map(self, worker: Worker, folder: Path, groups: Iterable[Sequence[TrialSpec]]) -> Iterator[Outcome]:
        """Outcomes as they come. `groups` is drawn lazily, so that the driver may leave out what is not needed.

        `worker` is this process's own; workers elsewhere are made from the run folder
        (`locaudit.run.audit.open_worker`).
        """
        ...


@EXECUTORS.register("local")
class Local:
    """One group after another, in this process."""

    def map(self, worker: Worker, folder: Path, groups: Iterable[Sequence[TrialSpec]]) -> Iterator[Outcome]:
        """Outcomes in the order of the groups."""
        for group in groups:
            n_left = len(group)
            for results in worker.run(group):
                n_left -= len(results)
                yield Outcome(group, results, n_left == 0)
