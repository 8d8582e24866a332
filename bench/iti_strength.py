"""Which ITI strength suits a model, on held-out questions of the training part of the split.

    python -m bench.iti_strength --alphas 5 10 15

Heads, directions and sigma from `--train` questions, scores on the next `--held-out` ones; validation and test
questions are not touched.
"""

from __future__ import annotations

import argparse

from locaudit.behaviours import load_behaviour, split_questions
from locaudit.behaviours.format import Prompt, load_primer
from locaudit.edits import stack
from locaudit.measure.activations import collect_activations
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.multiple_choice import means, score_questions
from locaudit.measure.tree import plant
from locaudit.methods.iti import iti_edit, iti_theta
from locaudit.methods.probes import fit_probes
from locaudit.models import load_model


def main() -> None:
    """Print one row of scores for each strength."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--data", default="misconceptions", help="behaviour name or file")
    parser.add_argument("--train", type=int, default=64, help="training questions")
    parser.add_argument("--held-out", type=int, default=24, help="held-out questions")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--alphas", type=float, nargs="+", default=[5, 10, 15])
    args = parser.parse_args()

    model = load_model(args.model, dtype=args.dtype)
    questions = split_questions(load_behaviour(args.data)).train
    train, held_out = questions[: args.train], questions[args.train : args.train + args.held_out]
    activations = collect_activations(model, train)
    claim, theta = fit_probes(activations).top(args.top_k), iti_theta(activations)
    prompt = Prompt(primer=load_primer("default"))
    forest = plant(model.tokenizer, prompt, [(q.text, q.answers) for q in held_out])
    base = [x[0] for x in answer_log_probs(model, forest)]
    print("| alpha | mc1 | mc2 | mc3 | preference_accuracy | reward_accuracy | reward_margin |\n" + "|---" * 7 + "|")
    for alpha in args.alphas:
        edit = iti_edit(model, claim, theta, alpha=alpha)
        sums = [x[0] for x in answer_log_probs(model, forest, stack(model, [edit]))]
        scores = means(score_questions(held_out, sums, base))
        print(f"| {alpha:g} | " + " | ".join(f"{value:.3f}" for value in scores.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
