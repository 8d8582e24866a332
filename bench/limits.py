"""How close our work comes to what the machine can do at all.

    python -m bench.limits [--data FILE] [--dtype bfloat16] [--device cuda] [--out FILE]

Measured first: the machine's matrix rate (the best of a few square products in the model's dtype) and its memory
bandwidth (the best of reading and of copying a large array). Then each piece of work is run under PyTorch's counter of
floating-point operations, which counts the matrix products that really run (what runs twice counts twice), and timed
without it. No faster than

    max(operations / matrix rate, forwards x bytes of weights / bandwidth)

can the same operations be on this machine; the *share* is that bound over the time taken. What the machine does besides
(reading keys and values, norms, logarithms, tokenising) is left out of the bound.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bench.arguments import ending, parse, parser, positive
from bench.harness import Options, machine
from bench.tried import edit
from bench.work import load, questions
from locaudit.behaviours.format import Prompt, load_primer
from locaudit.edits import stack
from locaudit.linears import linear
from locaudit.location import Location
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.generation import generate_answers
from locaudit.measure.residual import Residuals
from locaudit.measure.tree import plant
from locaudit.memory import scoring_bank, training_bank
from locaudit.methods.training import BATCH_SIZES, Job, TrainingData, train
from locaudit.models import Model
from locaudit.models.load import DTYPES
from locaudit.start import tune_allocator

SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192, 16384)}
"""Sides of the matrices that the rate is measured on."""
BYTES = {"cpu": 2**29, "cuda": 2**33}
"""Of the array that the bandwidth is measured on: far more than caches hold."""


@dataclass(frozen=True)
class Work:
    """A piece of work that is timed."""

    name: str
    unit: str
    units: int
    run: Callable[[], Any]


def matrix_rate(device: str, dtype: torch.dtype, rounds: int = 5) -> float:
    """Floating-point operations a second of the best square product, by PyTorch's own or our kernel."""
    best = 0.0
    for n in SIZES[torch.device(device).type]:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        for product in (torch.matmul, linear):
            best = max(best, 2 * n**3 / _fastest(lambda a=a, b=b, p=product: p(a, b), device, rounds))
    return best


def bandwidth(device: str, rounds: int = 5) -> float:
    """Bytes a second, read (summing up) or read and written (copying), whichever is more."""
    x = torch.zeros(BYTES[torch.device(device).type] // 4, device=device)
    y = torch.empty_like(x)
    reading, copying = _fastest(x.sum, device, rounds), _fastest(lambda: y.copy_(x), device, rounds)
    return max(x.nbytes / reading, 2 * x.nbytes / copying)


def works(model: Model, options: Options) -> list[Work]:
    """Training, scoring and decoding, one edit at a time and as many as an audit takes together."""
    part = questions(options)
    forest = plant(model.tokenizer, Prompt(), [(q.text, q.answers) for q in part])
    primed = plant(model.tokenizer, Prompt(primer=load_primer("default")), [(q.text, q.answers) for q in part])
    reference = tuple(x[0] for x in answer_log_probs(model, forest))
    data = TrainingData(forest, tuple(len(q.true) for q in part), reference)
    middle = Location(((model.n_layers // 2, 0),))
    residuals = Residuals(model, forest)
    n_trained = training_bank(model, BATCH_SIZES["question"] * forest.n_tokens / len(forest.trees))

    def training(where: Location, n_edits: int) -> Work:
        def run() -> None:
            fits = train(model, data, [Job(where, 0.2, k) for k in range(n_edits)], epochs=1, residuals=residuals)
            assert all(fit.edit is not None for fit in fits)

        what = "all heads" if where == model.whole() else "one head of the middle layer"
        return Work(f"training {_edits(n_edits)}, {what}", "pairs", n_edits * sum(map(_n_pairs, part)), run)

    def scoring(n_edits: int) -> Work:
        bank = stack(model, [edit(model, k) for k in range(n_edits)])
        n_answers = n_edits * sum(len(q.answers) for q in part)
        return Work(f"scoring {_edits(n_edits)} behind the primer", "answers", n_answers,
                    lambda: answer_log_probs(model, primed, bank))  # fmt: skip

    def decoding(n_edits: int) -> Work:
        bank, prompts = stack(model, [edit(model, k) for k in range(n_edits)]), [tree.prompt for tree in primed.trees]
        return Work(f"decoding {_edits(n_edits)}", "questions", n_edits * len(prompts),
                    lambda: generate_answers(model, primed.prefix, prompts, bank, max_new_tokens=50))  # fmt: skip

    return [
        *(training(where, n) for where in (model.whole(), middle) for n in dict.fromkeys((1, n_trained))),
        *(make(n) for make in (scoring, decoding) for n in dict.fromkeys((1, scoring_bank(model)))),
    ]


def measure(model: Model, work: Work, rate: float, band: float, rounds: int) -> dict[str, Any]:
    """Operations, forwards and median seconds of the work, and its share of the bound."""
    device = str(model.device)
    work.run()  # what is read once and kept is no part of the work
    n_forwards, n_tokens = 0, 0

    def count(_module: Any, args: Any) -> None:
        nonlocal n_forwards, n_tokens
        n_forwards, n_tokens = n_forwards + 1, n_tokens + args[0].numel()

    embeddings = model.lm.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(count)  # type: ignore[union-attr]
    counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
    try:
        with counter:
            work.run()
    finally:
        handle.remove()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work.run()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    median, n_operations = statistics.median(seconds), counter.get_total_flops()
    bounds = {"matrix rate": n_operations / rate, "bandwidth": n_forwards * _weight_bytes(model) / band}
    by, bound = max(bounds.items(), key=lambda item: item[1])
    row: dict[str, Any] = {"work": work.name, "unit": work.unit, "units": work.units, "tokens": n_tokens}
    row |= {"forwards": n_forwards, "gflop": round(n_operations / 1e9, 3), "seconds": [round(s, 4) for s in seconds]}
    row |= {"median_s": round(median, 4), "units_per_s": round(work.units / median, 3)}
    row |= {f"share_of_{name.replace(' ', '_')}": round(x / median, 3) for name, x in bounds.items()}
    row |= {"bound_by": by, "share": round(bound / median, 3)}
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def _attention_forward(q, k, v, *args, **kwargs) -> int:  # shapes
    return sdpa_flop_count(q, k, v)


def _attention_backward(gradient, q, k, v, *args, **kwargs) -> int:
    return sdpa_backward_flop_count(gradient, q, k, v)


def _linear(x, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x) * weight[0]


UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Kernels on a CPU that PyTorch's counter leaves out."""
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    UNCOUNTED[torch.ops.mkldnn._linear_pointwise] = _linear


def _fastest(run: Callable[[], Any], device: str, rounds: int) -> float:
    """Seconds of the fastest of `rounds` runs, after one that is not counted."""
    seconds = []
    for _ in range(rounds + 1):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _weight_bytes(model: Model) -> int:
    """Bytes of weights that every decoding forward reads: the layers and the output head."""
    layers = sum(p.nbytes for i in range(model.n_layers) for p in model.layer(i).parameters())
    return layers + model.lm.get_output_embeddings().weight.nbytes  # type: ignore[union-attr, return-value]


def _n_pairs(question: Any) -> int:
    return len(question.true) * len(question.false)


def _edits(n: int) -> str:
    return "one edit" if n == 1 else f"{n} edits together"


def main() -> None:
    """Measure the machine and the work; print Markdown."""
    given = parser(__doc__)
    given.add_argument("--questions", type=positive, default=12)
    given.add_argument("--rounds", type=positive, default=3)
    args = parse(given)
    options = Options(args.model, args.dtype, args.device, args.data, args.questions)
    rate, band = matrix_rate(args.device, DTYPES[args.dtype]), bandwidth(args.device)
    facts = {"model": args.model, "dtype": args.dtype, "data": Path(args.data).name, "questions": args.questions}
    facts |= {"matrix_rate_gflop_per_s": round(rate / 1e9, 1), "bandwidth_gb_per_s": round(band / 1e9, 1)}
    print(json.dumps(facts), file=sys.stderr, flush=True)
    model = load(options)
    rows: list[dict[str, Any]] = []
    for work in works(model, options):
        rows.append(measure(model, work, rate, band, args.rounds))
        if args.out:  # after each: what was measured is kept
            report = {"facts": facts, "rows": rows, "machine": machine(args.device)}
            args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{args.dtype}: {rate / 1e9:.0f} GFLOP/s in square products, {band / 1e9:.1f} GB/s\n")
    print("| work | seconds | rate | GFLOP | share of the matrix rate | of the bandwidth | bound by |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["work"], f"{row['median_s']:.2f}", f"{row['units_per_s']:.1f} {row['unit']}/s"]
        cells += [f"{row['gflop']:.0f}", f"{row['share_of_matrix_rate']:.0%}", f"{row['share_of_bandwidth']:.0%}"]
        print(f"| {' | '.join(cells)} | {row['bound_by']} |")


if __name__ == "__main__":
    tune_allocator()
    ending(main)
