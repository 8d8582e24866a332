"""How long the paper's whole study would take on a model of a given shape, from measured samples of its work.

    python -m bench.grid --model random-7b --dtype bfloat16 --device cuda --data TruthfulQA.csv

It is ``locaudit paper --dry-run`` on a benchmark's model, whose weights may be random, with training on answer trees
(``--batching pair`` for the paper's pairs). Random weights never end an answer, so that decoding is timed at its
longest.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from bench.arguments import ending, parse, parser
from bench.harness import Options, machine
from bench.work import load
from locaudit.studies.paper.config import PRESETS, load_paper_preset
from locaudit.studies.paper.run import describe_plan, estimate_paper


def main() -> None:
    """Estimate the study and print its plan."""
    given = parser(__doc__)
    given.add_argument("--preset", choices=PRESETS, default="full")
    given.add_argument("--batching", choices=("question", "pair"), default="question")
    args = parse(given)
    config = load_paper_preset(args.preset)
    # Steps and rates of trees are their own, not those of the preset's pairs.
    training = config.optimal
    if training.batching != args.batching:
        training = replace(training, batching=args.batching, batch_size=None, learning_rate=None)
    config = replace(config, data=args.data, optimal=training)
    model = load(Options(args.model, args.dtype, args.device, args.data))
    with tempfile.TemporaryDirectory() as folder:
        estimates = estimate_paper(config, out=Path(folder) / "study", model=model)
    print(describe_plan(estimates))
    if args.out:
        hours = sum(estimate.total_seconds for estimate in estimates.values()) / 3600
        report = {"model": args.model, "dtype": args.dtype, "preset": args.preset, "batching": args.batching}
        report |= {"data": Path(args.data).name, "hours": round(hours, 3)}
        report["parts"] = {part: {k: round(s, 1) for k, s in e.seconds.items()} for part, e in estimates.items()}
        report["trials"] = {part: sum(e.n_trials.values()) for part, e in estimates.items()}
        report |= {"tokens": sum(e.n_tokens for e in estimates.values()), "machine": machine(args.device)}
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    ending(main)
