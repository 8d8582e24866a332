"""How the cost of a trial scales: seconds and memory as one size varies, with fitted exponents.

    python -m bench.scaling --out docs/scaling

A trial is one optimal edit: it is trained for one epoch (IPO) and scores the same questions. The sizes are questions,
answers per question, trials, heads in the location, and parameters that run for each token (three Llamas with random
weights). An exponent is the least-squares slope of log cost against log size. Memory is the peak during a trial minus
what the process held before it. --out is a path without suffix; .json and .png are written.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from bench.command import Positive, check_out, header, line, machine, run, say, stated, write_json
from bench.harness import peak_bytes, reset_peak
from bench.work import (
    TAU,
    Job,
    Location,
    Model,
    Question,
    Residuals,
    Subject,
    heads,
    load,
    log_probs,
    questions,
    train,
    training_data,
)

SIZES = {
    "questions": (4, 8, 16, 32),
    "answers a question": (4, 8, 16, 32),
    "trials": (1, 2, 4),
    "heads": (1, 9, 45, 270),
    "parameters": (9, 30, 135),
}
"""Name of a size -> values tried. When another size varies, there are four questions."""


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    subject: tyro.conf.OmitArgPrefixes[Subject] = field(default_factory=Subject)
    rounds: Positive = 3
    smoke: bool = False
    """Only the two smallest values of each size, and one round."""
    only: Literal["questions", "answers a question", "trials", "heads", "parameters"] | None = None
    """Vary only this size and draw no figure."""
    out: Path | None = None
    """Output path without suffix."""


@dataclass(frozen=True)
class Point:
    """The cost of a trial at one value of one size."""

    against: str
    size: float
    seconds: float
    peak_mb: float


def main(given: Settings) -> None:
    """Measure all points, fit the exponents, print and draw them."""
    check_out(given.out)
    given.subject.check()
    found: dict[str, list[Point]] = {name: [] for name in SIZES if given.only in (None, name)}
    model, cuda = load(given.subject), given.subject.device.startswith("cuda")
    for name, points in found.items():
        for n in SIZES[name][: 2 if given.smoke else None]:
            size, trial = make_trial(given.subject, model, name, n)
            points.append(measure(name, size, trial, 1 if given.smoke else given.rounds, cuda))
            say(json.dumps(asdict(points[-1])))
    print(header("against", "sizes", "seconds per trial", "exponent", "MB above the weights", "exponent"))
    for name, points in found.items():
        sizes, seconds, memory = columns(points)
        cells = [name, _listed(sizes, ".4g"), _listed(seconds, ".2f"), f"{exponent(sizes, seconds):.2f}"]
        print(line([*cells, _listed(memory, ".0f"), f"{exponent(sizes, memory):.2f}"]))
    if given.out:
        rows = [asdict(point) for points in found.values() for point in points]
        report = {"options": stated(given), "rows": rows, "machine": machine(given.subject.device)}
        write_json(given.out.with_suffix(".json"), report)
        if not given.only:
            draw(found, given.out.with_suffix(".png"))


def make_trial(subject: Subject, model: Model, against: str, n: int) -> tuple[float, Callable[[], None]]:
    """The size that `n` stands for, and a function that trains and scores one edit (or n edits in turn)."""
    if against == "parameters":
        model = load(replace(subject, model=f"random-{n}m"))
    asked = questions(subject, n if against == "questions" else 4)
    if against == "answers a question":
        asked = with_answers(asked, n)
    # A location always begins in the first layer: where it begins matters, its size does not.
    where = Location(tuple(heads(model)[:n])) if against == "heads" else Location.whole()
    data = training_data(model, asked)

    def trial() -> None:
        residuals = Residuals(model, data.forest)
        for seed in range(n if against == "trials" else 1):
            (fit,) = train(model, data, [Job(where, TAU, seed)], epochs=1, residuals=residuals)
            assert fit.edit is not None, fit.message
            log_probs(model, data.forest, [fit.edit], residuals)

    return {"parameters": n_running(model) / 1e6, "heads": min(n, len(heads(model)))}.get(against, n), trial


def with_answers(part: Sequence[Question], n: int) -> list[Question]:
    """The questions with n answers each, half of them true, taken from all answers and numbered to be distinct."""
    spare = [answer for question in part for answer in question.answers]
    out = []
    for number, question in enumerate(part):
        texts = [f"{spare[(7 * number + i) % len(spare)].rstrip('.')}, {i}." for i in range(n)]
        out.append(replace(question, true=tuple(texts[: n // 2]), false=tuple(texts[n // 2 :]), best=None))
    return out


def n_running(model: Model) -> int:
    """Number of parameters that multiply each token: all but an input embedding that is not tied to the output head."""
    lm: Any = model.lm
    inputs, outputs = lm.get_input_embeddings(), lm.get_output_embeddings()
    n = sum(parameter.numel() for parameter in lm.parameters())
    return n if inputs.weight is outputs.weight else n - inputs.weight.numel()


def measure(against: str, size: float, trial: Callable[[], None], rounds: int, cuda: bool) -> Point:
    """Median seconds and median peak memory above the level before the trial; the first run is not counted."""
    seconds, peaks = [], []
    for number in range(rounds + 1):
        gc.collect()
        with suppress(OSError, AttributeError):  # return freed memory to the system, or it would hide the next peak
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        reset_peak(cuda)
        before, start = peak_bytes(cuda), time.perf_counter()
        trial()
        if number:
            seconds.append(time.perf_counter() - start)
            peaks.append((peak_bytes(cuda) - before) / 2**20)
    return Point(against, size, round(statistics.median(seconds), 4), round(statistics.median(peaks), 3))


def columns(points: Sequence[Point]) -> np.ndarray:
    """Sizes, seconds and megabytes: (3, points)."""
    return np.array([[p.size, p.seconds, max(p.peak_mb, 0.001)] for p in points]).T


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of log cost against log size."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def draw(found: dict[str, list[Point]], path: Path) -> None:
    """Plot seconds and memory against each size on log-log axes, with fitted lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, axes = plt.subplots(2, len(found), figsize=(2.6 * len(found), 4.8), sharey="row", layout="constrained")
    for column, (name, points) in zip(axes.T, found.items(), strict=True):
        sizes, *rows = columns(points)
        for ax, costs, colour in zip(column, rows, ("#0072B2", "#D55E00"), strict=True):
            slope, level = np.polyfit(np.log(sizes), np.log(costs), 1)
            ax.loglog(sizes, costs, "o", color=colour)
            ax.loglog(sizes, np.exp(level) * sizes**slope, "-", color=colour, linewidth=1)
            ax.set_title(f"exponent {slope:.2f}", fontsize=9)
            ax.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
            ax.minorticks_off()
            ax.spines[["top", "right"]].set_visible(False)
        column[1].set_xlabel("parameters (millions)" if name == "parameters" else name)
    axes[0][0].set_ylabel("seconds per trial")
    axes[1][0].set_ylabel("memory above weights (MB)")
    drawing.savefig(path, dpi=150)
    plt.close(drawing)


def _listed(values: Sequence[float], form: str) -> str:
    return ", ".join(format(value, form) for value in values)


if __name__ == "__main__":
    run(main, Settings, __doc__)
