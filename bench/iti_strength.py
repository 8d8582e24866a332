"""Scores of several ITI strengths on held-out questions, to choose a strength for a model.

    python -m bench.iti_strength --alphas 5 10 15

All questions come from the training part of the split; validation and test questions are not used. Heads, directions
and sigma are found on the first `--train` questions, and scores are measured on the next `--held-out` questions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import tyro

from bench.command import Positive, header, line, run
from bench.work import (
    PRIMED,
    Subject,
    grow,
    iti_edit,
    load,
    log_probs,
    means,
    probed,
    questions,
    score_questions,
)


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    subject: tyro.conf.OmitArgPrefixes[Subject] = field(default_factory=lambda: Subject(dtype="auto", device="auto"))
    train: Positive = 64
    """Number of questions to find heads and directions on."""
    held_out: Positive = 24
    """Number of questions to score."""
    top_k: Positive = 8
    alphas: tuple[float, ...] = (5, 10, 15)


def main(given: Settings) -> None:
    """Print one row of scores per strength."""
    model, asked = load(given.subject), questions(given.subject, given.train + given.held_out)
    claim, theta = probed(model, asked[: given.train], given.top_k)
    held_out = asked[given.train :]
    forest = grow(model, held_out, PRIMED)
    (base,) = log_probs(model, forest)
    print(header("alpha", *means(score_questions(held_out, base, base))))
    for alpha in given.alphas:
        (sums,) = log_probs(model, forest, [iti_edit(model, claim, theta, alpha=alpha)])
        scores = means(score_questions(held_out, sums, base))
        print(line([f"{alpha:g}", *(f"{value:.3f}" for value in scores.values())]), flush=True)


if __name__ == "__main__":
    run(main, Settings, __doc__)
