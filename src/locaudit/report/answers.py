"""The generated answers that a page or a terminal shows, with their judgements. It makes no HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from locaudit.store.database import HeldOutQuestion
from locaudit.text import LONGEST, readable

LONGEST_REASON = 160
"""Largest number of characters that are shown of the reason why a judgement is missing."""

_UNASKED = (None, "not yet")

Judgements = Mapping[tuple[str, str], tuple[float | None, str]]
"""(question id, answer) -> (probability or None, why it is missing)."""


@dataclass(frozen=True)
class Speech:
    """One model's answers to all test questions, ready for JSON."""

    meta: Mapping[str, Any]
    """Which model it is; empty if a terminal names it."""
    answers: list[str]
    judged: Mapping[str, list[float | None]]
    """Aspect -> P(yes) of each answer; None where the judgement is missing."""
    why: Mapping[str, Mapping[int, str]]
    """Aspect -> number of the question -> why its judgement is missing."""
    change: list[float | None]
    """Change of the verdict's score at each question from the unedited model; None where it is not known."""

    def part(self, i: int) -> tuple[Any, ...]:
        """What it says to question `i`, with all that belongs to it."""
        why = [reasons.get(i) for reasons in self.why.values()]
        return self.answers[i], [p[i] for p in self.judged.values()], why, self.change[i]

    def to_dict(self, n: int) -> dict[str, Any]:
        """The first `n` answers as values for JSON."""
        return {
            **self.meta, "answers": self.answers[:n], "judged": {a: p[:n] for a, p in self.judged.items()},
            "why": {a: {i: x for i, x in found.items() if i < n} for a, found in self.why.items()},
            "change": self.change[:n],
        }  # fmt: skip


def speech(
    meta: Mapping[str, Any],
    questions: Sequence[HeldOutQuestion],
    said: Sequence[str],
    judgements: Mapping[str, Judgements],
    change: Sequence[float] = (),
) -> Speech:
    """One model's answers with their judgements. Texts are made `readable`, and cut to `LONGEST` characters."""
    judged, why = {}, {}
    for aspect, table in judgements.items():
        found = [table.get((q.id, answer), _UNASKED) for q, answer in zip(questions, said, strict=True)]
        judged[aspect] = [None if p is None else round(p, 4) for p, _ in found]
        why[aspect] = {i: readable(reason, LONGEST_REASON) for i, (p, reason) in enumerate(found) if p is None}
    changes = [None if math.isnan(x) else float(f"{x:.4g}") for x in change]
    return Speech(meta, [readable(x.strip(), LONGEST) for x in said], judged, why, changes)
