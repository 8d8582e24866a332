"""The generated answers that a report shows: the first test questions with each model's answer. It makes no HTML."""

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
"""Number of questions that are visible at first, and number of all that can be opened."""
LONGEST_REASON = 160
"""Largest number of characters that are shown of the reason why a judgement is missing."""

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
    """Whether the answer equals the unedited model's answer."""
    opinions: tuple[Opinion, ...] = ()


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
    answers = [None if s.record is None else s.record.answers.get("test", ()) for s in speakers]
    if not answers[0]:
        return []
    there = [(speaker.name, said) for speaker, said in zip(speakers, answers, strict=True) if said != ()]
    out = []
    for i, question in enumerate(questions[:N_SHOWN]):
        first = answers[0][i]
        row = []
        for n, (who, said) in enumerate(there):
            if said is None:
                row.append(Said(who, None))
                continue
            found = {aspect: table.get((question.id, said[i]), _UNASKED) for aspect, table in judgements.items()}
            opinions = tuple(
                Opinion(aspect_words(aspect)[1], p, readable(why, LONGEST_REASON)) for aspect, (p, why) in found.items()
            )
            row.append(Said(who, readable(said[i].strip(), LONGEST), n > 0 and said[i] == first, opinions))
        out.append(Conversation(readable(question.text, LONGEST), tuple(row)))
    return out
