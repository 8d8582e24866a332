"""Behaviours (questions with wanted and unwanted answers): loading them and splitting their questions."""

from locaudit.behaviours.behaviour import Behaviour, Question, normalise, unique, with_period
from locaudit.behaviours.loaders import BUNDLED, Loader, load_behaviour
from locaudit.behaviours.splits import Split, split_questions

__all__ = [
    "BUNDLED",
    "Behaviour",
    "Loader",
    "Question",
    "Split",
    "load_behaviour",
    "normalise",
    "split_questions",
    "unique",
    "with_period",
]
