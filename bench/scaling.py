"""How the cost of a trial grows: seconds and memory against one size at a time, with fitted exponents.

    python -m bench.scaling --out docs/scaling

A trial is one optimal edit: training for one epoch (IPO) and scoring the same questions. Sizes: questions, answers a
question, trials, heads in the location, and the parameters that run for a token (three Llamas with random weights).
Each exponent is the slope of log cost against log size, by least squares; memory is the peak while the trial runs,
above what the process held before it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.arguments import ending, parse, parser, positive
from bench.harness import Options, machine, peak_bytes, reset_peak
from bench.work import load, questions
from locaudit.behaviours import Question
from locaudit.behaviours.format import Prompt
from locaudit.edits import stack
from locaudit.location import Location
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.residual import Residuals
from locaudit.measure.tree import plant
from locaudit.methods.training import Job, TrainingData, train
from locaudit.models import Model
from locaudit.start import tune_allocator

MODELS = ("random-9m", "random-30m", "random-135m")


def trial(model: Model, part: tuple[Question, ...], where: Location, n_trials: int = 1) -> Callable[[], None]:
    """A closure that trains and scores `n_trials` edits, one after the other."""
    forest = plant(model.tokenizer, Prompt(), [(q.text, q.answers) for q in part])
    reference = tuple(x[0] for x in answer_log_probs(model, forest))
    data = TrainingData(forest, tuple(len(q.true) for q in part), reference)

    def run() -> None:
        residuals = Residuals(model, forest)
        for seed in range(n_trials):
            (fit,) = train(model, data, [Job(where, 0.2, seed)], epochs=1, residuals=residuals)
            assert fit.edit is not None, fit.message
            answer_log_probs(model, forest, stack(model, [fit.edit]), residuals=residuals)

    return run


def with_answers(part: tuple[Question, ...], n: int) -> tuple[Question, ...]:
    """The questions with n answers each, half of them true: others' answers fill up, made distinct by a number."""
    spare = [answer for question in part for answer in question.answers]
    out = []
    for number, question in enumerate(part):
        texts = [f"{spare[(7 * number + i) % len(spare)].rstrip('.')}, {i}." for i in range(n)]
        out.append(replace(question, true=tuple(texts[: n // 2]), false=tuple(texts[n // 2 :]), best=None))
    return tuple(out)


def measure(run: Callable[[], None], rounds: int, cuda: bool) -> tuple[float, float]:
    """Median seconds, and peak bytes above what was held before; one run before is not counted."""
    seconds, peaks = [], []
    for number in range(rounds + 1):
        _give_back()
        reset_peak(cuda)
        before, start = peak_bytes(cuda), time.perf_counter()
        run()
        if number:
            seconds.append(time.perf_counter() - start)
            peaks.append(peak_bytes(cuda) - before)
    return statistics.median(seconds), statistics.median(peaks)


def _give_back() -> None:
    """Free memory goes back to the system, so that the next peak is not hidden in what was held before."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def exponent(sizes: list[float], costs: list[float]) -> float:
    """Slope of log cost against log size."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def curves(options: Options, smoke: bool) -> dict[str, list[tuple[float, Callable[[], Callable[[], None]]]]]:
    """Name of the size -> (size, maker of the run)."""
    ns = (2, 4) if smoke else (4, 8, 16, 32)
    model = load(options)
    part = questions(options, max(ns))
    few, one = part[: ns[0]], model.whole()
    heads = (1, 4) if smoke else (1, 9, 45, len(one))
    out: dict[str, list[tuple[float, Callable[[], Callable[[], None]]]]] = {
        "questions": [(n, lambda n=n: trial(model, part[:n], one)) for n in ns],
        "answers a question": [(a, lambda a=a: trial(model, with_answers(few, a), one)) for a in (4, 8, 16, 32)],
        "trials": [(k, lambda k=k: trial(model, few, one, k)) for k in (1, 2, 4)],
        # Always with the first layer: where the location begins matters, its size does not.
        "heads": [(h, lambda h=h: trial(model, few, Location(one.units[:h]))) for h in heads],
    }
    names = MODELS[:2] if smoke else MODELS
    out["parameters"] = []
    for name in names:
        other = load(replace(options, model=name))
        size = (sum(p.numel() for p in other.lm.parameters()) - _n_embedded(other)) / 1e6
        out["parameters"].append((size, lambda m=other: trial(m, few, m.whole())))
    return out


def _n_embedded(model: Model) -> int:
    """Parameters that no token is multiplied with: the input embedding, where the output head has its own."""
    inputs, outputs = model.lm.get_input_embeddings(), model.lm.get_output_embeddings()
    return 0 if inputs.weight is outputs.weight else inputs.weight.numel()  # type: ignore[union-attr]


def figure(rows: list[dict[str, Any]], fits: dict[str, dict[str, float]], path: Path) -> None:
    """Seconds and memory against each size, log-log, with the exponents."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(fits)
    drawing, axes = plt.subplots(2, len(names), figsize=(2.6 * len(names), 4.8), sharey="row", layout="constrained")
    for column, name in enumerate(names):
        chosen = [row for row in rows if row["against"] == name]
        sizes = [row["size"] for row in chosen]
        for line, (key, scale, colour) in enumerate((("seconds", 1, "#0072B2"), ("peak_bytes", 2**-20, "#D55E00"))):
            ax, values = axes[line][column], [max(row[key], 1e-3) * scale for row in chosen]
            ax.loglog(sizes, values, "o", color=colour)
            slope, level = np.polyfit(np.log(sizes), np.log(values), 1)
            ax.loglog(sizes, np.exp(level) * np.array(sizes) ** slope, "-", color=colour, linewidth=1)
            ax.set_title(f"exponent {fits[name][key]:.2f}", fontsize=9)
            ax.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
            ax.minorticks_off()
            ax.spines[["top", "right"]].set_visible(False)
        axes[1][column].set_xlabel("parameters (millions)" if name == "parameters" else name)
    axes[0][0].set_ylabel("seconds a trial")
    axes[1][0].set_ylabel("memory above weights (MB)")
    drawing.savefig(path, dpi=150)
    plt.close(drawing)


def main() -> None:
    """Measure, fit, draw."""
    given = parser(__doc__ + "\n--out is a path without suffix: .json and .png are written.")
    given.add_argument("--rounds", type=positive, default=3)
    given.add_argument("--smoke", action="store_true", help="the smallest sizes and one round")
    given.add_argument("--only", help="one size, such as 'questions', and no figure")
    args = parse(given)
    options = Options(args.model, args.dtype, args.device, args.data)
    rows: list[dict[str, Any]] = []
    found = curves(options, args.smoke)
    if args.only not in (None, *found):
        given.error(f"--only {args.only!r}: one of {', '.join(found)} was expected")
    for name, points in found.items():
        if args.only not in (None, name):
            continue
        for size, make in points:
            seconds, peak = measure(make(), 1 if args.smoke else args.rounds, args.device.startswith("cuda"))
            rows.append({"against": name, "size": size, "seconds": round(seconds, 4), "peak_bytes": int(peak)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    fits = {}
    for name in dict.fromkeys(row["against"] for row in rows):
        chosen = [row for row in rows if row["against"] == name]
        fits[name] = {
            key: round(exponent([row["size"] for row in chosen], [max(row[key], 1e-3) for row in chosen]), 2)
            for key in ("seconds", "peak_bytes")
        }
    print("| against | sizes | seconds | exponent | MB | exponent |\n|---|---|---|---|---|---|")
    for name, fit in fits.items():
        chosen = [row for row in rows if row["against"] == name]
        cells = [
            ", ".join(f"{row['size']:.4g}" for row in chosen),
            ", ".join(f"{row['seconds']:.2f}" for row in chosen),
            f"{fit['seconds']:.2f}",
            ", ".join(f"{row['peak_bytes'] / 2**20:.0f}" for row in chosen),
            f"{fit['peak_bytes']:.2f}",
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    if args.out:
        report = {"options": vars(args) | {"out": None, "data": Path(args.data).name}, "rows": rows, "exponents": fits}
        report["machine"] = machine(args.device)
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if not args.only:
            figure(rows, fits, args.out.with_suffix(".png"))


if __name__ == "__main__":
    tune_allocator()
    ending(main)
