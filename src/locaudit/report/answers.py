"""The generated answers that a report shows: the first test questions with each model's answer. No HTML here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from locaudit.records import TrialRecord
from locaudit.report.style import aspect_words
from locaudit.stats.scores import THRESHOLD
from locaudit.store.database import HeldOutQuestion
from locaudit.text import LONGEST, readable

N_OPEN, N_SHOWN = 5, 40
"""Number of questions that are visible at once, and number including those behind a click."""
LONGEST_REASON = 160
"""Longest text, in characters, of why a judgement is missing."""

_UNASKED = (None, "not yet")

Judgements = Mapping[tuple[str, str], tuple[float | None, str]]
"""(question id, answer) -> (probability or None, why it is missing)."""


@dataclass(frozen=True)
class Opinion:
    """One judge's rating of an answer."""

    word: str
    """The quality that is judged, as an adjective: ``true``."""
    probability: float | None
    """None if the judgement is missing."""
    reason: str = ""
    """Why it is missing, if that is known."""

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
    """Whether it equals the unedited model's answer, or its sample of the same number."""
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
