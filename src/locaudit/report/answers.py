"""What the edited models say, as plain values: the first test questions with the answers to them. No HTML here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from locaudit.records import TrialRecord
from locaudit.report.style import METHOD_TITLES
from locaudit.report.view import base_record, place_name
from locaudit.stats import Verdict, select
from locaudit.stats.judged import ASPECT_NAMES
from locaudit.stats.scores import THRESHOLD
from locaudit.stats.selection import Place
from locaudit.store import HeldOutQuestion

N_OPEN, N_SHOWN = 5, 40
"""Questions shown at once, and with those behind a click."""
PLACES: Sequence[Place] = (("claim", -1), ("whole", -1), ("control", 0))
"""Whose answers are shown, of each method."""
ASPECT_WORDS: Mapping[str, str] = {"truth": "true", "info": "informative"}
LONGEST_REASON = 160
"""Characters of why a judgement is missing."""
_UNSHOWABLE = dict.fromkeys([*range(9), *range(11, 32), 127], "\N{REPLACEMENT CHARACTER}")
"""Control characters, except tab and newline: HTML has no place for them."""

Judgements = Mapping[tuple[str, str], tuple[float | None, str]]
"""(question id, answer) -> (probability or None, why it is missing)."""


@dataclass(frozen=True)
class Opinion:
    """What one judge says of an answer."""

    word: str
    """``true`` or ``informative``."""
    probability: float | None
    """None if the judgement is missing."""
    reason: str = ""
    """Why it is missing, as far as it is known."""

    @property
    def is_yes(self) -> bool:
        """Whether the judge says that the answer has the quality."""
        return self.probability is not None and self.probability >= THRESHOLD


@dataclass(frozen=True)
class Said:
    """One model's answer to a question."""

    who: str
    answer: str | None
    """Blank if it says nothing; None if every edit tried there diverged."""
    is_same: bool
    """Equal to the unedited model's answer."""
    opinions: tuple[Opinion, ...]


@dataclass(frozen=True)
class Conversation:
    """A test question and what each model says to it, the unedited one first."""

    question: str
    answers: tuple[Said, ...]


def conversations(
    questions: Sequence[HeldOutQuestion],
    records: Sequence[TrialRecord],
    verdict: Verdict,
    judgements: Mapping[str, Judgements],
) -> list[Conversation]:
    """The first `N_SHOWN` test questions in their order; none if nothing was generated.

    `judgements` has the aspects that have a judge. The edits are those that validation chose.
    """
    base = base_record(records)
    if not base.answers.get("test") or not questions:
        return []
    speakers: list[tuple[str, TrialRecord | None]] = [("Unedited model", base)]
    chosen = select(records, verdict.score)
    for method in verdict.methods:
        places = chosen[method]  # type: ignore[index]
        for place in PLACES:
            record = places.get(place)
            if place in places and (record is None or record.answers.get("test")):
                speakers.append((f"{METHOD_TITLES[method]}: {place_name(place).lower()}", record))
    aspects = [aspect for aspect in ASPECT_NAMES if aspect in judgements]
    return [
        Conversation(
            question.text,
            tuple(
                _say(who, question.id, i, record, base, {aspect: judgements[aspect] for aspect in aspects})
                for who, record in speakers
            ),
        )
        for i, question in enumerate(questions[:N_SHOWN])
    ]


def _say(
    who: str,
    question: str,
    position: int,
    record: TrialRecord | None,
    base: TrialRecord,
    judgements: Mapping[str, Judgements],
) -> Said:
    if record is None:
        return Said(who, None, False, ())
    answer = record.answers["test"][position]
    is_same = record is not base and answer == base.answers["test"][position]
    found = [(aspect, table.get((question, answer), (None, "not yet"))) for aspect, table in judgements.items()]
    opinions = tuple(Opinion(ASPECT_WORDS[name], p, _cut(why)) for name, (p, why) in found)
    return Said(who, answer.strip().translate(_UNSHOWABLE), is_same, opinions)


def _cut(reason: str) -> str:
    return reason if len(reason) <= LONGEST_REASON else f"{reason[: LONGEST_REASON - 1]}…"
