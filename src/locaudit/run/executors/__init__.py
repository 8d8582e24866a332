"""Executors decide where trials run. They give groups of trials to workers, in this process or elsewhere.

To add an executor, register a class with the method `map` in `locaudit.registry.EXECUTORS`. Workers in other processes
are built from the run folder, where `locaudit.run.prepare` has saved what they need. Only the driver
(`locaudit.run.audit`) writes results, calls judges and stops early.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from locaudit.records import TrialSpec
from locaudit.registry import EXECUTORS

if TYPE_CHECKING:  # so that a setting that names no executor is refused without torch
    from locaudit.run.worker import Result, Worker


@dataclass(frozen=True, eq=False)
class Outcome:
    """The results of a group of trials, or of a part of it."""

    group: Sequence[TrialSpec]
    results: Sequence[Result]
    is_last: bool
    """Whether this is the last part of the group."""


class Executor(Protocol):
    """Runs groups of trials."""

    def map(self, worker: Worker, folder: Path, groups: Iterable[Sequence[TrialSpec]]) -> Iterator[Outcome]:
        """Run `groups` and yield each outcome as soon as it is there.

        Take a group from the iterable only when a worker is free. By then, the driver has left out groups that early
        stopping made unnecessary. `worker` runs in this process. Elsewhere, `locaudit.run.audit.open_worker` builds a
        worker from the run folder `folder`.
        """
        ...


@EXECUTORS.register("local")
class Local:
    """Runs one group after another in this process."""

    def map(self, worker: Worker, folder: Path, groups: Iterable[Sequence[TrialSpec]]) -> Iterator[Outcome]:
        """Yield outcomes in the order of the groups."""
        for group in groups:
            n_left = len(group)
            for results in worker.run(group):
                n_left -= len(results)
                yield Outcome(group, results, n_left == 0)
