"""How the time of an audit falls with the number of workers: measured on this machine, and modelled beyond it.

    python -m bench.workers --measure 1 2       # audits without workers, and with so many, of one thread each
    python -m bench.workers                     # the model only

The model schedules the trials of an audit as `locaudit.run` does: a free worker takes the next group of the plan. It
has these numbers: trials and their mean seconds, the spread of trial times (standard deviation over mean, log-normal),
seconds until a worker has loaded the model, and seconds that the driver spends on each trial (storing and judging it),
one after another. With ``curtailed``, controls end as `locaudit.stats.sequential.Monitor` says, fed in the order in
which results arrive; what ran by then and was not needed is in vain. Minutes are means over random audits.
"""

from __future__ import annotations

import heapq
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
import torch
import tyro

from bench.command import Positive, header, line, run
from bench.work import Subject
from locaudit.config import AuditConfig, merge_config
from locaudit.records import Place
from locaudit.run.audit import run_audit
from locaudit.stats.sequential import LEAST, Monitor, Rule
from locaudit.store.run import load_run

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
WORTH = 0.1
"""More workers help as long as twice as many save more than this share of the time."""
REACHES = (0.02, 0.2, 0.5)
"""Share of random places that do as well as the claim, in audits with early stopping."""


@dataclass(frozen=True)
class Model:
    """What an audit costs."""

    controls: Positive = 99
    per_control: Positive = 10
    """Trials at each control: methods times strengths."""
    before: Positive = 41
    """Trials before the controls: the unedited model, claim, whole model, rest and placebos."""
    seconds: float = 60.0
    """Mean seconds of a trial."""
    spread: float = 0.3
    """Standard deviation of the seconds of a trial, over their mean."""
    loading: float = 20.0
    """Seconds until a worker can begin its first trial."""
    driver: float = 0.05
    """Seconds of the driver for each trial."""


@dataclass(frozen=True)
class Settings:
    """What to measure and to model."""

    subject: tyro.conf.OmitArgPrefixes[Subject] = field(default_factory=Subject)
    measure: tuple[Positive, ...] = ()
    """Numbers of workers for which a small audit is run, after one without workers. Empty: none."""
    model: Model = field(default_factory=Model)
    waves: bool = True
    """Whether controls wait for results as in `locaudit.run.stopping`. False: every free worker begins the next one."""
    rounds: Positive = 50
    """Random audits over which the model's seconds are averaged."""


def main(given: Settings) -> None:
    """Print what was measured, then what the model gives."""
    if given.measure:
        print(header("workers", "seconds", "before the first trial", "seconds per trial", "spread", "trials"))
        for n in (0, *given.measure):
            print(line([n, *measure(given.subject, n)]), flush=True)
        print()
    print(header("workers", "all controls: minutes", "speed-up", "busy", *(
        f"{100 * share:g} % of places as good: minutes, trials in vain" for share in REACHES)))  # fmt: skip
    found = [simulate(given.model, n, "fixed", 0.5, given.rounds) for n in WORKERS]
    stopped = [
        [simulate(given.model, n, "curtailed", share, given.rounds, given.waves) for share in REACHES] for n in WORKERS
    ]
    for n, (seconds, work, _), early in zip(WORKERS, found, stopped, strict=True):
        cells = [f"{seconds / 60:.1f}", f"{found[0][0] / seconds:.1f}", f"{100 * work / (n * seconds):.0f} %"]
        print(line([n, *cells, *(f"{time_ / 60:.1f}, {vain:.0f}" for time_, _, vain in early)]))
    enough = next((n for n, (a, *_), (b, *_) in zip(WORKERS, found, found[1:], strict=False) if b > (1 - WORTH) * a), 0)
    print(f"\nTwice as many workers save less than {100 * WORTH:g} % of the time from {enough or 'more than 1024'} on.")


def simulate(
    model: Model, n_workers: int, rule: Rule, reaches: float, rounds: int, waves: bool = True
) -> tuple[float, float, float]:
    """Mean over random audits of: seconds, seconds in which workers run trials, and trials that were not needed."""
    rng, sigma = np.random.default_rng(0), np.sqrt(np.log1p(model.spread**2))
    n_trials, found = model.before + model.controls * model.per_control, []
    for _ in range(rounds):
        seconds = model.seconds * np.exp(sigma * rng.standard_normal(n_trials) - sigma**2 / 2)
        scores = (rng.random(model.controls) < reaches) - 0.5  # the claim's is 0
        monitor, left = Monitor(rule, model.controls, 0.05), [model.per_control] * model.controls
        monitor.add(Place("claim"), 0.0)
        now, n_begun, running = model.loading, 0, []
        while True:
            is_first = n_begun >= model.before and not (n_begun - model.before) % model.per_control
            has_more = n_begun < n_trials and not (is_first and monitor.state != "open")
            ahead = (n_begun - model.before) // model.per_control - monitor.seen.n
            may_begin = rule == "fixed" or not waves or ahead < max(monitor.seen.n, LEAST) or not running
            if has_more and len(running) < n_workers and may_begin:
                heapq.heappush(running, (now + seconds[n_begun], n_begun))
                n_begun += 1
            elif running:
                end, number = heapq.heappop(running)
                now = max(now, end) + model.driver  # the driver stores one result after another
                if number >= model.before:
                    control = (number - model.before) // model.per_control
                    left[control] -= 1
                    if not left[control]:
                        monitor.add(Place("control", control), float(scores[control]))
            else:
                break
        needed = model.before + monitor.seen.n * model.per_control
        found.append((now, seconds[:n_begun].sum(), n_begun - needed))
    return tuple(map(fmean, zip(*found, strict=True)))  # type: ignore[return-value]


def measure(subject: Subject, n_workers: int) -> tuple[str, str, str, str, int]:
    """Run an audit with so many workers of one thread, or in this process (0).

    Returns its seconds, those before the first trial began, those of a trial, their spread, and the number of trials.
    """
    torch.set_num_threads(1)
    values = {
        "model": subject.model, "behaviour": subject.data, "controls": 12, "nulls": ["anywhere"], "rest": False,
        "placebos": 0, "widen": 0, "score": "mc2", "split": {"max_train": 8, "max_val": 4, "max_test": 16},
        "methods": {"optimal": {"strengths": [0.2], "epochs": 2, "bank_size": 1}},
        "evaluation": {"max_new_tokens": 0, "bank_size": 1, "drift_documents": 2, "drift_tokens": 32},
        "loading": {"dtype": subject.dtype, "device": subject.device},
        "ray": {"workers": n_workers, "cpus_per_worker": 1} if n_workers else {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        run_audit(merge_config(AuditConfig(), values), Path(folder) / "run", progress=False)
        total, seconds = time.monotonic() - started, [*load_run(Path(folder) / "run").seconds.values()][1:]
    alone = total - sum(seconds) / max(n_workers, 1)
    spread = pstdev(seconds) / fmean(seconds)
    return f"{total:.0f}", f"{alone:.0f}", f"{fmean(seconds):.1f}", f"{spread:.2f}", len(seconds)


if __name__ == "__main__":
    run(main, Settings, __doc__)
