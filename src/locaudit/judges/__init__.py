"""Judges of generated answers: (question, answer, references) -> P(yes), or missing."""

from locaudit.judges.base import ASPECTS, Aspect, Billed, Case, Judge, Judgement, find_aspect

__all__ = ["ASPECTS", "Aspect", "Billed", "Case", "Judge", "Judgement", "find_aspect"]
