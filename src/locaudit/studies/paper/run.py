"""Run the paper's study: several audits of one model, each in its own folder. They share their preparation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

from locaudit.behaviours import Behaviour
from locaudit.checkpoints import read_shape
from locaudit.claims.kinds import Shape
from locaudit.config import AuditConfig, to_yaml
from locaudit.errors import LocationError
from locaudit.judges import Judge
from locaudit.models import Model
from locaudit.report.design import duration
from locaudit.run.audit import run_audit
from locaudit.run.executors import loads_by_name
from locaudit.run.pilot import Estimate, describe_estimate, run_pilot
from locaudit.run.status import describe_seconds, say_resumed, show_progress
from locaudit.run.subject import Inputs, load_subject, read_inputs
from locaudit.store.files import write_atomically
from locaudit.store.folder import check_run, lock_folder
from locaudit.studies.paper.config import PaperConfig, Part, describe_part
from locaudit.studies.paper.measures import data_release
from locaudit.studies.paper.registration import register
from locaudit.studies.paper.study import SETTINGS, begun, describe_need, need


def run_paper(
    config: PaperConfig,
    out: str | Path,
    *,
    model: Model | None = None,
    behaviour: Behaviour | None = None,
    judges: Mapping[str, Judge] | None = None,
    progress: bool = True,
) -> dict[Part, str]:
    """Run the trials of the study that have no record yet. Arguments and resuming are as in `run_audit`.

    Returns the parts that the budget does not reach, with what they take.

    Before the first trial, it raises `LocationError` if the model has too few heads, `ConfigError` if there are no
    judges of Truth and Info, and `RunFolderError` if the folder has other content.
    """
    folder, lacking = Path(out), dict[Part, str]()
    with _opened(config, folder, model, behaviour, judges, progress) as (subject, audits):
        with show_progress(progress) as meter:
            say_resumed([folder / part for part in audits], "parts", meter)
            meter.say(register(folder).sentence)
        for number, (part, audit) in enumerate(audits.items(), start=1):
            lacks = _beyond_budget(config, folder, part, audits)
            with show_progress(progress) as meter:
                name = f"part {number} of {len(audits)}, {part}"
                meter.say(f"{name}: {f'not run: {lacks}' if lacks else describe_part(part)}")
            if lacks:
                lacking[part] = lacks
            else:
                run_audit(audit, folder / part, prepared=folder / "sets", **subject)
    return lacking


def _beyond_budget(config: PaperConfig, folder: Path, part: Part, audits: Mapping[Part, AuditConfig]) -> str:
    """What the rest of a part takes, if that is more than the budget has left; empty if it fits."""
    if config.budget_hours is None or part == "sets":
        return ""
    runs = {other: run for other in audits if (run := begun(folder / other))}
    left = 3600 * config.budget_hours - sum(sum(run.seconds.values()) for run in runs.values())
    n, seconds = need(audits[part], list(runs.values()), runs.get(part))
    if not n or seconds <= left:
        return ""
    return f"{describe_need(n, seconds)}, but the budget has {duration(max(left, 0))} left"


@contextmanager
def _opened(
    config: PaperConfig,
    folder: Path,
    model: Model | None,
    behaviour: Behaviour | None,
    judges: Mapping[str, Judge] | None,
    progress: bool,
) -> Iterator[tuple[dict[str, Any], dict[Part, AuditConfig]]]:
    """Lock the study's folder, check everything, save the settings, and load the model.

    Yields the arguments that all audits share, and the audits' settings.
    """
    first = config.audits()["sets"]
    with lock_folder(folder, SETTINGS):
        inputs = read_inputs(first, behaviour, judges, model, folder / "sets")
        config = replace(config, prompt=inputs.config.prompt)  # all audits have the date of the first one
        questions = inputs.behaviour.questions
        answers = [sum(len(getattr(question, side)) for question in questions) for side in ("true", "false")]
        with show_progress(progress) as meter:
            meter.say(f"{inputs.behaviour.name}: {data_release(len(questions), *answers)}")
            shape = read_shape(config.model, config.loading.revision) if model is None else model.shape
            # Checked before steps that may take minutes.
            audits = None if shape is None else _check(config, folder, shape, inputs)
            by_name = loads_by_name(first)  # then each audit loads the model, as its workers do
            if audits is None or (model is None and not by_name):
                meter.say(f"loading {config.model}")
                model = load_subject(first)
                audits = _check(config, folder, model.shape, inputs)
            if by_name:
                model = None
        write_atomically(folder / SETTINGS, to_yaml(config).encode())
        shared = {"model": model, "behaviour": inputs.behaviour, "judges": inputs.judges, "progress": progress}
        yield shared, audits


def _check(config: PaperConfig, folder: Path, shape: Shape, inputs: Inputs) -> dict[Part, AuditConfig]:
    """The audits' settings for a model of this shape, if it has enough heads and the folder has no other trials."""
    n_heads, k = shape.n_layers * shape.n_heads, config.probe.top_k
    room = {
        f"probe.top_k = {k}": k < n_heads,
        f"random_sets = {config.random_sets} of {k} heads": comb(n_heads, min(k, n_heads)) > config.random_sets,
        f"random_heads = {config.random_heads}": n_heads > config.random_heads,
    }
    for got in (name for name, is_enough in room.items() if not is_enough):
        raise LocationError(
            got=f"{got} for {config.model}, which has {n_heads} heads",
            expected="fewer than the model has",
            remedy="lower probe.top_k, random_sets or random_heads",
        )
    audits = config.audits(n_heads)
    for part, audit in audits.items():
        check_run(folder / part, replace(audit, evaluation=inputs.config.evaluation), None)
    return audits


def estimate_paper(
    config: PaperConfig, out: str | Path, *, judges: Mapping[str, Judge] | None = None, progress: bool = True
) -> dict[Part, Estimate]:
    """Estimate what each audit of the study needs here, from its first trials, which are kept (`run_pilot`)."""
    folder, found = Path(out), dict[Part, Estimate]()
    with _opened(config, folder, None, None, judges, progress) as (subject, audits):
        register(folder)
        for part, audit in audits.items():
            if part.startswith("sets-"):  # as long as the first seed
                first = found["sets"]
                n = sum(first.n_trials.values())
                scale = n / max(n - first.n_done, 1)
                times = {"seconds": first.seconds * scale, "disk_bytes": round(first.disk_bytes * scale)}
                found[part] = replace(first, n_done=0, spent=0.0, notes=("taken to be like sets",), **times)
            else:
                found[part] = run_pilot(audit, folder / part, prepared=folder / "sets", **subject)
    return found


def describe_plan(estimates: Mapping[Part, Estimate], budget_hours: float | None = None) -> str:
    """The estimates as text for the terminal, one section per audit, a total, and what a budget does not reach."""
    lines: list[str] = []
    for part, estimate in estimates.items():
        told = describe_estimate(estimate).splitlines()[:-1]
        lines += [f"{part}:", *(f"  {line}".rstrip() for line in told), ""]
    every = estimates.values()
    n_trials = sum(sum(estimate.n_trials.values()) for estimate in every)
    n_tokens, disk = sum(estimate.n_tokens for estimate in every), sum(estimate.disk_bytes for estimate in every)
    time = describe_seconds(sum(estimate.seconds for estimate in every))
    lines.append(f"the whole study: {n_trials} trials, {n_tokens:,} tokens run, {time}, {disk / 2**20:.0f} MiB on disk")
    left = math.inf if budget_hours is None else 3600 * budget_hours - sum(estimate.spent for estimate in every)
    for part, estimate in estimates.items():
        if part == "sets" or estimate.seconds <= left:
            left -= estimate.seconds
        else:
            lines.append(f"the budget of {budget_hours:g} h does not reach {part}")
    return "\n".join([*lines, "Run the same command without --dry-run to go on: the trials that were timed are kept."])
