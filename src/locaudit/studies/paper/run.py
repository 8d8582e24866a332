"""Run the paper's whole study: three audits on one model, in folders of their own, that share what they prepare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import comb
from pathlib import Path

from filelock import FileLock, Timeout

from locaudit.behaviours import Behaviour
from locaudit.config import AuditConfig, read_over, to_dict, to_yaml
from locaudit.errors import ConfigError, LocationError, RunFolderError
from locaudit.judges import Judge
from locaudit.models import Model
from locaudit.run.audit import run_audit
from locaudit.run.estimate import Estimate, describe_estimate, estimate_audit
from locaudit.run.inputs import load_subject, read_inputs
from locaudit.run.status import describe_seconds, show_progress
from locaudit.store import read_run, write_atomically
from locaudit.studies.paper.config import PaperConfig, Part
from locaudit.studies.paper.study import SETTINGS, data_release


def run_paper(
    config: PaperConfig,
    out: str | Path,
    *,
    model: Model | None = None,
    behaviour: Behaviour | None = None,
    judges: Mapping[str, Judge] | None = None,
    progress: bool = True,
) -> None:
    """Run every trial of the study that has no record yet; arguments as in `run_audit`. Resumes as it does.

    Raises `LocationError` for a model with too few heads, `ConfigError` without judges of Truth and Info, and
    `RunFolderError` for a folder of something else, all before the first trial.
    """
    folder = Path(out)
    _check_folder(folder, config)
    with _locked(folder):
        model, behaviour, judges, audits = _begin(config, model, behaviour, judges, progress)
        write_atomically(folder / SETTINGS, to_yaml(config).encode())
        for number, (part, audit) in enumerate(audits.items(), start=1):
            with show_progress(progress) as meter:
                meter.say(f"part {number} of {len(audits)}, {part}: {_PARTS[part]}")
            run_audit(
                audit,
                folder / part,
                model=model,
                behaviour=behaviour,
                judges=judges,
                progress=progress,
                prepared=folder / "sets",
            )


_PARTS: Mapping[Part, str] = {
    "sets": "probed heads against random sets and the whole model",
    "single": "best probed head against random single heads",
    "landscape": "every head",
}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time writes a study."""
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(blocking=False)
    except Timeout:
        raise RunFolderError(
            got=f"{folder}, which another process is writing to",
            expected="one writer at a time",
            remedy="wait for it, stop it, or choose another --out",
        ) from None
    except OSError as error:
        raise RunFolderError(
            got=f"{folder}, which cannot be written to ({error.strerror or error})",
            expected="a folder to write to",
            remedy="check --out",
        ) from None
    try:
        yield
    finally:
        lock.release()
        if is_new and not any(path.name != ".lock" for path in folder.iterdir()):  # refused: leave nothing behind
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()


def estimate_paper(
    config: PaperConfig,
    *,
    out: str | Path,
    model: Model | None = None,
    behaviour: Behaviour | None = None,
    judges: Mapping[str, Judge] | None = None,
    progress: bool = True,
) -> dict[Part, Estimate]:
    """What each audit of the study would take here, from timed samples; writes nothing. See `estimate_audit`."""
    folder = Path(out)
    _check_folder(folder, config)
    model, behaviour, judges, audits = _begin(config, model, behaviour, judges, progress)
    out_of: dict[Part, Estimate] = {}
    paces = None
    for part, audit in audits.items():
        out_of[part] = estimate_audit(
            audit, model=model, behaviour=behaviour, judges=judges, out=folder / part, paces=paces, progress=progress
        )
        paces = paces or out_of[part].paces
    return out_of


def _begin(
    config: PaperConfig,
    model: Model | None,
    behaviour: Behaviour | None,
    judges: Mapping[str, Judge] | None,
    progress: bool,
) -> tuple[Model, Behaviour, Mapping[str, Judge], dict[Part, AuditConfig]]:
    """What can be refused with the inputs and the model at hand is refused here."""
    first = config.audits()["sets"]
    inputs = read_inputs(first, behaviour, judges)
    questions = inputs.behaviour.questions
    answers = [sum(len(getattr(question, side)) for question in questions) for side in ("true", "false")]
    with show_progress(progress) as meter:
        meter.say(f"{inputs.behaviour.name}: {data_release(len(questions), *answers)}")
        if model is None:
            meter.say(f"loading {config.model}")
            model = load_subject(first)
    n_heads = model.n_layers * model.n_heads
    k = config.probe.top_k
    for got, enough in (
        (f"probe.top_k = {k}", k < n_heads),
        (f"random_sets = {config.random_sets} of {k} heads", comb(n_heads, min(k, n_heads)) - 1 >= config.random_sets),
        (f"random_heads = {config.random_heads}", n_heads > config.random_heads),
    ):
        if not enough:
            raise LocationError(
                got=f"{got} for {model.name}, which has {n_heads} heads",
                expected="fewer than the model has",
                remedy="lower probe.top_k, random_sets or random_heads",
            )
    return model, inputs.behaviour, inputs.judges, config.audits(n_heads)


def _check_folder(folder: Path, config: PaperConfig) -> None:
    """A folder is a study's own, of the same settings, or new."""
    settings = folder / SETTINGS
    strange = [path.name for path in folder.iterdir() if path.name != ".lock"] if folder.is_dir() else []
    if strange and not settings.is_file():
        raise RunFolderError(
            got=f"{folder} with other files in it ({strange[0]})",
            expected="an empty folder or one of an earlier study",
            remedy="choose another --out",
        )
    if not settings.is_file():
        return
    try:
        found = read_over(PaperConfig(), settings)
    except ConfigError as error:
        raise RunFolderError(
            got=f"{settings}, which does not load ({error})",
            expected="the settings of this study",
            remedy="choose another --out",
        ) from None
    old, new = found.audits(), config.audits()
    for part in old:  # a landscape may be added to a finished study, or left out again
        if part in new and old[part].hash != new[part].hash and _has_trials(folder / part):
            theirs, ours = to_dict(found), to_dict(config)
            differ = sorted(key for key in ours if ours[key] != theirs[key] and key != "judges")
            raise RunFolderError(
                got=f"{folder}, made with other settings ({', '.join(differ)})",
                expected="the same settings, so that old and new trials can be compared",
                remedy="choose another --out, or repeat the earlier settings to resume",
            )


def _has_trials(folder: Path) -> bool:
    with suppress(RunFolderError), read_run(folder) as store:
        return bool(store.done())
    return False


def describe_plan(estimates: Mapping[Part, Estimate]) -> str:
    """The study's plan as lines for the terminal."""
    lines = []
    for part, estimate in estimates.items():
        lines += [
            f"{part}:",
            *(f"  {line}" if line else "" for line in describe_estimate(estimate).splitlines()[:-1]),
            "",
        ]
    seconds = sum(estimate.total_seconds for estimate in estimates.values())
    trials = sum(sum(estimate.n_trials.values()) for estimate in estimates.values())
    tokens = sum(estimate.n_tokens for estimate in estimates.values())
    disk = sum(estimate.disk_bytes for estimate in estimates.values())
    lines.append(
        f"the whole study: {trials} trials, {tokens:,} tokens run, {describe_seconds(seconds)}, {disk / 2**20:.0f} MiB "
        "on disk"
    )
    return "\n".join([*lines, "A dry run: nothing was written."])
