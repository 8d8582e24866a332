"""Compare two ways to do the same work: one process each, alternating rounds, median times and their ratio.

A task has several sides: ``ours`` and its peers. A side's function loads and prepares everything and returns a
`Prepared`; this is not part of the timing but reported separately. `Prepared.run` does the work once and returns an
`Outcome`; this is timed.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import tyro

from bench.command import Positive, machine, say, stated
from bench.work import Model, Question, Subject, load, questions

LEAST_SECONDS = 10.0
"""Shortest duration of one side's round. Machines change their speed within seconds; long rounds average this out."""

_QUIET = {
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Options:
    """What the measurement runs on; the same for both sides."""

    subject: tyro.conf.OmitArgPrefixes[Subject] = field(default_factory=Subject)
    questions: Positive | None = None
    """Number of questions (default: set by the task)."""
    where: Literal["all", "middle"] = "all"
    """Edited heads: all heads, or one head of the middle layer."""
    peer_batch: Positive | None = None
    """Batch size of the peer (default: set by the task)."""

    def load(self) -> tuple[Model, tuple[Question, ...]]:
        """The model and the questions."""
        return load(self.subject), questions(self.subject, self.questions or 1)


@dataclass(frozen=True)
class Outcome:
    """The result of one run."""

    units: int
    """Units of work done (pairs, answers, questions); must be the same for both sides."""
    values: dict[str, list[float]] = field(default_factory=dict)
    """Values that both sides must agree on, or that are only reported (see `Task.tolerances`)."""


@dataclass(frozen=True)
class Prepared:
    """A side that is ready to run."""

    run: Callable[[int], Outcome]
    """Does the work once. Its argument is the number of the round, which random sides use as a seed."""
    lm: Any
    """The underlying transformers model, whose weights and input tokens are counted."""
    check: Callable[[], dict[str, list[float]]] = dict
    """Computes more values about the last run, after the clock has stopped."""


@dataclass(frozen=True)
class Task:
    """Work that several sides can do, with its tolerances and target ratios."""

    name: str
    unit: str
    sides: Mapping[str, Callable[[Options], Prepared]]
    """Name -> function that prepares the side; ``ours`` first."""
    tolerances: Mapping[str, float] = field(default_factory=dict)
    """Name of a value -> largest elementwise difference allowed. Values not listed are only reported."""
    bars: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """(device, where) -> target ratio."""
    questions: int = 8
    smoke: int = 2
    """Number of questions in a smoke run."""


@dataclass(frozen=True)
class Round:
    """Measurements of one side in one round."""

    seconds: float
    """Mean seconds per run."""
    runs: int
    tokens: int
    """Input tokens of one run, padding included."""
    peak_bytes: int
    """Peak memory of the process during a run (CPU), or allocated on the device (CUDA)."""
    outcome: Outcome
    """Outcome of the last run."""


def compare(
    task: Task, peer: str, options: Options, *, rounds: int, least_seconds: float = LEAST_SECONDS
) -> dict[str, Any]:
    """Run ours and the peer in alternating rounds, after one uncounted warm-up run each. Returns a JSON-ready report.

    In a round, a side runs repeatedly for at least `least_seconds`; the round's time is the mean over these runs.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    found: dict[str, list[Round]] = {"ours": [], peer: []}
    facts = {}
    with ExitStack() as stack:
        context = multiprocessing.get_context("spawn")
        workers = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in found}
        for name, worker in workers.items():  # one at a time, so that they do not slow each other down
            say(f"{task.name}: preparing {name}")
            facts[name] = worker.submit(_prepare, task.sides[name], options).result()
        for number in range(-1, rounds):
            for name in list(workers)[:: 1 if number % 2 else -1]:  # alternate who goes first
                done = workers[name].submit(_round, number, least_seconds if number >= 0 else 0.0).result()
                what = "warm-up" if number < 0 else f"round {number + 1}"
                say(f"{task.name}: {what}, {name}: {done.seconds:.2f} s (runs: {done.runs})")
                found[name] += [done] * (number >= 0)
    return report(task, peer, options, found, facts)


def report(
    task: Task,
    peer: str,
    options: Options,
    found: Mapping[str, Sequence[Round]],
    facts: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """The JSON-ready report of one comparison; `facts` has the preparation time and weights of each side."""
    ours, theirs = found["ours"], found[peer]
    units = ours[0].outcome.units
    if units != theirs[0].outcome.units:
        raise RuntimeError(f"ours did {units} {task.unit}, {peer} did {theirs[0].outcome.units}: not the same work")
    medians = {name: statistics.median(r.seconds for r in rounds) for name, rounds in found.items()}
    ratios = [b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True)]
    return {
        "task": task.name,
        "peer": peer,
        "options": stated(options),
        "unit": task.unit,
        "units": units,
        "ratio": round(medians[peer] / medians["ours"], 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "bar": task.bars.get((options.subject.device, options.where)),
        "sides": {
            name: {
                "seconds": [round(r.seconds, 4) for r in rounds],
                "runs": [r.runs for r in rounds],
                "median_s": round(medians[name], 4),
                "units_per_s": round(units / medians[name], 4),
                "tokens": rounds[-1].tokens,
                "tokens_per_s": round(rounds[-1].tokens / medians[name], 1),
                "peak_mb": round(max(r.peak_bytes for r in rounds) / 2**20, 1),
                **facts[name],
            }
            for name, rounds in found.items()
        },
        "same": {key: _difference(key, limit, ours, theirs) for key, limit in task.tolerances.items()},
        "reported": {
            key: {name: [r.outcome.values.get(key, []) for r in rounds] for name, rounds in found.items()}
            for key in ours[0].outcome.values
            if key not in task.tolerances
        },
        "machine": machine(options.subject.device),
    }


def _difference(key: str, tolerance: float, ours: Sequence[Round], theirs: Sequence[Round]) -> dict[str, Any]:
    """Largest elementwise difference between the sides in one value, over all rounds. NaN never passes."""
    differences: list[float] = []
    for a, b in zip(ours, theirs, strict=True):
        if key not in a.outcome.values or key not in b.outcome.values:
            raise RuntimeError(f"{key}: a side did not report it")
        mine, peers = a.outcome.values[key], b.outcome.values[key]
        if len(mine) != len(peers):
            raise RuntimeError(f"{key}: ours has {len(mine)} values, the peer {len(peers)}: not the same work")
        differences += [abs(x - y) for x, y in zip(mine, peers, strict=True)]
    worst = max(differences, default=0.0) if all(map(math.isfinite, differences)) else math.nan
    n = len(ours[0].outcome.values[key])
    return {"n": n, "max_difference": worst, "tolerance": tolerance, "ok": worst <= tolerance}


_WORKER: list[Any] = []
"""State of a side's process: the `Prepared`, the token counter, whether it runs on CUDA."""


def _prepare(side: Callable[[Options], Prepared], options: Options) -> dict[str, float]:
    """Prepare a side in this process. Returns the seconds it took and the megabytes of its weights."""
    sys.stdout = sys.stderr  # keeps what peers print out of the JSON
    start = time.perf_counter()
    prepared = side(options)
    counted = [0]

    def count(_module, args):
        counted[0] += args[0].numel()

    prepared.lm.get_input_embeddings().register_forward_pre_hook(count)
    _WORKER[:] = [prepared, counted, options.subject.device.startswith("cuda")]
    weights = sum(p.numel() * p.element_size() for p in prepared.lm.parameters())
    return {"prepare_s": round(time.perf_counter() - start, 2), "weights_mb": round(weights / 2**20, 1)}


def _round(number: int, least_seconds: float) -> Round:
    prepared, counted, cuda = _WORKER
    return run_round(prepared, counted, cuda, number, least_seconds)


def run_round(prepared: Prepared, counted: list[int], cuda: bool, number: int, least_seconds: float) -> Round:
    """Run repeatedly for `least_seconds`, at least once. `counted` has the model's input tokens, counted by a hook."""
    seconds, runs, peak, outcome = 0.0, 0, 0, None
    while outcome is None or seconds < least_seconds:
        gc.collect()
        reset_peak(cuda)
        counted[0] = 0
        start = time.perf_counter()
        outcome = prepared.run(number)
        if cuda:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - start
        runs += 1
        peak = max(peak, peak_bytes(cuda))
    tokens = counted[0]  # `check` may run the model too
    outcome.values.update(prepared.check())
    return Round(seconds / runs, runs, tokens, peak, outcome)


def reset_peak(cuda: bool) -> None:
    """Reset the peak memory counter."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")


def peak_bytes(cuda: bool) -> int:
    """Peak memory in bytes since `reset_peak`; on systems other than Linux, since the process started."""
    if cuda:
        return torch.cuda.max_memory_allocated()
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for text in file:
            if text.startswith("VmHWM"):
                return int(text.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
