"""What is in a behaviour, and how far length or single words tell its true answers from the false ones.

Where these are not what the behaviour is about, an edit can gain by them alone.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from scipy.stats import rankdata

from locaudit.behaviours.behaviour import Behaviour, Question

FOLDS = 5
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")


@dataclass(frozen=True)
class Facts:
    """Numbers about a behaviour. Lengths are medians, in words."""

    n_questions: int
    n_true: int
    n_false: int
    n_groups: int
    """Questions that must stay together count as one."""
    question_words: float
    true_words: float
    false_words: float
    by_length: float
    """P(a true answer is longer than a false one of the same question), ties counted half: 0.5 gives nothing away."""
    by_words: float
    """Share of (true, false) pairs of a question in which a naive Bayes classifier of single words, fitted on other
    questions, prefers the true answer; ties counted half."""


def check_behaviour(behaviour: Behaviour) -> Facts:
    """Count a behaviour's questions and answers, and how far length or single words tell true from false ones."""
    questions = behaviour.questions
    true, false = ([a for q in questions for a in getattr(q, side)] for side in ("true", "false"))
    scores = _word_scores(questions)
    return Facts(
        n_questions=len(questions),
        n_true=len(true),
        n_false=len(false),
        n_groups=len({q.group or q.id for q in questions}),
        question_words=median(len(_words(q.text)) for q in questions),
        true_words=median(len(_words(a)) for a in true),
        false_words=median(len(_words(a)) for a in false),
        by_length=_preferred(questions, {a: float(len(_words(a))) for q in questions for a in q.answers}),
        by_words=_preferred(questions, scores),
    )


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _preferred(questions: Sequence[Question], scores: dict[str, float]) -> float:
    """Mean over questions of the probability that a true answer scores above a false one (area under the ROC curve)."""
    areas = []
    for q in questions:
        ranks = rankdata([scores[a] for a in q.answers])
        n, m = len(q.true), len(q.false)
        areas.append((float(ranks[:n].sum()) - n * (n + 1) / 2) / (n * m))
    return sum(areas) / len(areas)


def _word_scores(questions: Sequence[Question]) -> dict[str, float]:
    """Answer -> log-odds of being true by its words, with counts (add one) from the questions of other folds."""
    groups = sorted({q.group or q.id for q in questions})
    fold_of = {group: number % FOLDS for number, group in enumerate(groups)}
    scores: dict[str, float] = {}
    for fold in range(FOLDS):
        counts = {True: Counter[str](), False: Counter[str]()}
        inside = [q for q in questions if fold_of[q.group or q.id] == fold]
        for q in questions:
            if fold_of[q.group or q.id] != fold:
                for answer in q.answers:
                    counts[answer in q.true].update(set(_words(answer)))
        known = counts[True].keys() | counts[False].keys()
        totals = {side: counts[side].total() + len(known) for side in counts}
        even = math.log(totals[True] / totals[False]) if known else 0.0
        log_odds = {word: math.log((counts[True][word] + 1) / (counts[False][word] + 1)) - even for word in known}
        scores |= {a: sum(log_odds.get(word, 0.0) for word in set(_words(a))) for q in inside for a in q.answers}
    return scores
