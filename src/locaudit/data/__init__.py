"""Behaviours (questions with wanted and unwanted answers), where they come from, and how they are split."""

from locaudit.data.behaviour import Behaviour, Question, normalise, unique, with_period
from locaudit.data.loaders import Format, load_behaviour
from locaudit.data.splits import Split, split_questions

__all__ = [
    "Behaviour",
    "Format",
    "Question",
    "Split",
    "load_behaviour",
    "normalise",
    "split_questions",
    "unique",
    "with_period",
]
