"""Executors decide where trials run. They give groups of trials to workers, in this process or elsewhere.

To add an executor, register a class with the method `map` in `locaudit.registry.EXECUTORS`. Workers in other processes
are built from the run folder, where `locaudit.run.prepare` has saved what they need. Only the driver
(`locaudit.run.audit`) writes results, calls judges and stops early.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from locaudit.config import AuditConfig
from locaudit.config.choices import find
from locaudit.errors import ConfigError
from locaudit.records import TrialSpec
from locaudit.registry import EXECUTORS

if TYPE_CHECKING:  # so that a setting that names no executor is refused without torch
    from locaudit.run.worker import Result, Worker


@dataclass(frozen=True, eq=False)
class Outcome:
    """What happened to a group of trials: results of all of it or of a part, or that it began or failed."""

    group: Sequence[TrialSpec]
    results: Sequence[Result]
    """Empty if the group began to run at `where`, or failed."""
    is_last: bool
    """Whether nothing more will come of the group."""
    seconds: float = 0.0
    """Wall-clock seconds that these results took where they were computed."""
    where: str = ""
    """Where the group runs; empty for this process."""
    failed: str = ""
    """Why no results will come."""


class Executor(Protocol):
    """Runs groups of trials.

    If it has an attribute `threads`, a function of the settings, the driver prepares the run with so many threads. If
    it has an attribute `check`, this function of the settings raises `ConfigError` for those that it cannot use, and
    its workers load the model by its name: a model given as an object is refused.
    """

    def map(self, worker: Worker, folder: Path, groups: Iterable[Sequence[TrialSpec] | None]) -> Iterator[Outcome]:
        """Run `groups` and yield each outcome as soon as it is there.

        Take a group from the iterable only when a worker is free. By then, the driver has left out groups that early
        stopping made unnecessary. None in place of a group means that the next one depends on groups that still run:
        ask again after an outcome. `worker` runs in this process. Elsewhere, `locaudit.run.audit.open_worker` builds a
        worker from the run folder `folder`.
        """
        ...


@EXECUTORS.register("local")
class Local:
    """Runs one group after another in this process."""

    def map(self, worker: Worker, folder: Path, groups: Iterable[Sequence[TrialSpec] | None]) -> Iterator[Outcome]:
        """Yield outcomes in the order of the groups."""
        for group in filter(None, groups):
            n_left, started = len(group), time.monotonic()
            for results in worker.run(group):
                n_left -= len(results)
                yield Outcome(group, results, n_left == 0, time.monotonic() - started)
                started = time.monotonic()


def choose_executor(config: AuditConfig) -> Any:
    """The class of the executor that the settings choose. ``local`` with a number of workers is a local Ray."""
    name = "ray" if config.executor == "local" and config.ray.workers is not None else config.executor
    return find(EXECUTORS, name, "executor")


def loads_by_name(config: AuditConfig) -> bool:
    """Whether the executor's workers load the model by its name, so that it cannot be given as an object."""
    return hasattr(choose_executor(config), "check")


def check_executor(config: AuditConfig, has_object: bool) -> None:
    """Raise `ConfigError` if the executor cannot run these settings, or a model given as an object (`has_object`)."""
    if not loads_by_name(config):
        return
    if has_object:
        raise ConfigError(
            got="a model given as an object, and workers that have to load it",
            expected="its name: a folder, a GGUF file or a hub id that every worker can read",
            remedy="save it with model.lm.save_pretrained(FOLDER) and model.tokenizer.save_pretrained(FOLDER), and "
            "give FOLDER as the model",
        )
    choose_executor(config).check(config)
