"""How should optimal edits of the study of the paper be trained? Tried on the whole model, never on a test question.

    python -m bench.training_pilot --data TruthfulQA.csv --trials 128:1:0.03 128:2:0.05

Each trial, QUESTIONS:EPOCHS:TAU, trains an edit of the whole model. Its greedy and sampled answers are judged for truth
and informativeness by the bundled judge. All questions are those that the preset ``decide`` trains or validates on; a
fifth of them is kept for scoring here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.command import Positive, header, line, run
from bench.work import Location, Model, plant
from locaudit import Edit, Question, fit_optimal, load_behaviour
from locaudit.behaviours import Behaviour, split_questions
from locaudit.behaviours.format import Prompt, load_primer
from locaudit.judges import Case, Judge
from locaudit.measure.answers import answer_prompts
from locaudit.models import load_model
from locaudit.registry import JUDGES
from locaudit.run.subject import split_behaviour
from locaudit.store.cache import Cache, open_cache
from locaudit.studies.paper.config import load_paper_preset


@dataclass(frozen=True)
class Settings:
    """What is tried."""

    data: Path
    """TruthfulQA as a CSV."""
    trials: tuple[str, ...] = ("128:1:0.1", "128:1:0.03")
    """Trainings, each as QUESTIONS:EPOCHS:TAU."""
    samples: Positive = 1
    """Sampled answers to each question, beside the greedy one."""


def main(given: Settings) -> None:
    """Print truth, information and their product for the unedited model and each trial."""
    config = load_paper_preset("decide").audits()["sets"]
    behaviour = load_behaviour(given.data)
    known = split_behaviour(config, behaviour)
    split = split_questions(Behaviour(behaviour.name, (*known.train, *known.val)), (0.79, 0.01, 0.2))
    model = load_model(config.model, dtype=config.loading.dtype)
    scoring = Prompt("qa", load_primer("truthful", behaviour.primer))
    judges = judges_of(("truth", "info"))
    heads = [f"{what}, {how}" for how in ("greedy", "sampled") for what in ("truth", "info", "product")]
    print(header("questions:epochs:tau", *heads))
    for name in ("unedited", *given.trials):
        edit = None
        if name != "unedited":
            n, epochs, tau = name.split(":")
            edit = fit_optimal(
                model,
                split.train[: int(n)],
                Location.whole("head"),
                strength=float(tau),
                prompt=Prompt("qa"),
                epochs=int(epochs),
            )
        print(
            line([name, *(f"{x:.3f}" for x in probabilities(model, edit, split.test, scoring, judges, given.samples))])
        )


def judges_of(aspects: Sequence[str]) -> dict[str, Judge]:
    """The bundled judge of each aspect."""
    kind = JUDGES["reference"]
    return kind.loader({aspect: kind.settings() for aspect in aspects}, "auto")


def probabilities(
    model: Model,
    edit: Edit | None,
    asked: Sequence[Question],
    scoring: Prompt,
    judges: Mapping[str, Judge],
    samples: int,
    cache: Cache | None = None,
) -> list[float]:
    """Mean probabilities of truth, of information, and their product: of greedy answers, then of sampled ones."""
    forest = plant(model.tokenizer, scoring, [(q.text, q.answers) for q in asked])
    edits = None if edit is None else [edit]
    said = answer_prompts(
        model,
        forest,
        edits,
        max_new_tokens=load_paper_preset("decide").evaluation.max_new_tokens or 50,
        samples=range(samples + 1),
        cache=cache or open_cache(),
        answer_format=scoring,
    )[0]
    out: list[float] = []
    for answers in (said[:1], said[1:])[: 1 + bool(samples)]:
        cases = [Case(q.text, a, q.true, q.false) for row in answers for q, a in zip(asked, row, strict=True)]
        means = [np.mean([j.probability for j in judges[x].score(cases)]) for x in ("truth", "info")]  # type: ignore[misc]
        out += [*map(float, means), float(means[0] * means[1])]
    return out


if __name__ == "__main__":
    run(main, Settings, __doc__)
