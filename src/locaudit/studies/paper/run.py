"""Run the paper's study: two or three audits of one model, each in its own folder, which share their preparation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import comb
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from locaudit.behaviours import Behaviour
from locaudit.config import AuditConfig, read_over, to_dict, to_yaml
from locaudit.errors import ConfigError, LocationError, RunFolderError
from locaudit.judges import Judge
from locaudit.models import Model
from locaudit.run.audit import run_audit
from locaudit.run.pilot import Estimate, describe_estimate, run_pilot
from locaudit.run.status import describe_seconds, say_resumed, show_progress
from locaudit.run.subject import load_subject, read_inputs
from locaudit.store.files import write_atomically
from locaudit.store.folder import has_trials
from locaudit.studies.paper.config import PARTS, PaperConfig, Part
from locaudit.studies.paper.measures import data_release
from locaudit.studies.paper.study import SETTINGS


def run_paper(
    config: PaperConfig,
    out: str | Path,
    *,
    model: Model | None = None,
    behaviour: Behaviour | None = None,
    judges: Mapping[str, Judge] | None = None,
    progress: bool = True,
) -> None:
    """Run the trials of the study that have no record yet. Arguments and resuming as in `run_audit`.

    Before the first trial it raises `LocationError` for a model with too few heads, `ConfigError` without judges of
    Truth and Info, and `RunFolderError` for a folder with other content.
    """
    folder = Path(out)
    with _opened(config, folder, model, behaviour, judges, progress) as (subject, audits):
        with show_progress(progress) as meter:
            say_resumed([folder / part for part in audits], "parts", meter)
        for number, (part, audit) in enumerate(audits.items(), start=1):
            with show_progress(progress) as meter:
                meter.say(f"part {number} of {len(audits)}, {part}: {PARTS[part]}")
            run_audit(audit, folder / part, prepared=folder / "sets", **subject)


@contextmanager
def _opened(config: PaperConfig, folder: Path, *given: Any) -> Iterator[tuple[dict[str, Any], dict[Part, AuditConfig]]]:
    """Check and lock the study's folder, save the settings in it, and yield what `_begin` returns."""
    _check_folder(folder, config)
    with _locked(folder):
        begun = _begin(config, *given)
        write_atomically(folder / SETTINGS, to_yaml(config).encode())
        yield begun


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder, creating it if needed, so that only one process writes to a study."""
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(blocking=False)
    except OSError as error:
        is_busy = isinstance(error, Timeout)
        why = "another process is writing to" if is_busy else f"cannot be written to ({error.strerror or error})"
        raise RunFolderError(
            got=f"{folder}, which {why}",
            expected="a writable folder that no other process is using",
            remedy="wait for the other process or stop it, or choose another --out",
        ) from None
    try:
        yield
    finally:
        lock.release()
        if is_new and not any(
            path.name != ".lock" for path in folder.iterdir()
        ):  # the study was refused: leave nothing behind
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()


def estimate_paper(
    config: PaperConfig, out: str | Path, *, judges: Mapping[str, Judge] | None = None, progress: bool = True
) -> dict[Part, Estimate]:
    """Estimate what each audit of the study takes here, from its first trials, which are kept (`run_pilot`)."""
    folder = Path(out)
    with _opened(config, folder, None, None, judges, progress) as (subject, audits):
        return {
            part: run_pilot(audit, folder / part, prepared=folder / "sets", **subject) for part, audit in audits.items()
        }


def _begin(
    config: PaperConfig,
    model: Model | None,
    behaviour: Behaviour | None,
    judges: Mapping[str, Judge] | None,
    progress: bool,
) -> tuple[dict[str, Any], dict[Part, AuditConfig]]:
    """Load and check inputs and model. Returns the arguments that all audits share, and the audits' settings."""
    first = config.audits()["sets"]
    inputs = read_inputs(first, behaviour, judges)
    questions = inputs.behaviour.questions
    answers = [sum(len(getattr(question, side)) for question in questions) for side in ("true", "false")]
    with show_progress(progress) as meter:
        meter.say(f"{inputs.behaviour.name}: {data_release(len(questions), *answers)}")
        if model is None:
            meter.say(f"loading {config.model}")
            model = load_subject(first)
    n_heads, k = model.n_layers * model.n_heads, config.probe.top_k
    room = {
        f"probe.top_k = {k}": k < n_heads,
        f"random_sets = {config.random_sets} of {k} heads": comb(n_heads, min(k, n_heads)) > config.random_sets,
        f"random_heads = {config.random_heads}": n_heads > config.random_heads,
    }
    for got in (name for name, is_enough in room.items() if not is_enough):
        raise LocationError(
            got=f"{got} for {model.name}, which has {n_heads} heads",
            expected="fewer than the model has",
            remedy="lower probe.top_k, random_sets or random_heads",
        )
    shared = {"model": model, "behaviour": inputs.behaviour, "judges": inputs.judges, "progress": progress}
    return shared, config.audits(n_heads)


def _check_folder(folder: Path, config: PaperConfig) -> None:
    """Raise `RunFolderError` unless the folder is new, empty, or has a study with the same settings."""
    settings = folder / SETTINGS
    strange = [path.name for path in folder.iterdir() if path.name != ".lock"] if folder.is_dir() else []
    if strange and not settings.is_file():
        raise RunFolderError(
            got=f"{folder} with other files in it ({strange[0]})",
            expected="an empty folder, or the folder of a study",
            remedy="choose another --out",
        )
    if not settings.is_file():
        return
    try:
        found = read_over(PaperConfig(), settings)
    except ConfigError as error:
        raise RunFolderError(
            got=f"{settings}, which cannot be read ({error})",
            expected="the settings of this study",
            remedy="choose another --out",
        ) from None
    old, new = found.audits(), config.audits()
    for part in old:  # the landscape may be added to a study later, or dropped again
        if part in new and old[part].refuses(new[part]) and has_trials(folder / part):
            theirs, ours = to_dict(found), to_dict(config)
            differ = sorted(key for key in ours if ours[key] != theirs[key] and key != "judges")
            raise RunFolderError(
                got=f"{folder}, made with other settings ({', '.join(differ)})",
                expected="the same settings, so that old and new trials can be compared",
                remedy="choose another --out, or use the earlier settings to resume",
            )


def describe_plan(estimates: Mapping[Part, Estimate]) -> str:
    """The estimates as text for the terminal, one section per audit and a total."""
    lines = []
    for part, estimate in estimates.items():
        told = describe_estimate(estimate).splitlines()[:-1]
        lines += [f"{part}:", *(f"  {line}".rstrip() for line in told), ""]
    every = estimates.values()
    n_trials = sum(sum(estimate.n_trials.values()) for estimate in every)
    n_tokens, disk = sum(estimate.n_tokens for estimate in every), sum(estimate.disk_bytes for estimate in every)
    time = describe_seconds(sum(estimate.seconds for estimate in every))
    lines.append(f"the whole study: {n_trials} trials, {n_tokens:,} tokens run, {time}, {disk / 2**20:.0f} MiB on disk")
    return "\n".join([*lines, "Run the same command without --dry-run to go on: the trials that were timed are kept."])
