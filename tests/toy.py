"""A small hand-made behaviour, and training data from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from locaudit.behaviours import Question
from locaudit.behaviours.format import Prompt
from locaudit.location import Location
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.tree import plant
from locaudit.methods.base import Fit
from locaudit.methods.optimal import learning_rate
from locaudit.methods.parameters import TrainableEdit
from locaudit.methods.settings import TrainingSettings
from locaudit.methods.training import Trainee, TrainingData
from locaudit.methods.training import train as train_edits
from locaudit.models import Model

PRIMER = "Q: Is it?\nA: No, it is round."

_ROWS = [
    ("Is it flat?", ["No.", "It is round."], ["Yes.", "It is flat, yes."]),
    ("What is Paris?", ["The capital."], ["Nothing.", "A round earth."]),
    ("Do you see it?", ["No, you see nothing.", "Nothing."], ["Yes."]),
    ("What happens?", ["Nothing happens."], ["It is Paris."]),
    ("Is France flat?", ["No."], ["Yes.", "Yes, flat.", "The earth."]),
    ("Is Paris round?", ["No, it is not."], ["It is round."]),
    ("What is France?", ["A place.", "It has a capital."], ["The capital is flat.", "A capital."]),
    ("Do you see Paris?", ["No."], ["Yes, you do."]),
    ("Is the earth round?", ["Yes.", "Yes, round."], ["No.", "It is flat."]),
    ("What is the earth?", ["It is round."], ["It is flat.", "Nothing in particular."]),
    ("What is flat?", ["Not the earth."], ["The earth."]),
    ("Is nothing round?", ["No, the earth is.", "No."], ["Yes, nothing is."]),
]
QUESTIONS = tuple(
    Question(str(i), text, tuple(true), tuple(false), best=true[-1]) for i, (text, true, false) in enumerate(_ROWS)
)


def training_data(model: Model, questions: Sequence[Question], primer: str = "") -> TrainingData:
    forest = plant(
        model.tokenizer,
        Prompt(primer=primer),
        [(q.text, q.answers) for q in questions],
        [q.subject for q in questions],
    )
    reference = tuple(sums[0] for sums in answer_log_probs(model, forest))
    return TrainingData(forest, tuple(len(q.true) for q in questions), reference)


@dataclass(frozen=True)
class Job:
    """One edit to train, with a learning rate of its own (None: by size)."""

    location: Location
    strength: float
    seed: int
    learning_rate: float | None = None


def train(
    model: Model,
    data: TrainingData,
    jobs: Sequence[Job],
    *,
    reader: str = "layer",
    positions: Sequence[str] = (),
    **options: Any,
) -> list[Fit]:
    """`locaudit.methods.training.train`, settings and all in one call."""
    given = {name: options.pop(name) for name in ("residuals", "step_tokens", "on_step") if name in options}
    settings = TrainingSettings(**{"epochs": 2, **options})
    trainees = [
        Trainee(
            partial(untrained, model, job, reader, *positions[number : number + 1]),
            job.strength,
            job.seed,
            job.learning_rate or learning_rate(model.shape, job.location, settings, data.mean_pairs),
        )
        for number, job in enumerate(jobs)
    ]
    return train_edits(model, data, trainees, settings, **given)


def untrained(model: Model, job: Job, reader: str = "layer", positions: str = "all") -> TrainableEdit:
    """A job's edit before its first step; ``none`` reads nothing: a constant edit."""
    if reader == "none":
        return TrainableEdit(model, job.location, constant=True, seed=job.seed)
    return TrainableEdit(model, job.location, reader=reader, positions=positions, seed=job.seed)  # type: ignore[arg-type]
