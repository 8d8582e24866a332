"""Questions whose right answer is nearly always the same one of the same options, such as (A): found, and balanced.

A model that always says (A) is right on all of them, so that no score tells whether it has understood anything.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from locaudit.behaviours.behaviour import Question
from locaudit.stats.labels import wanted

LARGEST_SHARE = 2 / 3
"""If one answer is right in more than this share of the questions, they are lopsided."""
FEWEST = 8
"""Fewer questions than this are never called lopsided."""
_OPTIONS = re.compile(r"(?s)(.*\n[ \t]*\(A\)[ \t]*)(\S[^\n]*)(\n[ \t]*\(B\)[ \t]*)(\S[^\n]*)")
"""A question that ends in two lines, ``(A) ...`` and ``(B) ...``; the groups 2 and 4 are the options."""


def swap_options(question: Question) -> Question | None:
    """The question with the contents of its options (A) and (B) exchanged, and its answers too. The id stays.

    None if its answers are not these letters, or its text does not end in one line for each option.
    """
    found = _OPTIONS.fullmatch(question.text)
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
    """Swap options so that each answer is right equally often, if the questions are lopsided; also what to note.

    The questions with the smallest ids are swapped, so that the order of the file does not matter. Other questions
    are left as they are.
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
        note = f"{seen}. A model that always prefers it is right there; balance the file."
    return tuple(swapped.get(question.id, question) for question in questions), (note,)
