"""What an edit does: multiple choice and answers on held-out questions, drift on ordinary text."""

from locaudit.evaluation.answers import answer_prompts
from locaudit.evaluation.drift import (
    DriftText,
    cut_documents,
    measure_drift,
    read_drift_text,
    sample_documents,
)
from locaudit.evaluation.generation import answer_text, generate_answers, generate_tokens
from locaudit.evaluation.multiple_choice import METRICS, means, question_scores, score_questions

__all__ = [
    "METRICS",
    "DriftText",
    "answer_prompts",
    "answer_text",
    "cut_documents",
    "generate_answers",
    "generate_tokens",
    "means",
    "measure_drift",
    "question_scores",
    "read_drift_text",
    "sample_documents",
    "score_questions",
]
