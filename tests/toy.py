"""A small hand-made behaviour, and training data from it."""

from __future__ import annotations

from collections.abc import Sequence

from locaudit.behaviours import Question
from locaudit.behaviours.format import Prompt
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.tree import plant
from locaudit.methods.training import TrainingData
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
    forest = plant(model.tokenizer, Prompt(primer=primer), [(q.text, q.answers) for q in questions])
    reference = tuple(sums[0] for sums in answer_log_probs(model, forest))
    return TrainingData(forest, tuple(len(q.true) for q in questions), reference)
