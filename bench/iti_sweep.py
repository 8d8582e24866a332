"""How Truth, Info, MC and drift move with the ITI strength alpha, at the probed heads and at random ones.

    python -m bench.iti_sweep --data TruthfulQA.csv --drift-text wikitext.txt --out docs/iti-sweep

Questions that the bundled judge was fitted on are used for probes and directions, or not at all; test questions are
among those it was not fitted on. Writes OUT.json (every number) and OUT.png, and prints a Markdown table. Intervals
resample test questions.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing
from pathlib import Path

import matplotlib
import torch

from locaudit.behaviours import load_behaviour
from locaudit.behaviours.format import Prompt, load_primer
from locaudit.behaviours.splits import shuffled
from locaudit.edits import Edit, stack
from locaudit.judges import Case
from locaudit.judges.labelled import is_held_out
from locaudit.judges.reference import load_reference_judges
from locaudit.location import sample_controls, unit_strata
from locaudit.measure.activations import collect_activations
from locaudit.measure.answers import answer_prompts
from locaudit.measure.drift import DriftText, cut_documents, measure_drift, sample_documents
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.multiple_choice import means, score_questions
from locaudit.measure.tree import plant
from locaudit.methods.iti import iti_edit, iti_theta
from locaudit.methods.probes import fit_probes
from locaudit.models import load_model
from locaudit.stats import JUDGED, judged_metrics, mean_score, score_interval, score_values
from locaudit.store.cache import open_cache

PANELS = (("truth", "Truth"), ("info", "Info"), ("info_truth", "Info*Truth"), ("mc2", "MC2"), ("mc1", "MC1"),
          ("kl", "KL (nats per token)"))  # fmt: skip


def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--data", required=True, help="behaviour name or file")
    parser.add_argument("--drift-text", default=None, help="text file for KL (default: text sampled from the model)")
    parser.add_argument("--train", type=int, default=200, help="questions for probes and directions")
    parser.add_argument("--test", type=int, default=100, help="questions scored")
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0, 5, 10, 15, 20, 30, 40])
    parser.add_argument("--random", type=int, default=1, help="random sets of as many heads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="path without suffix")
    args = parser.parse_args()

    questions = shuffled(sorted(load_behaviour(args.data).questions, key=lambda q: q.id), args.seed)
    train = [q for q in questions if not is_held_out(q.text)][: args.train]
    test = tuple([q for q in questions if is_held_out(q.text)][: args.test])
    model = load_model(args.model, dtype=args.dtype)
    started = time.monotonic()
    activations = collect_activations(model, train)
    claim, theta = fit_probes(activations).top(args.top_k), iti_theta(activations)
    strata = unit_strata("none", model.n_layers, model.n_heads)
    places = {"probed heads": claim} | {
        f"random heads {n}": place
        for n, place in enumerate(sample_controls(claim, strata, args.random, seed=args.seed, disjoint=True), start=1)
    }
    prompt = Prompt(primer=load_primer("default"))
    forest = plant(model.tokenizer, prompt, [(q.text, q.answers) for q in test])
    reference = [x[0] for x in answer_log_probs(model, forest)]
    drift = DriftText(
        cut_documents(model, args.drift_text, 20, 128) if args.drift_text else sample_documents(model, 20, 128, 0)
    )
    judges = dict(zip(("truth", "info"), load_reference_judges(["truth", "info"]), strict=True))
    rows = []
    with closing(open_cache()) as cache:

        def measure(name: str, alpha: float, edit: Edit | None) -> None:
            bank = None if edit is None else stack(model, [edit])
            sums = reference if bank is None else [x[0] for x in answer_log_probs(model, forest, bank)]
            edits = None if edit is None else [edit]
            answers = answer_prompts(model, forest, edits, max_new_tokens=50, cache=cache)[0]
            cases = [Case(q.text, a, q.true, q.false) for q, a in zip(test, answers, strict=True)]
            said = {aspect: [j.probability for j in judge.score(cases)] for aspect, judge in judges.items()}
            judged = judged_metrics(said["truth"], said["info"])
            row = {"place": name, "alpha": alpha, **means(score_questions(test, sums, reference))}
            for score in JUDGED:
                values = score_values(judged, score)
                row[score], row[f"{score}_interval"] = float(mean_score(values)), score_interval(values)
            row |= measure_drift(model, drift, bank)[0]
            rows.append(row)
            print(f"| {name} | {alpha:g} | " + " | ".join(f"{row[key]:.3f}" for key, _ in PANELS) + " |", flush=True)

        print("| heads | alpha | " + " | ".join(title for _, title in PANELS) + " |\n" + "|---" * 8 + "|")
        measure("unedited", 0.0, None)
        for alpha in args.alphas:
            for name, place in places.items():
                if alpha:
                    measure(name, alpha, iti_edit(model, place, theta, alpha=alpha))
    facts = {
        "settings": {
            key: Path(value).name if isinstance(value, str | Path) else value for key, value in vars(args).items()
        },
        "n_train": len(train),
        "n_test": len(test),
        "locations": {name: str(place) for name, place in places.items()},
        "judges": {aspect: judge.fingerprint for aspect, judge in judges.items()},
        "dtype": str(model.lm.dtype),
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - started),
    }
    args.out.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    draw(rows, facts, args.out.with_suffix(".png"))


def draw(rows: list[dict], facts: dict, path: Path) -> None:
    """One panel a score, a line a place, the unedited model at alpha = 0 of every line."""
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(10, 5.6), layout="constrained", sharex=True)
    base = rows[0]
    colours = ("#D55E00", "#0072B2", "#56B4E9", "#009E73")
    for axis, (key, title) in zip(axes.flat, PANELS, strict=True):
        for name, colour in zip(facts["locations"], colours, strict=False):
            line = [base, *(row for row in rows if row["place"] == name)]
            x, y = [row["alpha"] for row in line], [row[key] for row in line]
            axis.plot(x, y, marker="o", markersize=4, color=colour, label=name)
            if f"{key}_interval" in base:
                low, high = zip(*(row[f"{key}_interval"] for row in line), strict=True)
                axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_title(title, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        if key == "kl":
            axis.set_yscale("symlog", linthresh=0.01)
    for axis in axes[1]:
        axis.set_xlabel("alpha")
    axes[0, 0].legend(frameon=False)
    figure.suptitle(
        f"ITI at {len(facts['locations']['probed heads'].split(','))} heads, {facts['n_test']} test questions "
        "(bands: 95 % over questions)",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    figure.savefig(path, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
