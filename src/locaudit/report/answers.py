"""The generated answers that a page or a terminal shows, with their judgements. It makes no HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from locaudit.records import TrialRecord
from locaudit.report.style import aspect_words
from locaudit.stats.scores import THRESHOLD
from locaudit.store.database import HeldOutQuestion
from locaudit.text import LONGEST, readable

N_SHOWN = 3
"""Number of questions whose answers a terminal shows."""
LONGEST_REASON = 160
"""Largest number of characters that are shown of the reason why a judgement is missing."""

_UNASKED = (None, "not yet")

Judgements = Mapping[tuple[str, str], tuple[float | None, str]]
"""(question id, answer) -> (probability or None, why it is missing)."""


@dataclass(frozen=True)
class Speech:
    """One model's answers to all test questions, ready for JSON."""

    meta: Mapping[str, Any]
    """Which model it is."""
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
    change: Sequence[float],
) -> Speech:
    """One model's answers with their judgements. Texts are made `readable`, and cut to `LONGEST` characters."""
    judged, why = {}, {}
    for aspect, table in judgements.items():
        found = [table.get((q.id, answer), _UNASKED) for q, answer in zip(questions, said, strict=True)]
        judged[aspect] = [None if p is None else round(p, 4) for p, _ in found]
        why[aspect] = {i: readable(reason, LONGEST_REASON) for i, (p, reason) in enumerate(found) if p is None}
    changes = [None if math.isnan(x) else float(f"{x:.4g}") for x in change]
    return Speech(meta, [readable(x.strip(), LONGEST) for x in said], judged, why, changes)


@dataclass(frozen=True)
class Opinion:
    """One judge's rating of an answer."""

    word: str
    """The quality that is judged, as an adjective: ``true``."""
    probability: float | None
    """None if the judgement is missing."""
    reason: str = ""
    """Why the judgement is missing, if that is known."""

    @property
    def is_yes(self) -> bool:
        """Whether the judge finds that the answer has the quality."""
        return self.probability is not None and self.probability >= THRESHOLD


@dataclass(frozen=True)
class Said:
    """One model's answer to a question."""

    who: str
    answer: str | None
    """Empty if the model generated nothing; None if every edit tried at this place diverged."""
    is_same: bool = False
    """Whether it equals the unedited model's answer, or that model's sample of the same number."""
    opinions: tuple[Opinion, ...] = ()
    sample: int = 0
    """Number of the sample; 0 for the greedy answer."""


@dataclass(frozen=True)
class Conversation:
    """A test question and each model's answer to it, beginning with the unedited model."""

    question: str
    answers: tuple[Said, ...]


class Speaker(NamedTuple):
    """A model that answers."""

    name: str
    record: TrialRecord | None
    """None if every edit tried at the place diverged."""


def conversations(
    questions: Sequence[HeldOutQuestion], speakers: Sequence[Speaker], judgements: Mapping[str, Judgements]
) -> list[Conversation]:
    """The first `N_SHOWN` test questions, in order, with all answers; empty if nothing was generated.

    The first speaker is the unedited model. `judgements` holds the aspects that have a judge.
    """
    said = {s.name: None if s.record is None else s.record.said("test") for s in speakers}
    base = said[speakers[0].name]
    if not base:
        return []
    out = []
    for i, question in enumerate(questions[:N_SHOWN]):
        row = []
        for who, answers in said.items():
            if answers is None:
                row.append(Said(who, None))
            for n, texts in enumerate(answers or ()):
                found = {aspect: table.get((question.id, texts[i]), _UNASKED) for aspect, table in judgements.items()}
                opinions = tuple(
                    Opinion(aspect_words(aspect)[1], p, readable(why, LONGEST_REASON))
                    for aspect, (p, why) in found.items()
                )
                same = answers is not base and n < len(base) and texts[i] == base[n][i]
                row.append(Said(who, readable(texts[i].strip(), LONGEST), same, opinions, n))
        out.append(Conversation(readable(question.text, LONGEST), tuple(row)))
    return out
