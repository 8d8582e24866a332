"""Find questions whose right answer is nearly always the same option, such as (A), and balance them.

Such questions are called lopsided. A model that always says (A) is nearly always right on them, so that no score tells
whether it has understood anything.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from locaudit.behaviours.behaviour import Question
from locaudit.stats.labels import wanted

LARGEST_SHARE = 2 / 3
"""Questions are lopsided if the same answer is right in more than this share of them."""
FEWEST = 8
"""Fewer questions than this are never called lopsided."""
OPTIONS = re.compile(r"(?s)(.*\n[ \t]*\(A\)[ \t]*)(\S[^\n]*)(\n[ \t]*\(B\)[ \t]*)(\S[^\n]*)")
"""A question that ends in two lines, ``(A) ...`` and ``(B) ...``; the groups 2 and 4 are the options."""


def swap_options(question: Question) -> Question | None:
    """The question with the contents of its options (A) and (B) exchanged, and its true and false answers too.

    The id stays the same. Returns None if the answers are not these letters, or if the text does not end in one line
    for each option.
    """
    found = OPTIONS.fullmatch(question.text)
    if (
        set(question.answers) != {"(A)", "(B)"}
        or not found
        or any(question.text.count(x) > 1 for x in question.answers)
    ):
        return None
    before, first, between, second = found.groups()
    text = f"{before}{second}{between}{first}"
    return replace(question, text=text, true=question.false, false=question.true, best=None)


def balance(questions: Sequence[Question]) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    """Swap options in lopsided questions so that each answer is right equally often.

    Returns all questions, and notes on what was swapped. Options are swapped in the questions with the smallest ids, so
    that the order of the file does not matter. Other questions are left as they are.
    """
    labels = wanted(questions)
    if len(labels) < FEWEST:
        return tuple(questions), ()
    (label, n), total = Counter(labels).most_common(1)[0], len(labels)
    if n <= LARGEST_SHARE * total:
        return tuple(questions), ()
    others = sorted((q.id, s) for q in questions if q.true == (label,) and (s := swap_options(q)) is not None)
    swapped = dict(others[: n - (total + 1) // 2])
    seen = f"{label} is the right answer to {n} of {total} questions"
    if swapped:
        note = f"{seen}. Options were swapped in {len(swapped)} of them, after which it is right in {n - len(swapped)}."
    else:
        note = f"{seen}. A model that always prefers this answer is right on all of these; balance the file."
    return tuple(swapped.get(question.id, question) for question in questions), (note,)
