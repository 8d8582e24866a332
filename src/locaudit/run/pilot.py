"""Run some trials of an audit first: a dry run times each method, a pilot tells how large the audit must be."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from locaudit.behaviours.behaviour import Behaviour
from locaudit.config import AuditConfig
from locaudit.errors import ConfigError
from locaudit.judges.base import Billed, Judge
from locaudit.methods.settings import HORIZONS
from locaudit.models.model import Model
from locaudit.records import NO_METHOD, TrialSpec
from locaudit.report.sizing import find_method
from locaudit.run.audit import Job, begin, pace_of, run_groups
from locaudit.run.judging import estimate_cost, judge_answers
from locaudit.run.status import Pace, describe_seconds
from locaudit.run.worker import find_lack, run_splits
from locaudit.stats.design import LEAST_CONTROLS
from locaudit.store.database import Store
from locaudit.store.folder import has_trials
from locaudit.store.run import load_run
from locaudit.text import plural


@dataclass(frozen=True)
class Estimate:
    """How much work an audit has left, estimated from the trials already timed. Made by `run_pilot`."""

    n_trials: Mapping[tuple[str, str], int]
    """(arm, method) -> number of trials in the whole plan."""
    n_done: int
    """Trials with a record, including those just timed."""
    n_answers: int
    """Answers still to be generated, at most."""
    n_tokens: int
    """Tokens in the forward passes of the remaining trials, if every answer has the maximal length. An upper bound."""
    disk_bytes: int
    """Disk space that the remaining trials will take, assuming the average of the finished ones."""
    seconds: float
    """Wall-clock seconds that the remaining trials will take, without loading the model and preparing."""
    spent: float
    """Wall-clock seconds of the trials just timed."""
    peak_bytes: int
    """Peak memory of this process, or on the GPU if there is one; 0 if unknown."""
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        total = sum(self.n_trials.values())
        return f"Estimate({self.n_done} of {total} trials done, about {describe_seconds(self.seconds)} left)"


def run_pilot(
    config: AuditConfig,
    out: str | Path,
    *,
    model: Model | None = None,
    behaviour: Behaviour | None = None,
    judges: Mapping[str, Judge] | None = None,
    progress: bool = True,
    prepared: Path | None = None,
) -> Estimate:
    """Run the first trials of each method at the claim, in the whole model and at controls, and extrapolate.

    The trials are kept: the same audit into `out` continues from there and ends with the same records. A finished run
    stays as it is; what it would take to extend it is found in a copy. Judges that cost money are not asked. Arguments
    and errors are those of `run_audit`.
    """
    with (
        _unless_finished(out) as folder,
        begin(config, folder, model, behaviour, judges, progress, prepared) as (store, job, meter),
    ):
        billed = {aspect: judge for aspect, judge in job.inputs.judges.items() if isinstance(judge, Billed)}
        local = {aspect: judge for aspect, judge in job.inputs.judges.items() if aspect not in billed}
        before, spent = store.done(), store.seconds()
        local_only = replace(job, inputs=replace(job.inputs, judges=local))
        left = run_groups(store, local_only, pilot_groups(job), meter)
        run, n_left, notes = load_run(store.folder), _count_answers(job, left), []
        for aspect, judge in billed.items():
            n_answers = n_left + len(run.said - set(run.judgements[aspect]))
            notes += estimate_cost({aspect: judge}, run.questions["test"], n_answers)
        if billed:
            names = " and ".join(judge.name for judge in billed.values())
            notes.append(f"the time of judging by {names} is not included")
        for name, facts in job.manifest.methods.items():
            if lengths := (facts.training or {}).get("objectives"):
                n = sum(sum(HORIZONS[: len(x)]) for x in lengths.values())
                notes.append(f"the training length of {name} is found ({plural(n, 'epoch')} of training, not repeated)")
        if config.widen:
            notes.append(f"at most {plural(config.widen, 'further strength')} at each place included (widen)")
        return _estimate(store, job, left, before, spent, meter.pace, notes)


@contextmanager
def _unless_finished(out: str | Path) -> Iterator[str | Path]:
    """The folder `out`; a copy for the time being if it holds a finished run."""
    if not has_trials(out) or not load_run(out).is_finished:
        yield out
        return
    with TemporaryDirectory() as copy:
        yield shutil.copytree(out, copy, dirs_exist_ok=True)


def run_design_pilot(
    config: AuditConfig,
    out: str | Path,
    method: str | None = None,
    *,
    model: Model | None = None,
    behaviour: Behaviour | None = None,
    judges: Mapping[str, Judge] | None = None,
    progress: bool = True,
) -> None:
    """Run what `locaudit design` needs to design an audit: less than a fifth of its trials with 19 controls.

    That is the unedited model and the claim, and for `method` also the whole model and the first `LEAST_CONTROLS`
    controls of each null. None stands for the first trained method, or the first. The folder then holds an unfinished
    run of this audit, which `run_audit` continues. Arguments and errors are those of `run_audit`; raises `ConfigError`
    for a method that the settings lack.
    """
    with begin(config, out, model, behaviour, judges, progress, None) as (store, job, meter):
        known = job.manifest.methods
        method = method or find_method(known)
        if method not in known:
            raise ConfigError(
                got=f"--method {method}", expected=f"one of {', '.join(known)}", remedy="choose one of them"
            )
        groups = [[spec for spec in group if _is_in_pilot(spec, method)] for group in job.groups]
        pilot = replace(job, groups=[group for group in groups if group])
        judge_answers(job.inputs.judges, store, store.records(), job.shared.cache, meter.say)
        run_groups(store, pilot, pilot.groups, meter)


def _is_in_pilot(spec: TrialSpec, method: str) -> bool:
    if spec.method not in (method, NO_METHOD):
        return spec.arm == "claim"
    return spec.arm in ("base", "claim", "whole") or 0 <= spec.control < LEAST_CONTROLS


def pilot_groups(job: Job) -> list[list[TrialSpec]]:
    """The groups to time: of each method, those that hold its first whole-model, claim and control trials.

    Whole groups are run, not single trials, for two reasons. The audit that continues from there has the same banks and
    so the same results. And on a GPU a bank of many edits takes hardly longer than a single one, so that the time of a
    single trial says little.
    """
    chosen: list[list[TrialSpec]] = []
    kinds = [{(pace_of(job.shared, spec), spec.arm) for spec in group} for group in job.groups]
    for pace in dict.fromkeys(pace_of(job.shared, spec) for group in job.groups for spec in group):
        for arm in ("base", "whole", "claim", "control"):
            holding = [group for group, found in zip(job.groups, kinds, strict=True) if (pace, arm) in found]
            if holding and not any(group in chosen for group in holding):
                chosen.append(holding[0])
    return chosen


def describe_estimate(estimate: Estimate) -> str:
    """The estimate as lines for the terminal."""
    total = sum(estimate.n_trials.values())
    trials = ", ".join(
        f"{n} {arm}" if method == NO_METHOD else f"{n} {arm} {method}" for (arm, method), n in estimate.n_trials.items()
    )
    are = "is" if estimate.n_done == 1 else "are"
    lines = [
        f"{plural(total, 'trial')}: {trials}",
        f"{estimate.n_done} of them {are} done; the timing took {describe_seconds(estimate.spent)}",
        f"the others: about {describe_seconds(estimate.seconds)}, {plural(estimate.n_answers, 'answer')} to generate, "
        f"{plural(estimate.n_tokens, 'token')} to run, {estimate.disk_bytes / 2**20:.1f} MiB on disk",
    ]
    if estimate.peak_bytes:
        lines.append(f"peak memory so far: {estimate.peak_bytes / 2**30:.1f} GiB")
    lines += [f"note: {note}" for note in estimate.notes]
    return "\n".join([*lines, "Run the same command without --dry-run to go on: the trials that were timed are kept."])


def _estimate(
    store: Store,
    job: Job,
    left: Sequence[TrialSpec],
    before: set[str],
    spent: Mapping[str, float],
    measured: Pace,
    notes: Sequence[str],
) -> Estimate:
    times, done, kept = store.seconds(), store.done(), job.shared.kept
    specs = [spec for group in job.groups for spec in group]
    pace: dict[str, list[float]] = {}
    for spec in specs:
        trial = spec.trial_id
        if trial in done:  # for a partly measured trial, only the time spent now
            pace.setdefault(pace_of(job.shared, spec), []).append(times[trial] - (spent[trial] if trial in kept else 0))
    mean = {name: sum(found) / len(found) for name, found in pace.items()}
    trials = [spec for spec in left if spec.measured is None]
    # The time of a trial includes that of more samples, so they are counted where no trial is left.
    places = {(spec.method, spec.place) for spec in trials}
    more = [s for s in left if s.measured is not None and (s.method, s.place) not in places]
    seconds = measured.remaining(Counter(pace_of(job.shared, spec) for spec in more)) or 0.0
    size = sum(path.stat().st_size for path in (store.folder / "trials.sqlite", *store.edits.iterdir()))
    return Estimate(
        dict(Counter((str(spec.arm), spec.method) for spec in specs)),
        len(done),
        _count_answers(job, left),
        _count_tokens(job, left),
        size * len(trials) // max(len(done), 1),
        sum(mean[pace_of(job.shared, spec)] for spec in trials) + seconds,
        sum(times[trial] - spent.get(trial, 0) for trial in done - before),
        _peak_bytes(job.shared.model),
        tuple(notes),
    )


def _count_answers(job: Job, specs: Sequence[TrialSpec]) -> int:
    return sum(len(find_lack(job.shared, spec)[1]) for spec in specs)


def _count_tokens(job: Job, specs: Sequence[TrialSpec]) -> int:
    config, shared = job.inputs.config, job.shared
    total = _count_answers(job, specs) * (config.evaluation.max_new_tokens or 0)
    for spec in specs:
        lacking = shared.only(find_lack(shared, spec)[0])
        names = run_splits(lacking, spec)
        total += sum(x.forest.n_tokens + len(x.forest.prefix) for x in map(lacking.splits.__getitem__, names))
        if spec.measured is None and spec.trial_id not in shared.kept:
            total += shared.drift.documents.numel() if shared.drift else 0
            total += getattr(config.methods.get(spec.method), "epochs", 0) * shared.training.forest.n_tokens
    return total


def _peak_bytes(model: Model) -> int:
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
