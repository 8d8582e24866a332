"""Trackers show a run in another program while it runs: Weights & Biases, MLflow or TensorBoard.

To add a tracker, register a class with the methods of `Tracker` in `locaudit.registry.TRACKERS`. Only the driver calls
it, and no result or identity depends on it. If it fails, this is said once, and the run goes on without it. Where its
data go is configured as for the library itself, for example by ``WANDB_PROJECT`` or ``MLFLOW_TRACKING_URI``.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from locaudit.config import AuditConfig, to_dict
from locaudit.config.choices import find
from locaudit.config.settings import leaves
from locaudit.errors import import_extra
from locaudit.records import NO_METHOD, TrialRecord
from locaudit.registry import TRACKERS
from locaudit.stats.verdict import Verdict

LONGEST = 500
"""Longest value of a setting that is shown, in characters."""


class Tracker(Protocol):
    """Shows a run. If the class has an attribute `check`, this function is called before the run is prepared.

    `check` raises `ConfigError` if a package is missing.
    """

    def __init__(self, name: str, folder: Path, settings: Mapping[str, str]) -> None:
        """Begin to show the run of this name. Settings have dotted names."""
        ...

    def log(self, n: int, values: Mapping[str, float]) -> None:
        """Show the scores of the `n`-th place that is done, by names such as ``optimal/claim/mc2``."""
        ...

    def finish(self, values: Mapping[str, float | str], report: Path | None) -> None:
        """Show the verdict, by names such as ``optimal/anywhere/p``, and the report.

        If the run was interrupted, there are no values and `report` is None.
        """
        ...


@TRACKERS.register("wandb")
class WeightsAndBiases:
    """A run of the project ``WANDB_PROJECT`` (without it, ``locaudit``), with the report as a file."""

    check = staticmethod(partial(import_extra, "wandb", "trackers"))

    def __init__(self, name: str, folder: Path, settings: Mapping[str, str]):
        project = os.environ.get("WANDB_PROJECT", "locaudit")
        self._run = self.check().init(project=project, name=name, config=dict(settings), reinit="create_new")

    def log(self, n: int, values: Mapping[str, float]) -> None:
        """Log a step."""
        self._run.log(dict(values), step=n)

    def finish(self, values: Mapping[str, float | str], report: Path | None) -> None:
        """Write the verdict into the run's summary."""
        self._run.summary.update(dict(values))
        if report is not None:
            self._run.save(str(report), base_path=str(report.parent), policy="now")
        self._run.finish()


@TRACKERS.register("mlflow")
class MLflow:
    """A run of the experiment ``MLFLOW_EXPERIMENT_NAME`` at ``MLFLOW_TRACKING_URI``, with the report as an artifact."""

    check = staticmethod(partial(import_extra, "mlflow", "trackers"))

    def __init__(self, name: str, folder: Path, settings: Mapping[str, str]):
        self._mlflow = self.check()
        self._mlflow.start_run(run_name=name, nested=True)
        self._mlflow.log_params(dict(settings))

    def log(self, n: int, values: Mapping[str, float]) -> None:
        """Log a step."""
        self._mlflow.log_metrics(dict(values), step=n)

    def finish(self, values: Mapping[str, float | str], report: Path | None) -> None:
        """Log the verdict's numbers as metrics and its texts as tags."""
        for name, value in values.items():
            (self._mlflow.set_tag if isinstance(value, str) else self._mlflow.log_metric)(name, value)
        if report is not None:
            self._mlflow.log_artifact(str(report))
        self._mlflow.end_run("KILLED" if report is None else "FINISHED")


@TRACKERS.register("tensorboard")
class TensorBoard:
    """Event files in the folder ``tensorboard`` of the run folder, which ``tensorboard --logdir runs`` finds."""

    check = staticmethod(partial(import_extra, "tensorboard", "trackers"))

    def __init__(self, name: str, folder: Path, settings: Mapping[str, str]):
        self._writer = import_extra("torch.utils.tensorboard", "trackers").SummaryWriter(str(folder / "tensorboard"))
        self._write("settings", settings)

    def _write(self, title: str, values: Mapping[str, Any]) -> None:
        self._writer.add_text(title, "\n".join(f"    {name}: {value}" for name, value in values.items()))  # Markdown

    def log(self, n: int, values: Mapping[str, float]) -> None:
        """Write a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, n)

    def finish(self, values: Mapping[str, float | str], report: Path | None) -> None:
        """Write the verdict as text."""
        self._write("verdict", values)
        self._writer.close()


def check_tracker(config: AuditConfig) -> None:
    """Raise `ConfigError` if the settings choose a tracker that is unknown, or whose package is missing."""
    if config.tracker is not None:
        getattr(find(TRACKERS, config.tracker, "tracker"), "check", lambda: None)()


@contextmanager
def tracking(
    config: AuditConfig, folder: Path, say: Callable[[str], None]
) -> Iterator[Callable[[TrialRecord | None], None]]:
    """Show a run in the tracker that the settings choose. Yields what logs the chosen trial of a place."""
    trackers: list[Tracker] = []  # the chosen one, unless it failed
    places = itertools.count(1)

    def attempt(call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:  # whatever the library raises
            trackers.clear()
            why = str(error) or type(error).__name__
            say(f"note: the tracker {config.tracker} failed ({why}); the run goes on without it")

    def log(record: TrialRecord | None) -> None:
        n = next(places)
        if record is not None and trackers:
            attempt(trackers[0].log, n, _values(record))

    def finish(tracker: Tracker) -> None:
        from locaudit.report.result import read_result

        result = read_result(folder)
        tracker.finish(_summary(result.verdict), result.write_report())

    if (name := config.tracker) is not None:
        settings = {key: str(value)[:LONGEST] for key, value in leaves(to_dict(config))}
        attempt(lambda: trackers.append(TRACKERS[name](str(folder), folder, settings)))
    try:
        yield log
    except BaseException:
        if trackers:
            attempt(trackers[0].finish, {}, None)
        raise
    if trackers:
        attempt(finish, trackers[0])


def _values(record: TrialRecord) -> dict[str, float]:
    """The trial's test scores and drift, by names such as ``unedited/mc2`` and ``optimal/control-anywhere/kl``."""
    spec = record.spec
    place = "-".join(filter(None, (spec.arm, spec.null)))
    where = "unedited" if spec.method == NO_METHOD else f"{spec.method}/{place}"
    return {f"{where}/{name}": float(x) for name, x in {**record.metrics.get("test", {}), **record.drift}.items()}


def _summary(verdict: Verdict) -> dict[str, float | str]:
    """The verdict's main numbers and texts."""
    found: dict[str, float | str] = {"outcome": verdict.outcome, "headline": verdict.headline, "score": verdict.score}
    for name, v in verdict.methods.items():
        found |= {f"{name}/outcome": v.outcome, f"{name}/gain": v.effect, f"{name}/gain_p": v.effect_p}
        for null, x in v.nulls.items():
            found |= {f"{name}/{null}/lead": x.lead, f"{name}/{null}/p": x.p_value}
    return found
