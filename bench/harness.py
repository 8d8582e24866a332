"""Two ways of doing the same work, side by side: a worker process for each, runs that alternate, medians and ratios.

A task has sides, ``ours`` and its peers. A side's function loads and prepares (not timed, reported apart) and returns
a `Prepared`; its `run` does the work once and returns an `Outcome` (timed).
"""

from __future__ import annotations

import gc
import importlib.metadata
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from locaudit.errors import LocauditError
from locaudit.start import VARIABLE, settings

PACKAGES = ("torch", "transformers", "locaudit", "trl", "peft", "lm-eval", "scikit-learn", "transformer-lens", "pyvene")


@dataclass(frozen=True)
class Options:
    """What is measured on; the same for both sides."""

    model: str = "smollm2-135m"
    """Name, folder or hub id; ``random-SIZE`` makes a Llama of that shape with random weights (see `models`)."""
    dtype: str = "float32"
    device: str = "cpu"
    data: str = "misconceptions"
    """Behaviour by name or file."""
    n_questions: int = 8
    where: str = "all"
    """Edited heads: ``all``, or ``middle`` for one head of the middle layer."""
    batch_size: int | None = None
    """Of the peer; None: what the task says."""
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a run did."""

    units: int
    """Units of work that were asked for (pairs, answers, questions): the same for both sides."""
    values: dict[str, list[float]] = field(default_factory=dict)
    """What both sides must agree on."""


@dataclass(frozen=True)
class Prepared:
    """A side that is ready to run."""

    run: Callable[[int], Outcome]
    """Does the work once; takes the number of the round, as a seed where a side is random."""
    lm: Any
    """The transformers model that runs underneath: its weights and the tokens it takes are counted."""
    check: Callable[[], dict[str, list[float]]] | None = None
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
    n_questions: int = 8
    smoke: int = 2
    """Questions of a smoke run."""


@dataclass
class _Record:
    prepare_s: float = 0.0
    seconds: list[float] = field(default_factory=list)
    """Of a run, the mean of each round."""
    runs: list[int] = field(default_factory=list)
    """In each round."""
    units: int = 0
    tokens: int = 0
    """Of one run, padding included."""
    peak_bytes: int = 0
    """Of the process while it ran (CPU), or allocated on the device (CUDA)."""
    weights_bytes: int = 0
    values: list[dict[str, list[float]]] = field(default_factory=list)


LEAST_SECONDS = 10.0
"""Of a round of one side: machines change their speed within seconds, which would tell on the faster side alone."""


def compare(
    task: Task,
    peer: str,
    options: Options,
    *,
    rounds: int,
    say: Callable[[str], None],
    least_seconds: float = LEAST_SECONDS,
) -> dict[str, Any]:
    """Run ours and the peer in turn, `rounds` times after one run each that is not counted; a JSON-ready report.

    A round's time is the mean over as many runs of one side as take `least_seconds`.
    """
    names = ["ours", peer]
    records = {name: _Record() for name in names}
    context = multiprocessing.get_context("spawn")
    workers = {}
    try:
        for name in names:  # one after the other: they would disturb each other
            say(f"{task.name}: preparing {name}")
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, task.name, name, options), daemon=True)
            with _started_as_ours() if name == "ours" else nullcontext():
                process.start()
            there.close()
            workers[name] = (here, process)
            records[name].prepare_s, records[name].weights_bytes = _receive(here, name)
        for number in range(-1, rounds):
            for name in names if number % 2 else reversed(names):
                here, _ = workers[name]
                here.send((number, least_seconds if number >= 0 else 0.0))
                seconds, runs, tokens, peak, outcome = _receive(here, name)
                what = "warm-up" if number < 0 else f"round {number + 1}"
                say(f"{task.name}: {what}, {name}: {seconds:.2f} s (runs: {runs})")
                if number >= 0:
                    record = records[name]
                    record.seconds.append(seconds)
                    record.runs.append(runs)
                    record.units, record.tokens = outcome.units, tokens
                    record.peak_bytes = max(record.peak_bytes, peak)
                    record.values.append(outcome.values)
    finally:
        for here, process in workers.values():
            with suppress(OSError):
                here.send(None)
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
    return report(task, peer, options, records)


@contextmanager
def _started_as_ours() -> Iterator[None]:
    """The environment in which the command line would run; the peer has what it would have without us."""
    given = settings()
    os.environ.update(given)
    try:
        yield
    finally:
        for name in given:
            del os.environ[name]


def report(task: Task, peer: str, options: Options, records: Mapping[str, _Record]) -> dict[str, Any]:
    """The JSON of one comparison."""
    ours, theirs = records["ours"], records[peer]
    if ours.units != theirs.units:
        raise RuntimeError(f"ours did {ours.units} {task.unit}, {peer} did {theirs.units}: not the same work")
    ratios = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
    sides = {}
    for name, record in records.items():
        median = statistics.median(record.seconds)
        sides[name] = {
            "seconds": [round(x, 4) for x in record.seconds],
            "runs": record.runs,
            "median_s": round(median, 4),
            f"{task.unit}_per_s": round(record.units / median, 4),
            "tokens": record.tokens,
            "tokens_per_s": round(record.tokens / median, 1),
            "peak_mb": round(record.peak_bytes / 2**20, 1),
            "weights_mb": round(record.weights_bytes / 2**20, 1),
            "prepare_s": round(record.prepare_s, 2),
        }
    ratio = statistics.median(theirs.seconds) / statistics.median(ours.seconds)
    return {
        "task": task.name,
        "peer": peer,
        "options": {**asdict(options), "data": Path(options.data).name},
        task.unit: ours.units,
        "ratio": round(ratio, 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "bar": task.bars.get((options.device, options.where)),
        "sides": sides,
        "same": _same(task, ours, theirs),
        "reported": _reported(task, ours, theirs),
        "machine": machine(options.device) | settings(),  # what ours alone was started with
    }


def _same(task: Task, ours: _Record, theirs: _Record) -> dict[str, dict[str, Any]]:
    out = {}
    for key, tolerance in task.tolerances.items():
        differences: list[float] = []
        for one, other in zip(ours.values, theirs.values, strict=True):
            if key not in one or key not in other:
                raise RuntimeError(f"{key}: a side did not say it")
            a, b = one[key], other[key]
            if len(a) != len(b):
                raise RuntimeError(f"{key}: ours has {len(a)} values, the peer {len(b)}: not the same work")
            differences += [abs(x - y) for x, y in zip(a, b, strict=True)]
        finite = all(map(math.isfinite, differences))
        worst = max(differences, default=0.0) if finite else math.nan
        ok = finite and worst <= tolerance
        n = len(ours.values[0][key])
        out[key] = {"n": n, "max_difference": worst, "tolerance": tolerance, "ok": ok}
    return out


def _reported(task: Task, ours: _Record, theirs: _Record) -> dict[str, dict[str, list[list[float]]]]:
    keys = [key for key in (ours.values[0] if ours.values else {}) if key not in task.tolerances]
    return {
        key: {"ours": [v[key] for v in ours.values], "peer": [v[key] for v in theirs.values if key in v]}
        for key in keys
    }


def _receive(here, name: str) -> Any:
    try:
        kind, value = here.recv()
    except EOFError:
        raise RuntimeError(f"the worker of {name} ended without a word (killed for memory?)") from None
    if kind == "refused":
        raise SystemExit(f"error: {value}")
    if kind == "error":
        raise RuntimeError(f"the worker of {name} failed:\n{value}")
    return value


def _serve(pipe, task_name: str, side: str, options: Options) -> None:
    """A worker: prepare, then run whenever asked."""
    try:
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ["LOCAUDIT_CACHE"] = "off"
        sys.stdout = sys.stderr  # peers print
        from bench.tasks import TASKS

        start = time.perf_counter()
        prepared = TASKS[task_name].sides[side](options)
        counted = _count_tokens(prepared.lm)
        weights = sum(p.numel() * p.element_size() for p in prepared.lm.parameters())
        pipe.send(("ready", (time.perf_counter() - start, weights)))
        while (asked := pipe.recv()) is not None:
            pipe.send(("done", _round(prepared, *asked, counted, options.device.startswith("cuda"))))
    except (EOFError, KeyboardInterrupt):
        pass
    except LocauditError as error:
        pipe.send(("refused", str(error)))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))


def _round(
    prepared: Prepared, number: int, least_seconds: float, counted: list[int], cuda: bool
) -> tuple[float, int, int, int, Outcome]:
    """Mean seconds, runs, tokens of one, most bytes of all, and what the last gave."""
    seconds, runs, peak, outcome = 0.0, 0, 0, None
    while outcome is None or seconds < least_seconds:
        gc.collect()
        reset_peak(cuda)
        counted[0] = 0
        start = time.perf_counter()
        outcome = prepared.run(number)
        if cuda:
            import torch

            torch.cuda.synchronize()
        seconds += time.perf_counter() - start
        runs += 1
        peak = max(peak, peak_bytes(cuda))
    tokens = counted[0]
    if prepared.check is not None:
        outcome.values.update(prepared.check())
    return seconds / runs, runs, tokens, peak, outcome


def _count_tokens(lm) -> list[int]:
    counted = [0]

    def count(_module, args):
        counted[0] += args[0].numel()

    lm.get_input_embeddings().register_forward_pre_hook(count)
    return counted


def reset_peak(cuda: bool) -> None:
    """Start a new peak of memory."""
    if cuda:
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")


def peak_bytes(cuda: bool) -> int:
    """Peak since `reset_peak` (Linux; elsewhere of the whole process)."""
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated()
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine(device: str) -> dict[str, Any]:
    """Facts about where and with what was measured."""
    import torch

    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    cpu = platform.processor() or platform.machine()
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()),
        "tunables": os.environ.get(VARIABLE, ""),
        "preloaded": [Path(name).name for name in os.environ.get("LD_PRELOAD", "").split()],
        "versions": versions,
    }
