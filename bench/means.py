"""Each means of speed alone: with it, and without it, in one process, alternating.

    python -m bench.means [--data FILE] [--out docs/performance-means.json]

What is switched off is switched off here, not in the library: plain PyTorch and transformers in its place.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from bench.arguments import ending, parse, parser, positive
from bench.harness import Options, machine
from bench.switches import means
from bench.tried import Mean
from locaudit.start import tune_allocator


def measure(mean: Mean, rounds: int) -> dict[str, Any]:
    """Medians of alternating runs, after one of each that is not counted."""
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    first = {}
    for number in range(-1, rounds):
        for name, run in (("with", mean.with_it), ("without", mean.without))[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            run()
            if number < 0:
                first[f"first_{name}_s"] = round(time.perf_counter() - start, 3)
            else:
                seconds[name].append(time.perf_counter() - start)
    a, b = (statistics.median(seconds[name]) for name in ("with", "without"))
    ratios = [y / x for x, y in zip(seconds["with"], seconds["without"], strict=True)]
    predicted = None if mean.predicted is None else round(mean.predicted, 2)
    row: dict[str, Any] = {"mean": mean.name, "work": mean.work, "predicted": predicted}
    row |= {"with_s": round(a, 3), "without_s": round(b, 3)}
    row |= {"ratio": round(b / a, 2), "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)]}
    row |= first
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def main() -> None:
    """Measure all means and print them as Markdown."""
    given = parser(__doc__)
    given.add_argument("--questions", type=positive, default=12)
    given.add_argument("--rounds", type=positive, default=3)
    given.add_argument("--only", nargs="*", default=[], help="means whose name has one of these in it")
    args = parse(given)
    options = Options(args.model, args.dtype, args.device, args.data, args.questions)
    facts: dict[str, Any] = {
        "model": args.model,
        "dtype": args.dtype,
        "data": Path(args.data).name,
        "questions": args.questions,
    }
    facts |= {"only": args.only} if args.only else {}
    rows: list[dict[str, Any]] = []
    for mean in means(options):
        if not args.only or any(part in mean.name for part in args.only):
            rows.append(measure(mean, args.rounds))
            if args.out:  # after each: what was measured is kept
                report = {"facts": facts, "rows": rows, "machine": machine(args.device)}
                args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("| means | measured on | predicted | measured (rounds) | with it (s) | without (s) |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["ratio_range"]
        measured = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
        cells = [row["mean"], row["work"], str(row["predicted"] or ""), measured]
        print(f"| {' | '.join(cells)} | {row['with_s']:.2f} | {row['without_s']:.2f} |")


if __name__ == "__main__":
    tune_allocator()
    ending(main)
