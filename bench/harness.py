"""Two ways of doing the same work, side by side: a process for each, rounds that alternate, medians and ratios.

A task has sides, ``ours`` and its peers. A side's function loads and prepares (not timed, reported apart) and returns
a `Prepared`; its `run` does the work once and returns an `Outcome` (timed).
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
"""Of a round of one side: machines change their speed within seconds, which would tell on the faster side alone."""

_QUIET = {
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Options:
    """What is measured on; the same for both sides."""

    subject: tyro.conf.OmitArgPrefixes[Subject] = field(default_factory=Subject)
    questions: Positive | None = None
    """Default: what the task says."""
    where: Literal["all", "middle"] = "all"
    """Edited heads: all, or one head of the middle layer."""
    peer_batch: Positive | None = None
    """Batch size of the peer (default: what its benchmark says)."""

    def load(self) -> tuple[Model, tuple[Question, ...]]:
        """The model and the questions."""
        return load(self.subject), questions(self.subject, self.questions or 1)


@dataclass(frozen=True)
class Outcome:
    """What a run did."""

    units: int
    """Units of work that were asked for (pairs, answers, questions): the same for both sides."""
    values: dict[str, list[float]] = field(default_factory=dict)
    """What both sides must agree on, or what is only reported."""


@dataclass(frozen=True)
class Prepared:
    """A side that is ready to run."""

    run: Callable[[int], Outcome]
    """Does the work once; takes the number of the round, as a seed where a side is random."""
    lm: Any
    """The transformers model that runs underneath: its weights and the tokens it takes are counted."""
    check: Callable[[], dict[str, list[float]]] = dict
    """More values about the last run, computed when the clock has stopped."""


@dataclass(frozen=True)
class Task:
    """Work that several sides can do."""

    name: str
    unit: str
    sides: Mapping[str, Callable[[Options], Prepared]]
    """``ours`` first."""
    tolerances: Mapping[str, float] = field(default_factory=dict)
    """Value -> largest difference between two sides, elementwise. Values without one are only reported."""
    bars: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """(device, where) -> ratio that is aimed at."""
    questions: int = 8
    smoke: int = 2
    """Questions of a smoke run."""


@dataclass(frozen=True)
class Round:
    """What a side did in one round."""

    seconds: float
    """Of a run, the mean."""
    runs: int
    tokens: int
    """Of one run, padding included."""
    peak_bytes: int
    """Of the process while it ran (CPU), or allocated on the device (CUDA)."""
    outcome: Outcome
    """Of the last run."""


def compare(
    task: Task, peer: str, options: Options, *, rounds: int, least_seconds: float = LEAST_SECONDS
) -> dict[str, Any]:
    """Run ours and the peer in turn, `rounds` times after one run each that is not counted; a JSON-ready report.

    A round's time is the mean over as many runs of one side as take `least_seconds`.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    found: dict[str, list[Round]] = {"ours": [], peer: []}
    facts = {}
    with ExitStack() as stack:
        context = multiprocessing.get_context("spawn")
        workers = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in found}
        for name, worker in workers.items():  # one after the other: they would disturb each other
            say(f"{task.name}: preparing {name}")
            facts[name] = worker.submit(_prepare, task.sides[name], options).result()
        for number in range(-1, rounds):
            for name in list(workers)[:: 1 if number % 2 else -1]:
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
    """The JSON of one comparison; `facts` are what preparing each side said."""
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
    """The largest difference of one value between the sides, over all rounds; never a pass where something is NaN."""
    differences: list[float] = []
    for a, b in zip(ours, theirs, strict=True):
        if key not in a.outcome.values or key not in b.outcome.values:
            raise RuntimeError(f"{key}: a side did not say it")
        mine, peers = a.outcome.values[key], b.outcome.values[key]
        if len(mine) != len(peers):
            raise RuntimeError(f"{key}: ours has {len(mine)} values, the peer {len(peers)}: not the same work")
        differences += [abs(x - y) for x, y in zip(mine, peers, strict=True)]
    worst = max(differences, default=0.0) if all(map(math.isfinite, differences)) else math.nan
    n = len(ours[0].outcome.values[key])
    return {"n": n, "max_difference": worst, "tolerance": tolerance, "ok": worst <= tolerance}


_WORKER: list[Any] = []
"""In a side's process: what is prepared, the count of tokens, whether it runs on CUDA."""


def _prepare(side: Callable[[Options], Prepared], options: Options) -> dict[str, float]:
    """Make this process the one of a side; seconds and megabytes of weights."""
    sys.stdout = sys.stderr  # peers print
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
    return run_round(*_WORKER, number, least_seconds)


def run_round(prepared: Prepared, counted: list[int], cuda: bool, number: int, least_seconds: float) -> Round:
    """Run until `least_seconds` are over, at least once; `counted` grows by the tokens that the model takes."""
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
    """Start a new peak of memory."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")


def peak_bytes(cuda: bool) -> int:
    """Peak since `reset_peak` (Linux; elsewhere of the whole process)."""
    if cuda:
        return torch.cuda.max_memory_allocated()
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for text in file:
            if text.startswith("VmHWM"):
                return int(text.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
