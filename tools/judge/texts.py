"""Make texts for two readers: prompts of `sentiment`, continued by SmolLM2-135M, unedited and under several edits.

    python tools/judge/texts.py FOLDER --fit "Family letters" Sport --seen tools/judge/labels/test.tsv --seed 2

Edits are fitted on prompts of the domains after --fit. The texts continue prompts of other domains, or the lines of a
file (--prompts), without those in the files after --seen. Writes FOLDER/texts.tsv (id, prompt, continuation) for the
readers, and FOLDER/key.tsv (id, arm): the edit of each text, which readers must not see. tools/judge/readers.py --join
adds the readers' labels.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from readers import read_rows, write_rows

from locaudit.api import fit_optimal
from locaudit.behaviours import load_behaviour
from locaudit.behaviours.format import Prompt
from locaudit.edits import Edit, stack
from locaudit.location import Location
from locaudit.measure.activations import collect_activations
from locaudit.measure.generation import generate_answers
from locaudit.measure.tree import plant
from locaudit.methods.iti import iti_edit, iti_theta
from locaudit.methods.probes import fit_probes
from locaudit.models import Model, load_model

HEADS = 8
"""Heads of the claim (those with the best probes) and of the control (random ones)."""
EPOCHS = {"claim": 4, "control": 4, "whole": 2}
"""Epochs of the optimal edits, by place."""
SHARES = {
    "unedited": 9,
    **{f"iti-claim-{alpha}": share for alpha, share in ((5, 5), (15, 6), (40, 6))},
    "iti-control-40": 5,
    **{f"iti-all-{alpha}": share for alpha, share in ((3, 10), (6, 7), (10, 6), (15, 6))},
    **{f"optimal-claim-{tau}": share for tau, share in ((0.02, 10), (0.1, 6))},
    "optimal-control-0.02": 5,
    **{f"optimal-whole-{tau}": share for tau, share in ((0.02, 11), (0.1, 8))},
}
"""Edit -> its share of the texts, in percent. A name has the method, the place, and the strength alpha or tau."""
SAMPLES, LENGTHS = (0, 0, 0, 1, 2), (24, 24, 24, 24, 50)
"""A text is greedy (0) or sampled, and has at most so many tokens; drawn at random from these."""


def continue_prompts(
    model: Model, prompts: Sequence[str], edits: Sequence[Edit], style: Prompt, rng: random.Random
) -> list[tuple[str, str]]:
    """(prompt, continuation) under the edit, or of the unedited model if there is none; empty ones are left out."""
    wanted: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for prompt in prompts:
        wanted[rng.choice(LENGTHS)].append((prompt, rng.choice(SAMPLES)))
    found = []
    for length, drawn in wanted.items():
        forest = plant(model.tokenizer, style, [(prompt, ()) for prompt, _ in drawn])
        (said,) = generate_answers(
            model,
            forest.prefix,
            [tree.prompt for tree in forest.trees],
            stack(model, edits) if edits else None,
            samples=[sample for _, sample in drawn],
            max_new_tokens=length,
            answer_format=style,
        )
        found += [(prompt, text) for (prompt, _), text in zip(drawn, said, strict=True) if text.strip()]
    return found


def main() -> None:
    """Fit the edits, generate the texts, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fit", nargs="+", required=True)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--seen", nargs="*", type=Path, default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texts", type=int, default=300)
    parser.add_argument("--train", type=int, default=60, help="prompts that edits are fitted on")
    given = parser.parse_args()
    model, rng = load_model("smollm2-135m", device="cpu"), random.Random(given.seed)
    questions = load_behaviour("sentiment").questions
    train = rng.sample([question for question in questions if question.group in given.fit], given.train)
    seen = {row["prompt"] for file in given.seen for row in read_rows(file)}
    others = [question.text for question in questions if question.group not in given.fit]
    if given.prompts:
        others = given.prompts.read_text(encoding="utf-8").splitlines()
    prompts = [prompt for prompt in others if prompt not in seen]
    every = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    style = Prompt("completion")
    activations = collect_activations(model, train, prompt=style, seed=given.seed)
    theta = iti_theta(activations)
    places = {
        "claim": fit_probes(activations, seed=given.seed).top(HEADS),
        "control": Location(tuple(rng.sample(every, HEADS))),
        "all": Location.whole(),
        "whole": Location.whole(),
    }
    texts: dict[tuple[str, str], str] = {}
    for arm, share in SHARES.items():
        rng = random.Random(f"{given.seed} {arm}")
        method, place, strength = (arm.split("-") + ["", ""])[:3]
        edits = []
        if method == "iti":
            edits = [iti_edit(model, places[place], theta, alpha=float(strength))]
        elif method == "optimal":
            settings = {"strength": float(strength), "prompt": style, "seed": given.seed, "epochs": EPOCHS[place]}
            edits = [fit_optimal(model, train, places[place], **settings)]
        chosen = rng.sample(prompts, min(round(given.texts * share / 80), len(prompts)))
        found = continue_prompts(model, chosen, edits, style, rng)
        new = [pair for pair in dict.fromkeys(found) if pair not in texts]
        texts |= dict.fromkeys(rng.sample(new, min(round(given.texts * share / 100), len(new))), arm)
        print(time.strftime("%X"), arm, len(new), flush=True)
    order = list(texts.items())
    rng.shuffle(order)
    rows = [(f"{given.seed}-{n:03}", *pair, arm) for n, (pair, arm) in enumerate(order)]
    write_rows(given.folder / "texts.tsv", ("id", "prompt", "continuation"), [row[:3] for row in rows])
    write_rows(given.folder / "key.tsv", ("id", "arm"), [(row[0], row[3]) for row in rows])


if __name__ == "__main__":
    main()
