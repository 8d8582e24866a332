"""Which learning rate suits question batches, by size of the location.

    python -m bench.learning_rates --out docs/learning-rates.json

For each size (1 head, 16 heads, the whole model), rate and seed: one IPO edit at a random location, trained on
`--train` questions; then the IPO loss and reward accuracy on held-out questions of the training part of the split (test
questions are not touched). Prints a Markdown table and writes every number as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from locaudit.behaviours import load_behaviour, split_questions
from locaudit.behaviours.format import Prompt
from locaudit.edits import stack
from locaudit.location import Location
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.multiple_choice import means, score_questions
from locaudit.measure.tree import plant
from locaudit.methods.objectives import pair_loss
from locaudit.methods.training import Job, TrainingData, train
from locaudit.models import load_model


def held_out_loss(sums, reference, n_true: int, tau: float) -> float:
    """Mean IPO loss over one question's pairs."""
    ratio = sums - reference
    return pair_loss((ratio[:n_true].unsqueeze(1) - ratio[n_true:]).flatten(), "ipo", tau).mean().item()


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--data", default="misconceptions", help="behaviour name or file")
    parser.add_argument("--train", type=int, default=60, help="training questions")
    parser.add_argument("--held-out", type=int, default=40, help="held-out questions")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--tau", type=float, default=0.2)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 16, 0], help="heads; 0 for the whole model")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    model = load_model(args.model, dtype=args.dtype)
    questions = split_questions(load_behaviour(args.data)).train
    parts = questions[: args.train], questions[args.train : args.train + args.held_out]
    forests = [plant(model.tokenizer, Prompt(), [(q.text, q.answers) for q in part]) for part in parts]
    references = [[x[0] for x in answer_log_probs(model, forest)] for forest in forests]
    data = TrainingData(forests[0], tuple(len(q.true) for q in parts[0]), tuple(references[0]))
    rows = []
    for size in args.sizes:
        for rate in args.rates:
            for seed in args.seeds:
                where = model.whole() if size == 0 else random_heads(model.whole(), size, seed)
                started = time.monotonic()
                fit = train(model, data, [Job(where, args.tau, seed, rate)], epochs=args.epochs)[0]
                row = {"size": size, "rate": rate, "seed": seed, "seconds": round(time.monotonic() - started, 1)}
                row["train_loss"] = statistics.fmean(fit.losses[-max(1, len(fit.losses) // 4) :])
                if fit.edit is not None:
                    sums = [x[0] for x in answer_log_probs(model, forests[1], stack(model, [fit.edit]))]
                    pairs = zip(sums, references[1], parts[1], strict=True)
                    row["loss"] = statistics.fmean(held_out_loss(s, r, len(q.true), args.tau) for s, r, q in pairs)
                    row |= means(score_questions(parts[1], sums, references[1]))
                else:
                    row["diverged"] = fit.message
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    base = means(score_questions(parts[1], references[1], references[1]))
    facts = {k: v for k, v in vars(args).items() if k != "out"} | {
        "data": Path(args.data).name,
        "fingerprint": model.fingerprint,
        "dtype": str(model.lm.dtype),
        "n_pairs": sum(len(q.true) * len(q.false) for q in parts[0]),
        "base": base | {"loss": 1 / (4 * args.tau**2)},
        "torch": torch.__version__,
    }
    args.out.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(table(rows, facts))


def random_heads(whole: Location, size: int, seed: int) -> Location:
    """`size` random heads."""
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:size].tolist()
    return Location(tuple(whole.units[i] for i in order))


def table(rows: list[dict], facts: dict) -> str:
    """Means over seeds as Markdown."""
    lines = [
        "| heads | learning rate | last train loss | held-out loss | reward accuracy | MC2 |",
        "|---|---|---|---|---|---|",
    ]
    for size in facts["sizes"]:
        for rate in facts["rates"]:
            group = [row for row in rows if (row["size"], row["rate"]) == (size, rate)]
            good = [row for row in group if "loss" in row]
            cells = ["all" if size == 0 else str(size), f"{rate:g}"]
            cells.append(f"{statistics.fmean(row['train_loss'] for row in group):.2f}")
            for key in ("loss", "reward_accuracy", "mc2"):
                cells.append(f"{statistics.fmean(row[key] for row in good):.3f}" if good else "diverged")
            lines.append("| " + " | ".join(cells) + " |")
    base = facts["base"]
    lines.append(f"| none | | | {base['loss']:.3f} | | {base['mc2']:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
